"""ggml's K-quants: 256 values in sub-blocks, whose scales (and minima) are small integers times one float16.

    type   bytes  layout of a block
    Q2_K   84     16 bytes: scale low nibble, min high nibble | 64 bytes, 2 bits | d f16 | dmin f16     sub-blocks of 16
    Q3_K   110    32 bytes: third bits | 64 bytes, 2 bits | 12 bytes: 16 6-bit scales | d f16           sub-blocks of 16
    Q4_K   144    d f16 | dmin f16 | 12 bytes: 8 6-bit scales and minima | 128 bytes, nibbles           sub-blocks of 32
    Q5_K   176    d f16 | dmin f16 | 12 bytes, as Q4_K | 32 bytes: fifth bits | 128 bytes, nibbles      sub-blocks of 32
    Q6_K   210    128 bytes, nibbles | 64 bytes, 2 bits | 16 int8 scales | d f16                        sub-blocks of 16

Two bits: byte i of 32 holds values i, i + 32, i + 64 and i + 96 of its half, lowest first. Nibbles: byte i of 32 holds
values i and i + 32 of its quarter (Q6_K: byte i of 64 values i and i + 64 of its half). Single bits: bit k of byte i
is value i + 32 k.

Formula, in float32: Q2_K, Q4_K, Q5_K (d * scale) * q - (dmin * min); Q3_K (d * (scale - 32)) * (q - 4), where q has the
third bit; Q6_K (d * scale) * (q - 32).
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c; gguf 0.19, quants.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck import compiled
from pytest_quantcheck.schemes import ggml_blocks, packing, rounding, steps
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.ggml_search import Scales, from_least, from_zero
from pytest_quantcheck.schemes.rounding import Round
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.schemes.steps import Span
from pytest_quantcheck.tensor import LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _q2_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale = packing.halves(blocks, 80) * (blocks[:, :16] & 15)  # (n, 16)
    least = packing.halves(blocks, 82) * (blocks[:, :16] >> 4)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_two_bits(blocks, 16, scale, least, values)
        return
    values.copy_(_two_bits(blocks[:, 16:80]).flatten(1))
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1)).sub_(least.unsqueeze(-1))


def _q3_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = packing.shifted(low, 4).transpose(1, 2).reshape(-1, 16)
    high = packing.shifted(high, 2).transpose(1, 2).reshape(-1, 16)
    scale = packing.halves(blocks, 108) * ((low | high << 4).to(torch.float32) - 32)  # (n, 16)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_two_bits(blocks, 32, scale, None, values)
        return
    third = _single_bits(blocks[:, :32])  # (n, 8, 32)
    codes = _two_bits(blocks[:, 32:96]).view(-1, 8, 32) | third << 2
    values.copy_(codes.view(-1, 256)).sub_(4)
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


def _q4_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale, least = _scales_k(blocks)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_nibbles(blocks, 16, 32, 0, scale, least, values)
        return
    _nibbles(blocks[:, 16:].view(-1, 4, 32), values.view(-1, 4, 2, 32))
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1)).sub_(least.unsqueeze(-1))


def _q5_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale, least = _scales_k(blocks)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_q5_k(blocks, scale, least, values)
        return
    _nibbles(blocks[:, 48:].view(-1, 4, 32), values.view(-1, 4, 2, 32))
    values.add_(_single_bits(blocks[:, 16:48]).flatten(1), alpha=16)
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1)).sub_(least.unsqueeze(-1))


def _q6_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    scale = packing.halves(blocks, 208) * blocks[:, 192:208].view(torch.int8)  # (n, 16)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_q6_k(blocks, scale, values)
        return
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    _nibbles(blocks[:, :128].view(-1, 2, 64), codes.view(-1, 2, 2, 64))
    codes.view(-1, 2, 4, 32).bitwise_or_(_two_bits(blocks[:, 128:192]) << 4)
    values.copy_(codes).sub_(32)
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


def _nibbles(packed: torch.Tensor, codes: torch.Tensor) -> None:
    """Fill the low and the high nibbles of each run of bytes, one run after the other.

    packed  # (n, runs, bytes) uint8
    codes   # (n, runs, 2, bytes)
    """
    codes[:, :, 0] = packed & 15
    codes[:, :, 1] = packed >> 4


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return the 2-bit fields of 64 bytes in the order of their values.

    packed  # (n, 64) uint8
    ->      # (n, 2, 4, 32)
    """
    import torch

    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).view(4, 1)
    return (packed.view(-1, 2, 1, 32) >> shifts) & 3


def _single_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return the bits of 32 bytes in the order of their values.

    packed  # (n, 32) uint8
    ->      # (n, 8, 32)
    """
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device).view(8, 1)
    return (packed.unsqueeze(1) >> shifts) & 1


def _scales_k(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima of Q4_K and Q5_K: 6 bits each, the upper two of the last four beside the first.

    blocks  # (n, bytes) uint8
    ->      # (n, 8) twice
    """
    import torch

    scale, least = packing.halves(blocks, 0), packing.halves(blocks, 2)
    loops = compiled.loops("ggml")
    if loops is not None:
        return loops.scales_k(blocks, scale, least)  # type: ignore[no-any-return]
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), dim=1)
    return scale * scales, least * minima


def _rounding(to_code: Round, bits: int, span: Span) -> Rounding:
    """An importance matrix moves the error to where it matters less; every code is the nearest all the same."""
    gaps = steps.even(bits, clips=(True, True), least=True, span=span)
    return rounding.grouped(to_code, 256, margin_db=rounding.COMPENSATED_DB, steps=gaps)


_SPREADS = (-0.5, -0.29, -0.07, 0.14, 0.36, 0.57, 0.79, 1.0)
Q2_K = _rounding(from_least(3, Scales(16, 15), _SPREADS, absolute=True), 2, Span(84, 16, 80))
Q3_K = _rounding(from_zero(tuple(range(-4, 4)), Scales(16, 32), (), refined=1), 3, Span(110, 0, 96))
Q4_K = _rounding(
    from_least(15, Scales(32, 63), (-1, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1)), 4, Span(144, 16, 144)
)
Q5_K = _rounding(from_least(31, Scales(32, 63), (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1)), 5, Span(176, 16, 176))
Q6_K = _rounding(from_zero(tuple(range(-32, 32)), Scales(16, 128), (-0.9, 0.9)), 6, Span(210, 0, 192))

TYPES = {
    "Q2_K": BlockType(_q2_k, scales=10, zero_points=10, floor_db=8.5, rounding=Q2_K),
    "Q3_K": BlockType(_q3_k, scales=14, floor_db=14.0, rounding=Q3_K),
    "Q4_K": BlockType(_q4_k, scales=8, zero_points=8, floor_db=20.5, rounding=Q4_K),
    "Q5_K": BlockType(_q5_k, scales=8, zero_points=8, floor_db=26.5, rounding=Q5_K),
    "Q6_K": BlockType(_q6_k, scales=18, floor_db=32.0, rounding=Q6_K),
}

SCHEME = Scheme(
    name="ggml-k",
    title="ggml K-quants",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
