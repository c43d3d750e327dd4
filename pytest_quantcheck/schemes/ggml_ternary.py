"""ggml's ternary types: 256 values of -1, 0 and 1 with one scale.

    type   bytes  layout of a block
    TQ1_0  54     32 bytes: 160 values | 16 bytes: 80 values | 4 bytes: 16 values | d f16
    TQ2_0  66     64 bytes, 2 bits: byte i of 32 holds values i, i + 32, i + 64, i + 96 of its half | d f16

TQ1_0: a byte b is ceil(256 / 243 * n), n a number of five ternary digits; digit k, highest first, is
((b * 3^k mod 256) * 3) >> 8. Of 32 bytes the first digits are values 0 to 31, the second 32 to 63, and so on; the last
4 bytes have four digits each.

Formula, in float32: d * (digit - 1). BitNet's per-tensor scale is a tensor of its own, `X.scale`.
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c; gguf 0.19, quants.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.schemes import ggml_blocks, packing, rounding
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _tq1_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    values[:, :160] = _digits(blocks[:, :32], 5)
    values[:, 160:240] = _digits(blocks[:, 32:48], 5)
    values[:, 240:] = _digits(blocks[:, 48:52], 4)
    values.sub_(1).mul_(packing.halves(blocks, 52))


def _digits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ternary digits of each byte, first digits first.

    packed  # (n, bytes) uint8
    ->      # (n, count * bytes)
    """
    import torch

    powers = torch.tensor([1, 3, 9, 27, 81][:count], dtype=torch.uint8, device=packed.device).view(-1, 1)
    wrapped = packed.unsqueeze(1) * powers  # modulo 256
    return ((wrapped.to(torch.int16) * 3) >> 8).flatten(1)


def _tq2_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    codes, packed = values.view(-1, 2, 4, 32), blocks[:, :64].view(-1, 2, 32)
    for number in range(4):
        codes[:, :, number] = (packed >> 2 * number) & 3
    values.sub_(1).mul_(packing.halves(blocks, 64))


TERNARY = rounding.grouped(rounding.codebook((-1.0, 0.0, 1.0), scale="float16-late"), 256)

TYPES = {
    "TQ1_0": BlockType(_tq1_0, scales=2, rounding=TERNARY),
    "TQ2_0": BlockType(_tq2_0, scales=2, rounding=TERNARY),
}

SCHEME = Scheme(
    name="ggml-ternary",
    title="ggml TQ1_0, TQ2_0",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
