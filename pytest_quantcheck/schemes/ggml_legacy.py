"""ggml's first block types: 32 values with one scale, and a minimum in the `_1` types.

    type   bytes  layout of a block
    Q4_0   18     d f16 | 16 bytes: low nibbles are values 0 to 15, high nibbles 16 to 31
    Q4_1   20     d f16 | m f16 | 16 bytes, as Q4_0
    Q5_0   22     d f16 | 4 bytes: the fifth bit of value i is bit i, lowest first | 16 bytes, as Q4_0
    Q5_1   24     d f16 | m f16 | 4 bytes | 16 bytes, as Q5_0
    Q8_0   34     d f16 | 32 int8

Formula, in float32: Q4_0 (q - 8) * d; Q5_0 (q - 16) * d; Q8_0 q * d; Q4_1 and Q5_1 q * d + m.
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c; gguf 0.19, quants.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_quantcheck import compiled
from pytest_quantcheck.schemes import ggml_blocks, packing, rewritten, rounding, steps
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.rounding import Round
from pytest_quantcheck.schemes.scheme import Namespace, Reading, Scheme
from pytest_quantcheck.schemes.steps import Span
from pytest_quantcheck.tensor import LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def alternatives(tensor: LogicalTensor) -> Iterator[Reading]:
    """Yield other ways to write the nibbles of a block: signed, the halves exchanged."""
    size, first = CODES.get(tensor.stored.dtype, (0, 0))
    if not size:
        return
    signed = partial(_codes, first=first, change=partial(rewritten.flip_signs, bits=4))
    swapped = partial(_codes, first=first, change=rewritten.swap_nibbles)
    for name, words, change, advice in (
        ("sign-convention", "nibbles in two's complement", signed, "ggml has excess 8"),
        ("nibbles-swapped", "the two nibbles of each byte swapped", swapped, "ggml has the first half in low nibbles"),
    ):
        yield Reading(name, words, rewritten.part(tensor, "blocks", change, unit=size), advice)


def _codes(blocks: torch.Tensor, first: int, change: rewritten.Change) -> torch.Tensor:
    import torch

    return torch.cat((blocks[:, :first], change(blocks[:, first:])), dim=1)


def _q4_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale = packing.halves(blocks, 0)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_nibbles(blocks, 2, 16, 8, scale, None, values)
        return
    _nibbles(blocks[:, 2:], values)
    values.sub_(8).mul_(scale)


def _q4_1(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale, least = packing.halves(blocks, 0), packing.halves(blocks, 2)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_nibbles(blocks, 4, 16, 0, scale, -least, values)
        return
    _nibbles(blocks[:, 4:], values)
    values.mul_(scale).add_(least)


def _q5_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale = packing.halves(blocks, 0)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_five(blocks, 2, 16, scale, None, values)
        return
    _nibbles(blocks[:, 6:], values)
    values.add_(_bits(blocks[:, 2:6]), alpha=16).sub_(16).mul_(scale)


def _q5_1(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale, least = packing.halves(blocks, 0), packing.halves(blocks, 2)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_five(blocks, 4, 0, scale, -least, values)
        return
    _nibbles(blocks[:, 8:], values)
    values.add_(_bits(blocks[:, 4:8]), alpha=16)
    values.mul_(scale).add_(least)


def _q8_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    values.copy_(blocks[:, 2:].view(torch.int8)).mul_(packing.halves(blocks, 0))


def _nibbles(packed: torch.Tensor, values: torch.Tensor) -> None:
    """Fill the first half of each block from low nibbles, the second from high ones."""
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4


def _bits(packed: torch.Tensor) -> torch.Tensor:
    return packing.shifted(packed, 1).flatten(1)  # (n, 32)


# type -> bytes of a block, and where its nibbles start
CODES = {"Q4_0": (18, 2), "Q4_1": (20, 4), "Q5_0": (22, 6), "Q5_1": (24, 8)}


def _rounding(to_code: Round, bits: int, first: int, last: int, *, least: bool = False) -> Rounding:
    """The extreme may be of either sign, and what is as large on the other side has no code: the highest one clips."""
    fills = steps.SIGNED[8] if bits == 8 else (0x00, 0xFF)
    gaps = steps.even(bits, fills=fills, clips=(False, True), least=least, span=Span(last, first, last))
    return rounding.grouped(to_code, 32, steps=gaps)


Q4_0 = _rounding(rounding.extreme(4), 4, 2, 18)
Q4_1 = _rounding(rounding.from_least(4, scale="float16-late"), 4, 4, 20, least=True)
Q5_0 = _rounding(rounding.extreme(5), 5, 2, 22)
Q5_1 = _rounding(rounding.from_least(5, scale="float16-late"), 5, 4, 24, least=True)
Q8_0 = _rounding(rounding.symmetric(8, reach=127, scale="float16-late"), 8, 2, 34)

TYPES = {
    "Q4_0": BlockType(_q4_0, scales=2, floor_db=18.0, rounding=Q4_0),
    "Q4_1": BlockType(_q4_1, scales=2, zero_points=2, floor_db=19.9, rounding=Q4_1),
    "Q5_0": BlockType(_q5_0, scales=2, floor_db=24.3, rounding=Q5_0),
    "Q5_1": BlockType(_q5_1, scales=2, zero_points=2, floor_db=26.2, rounding=Q5_1),
    "Q8_0": BlockType(_q8_0, scales=2, floor_db=42.0, rounding=Q8_0),
}

SCHEME = Scheme(
    name="ggml-legacy",
    title="ggml Q4_0 to Q8_0",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    alternatives=alternatives,
    source="llama.cpp ggml-common.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
