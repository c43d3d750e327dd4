"""Listing DeepSeek-V3's checkpoint: 91,991 tensors in 163 shards, FP8 in blocks, as whole processes.

The checkpoint is sparse: its headers are real, its 690 GB of weights are holes that nobody reads. Ours gives the exact
parameters and where every byte goes, having refused whatever two parsers could read differently; the others list names
and shapes as they stand.
"""

from __future__ import annotations

import os
import sys
import tempfile

from benchmarks import measure

PARAMETERS = 684_489_830_400  # the Hub shows 684,531,386,000: it counts 41,540,496 scales and 15,104 values of buffers

OURS = f"""
from pytest_quantcheck import inspect
artifact = inspect({{path!r}})
assert artifact.logical_params == {PARAMETERS:_}
assert sum(artifact.bytes.values()) == artifact.file_bytes
artifact.bits_per_weight, artifact.schemes
"""

LIBRARY = """
import glob
from safetensors import safe_open
count = 0
for shard in glob.glob({path!r} + "/*.safetensors"):
    with safe_open(shard, "np") as file:
        count += len([(name, file.get_slice(name).get_shape()) for name in file.keys()])
assert count == 91_991
"""

JSON = """
import glob, json, struct
count = 0
for shard in glob.glob({path!r} + "/*.safetensors"):
    with open(shard, "rb") as file:
        count += len(json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))) - 1
assert count == 91_991
"""


# In a process of its own: what this one has once needed would count as the peak of those it starts.
WRITE = """
from pathlib import Path
from tests import layouts
layouts.write_folder(Path({path!r}), layouts.deepseek_v3(), layouts.DEEPSEEK_CONFIG, layouts.DEEPSEEK_SHARDS)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "deepseek")
        measure.run(measure.python(WRITE.format(path=path)))
        results = measure.in_turns(
            {
                "inspect(path) with its totals": measure.python(OURS.format(path=path)),
                "quantcheck inspect": [sys.executable, "-m", "pytest_quantcheck", "inspect", path],
                "quantcheck inspect --json": [
                    sys.executable,
                    "-m",
                    "pytest_quantcheck",
                    "inspect",
                    "--json",
                    path,
                ],
                "safetensors library, names and shapes": measure.python(LIBRARY.format(path=path)),
                "bare json, names": measure.python(JSON.format(path=path)),
                "an empty Python": measure.python("pass"),
            },
            rounds=3,
        )
    measure.table(results)
