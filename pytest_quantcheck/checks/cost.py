"""What the bytes of an artifact feel like: the wait for its download, the memory it loads into, the GPUs it fits.

    download  8 * bytes of all files / bandwidth      the link alone: no protocol, no disk, no other user of the line
    load      weights as stored + one decoded matrix  the least a loaded model holds

`weights` are the tensors as stored: codes, scales, unquantized weights, buffers; headers are left out, and so are
copies, which torch ties. `largest_decoded` is the largest quantized matrix in 16 bit: libraries without a fused kernel
decode one weight at a time. The runtimes of `AS_STORED` compute on codes and load copies like the rest. Not in it: KV
cache, activations, the context of the device, what the allocator loses, copies made while loading.

GPU memory is the total that `nvidia-smi` prints, which is less than what is on the box.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.tensor import DEAD, LogicalTensor

AS_STORED = frozenset({"gguf", "onnx", "tflite"})
LINKS = (  # Mbit/s
    25,
    100,
    1_000,
    10_000,
)
GPUS = (  # MiB
    ("GeForce RTX 4060", 8_188),
    ("GeForce RTX 3060", 12_288),
    ("T4", 15_360),
    ("GeForce RTX 4060 Ti", 16_380),
    ("L4", 23_034),
    ("GeForce RTX 4090", 24_564),
    ("GeForce RTX 5090", 32_607),
    ("A100 40 GB", 40_960),
    ("L40S", 46_068),
    ("RTX A6000", 49_140),
    ("H100 80 GB", 81_559),
    ("A100 80 GB", 81_920),
    ("H200", 143_771),
)


class Download(NamedTuple):
    """How long a link of so many megabits (10^6 bits) a second takes for all files."""

    megabits: int
    seconds: float


class Fit(NamedTuple):
    """The bytes a GPU has left when the weights are loaded; below zero is what it lacks."""

    gpu: str
    memory: int
    left: int

    @property
    def fits(self) -> bool:
        """Whether anything is left."""
        return self.left >= 0


class Cost(NamedTuple):
    """What the module docstring says, in bytes and seconds. A live model has no download."""

    downloads: tuple[Download, ...]
    weights: int
    largest_decoded: int
    gpus: tuple[Fit, ...]

    @property
    def load(self) -> int:
        """The least memory of the loaded model."""
        return self.weights + self.largest_decoded


def felt(artifact: Artifact) -> Cost:
    """Return what an artifact costs whoever downloads and loads it."""
    as_stored = artifact.container in AS_STORED
    loaded = [tensor for tensor in artifact.tensors if as_stored or tensor.role not in DEAD]
    weights = sum(tensor.nbytes for tensor in loaded)
    decoded = 0 if as_stored else max((_decoded(tensor) for tensor in loaded if tensor.quantized), default=0)
    megabits = () if artifact.container == "live" else LINKS
    return Cost(
        tuple(Download(link, 8 * artifact.file_bytes / (link * 10**6)) for link in megabits),
        weights,
        decoded,
        tuple(Fit(name, mib << 20, (mib << 20) - weights - decoded) for name, mib in GPUS),
    )


def _decoded(tensor: LogicalTensor) -> int:
    """Bytes of one matrix in 16 bit; of a stack of experts, one expert."""
    return 2 * math.prod(tensor.shape[-2:])
