"""Listing a 14.5 GB torch checkpoint from its file, as a whole process, against torch.load.

The file is sparse: the pickle and the zip records are torch's own, the storages holes, which no listing should read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import measure
from tests import layouts

OURS = "from pytest_quantcheck import count_params; assert count_params({path!r}) == 7_241_732_096"

MMAP = """
import torch
state = torch.load({path!r}, mmap=True, weights_only=True)
assert sum(tensor.numel() for tensor in state.values()) == 7_241_732_096
"""

META = """
import torch
state = torch.load({path!r}, mmap=True, weights_only=True, map_location="meta")
assert sum(tensor.numel() for tensor in state.values()) == 7_241_732_096
"""


def write_sparse(path: Path) -> None:
    """Write Mistral-7B in bf16 as torch would, values left out: memory that nobody touches takes none."""
    import torch

    entries = layouts.mistral_7b(quantized=False)
    state = {entry.name: torch.empty(entry.shape, dtype=torch.bfloat16) for entry in entries}
    with torch.serialization.skip_data():
        torch.save(state, path)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pytorch_model.bin"
        # In a process of its own: what a process has used counts for its children as well.
        write = f"from benchmarks.bench_torch_zip import *; write_sparse(Path({str(path)!r}))"
        measure.run(measure.python(write))
        results = measure.in_turns(
            {
                "count_params(path), exact": measure.python(OURS.format(path=str(path))),
                "torch.load(mmap=True)": measure.python(MMAP.format(path=str(path))),
                "torch.load(mmap=True) on meta": measure.python(META.format(path=str(path))),
            },
            rounds=3,
        )
    measure.table(results)
