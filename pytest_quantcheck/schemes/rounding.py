"""What rounding to nearest makes of values: the arithmetic that formats share, and how blocks lie over a matrix.

    symmetric    s = max|w| / reach                        w' = clamp(round(w / s), low, high) * s
    extreme      s = -(the w of largest |w|) / 2**(bits - 1)    w' as symmetric: the extreme is met exactly
    affine       s = (max - min) / (levels - 1)            w' = (clamp(round(w / s) + z) - z) * s, z = round(-min / s)
                 where the zero point is a float           w' = round((w - min) / s) * s + min
    from_edge    the same from the end of greater magnitude, and s such that 0 has a code
    codebook     s = max|w| / max|level|                   w' = s * the level nearest to w / s
    small_float  s = max|w| / the largest float            w' = s * float8(w / s)

    grouped      blocks of columns, each row anew; the last one may be shorter
    flat         blocks of the row-major tensor, across rows
    tiled        blocks of rows and columns
    whole        one block

A scale is kept in float32, bfloat16 or float16 (`float16-late`: rounded after the codes were chosen); as a power of two
(`floor`, `ceil`, `even`: that is how its exponent is found); as E4M3 (`e4m3`), or as E4M3 under one scale of
the window (`e4m3-scaled`); or in 8 bits under one more, as bitsandbytes (`nested`) and torchao (`nested-int8`) do.

Left out: what a quantizer does beyond rounding. Calibrated methods minimize another error, and get a wider margin.

What is asked for is kept: the many tensors of a model share few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

from pytest_quantcheck import compiled
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.tensor import Floats, Integers, Levels, LogicalTensor, Rounding, Steps, StoredTensor

if TYPE_CHECKING:
    from types import ModuleType

    import torch

ScaleKind = Literal[
    "float32",
    "float16",
    "float16-late",
    "bfloat16",
    "floor",
    "ceil",
    "even",
    "e4m3",
    "e4m3-scaled",
    "nested",
    "nested-int8",
]

# What error-compensating and searching methods may stay below rounding to nearest.
COMPENSATED_DB = 3.0
# Entries of the table that stands for a codebook, on either side of 0: a value this near to a boundary may fall on the
# other side of it.
REACH = (1 << 15) - 1
NESTED_BLOCK = 256
INT8 = tuple(float(code) for code in range(-128, 128))
WINDOW = 1 << 22  # values: blocks that take more of whole rows are not predicted
E4M3_MAX = 448.0

# Rounds blocks (n, size), each by itself, given the largest magnitude of all where that is what scales them.
Round = Callable[["torch.Tensor", float | None], "torch.Tensor"]


@lru_cache
def grouped(round_: Round, size: int, *, margin_db: float = 1.5, steps: Steps | None = None) -> Rounding:
    """Return the rounding of blocks of `size` columns."""
    size = max(1, size)
    nearest = partial(_grouped, round_=round_, size=size)
    return Rounding(nearest, margin_db=margin_db, steps=steps, levels=_levels_of(round_), size=size)


@lru_cache
def flat(round_: Round, size: int, columns: int, *, steps: Steps | None = None) -> Rounding:
    """Return the rounding of blocks of `size` values that run on across rows."""
    rows = size // math.gcd(max(1, columns), size)
    levels = None if columns % size else _levels_of(round_)
    return Rounding(partial(_flat, round_=round_, size=size), rows, steps=steps, levels=levels, size=size)


@lru_cache
def tiled(round_: Round, height: int, width: int, *, margin_db: float = 1.5, steps: Steps | None = None) -> Rounding:
    """Return the rounding of blocks of `height` rows and `width` columns."""
    nearest = partial(_tiled, round_=round_, height=height, width=width)
    return Rounding(nearest, height, margin_db=margin_db, steps=steps, levels=_levels_of(round_), size=width)


@lru_cache
def whole(round_: Round, *, margin_db: float = 1.5, steps: Steps | None = None) -> Rounding:
    """Return the rounding of a tensor with one scale."""
    nearest, levels = partial(_whole, round_=round_), _levels_of(round_)
    return Rounding(nearest, whole=True, margin_db=margin_db, steps=steps, levels=levels, size=0)


@lru_cache
def placed(
    round_: Round,
    shape: tuple[int, ...],
    height: int,
    width: int,
    *,
    margin_db: float = 1.5,
    steps: Steps | None = None,
) -> Rounding | None:
    """Return the rounding of blocks of `height` rows and `width` columns; None where windows cannot hold a block."""
    if height <= 1:
        return grouped(round_, width, margin_db=margin_db, steps=steps)
    if height >= math.prod(shape[:-1]) and width >= shape[-1]:
        return whole(round_, margin_db=margin_db, steps=steps)
    if height * shape[-1] > WINDOW:
        return None
    return tiled(round_, height, width, margin_db=margin_db, steps=steps)


@lru_cache
def placed_floats(
    dtype: str,
    shape: tuple[int, ...],
    height: int,
    width: int,
    *,
    scale: ScaleKind = "float32",
    margin_db: float = 1.5,
    steps: Steps | None = None,
) -> Rounding:
    """Return the rounding to 8-bit floats in blocks; floats keep as much under a scale of a window as of a tensor."""
    round_ = small_float(dtype, scale=scale)
    placing = placed(round_, shape, height, width, margin_db=margin_db, steps=steps)
    if placing is None or placing.whole:
        nearest = partial(_whole, round_=round_)
        return Rounding(nearest, margin_db=margin_db, steps=steps, levels=_levels_of(round_), size=0)
    return placing


@lru_cache
def on_grid(
    round_: Round, shape: tuple[int, ...], grid: tuple[int, ...], *, margin_db: float = 1.5, steps: Steps | None = None
) -> Rounding | None:
    """Return the rounding of a tensor cut into so many blocks along each dimension; None where rows are not in one."""
    blocks = [-(-size // max(1, number)) for size, number in zip(shape, grid, strict=True)]
    height, leading = 1, list(zip(shape[:-1], blocks[:-1], strict=True))
    while leading:
        size, block = leading.pop()
        height *= block
        if block < size:
            break
    if any(block > 1 for _, block in leading):
        return None
    return placed(round_, shape, height, blocks[-1], margin_db=margin_db, steps=steps)


@lru_cache
def symmetric(bits: int, *, reach: float | None = None, narrow: bool = False, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to signed integers; `reach` is the code of the largest magnitude, by default half the range.

    `narrow` leaves out the lowest code.
    """
    low, high = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return partial(
        _to_levels, levels=partial(_integers, low=low, high=high, reach=reach or (high - low) / 2, scale=scale)
    )


@lru_cache
def extreme(bits: int, *, scale: ScaleKind = "float16-late") -> Round:
    """Return the rounding to signed integers whose lowest code is the extreme of the block, whatever its sign."""
    return partial(_extreme, low=-(2 ** (bits - 1)), scale=scale)


@lru_cache
def affine(bits: int, *, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to unsigned integers with an integer zero point; 0 is always among the values."""
    return partial(_affine, levels=2**bits, scale=scale)


@lru_cache
def from_least(bits: int, *, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to unsigned integers above the least value, which is kept like the scale."""
    return partial(_from_least, levels=2**bits, scale=scale)


@lru_cache
def from_edge(bits: int, *, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to unsigned integers from the minimum or the maximum, whichever is of greater magnitude."""
    return partial(_from_edge, levels=2**bits, scale=scale)


@lru_cache
def codebook(levels: tuple[float, ...], *, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to the levels of a table."""
    return partial(_to_levels, levels=partial(_table, levels=levels, scale=scale))


@lru_cache
def small_float(dtype: str, *, scale: ScaleKind = "float32") -> Round:
    """Return the rounding to one of torch's 8-bit floats, by name."""
    return partial(_to_levels, levels=partial(_floats, dtype=dtype, scale=scale))


def _grouped(
    tensor: LogicalTensor, values: torch.Tensor, largest: float | None, *, round_: Round, size: int
) -> torch.Tensor:
    rows, columns = values.shape
    return round_(_in_blocks(values, size), None).reshape(rows, -(-columns // size) * size)[:, :columns]


def _in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Cut rows into blocks; the last one is filled up with a value that it has: it gets no wider.

    values  # (rows, columns)
    ->      # (rows * ceil(columns / size), size)
    """
    import torch

    rows, columns = values.shape
    missing = -columns % size
    if missing:
        values = torch.cat((values, values[:, -1:].expand(rows, missing)), dim=1)
    return values.reshape(-1, size)


def _flat(
    tensor: LogicalTensor, values: torch.Tensor, largest: float | None, *, round_: Round, size: int
) -> torch.Tensor:
    line = values.reshape(1, -1)
    return _grouped(tensor, line, largest, round_=round_, size=size).reshape(values.shape)


def _tiled(
    tensor: LogicalTensor, values: torch.Tensor, largest: float | None, *, round_: Round, height: int, width: int
) -> torch.Tensor:
    from torch.nn.functional import pad

    rows, columns = values.shape
    height, width = min(height, max(1, rows)), min(width, max(1, columns))
    tiles = pad(values, (0, -columns % width, 0, -rows % height))
    down, across = tiles.shape[0] // height, tiles.shape[1] // width
    tiles = tiles.reshape(down, height, across, width).transpose(1, 2).reshape(-1, height * width)
    tiles = round_(tiles, None).reshape(down, across, height, width).transpose(1, 2)
    return tiles.reshape(down * height, across * width)[:rows, :columns]


def _whole(tensor: LogicalTensor, values: torch.Tensor, largest: float | None, *, round_: Round) -> torch.Tensor:
    return round_(values.reshape(1, -1), largest).reshape(values.shape)


def _extreme(blocks: torch.Tensor, largest: float | None, *, low: int, scale: ScaleKind) -> torch.Tensor:
    import torch

    least, most = _range(blocks)
    edge = torch.where(-least > most, least, most).add_(0.0)  # never -0.0
    chosen, kept = scales(edge / low, scale)
    return _to_codes(blocks, _inverse(chosen), low, -low - 1, kept)


def _to_codes(blocks: torch.Tensor, inverse: torch.Tensor, low: int, high: int, kept: torch.Tensor) -> torch.Tensor:
    loops = block_loops(blocks)
    if loops is not None:
        return loops.round_to_codes(blocks, low, high, inverse, kept)  # type: ignore[no-any-return]
    return blocks.mul(inverse).round_().clamp_(low, high).mul_(kept)


def _range(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest of each block."""
    loops = block_loops(blocks)
    if loops is not None:
        return loops.range_of_blocks(blocks)  # type: ignore[no-any-return]
    return blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)


def block_loops(blocks: torch.Tensor) -> ModuleType | None:
    """Return compiled loops over blocks, each with a scale of its own, where they are in use."""
    import torch

    return compiled.loops("ggml") if blocks.dtype == torch.float32 else None


def _affine(blocks: torch.Tensor, largest: float | None, *, levels: int, scale: ScaleKind) -> torch.Tensor:
    least, most = _range(blocks)
    low, high = least.clamp(max=0), most.clamp(min=0)
    if largest is not None:
        low, high = low.new_full((1, 1), -largest), high.new_full((1, 1), largest)
    chosen, kept = scales((high - low) / (levels - 1), scale)
    inverse = _inverse(chosen)
    zeros = low.mul(-inverse).round_().clamp_(0, levels - 1)
    return blocks.mul(inverse).round_().add_(zeros).clamp_(0, levels - 1).sub_(zeros).mul_(kept)


def _from_least(blocks: torch.Tensor, largest: float | None, *, levels: int, scale: ScaleKind) -> torch.Tensor:
    low, high = _range(blocks)
    return _above(blocks, (high - low) / (levels - 1), low, levels, scale)


def _from_edge(blocks: torch.Tensor, largest: float | None, *, levels: int, scale: ScaleKind) -> torch.Tensor:
    import torch

    low, high = _range(blocks)
    lower = low.abs() > high.abs()
    edge, step = torch.where(lower, low, high), (high - low) / (levels - 1)
    step = torch.where(lower, step, -step)
    steps_to_zero = (edge * _inverse(step)).round_()
    step = torch.where(steps_to_zero == 0, step, edge / steps_to_zero)
    return _above(blocks, step, edge.masked_fill(steps_to_zero == 0, 0.0), levels, scale)


def _above(
    blocks: torch.Tensor, step: torch.Tensor, least: torch.Tensor, levels: int, scale: ScaleKind
) -> torch.Tensor:
    (chosen, kept), (least, kept_least) = scales(step, scale), scales(least, scale)
    inverse, loops = _inverse(chosen), block_loops(blocks)
    if loops is not None:
        return loops.round_to_codes(blocks, 0, levels - 1, inverse, kept, (least, kept_least))  # type: ignore[no-any-return]
    return blocks.sub(least).mul_(inverse).round_().clamp_(0, levels - 1).mul_(kept).add_(kept_least)


def _to_levels(
    blocks: torch.Tensor, largest: float | None, *, levels: Callable[[torch.Tensor], Levels]
) -> torch.Tensor:
    chosen = levels(_largest(blocks, largest))
    return _nearest(blocks, chosen).mul_(chosen.scales)


def _levels_of(round_: Round) -> Callable[[torch.Tensor], Levels] | None:
    """What a rounding makes of the largest magnitudes; None where it needs more than those."""
    return round_.keywords["levels"] if isinstance(round_, partial) and round_.func is _to_levels else None


def _integers(largest: torch.Tensor, *, low: int, high: int, reach: float, scale: ScaleKind) -> Levels:
    chosen, kept = scales(largest / reach, scale)
    return Levels(_inverse(chosen), kept, Integers(low, high))


def _table(largest: torch.Tensor, *, levels: tuple[float, ...], scale: ScaleKind) -> Levels:
    top = max(map(abs, levels))
    chosen, kept = scales(largest / top, scale, top)
    return Levels(_inverse(chosen) * (REACH / top), kept, _level_table(levels).to(largest.device))


def _floats(largest: torch.Tensor, *, dtype: str, scale: ScaleKind) -> Levels:
    kind = _floats_of(dtype)
    chosen, kept = scales(largest / kind.top, scale, kind.top)
    return Levels(_inverse(chosen), kept, kind)


@lru_cache
def _floats_of(dtype: str) -> Floats:
    """What one of torch's 8-bit floats can say.

    >>> _floats_of("float8_e4m3fn")
    Floats(top=448.0, mantissa=3, least=-6, dtype='float8_e4m3fn')
    """
    import torch

    said, mantissa = torch.finfo(getattr(torch, dtype)), int(dtype.partition("m")[2][0])  # `eps` of e5m2fnuz is wrong
    return Floats(said.max, mantissa, round(math.log2(said.smallest_normal)), dtype)


def nearest_level(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Return the nearest of `levels` for each value, found in a table over their range; NaN takes the first.

    values  # (blocks, size) float32
    ->      # (blocks, size) float32
    """
    step = values.new_full((len(values), 1), REACH / max(map(abs, levels)))
    return _nearest(values, Levels(step, step, _level_table(levels).to(values.device)))


def _nearest(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """What is nearest to each value, multiplied by the step of its block."""
    import torch

    loops, among = compiled.loops("windows"), levels.among
    if loops is not None and values.dtype == torch.float32:
        return loops.nearest(values, levels)  # type: ignore[no-any-return]
    if isinstance(among, Integers):
        return values.mul(levels.steps).round_().clamp_(among.low, among.high)
    if isinstance(among, Floats):
        codes = values.mul(levels.steps).clamp_(-among.top, among.top).to(getattr(torch, among.dtype))
        return codes.to(torch.float32)
    return _entries(values, levels.steps, among)


def _entries(values: torch.Tensor, steps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of the table where each value lies, multiplied by the step of its block."""
    entries = values.mul(steps).add_(REACH + 0.5).clamp_(0, 2 * REACH)
    if bool(entries.sum().isnan()):
        entries.nan_to_num_()
    return table.index_select(0, entries.reshape(-1).int()).view(values.shape)


@lru_cache
def _level_table(levels: tuple[float, ...]) -> torch.Tensor:
    """The nearest level for each of `2 * REACH + 1` values that are evenly spread over the range of the levels."""
    import torch

    ordered = torch.tensor(sorted(set(levels)), dtype=torch.float64)
    top = float(ordered.abs().max())
    spread = torch.linspace(-top, top, 2 * REACH + 1, dtype=torch.float64)
    return ordered[torch.bucketize(spread, (ordered[1:] + ordered[:-1]) / 2)].float()


def kept_in(stored: StoredTensor) -> ScaleKind:
    """Return how a part keeps scales: in the 16-bit float that it has, else in float32."""
    return {"F16": "float16", "BF16": "bfloat16"}.get(stored.dtype, "float32")  # type: ignore[return-value]


def float_of(stored: StoredTensor) -> str:
    """Return torch's name for the 8-bit float that a part is stored in."""
    name = DTYPES[stored.dtype].torch
    assert name is not None
    return name


def _largest(blocks: torch.Tensor, largest: float | None) -> torch.Tensor:
    if largest is not None:
        return blocks.new_full((1, 1), largest)
    loops = compiled.loops("windows")
    if loops is not None and blocks.element_size() == 4:
        return loops.largest_of_blocks(blocks)  # type: ignore[no-any-return]
    return blocks.abs().amax(dim=1, keepdim=True)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """One over each scale, 0 for 0: a block of zeros stays one."""
    return scales.reciprocal().masked_fill_(scales == 0, 0.0)


def scales(exact: torch.Tensor, kind: ScaleKind, top: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales that codes are chosen by, and those that are kept, as float32; `top` is the largest level."""
    if kind == "float16-late":
        return exact, _cast(exact, "float16")
    if kind in ("nested", "nested-int8"):
        return exact, _nested(exact, dynamic_levels() if kind == "nested" else INT8)
    kept = _kept(exact, kind, top)
    return kept, kept


def _kept(exact: torch.Tensor, kind: ScaleKind, top: float) -> torch.Tensor:
    import torch

    match kind:
        case "float16" | "bfloat16":
            return _cast(exact, kind)
        case "floor":
            return _power(torch.floor(torch.log2(exact * top)) - math.floor(math.log2(top)), exact)
        case "ceil":
            return _power(torch.ceil(torch.log2(exact)), exact)
        case "even":
            mantissa, exponent = torch.frexp(exact * top)  # 0.5 to 1: rounded to one bit as E2M1 rounds
            return _power(exponent - 1 + (mantissa >= 0.875).int() - math.floor(math.log2(top)), exact)
        case "e4m3":
            return _e4m3(exact)
        case "e4m3-scaled":
            above = exact.amax().clamp_(min=torch.finfo(torch.float32).tiny) / E4M3_MAX
            return _e4m3(exact / above).mul_(above)
        case _:
            return exact


def _cast(exact: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return exact.to(getattr(torch, dtype)).to(torch.float32)


def _power(exponents: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    import torch

    powers = torch.exp2(exponents.to(torch.float32).clamp(-127, 127))
    return powers.masked_fill_(largest == 0, 0.0)


def _e4m3(scales: torch.Tensor) -> torch.Tensor:
    ones = scales.new_ones((1, 1))
    return _nearest(scales, Levels(ones, ones, _floats_of("float8_e4m3fn")))


def _nested(exact: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Scales less their mean, as 8-bit codes in blocks of 256."""
    mean = exact.mean()
    blocks = _in_blocks(exact.view(1, -1) - mean, NESTED_BLOCK)
    rounded = codebook(levels)(blocks, None)
    return rounded.view(-1)[: exact.numel()].view(exact.shape).add_(mean)


@lru_cache
def dynamic_levels() -> tuple[float, ...]:
    """Return bitsandbytes' 256 values of 8 bits: of each decade the middles of 1, 2, 4, ... 64 equal parts.

    >>> len(dynamic_levels()), max(dynamic_levels()), dynamic_levels().index(0.0)
    (256, 1.0, 127)
    """
    middles = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / 2**decade)
        for decade in range(7)
        for part in range(2**decade)
    ]
    return tuple(sorted([*middles, *(-value for value in middles), 0.0, 1.0]))
