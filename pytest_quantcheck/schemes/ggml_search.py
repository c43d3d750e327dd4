"""What ggml's searching quantizers make of values: K-quants and IQ4, without an importance matrix.

    from_least  (Q2_K, Q4_K, Q5_K)           x ~ scale * q + min, by weighted least squares for codes of several spreads
    from_zero   (Q3_K, Q6_K, IQ4_NL, IQ4_XS)  x ~ scale * q, the same way, the weights being x * x

Scales (and minima) of the sub-blocks of 256 values are then rounded to small integers times a float16, and every value
to the code nearest to it under the scale that came out.
Source: llama.cpp, ggml/src/ggml-quants.c, `quantize_row_*_ref`, `make_qkx2_quants`, `make_qx_quants`,
`quantize_row_iq4_nl_impl`.

Left out: of the 15 to 21 spreads that ggml tries, all but two to eleven; and Q3_K's search code by code, for which one
more fit stands. Together they cost less than 0.1 dB.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.schemes import rounding
from pytest_quantcheck.schemes.rounding import Round

if TYPE_CHECKING:
    import torch

TINY = 1e-30


class Scales(NamedTuple):
    """How the scales of sub-blocks of `size` values are kept: as integers up to `top` times a float16."""

    size: int
    top: int


def from_least(codes: int, scales: Scales, spreads: tuple[float, ...], *, absolute: bool = False) -> Round:
    """Return the rounding to 0 .. `codes` above a minimum of 0 or less; `absolute` is how Q2_K measures errors."""
    return partial(_from_least, codes=codes, scales=scales, spreads=spreads, absolute=absolute)


def from_zero(levels: tuple[int, ...], scales: Scales, spreads: tuple[float, ...], *, refined: int = 0) -> Round:
    """Return the rounding to levels, the lowest of which is of the greatest magnitude."""
    return partial(_from_zero, levels=levels, scales=scales, spreads=spreads, refined=refined)


def _from_least(
    blocks: torch.Tensor,
    largest: float | None,
    *,
    codes: int,
    scales: Scales,
    spreads: tuple[float, ...],
    absolute: bool,
) -> torch.Tensor:
    parts = blocks.reshape(-1, scales.size)
    scale, least = _fit_line(parts, codes, spreads, absolute=absolute)
    shape = (len(blocks), -1)
    scale, least = (_small_integers(found.view(shape), scales.top).view(-1, 1) for found in (scale, -least))
    inverse, loops = _inverse(scale), rounding.block_loops(parts)
    if loops is not None:
        return loops.round_to_codes(parts, 0, codes, inverse, scale, (-least, -least)).view(blocks.shape)  # type: ignore[no-any-return]
    values = (parts + least).mul_(inverse).round_().clamp_(0, codes).mul_(scale).sub_(least)
    return values.reshape(blocks.shape)


def _fit_line(
    parts: torch.Tensor, codes: int, spreads: tuple[float, ...], *, absolute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum of each part, by the spread whose weighted error is the least.

    parts  # (n, size)
    ->     # (n, 1) twice
    """
    import torch

    loops = rounding.block_loops(parts)
    if loops is not None:
        return loops.fit_lines(parts, codes, spreads, absolute=absolute)  # type: ignore[no-any-return]
    weight = parts.abs()
    if not absolute:
        weight = weight.add_(parts.square().mean(dim=1, keepdim=True).sqrt_())
    high, best_least = parts.amax(dim=1, keepdim=True), parts.amin(dim=1, keepdim=True).clamp_(max=0)
    weighted = weight * parts
    sum_w, sum_x = weight.sum(dim=1, keepdim=True), weighted.sum(dim=1, keepdim=True)
    best_scale = (high - best_least) / codes

    def error_of(code: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
        off = torch.addcmul(least, code, scale).sub_(parts)
        error: torch.Tensor = torch.linalg.vecdot(weight, off.abs_() if absolute else off.square_())
        return error.unsqueeze(1)

    first = ((parts - best_least) * _inverse(best_scale)).round_().clamp_(0, codes)
    best = error_of(first, best_scale, best_least)
    for spread in spreads:  # from the minimum that is the best so far
        inverse = (codes + spread) * _inverse(high - best_least)
        code = ((parts - best_least) * inverse).round_().clamp_(0, codes)
        heavy = weight * code
        sum_l = heavy.sum(dim=1, keepdim=True)
        sum_ll = torch.linalg.vecdot(heavy, code).unsqueeze(1)
        sum_xl = torch.linalg.vecdot(weighted, code).unsqueeze(1)
        spanned = sum_w * sum_ll - sum_l * sum_l
        scale, least = (sum_w * sum_xl - sum_x * sum_l) / spanned, (sum_ll * sum_x - sum_l * sum_xl) / spanned
        above = least > 0
        scale, least = torch.where(above, sum_xl / sum_ll, scale), least.masked_fill(above, 0.0)
        error = error_of(code, scale, least)
        better = (spanned > 0) & (error < best)
        best = torch.where(better, error, best)
        best_scale, best_least = torch.where(better, scale, best_scale), torch.where(better, least, best_least)
    return best_scale, best_least


def _small_integers(scales: torch.Tensor, top: int) -> torch.Tensor:
    """Scales of 0 and more of a block, as integers up to `top` times a float16.

    scales  # (n, sub-blocks)
    """
    import torch

    most = scales.amax(dim=1, keepdim=True)
    codes = (scales * (top * _inverse(most))).round_()
    return codes.mul_((most / top).to(torch.float16))


def _from_zero(
    blocks: torch.Tensor,
    largest: float | None,
    *,
    levels: tuple[int, ...],
    scales: Scales,
    spreads: tuple[float, ...],
    refined: int,
) -> torch.Tensor:
    import torch

    parts = blocks.reshape(-1, scales.size)
    fitted = _fit_scale(parts, levels, spreads, refined).view(len(blocks), -1)
    if scales.top == 1:
        scale = fitted.to(torch.float16).to(torch.float32).view(-1, 1)
    else:
        unit = _extreme(fitted) / -scales.top
        codes = (fitted * _inverse(unit)).round_().clamp_(-scales.top, scales.top - 1)
        scale = codes.mul_(unit.to(torch.float16)).view(-1, 1)
    loops = rounding.block_loops(parts)
    if loops is not None:
        return loops.round_to_levels(parts, levels, _inverse(scale), scale).view(blocks.shape)  # type: ignore[no-any-return]
    return _to_level(parts * _inverse(scale), levels).mul_(scale).reshape(blocks.shape)


def _fit_scale(parts: torch.Tensor, levels: tuple[int, ...], spreads: tuple[float, ...], refined: int) -> torch.Tensor:
    """Return the scale of each part, by the spread that leaves the least error under weights of x * x."""
    import torch

    loops = rounding.block_loops(parts)
    if loops is not None:
        return loops.fit_scales(parts, levels, spreads, refined)  # type: ignore[no-any-return]
    most = _extreme(parts)
    weight = parts.square()
    weighted = weight * parts
    scale, best = torch.zeros_like(most), torch.zeros_like(most)
    for spread in (0.0, *spreads):
        inverse = (levels[0] - spread) * _inverse(most)
        for _ in range(1 + refined):
            level = _to_level(parts * inverse, levels)
            along = torch.linalg.vecdot(weighted, level).unsqueeze(1)
            energy = torch.linalg.vecdot(weight, level.square_()).unsqueeze(1)
            found = along / energy
            better = (energy > 0) & (along * along > best * energy)
            scale = torch.where(better, found, scale)
            best = torch.where(better, found * along, best)
            inverse = _inverse(found)
    return scale


def _to_level(values: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    if levels[-1] - levels[0] == len(levels) - 1:
        return values.round_().clamp_(levels[0], levels[-1])
    return rounding.nearest_level(values, levels)


def _extreme(parts: torch.Tensor) -> torch.Tensor:
    """The value of the greatest magnitude of each row, with its sign."""
    import torch

    least, most = parts.amin(dim=1, keepdim=True), parts.amax(dim=1, keepdim=True)
    return torch.where(-least > most, least, most)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """One over each scale; 0 where it is too small to divide by."""
    return scales.reciprocal().masked_fill_(scales.abs() < TINY, 0.0)
