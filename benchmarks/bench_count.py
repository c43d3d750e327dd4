"""Counting Mistral-7B in NF4 from its files, as a whole process.

The checkpoint is sparse: real headers, holes for weights, which no counter should read. `from_pretrained` gets the
unquantized twin, since transformers 5.17 cannot load a bitsandbytes checkpoint on the meta device.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import measure
from tests import layouts

OURS = "from pytest_quantcheck import count_params; assert count_params({path!r}) == 7_241_732_096"

LIBRARY = """
import glob, math
from safetensors import safe_open
total = 0
for shard in sorted(glob.glob({path!r} + "/*.safetensors")):
    with safe_open(shard, "pt") as file:
        total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
"""

META = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({path!r}, device_map={{"": "meta"}})
total = sum(p.numel() for p in model.parameters())
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(layouts.write_folder(Path(folder) / "mistral", layouts.mistral_7b(), layouts.MISTRAL_CONFIG))
        config = {name: value for name, value in layouts.MISTRAL_CONFIG.items() if name != "quantization_config"}
        twin = str(layouts.write_folder(Path(folder) / "bf16", layouts.mistral_7b(quantized=False), config))
        results = measure.in_turns(
            {
                "count_params(path), exact": measure.python(OURS.format(path=path)),
                "quantcheck inspect --json": [sys.executable, "-m", "pytest_quantcheck", "inspect", "--json", path],
                "every shard with safetensors, naive": measure.python(LIBRARY.format(path=path)),
                "from_pretrained on meta (bf16 twin)": measure.python(META.format(path=twin)),
            },
            rounds=3,
        )
    measure.table(results)
