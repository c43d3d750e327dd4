"""Two checkpoints of 512 MB that hold the same weights; loading both and `torch.equal`, tensor by tensor, beside it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks import measure

OURS = "from pytest_quantcheck import assert_same_weights; assert_same_weights({one!r}, {other!r})"
# Four matrices of 128 MB: as much as a checkpoint of a billion parameters in 4 bits.
WRITTEN = """
import torch
from safetensors.torch import save_file
values = {{f"layers.{{number}}.weight": torch.randn(8192, 8192).to(torch.bfloat16) for number in range(4)}}
save_file(values, {path!r})
"""
LOADED = """
import torch
from safetensors.torch import load_file
one, other = load_file({one!r}), load_file({other!r})
assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.safetensors"
        measure.run(measure.python(WRITTEN.format(path=str(one))))  # what a process inherits counts as its peak memory
        paths = {"one": str(one), "other": str(shutil.copy(one, one.with_name("other.safetensors")))}
        measure.table(
            measure.in_turns(
                {
                    "assert_same_weights": measure.python(OURS.format(**paths)),
                    "load_file twice, torch.equal": measure.python(LOADED.format(**paths)),
                },
                rounds=3,
            )
        )
