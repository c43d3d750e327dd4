"""ggml's 4-bit floats: E2M1 codes with a small-float scale for each group.

    type   bytes  layout of a block
    MXFP4  17     e E8M0 | 16 bytes: low nibbles are values 0 to 15, high nibbles 16 to 31            32 values
    NVFP4  36     4 scales UE4M3 | 4 runs of 8 bytes: low nibbles are values 0 to 7, high 8 to 15     4 groups of 16

Formula, in float32: scale / 2 * TABLE[q], the table holding doubled values. MXFP4: scale 2^(e - 127), and e = 255 is no
NaN. NVFP4: scale without its sign bit, 0x7f being 0 and no NaN; the scale of the whole tensor is a tensor of its own,
`X.scale`.
Source: llama.cpp, ggml/src/ggml-common.h, ggml-impl.h and ggml-quants.c; gguf 0.19, quants.py.

Departs from the package in one thing: it does not apply `X.scale`, llama.cpp does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck import compiled
from pytest_quantcheck.schemes import ggml_blocks, packing, rounding, steps
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.schemes.steps import Span
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch

TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Bit patterns of half of 2^(e - 127): two of them are subnormal.
_E8M0_HALVES = (0x00200000, 0x00400000, *((e - 1) << 23 for e in range(2, 256)))


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _mxfp4(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    scales = torch.tensor(_E8M0_HALVES, dtype=torch.int32, device=blocks.device).view(torch.float32)
    scale, loops = scales[blocks[:, :1].to(torch.int32)], compiled.loops("ggml")
    if loops is not None:
        loops.unpack_levels(blocks, 1, 16, TABLE, scale, values)
        return
    packing.look_up_halves(blocks[:, 1:], TABLE, values.view(-1, 2, 16))
    values.mul_(scale)


def _nvfp4(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    scales = torch.tensor([_ue4m3_half(code) for code in range(256)], device=blocks.device)
    scale, loops = scales[blocks[:, :4].to(torch.int32)], compiled.loops("ggml")
    if loops is not None:
        loops.unpack_levels(blocks, 4, 8, TABLE, scale, values)
        return
    packing.look_up_halves(blocks[:, 4:].reshape(-1, 8), TABLE, values.view(-1, 2, 8))
    values.view(-1, 4, 16).mul_(scale.unsqueeze(-1))


def _ue4m3_half(code: int) -> float:
    """Return half of an unsigned E4M3.

    >>> _ue4m3_half(0x38), _ue4m3_half(0x01), _ue4m3_half(0x7F)
    (0.5, 0.0009765625, 0.0)
    """
    exponent, mantissa = code >> 3 & 15, code & 7
    if code in (0, 0x7F):
        return 0.0
    return 0.5 * (mantissa * 2.0**-9 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


MXFP4 = rounding.grouped(
    rounding.codebook(packing.E2M1, scale="floor"),
    32,
    steps=steps.levels(packing.E2M1, 1.0, 0x22, clips=True, span=Span(17, 1, 17)),
)
_NVFP4_STEPS = steps.levels(packing.E2M1, 1.0, 0x22, clips=True, span=Span(36, 4, 36))
NVFP4 = rounding.grouped(rounding.codebook(packing.E2M1, scale="e4m3"), 16, steps=_NVFP4_STEPS)
NVFP4_SCALED = rounding.grouped(rounding.codebook(packing.E2M1, scale="e4m3-scaled"), 16, steps=_NVFP4_STEPS)

TYPES = {
    "MXFP4": BlockType(_mxfp4, scales=1, floor_db=17.0, rounding=MXFP4),
    "NVFP4": BlockType(_nvfp4, scales=4, floor_db=19.0, rounding=NVFP4, scaled=NVFP4_SCALED),
}

SCHEME = Scheme(
    name="ggml-fp4",
    title="ggml MXFP4, NVFP4",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-impl.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
