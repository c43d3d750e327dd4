"""Loops over blocks with a scale of their own, on tensors of the CPU: reading ggml's, rounding, and its searches.

    blocks         # (n, bytes of a block) uint8, as in the `ggml_*` schemes
    scales, least  # (n, parts) float32, of equal parts of a block; a value is code * scale - least
    values         # (n, values of a block) float32, which are filled

A search takes `LANES` sub-blocks at once, turned so that vectors run across sub-blocks: value i of all of them lies in
a row. Each then has its sums in a lane of its own, added up in the order of its values, whatever the CPU.
"""

from __future__ import annotations

import numpy as np
import torch

from pytest_quantcheck.compiled.machine import machine_code

LANES = 128
RUN = 8  # values of a sub-block whose sums stay in registers
SIZE = 32  # values of the largest sub-block

BIT, TWO_BITS, NIBBLE = np.int32(1), np.int32(3), np.int32(15)
MIDDLE = np.int32(32)  # of the codes of Q6_K
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
INFINITY, NAN = np.int32(0x7F800000), np.int32(0x7FC00000)
TINY = np.float32(1e-30)


def unpack_nibbles(
    blocks: torch.Tensor,
    first: int,
    size: int,
    zero: int,
    scales: torch.Tensor,
    least: torch.Tensor | None,
    values: torch.Tensor,
) -> None:
    """Fill values from runs of `size` bytes from byte `first`: their low nibbles, then their high ones, less `zero`."""
    _unpack_nibbles(blocks.contiguous().numpy(), first, size, np.int32(zero), *_both(scales, least), values.numpy())


def unpack_levels(
    blocks: torch.Tensor, first: int, size: int, levels: tuple[int, ...], scales: torch.Tensor, values: torch.Tensor
) -> None:
    """Fill values from the same runs, whose nibbles are of a table of 16 levels."""
    table = np.array(levels, np.float32)
    _unpack_levels(blocks.contiguous().numpy(), first, size, table, scales.contiguous().numpy(), values.numpy())


def unpack_five(
    blocks: torch.Tensor,
    fifth: int,
    zero: int,
    scales: torch.Tensor,
    least: torch.Tensor | None,
    values: torch.Tensor,
) -> None:
    """Fill 32 values from 16 bytes of nibbles at the end and the 4 bytes of fifth bits before them."""
    _unpack_five(blocks.contiguous().numpy(), fifth, np.int32(zero), *_both(scales, least), values.numpy())


def unpack_two_bits(
    blocks: torch.Tensor, first: int, scales: torch.Tensor, least: torch.Tensor | None, values: torch.Tensor
) -> None:
    """Fill the values of Q2_K, whose fields start at byte `first`, or of Q3_K, whose third bits lie before them."""
    third = np.int32(least is None)
    _unpack_two_bits(blocks.contiguous().numpy(), first, third, *_both(scales, least), values.numpy())


def unpack_q5_k(blocks: torch.Tensor, scales: torch.Tensor, least: torch.Tensor, values: torch.Tensor) -> None:
    """Fill the values of Q5_K."""
    _unpack_q5_k(blocks.contiguous().numpy(), *_both(scales, least), values.numpy())


def unpack_q6_k(blocks: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
    """Fill the values of Q6_K."""
    _unpack_q6_k(blocks.contiguous().numpy(), scales.numpy(), values.numpy())


def scales_k(blocks: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima of Q4_K and Q5_K, given the float16 of either.

    scale, least  # (n, 1) float32
    ->            # (n, 8) twice
    """
    found = torch.empty((2, len(blocks), 8))
    units = scale.contiguous().view(-1).numpy(), least.contiguous().view(-1).numpy()
    _scales_k(blocks.contiguous().numpy(), *units, found.numpy())
    return found[0], found[1]


def _both(scales: torch.Tensor, least: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    least = torch.zeros_like(scales) if least is None else least
    return scales.contiguous().numpy(), least.contiguous().numpy()


def fit_lines(
    parts: torch.Tensor, codes: int, spreads: tuple[float, ...], *, absolute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum of each part, as `ggml_search` fits them.

    parts  # (n, size) float32
    ->     # (n, 1) twice
    """
    found = torch.empty((2, len(parts)))
    reaches = np.array([codes, *(codes + spread for spread in spreads)], np.float32)
    _fit_lines(parts.contiguous().numpy(), np.float32(codes), reaches, absolute, found.numpy())
    return found[0].unsqueeze(1), found[1].unsqueeze(1)


def fit_scales(parts: torch.Tensor, levels: tuple[int, ...], spreads: tuple[float, ...], refined: int) -> torch.Tensor:
    """Return the scale of each part, as `ggml_search` fits it.

    parts  # (n, size) float32
    ->     # (n, 1)
    """
    found = torch.empty((len(parts), 1))
    reaches = np.array([levels[0] - spread for spread in (0.0, *spreads)], np.float32)
    _fit_scales(parts.contiguous().numpy(), *_cells(levels), reaches, 1 + refined, found.view(-1).numpy())
    return found


def round_to_levels(
    parts: torch.Tensor, levels: tuple[int, ...], inverse: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return the level nearest to each value times the inverse scale of its part, times that scale.

    parts           # (n, size) float32
    inverse, scale  # (n, 1) float32
    """
    low, high, cells = _cells(levels)
    if not len(cells):
        return round_to_codes(parts, levels[0], levels[-1], inverse, scale)
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    _round_to_cells(parts.contiguous().numpy(), low, high, cells, _rows(inverse, scale), found.numpy())
    return found


def round_to_codes(
    parts: torch.Tensor,
    low: float,
    high: float,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    least: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return what codes of `low` to `high` make of values: `round((w - chosen) * inverse) * scale + kept`.

    parts           # (n, size) float32
    inverse, scale  # (n, 1) float32
    least           # chosen and kept minimum, (n, 1) float32 each
    """
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    chosen, kept = least or (torch.zeros_like(scale), torch.full_like(scale, -0.0))  # which keep the sign of any zero
    how = _rows(inverse, scale, chosen, kept)
    _round_to_codes(parts.contiguous().numpy(), np.float32(low), np.float32(high), how, found.numpy())
    return found


def range_of_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value of each block, NaN where one is.

    blocks  # (n, size) float32
    ->      # (n, 1) twice
    """
    found = torch.empty((2, len(blocks)))
    _range_of_blocks(blocks.contiguous().view(torch.int32).numpy(), found.view(torch.int32).numpy())
    return found[0].unsqueeze(1), found[1].unsqueeze(1)


def _rows(*columns: torch.Tensor) -> np.ndarray:
    """Columns as the rows of one array."""
    return torch.cat([column.reshape(1, -1) for column in columns]).numpy()


def _cells(levels: tuple[int, ...]) -> tuple[np.float32, np.float32, np.ndarray]:
    """The lowest and the highest level, and the level nearest to all of each half between; none where all are levels.

    A boundary between two levels lies on a half.
    """
    low, high = np.float32(levels[0]), np.float32(levels[-1])
    if high - low == len(levels) - 1:
        return low, high, np.empty(0, np.float32)
    middles = low + 0.25 + np.arange(2 * int(high - low) + 1) / 2
    ordered = np.array(levels, np.float32)
    return low, high, ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, middles)]


@machine_code
def _unpack_nibbles(
    blocks: np.ndarray,
    first: int,
    size: int,
    zero: np.int32,
    scales: np.ndarray,
    least: np.ndarray,
    values: np.ndarray,
) -> None:
    runs = values.shape[1] // size  # two of each run of bytes
    shared = runs // scales.shape[1]
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        for run in range(0, runs, 2):
            some = packed[first + run // 2 * size :][:size]
            low, high = found[run * size :][:size], found[(run + 1) * size :][:size]
            scale, under = scales[block, run // shared], least[block, run // shared]
            high_scale, high_under = scales[block, (run + 1) // shared], least[block, (run + 1) // shared]
            for at in range(len(some)):
                byte = np.int32(some[at])
                low[at] = np.float32(np.int32(np.int32(byte & NIBBLE) - zero)) * scale - under
                high[at] = np.float32(np.int32(np.int32(byte >> 4) - zero)) * high_scale - high_under


@machine_code
def _unpack_levels(
    blocks: np.ndarray, first: int, size: int, levels: np.ndarray, scales: np.ndarray, values: np.ndarray
) -> None:
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        for part in range(scales.shape[1]):
            some, scale = packed[first + part * size :][:size], scales[block, part]
            low, high = found[2 * part * size :][:size], found[(2 * part + 1) * size :][:size]
            for at in range(len(some)):
                low[at] = levels[np.uint32(some[at] & NIBBLE)] * scale
                high[at] = levels[np.uint32(some[at] >> 4)] * scale


@machine_code
def _unpack_five(
    blocks: np.ndarray, fifth: int, zero: np.int32, scales: np.ndarray, least: np.ndarray, values: np.ndarray
) -> None:
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        bits = packed[fifth:]
        lower, upper = np.int32(bits[0] | bits[1] << 8), np.int32(bits[2] | bits[3] << 8)
        scale, under = scales[block, 0], least[block, 0]
        some, low, high = bits[4:20], found[:16], found[16:]
        for at in range(len(some)):
            byte, place = np.int32(some[at]), np.int32(at)
            code = np.int32(np.int32(byte & NIBBLE) | np.int32(np.int32(np.int32(lower >> place) & BIT) << 4))
            high_code = np.int32(np.int32(byte >> 4) | np.int32(np.int32(np.int32(upper >> place) & BIT) << 4))
            low[at] = np.float32(np.int32(code - zero)) * scale - under
            high[at] = np.float32(np.int32(high_code - zero)) * scale - under


@machine_code
def _unpack_two_bits(
    blocks: np.ndarray, first: int, third: np.int32, scales: np.ndarray, least: np.ndarray, values: np.ndarray
) -> None:
    zero = np.int32(third << 2)
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        for part in range(4):  # 16 bytes, and the four runs of values that they are of
            some, upper = packed[first + 16 * part :][:16], packed[16 * (part % 2) :][:16]
            for field in range(4):
                run = 8 * (part // 2) + 2 * field + part % 2
                down, off = np.int32(2 * field), np.int32(run // 2)
                scale, under, run_of = scales[block, run], least[block, run], found[16 * run : 16 * run + 16]
                for at in range(len(run_of)):
                    code = np.int32(np.int32(np.int32(some[at]) >> down) & TWO_BITS)
                    more = np.int32(np.int32(np.int32(upper[at]) >> off) & third)
                    run_of[at] = np.float32(np.int32(code + np.int32(more << 2) - zero)) * scale - under


@machine_code
def _unpack_q5_k(blocks: np.ndarray, scales: np.ndarray, least: np.ndarray, values: np.ndarray) -> None:
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        bits = packed[16:48]
        for run in range(0, 8, 2):
            some, low, high = packed[48 + 16 * run :][:32], found[32 * run :][:32], found[32 * run + 32 :][:32]
            scale, under = scales[block, run], least[block, run]
            high_scale, high_under = scales[block, run + 1], least[block, run + 1]
            off, high_off = np.int32(run), np.int32(run + 1)
            for at in range(len(some)):
                byte, upper = np.int32(some[at]), np.int32(bits[at])
                code = np.int32(np.int32(byte & NIBBLE) | np.int32(np.int32(np.int32(upper >> off) & BIT) << 4))
                high_code = np.int32(np.int32(byte >> 4) | np.int32(np.int32(np.int32(upper >> high_off) & BIT) << 4))
                low[at] = np.float32(code) * scale - under
                high[at] = np.float32(high_code) * high_scale - high_under


@machine_code
def _unpack_q6_k(blocks: np.ndarray, scales: np.ndarray, values: np.ndarray) -> None:
    for block in range(blocks.shape[0]):
        packed, found = blocks[block], values[block]
        for part in range(4):  # 16 bytes of upper bits, and the four runs of values that they are of
            half, side = part // 2, part % 2
            one, other = packed[64 * half + 16 * side :][:16], packed[64 * half + 32 + 16 * side :][:16]
            bits, values_of = packed[128 + 16 * part :][:16], found[128 * half + 16 * side :]
            a, b, c, d = values_of[:16], values_of[32:48], values_of[64:80], values_of[96:112]
            scale_a, scale_b, scale_c, scale_d = scales[block, 8 * half + side :][0:8:2]
            for at in range(len(one)):
                low, high, upper = np.int32(one[at]), np.int32(other[at]), np.int32(bits[at])
                a[at] = np.float32(np.int32((low & NIBBLE) + ((upper & 3) << 4) - MIDDLE)) * scale_a
                b[at] = np.float32(np.int32((high & NIBBLE) + ((upper & 12) << 2) - MIDDLE)) * scale_b
                c[at] = np.float32(np.int32((low >> 4) + (upper & 48) - MIDDLE)) * scale_c
                d[at] = np.float32(np.int32((high >> 4) + ((upper & 192) >> 2) - MIDDLE)) * scale_d


@machine_code
def _scales_k(blocks: np.ndarray, scale: np.ndarray, least: np.ndarray, found: np.ndarray) -> None:
    for block in range(blocks.shape[0]):
        packed, scales, minima = blocks[block], found[0, block], found[1, block]
        of_scale, of_least = scale[block], least[block]
        for at in range(4):
            first, second, third = packed[4 + at], packed[8 + at], packed[12 + at]
            scales[at] = np.float32(first & 63) * of_scale
            scales[4 + at] = np.float32((third & 15) | (first >> 6) << 4) * of_scale
            minima[at] = np.float32(second & 63) * of_least
            minima[4 + at] = np.float32((third >> 4) | (second >> 6) << 4) * of_least


# Rows of what sub-blocks have, a lane each: the end of its range and the scale (and minimum) that are the best so far,
# sums over its values (x), weights (w) and codes (l), and what is tried.
ROWS = 15
HIGH, LEAST, SCALE, BEST, SW, SX, SXX, INVERSE, SL, SLL, SXL, SPANNED, TRIED_SCALE, TRIED_LEAST, ERROR = range(ROWS)


@machine_code
def _fit_lines(parts: np.ndarray, codes: np.float32, reaches: np.ndarray, absolute: bool, found: np.ndarray) -> None:
    count, size = parts.shape
    turned = np.empty((2, SIZE, LANES), np.float32)
    values, weights = turned[0], turned[1]
    lanes = np.empty((ROWS, LANES), np.float32)
    for first in range(0, count, LANES):
        used = min(LANES, count - first)
        _turn(parts[first : first + used], values)
        _weigh(values, size, absolute, weights, lanes)
        for lane in range(LANES):
            lanes[SCALE, lane] = (lanes[HIGH, lane] - lanes[LEAST, lane]) / codes
            lanes[BEST, lane] = np.inf
        for at in range(len(reaches)):
            for lane in range(LANES):
                lanes[INVERSE, lane] = reaches[at] * _inverse_of(lanes[HIGH, lane] - lanes[LEAST, lane])
            _add_up(turned, size, codes, lanes)
            _solve(lanes, at == 0)
            _measure(turned, size, absolute, codes, lanes)
            _keep_better(lanes)
        for lane in range(used):
            found[0, first + lane] = lanes[SCALE, lane]
            found[1, first + lane] = lanes[LEAST, lane]


@machine_code
def _turn(parts: np.ndarray, values: np.ndarray) -> None:
    used, size = parts.shape
    for lane in range(used):
        for at in range(size):
            values[at, lane] = parts[lane, at]
    for at in range(size):
        for lane in range(used, LANES):
            values[at, lane] = ZERO


@machine_code
def _inverse_of(scale: np.float32) -> np.float32:
    return ZERO if np.abs(scale) < TINY else ONE / scale


@machine_code
def _weigh(values: np.ndarray, size: int, absolute: bool, weights: np.ndarray, lanes: np.ndarray) -> None:
    for lane in range(LANES):
        lanes[HIGH, lane] = values[0, lane]
        lanes[LEAST, lane] = ZERO
        lanes[SXX, lane] = ZERO
        lanes[SW, lane] = ZERO
        lanes[SX, lane] = ZERO
    for at in range(size):
        for lane in range(LANES):
            value = values[at, lane]
            high, least = lanes[HIGH, lane], lanes[LEAST, lane]
            lanes[HIGH, lane] = value if value > high else high
            lanes[LEAST, lane] = value if value < least else least
            lanes[SXX, lane] += value * value
    share = ONE / np.float32(size)
    for lane in range(LANES):
        lanes[INVERSE, lane] = ZERO if absolute else np.sqrt(lanes[SXX, lane] * share)
        lanes[SXX, lane] = ZERO
    for at in range(size):
        for lane in range(LANES):
            value = values[at, lane]
            weight = np.abs(value) + lanes[INVERSE, lane]
            weights[at, lane] = weight
            lanes[SW, lane] += weight
            lanes[SX, lane] += weight * value
            lanes[SXX, lane] += weight * value * value


@machine_code
def _add_up(turned: np.ndarray, size: int, codes: np.float32, lanes: np.ndarray) -> None:
    for lane in range(LANES):
        lanes[SL, lane] = ZERO
        lanes[SLL, lane] = ZERO
        lanes[SXL, lane] = ZERO
    for start in range(0, size, RUN):
        for lane in range(LANES):
            least, inverse = lanes[LEAST, lane], lanes[INVERSE, lane]
            sum_l, sum_ll, sum_xl = lanes[SL, lane], lanes[SLL, lane], lanes[SXL, lane]
            for at in range(RUN):
                value, weight = turned[0, start + at, lane], turned[1, start + at, lane]
                code = (value - least) * inverse
                code = code if code > ZERO else ZERO
                code = code if code < codes else codes
                code = np.rint(code)
                heavy = weight * code
                sum_l += heavy
                sum_ll += heavy * code
                sum_xl += heavy * value
            lanes[SL, lane], lanes[SLL, lane], lanes[SXL, lane] = sum_l, sum_ll, sum_xl


@machine_code
def _solve(lanes: np.ndarray, as_it_is: bool) -> None:
    if as_it_is:  # the range itself
        for lane in range(LANES):
            lanes[TRIED_SCALE, lane] = lanes[SCALE, lane]
            lanes[TRIED_LEAST, lane] = lanes[LEAST, lane]
            lanes[SPANNED, lane] = ONE
        return
    for lane in range(LANES):
        sum_w, sum_x = lanes[SW, lane], lanes[SX, lane]
        sum_l, sum_ll, sum_xl = lanes[SL, lane], lanes[SLL, lane], lanes[SXL, lane]
        spanned = sum_w * sum_ll - sum_l * sum_l
        share = ONE / spanned
        scale, least = (sum_w * sum_xl - sum_x * sum_l) * share, (sum_ll * sum_x - sum_l * sum_xl) * share
        alone = sum_xl / sum_ll
        lanes[TRIED_SCALE, lane] = alone if least > ZERO else scale
        lanes[TRIED_LEAST, lane] = ZERO if least > ZERO else least
        lanes[SPANNED, lane] = spanned


@machine_code
def _measure(turned: np.ndarray, size: int, absolute: bool, codes: np.float32, lanes: np.ndarray) -> None:
    if not absolute:
        for lane in range(LANES):
            scale, least = lanes[TRIED_SCALE, lane], lanes[TRIED_LEAST, lane]
            of_scale = scale * (scale * lanes[SLL, lane] + TWO * (least * lanes[SL, lane] - lanes[SXL, lane]))
            of_least = least * (least * lanes[SW, lane] - TWO * lanes[SX, lane])
            lanes[ERROR, lane] = lanes[SXX, lane] + (of_scale + of_least)
        return
    for lane in range(LANES):
        lanes[ERROR, lane] = ZERO
    for start in range(0, size, RUN):
        for lane in range(LANES):
            scale, least, error = lanes[TRIED_SCALE, lane], lanes[TRIED_LEAST, lane], lanes[ERROR, lane]
            before, inverse = lanes[LEAST, lane], lanes[INVERSE, lane]
            for at in range(RUN):
                value = turned[0, start + at, lane]
                code = (value - before) * inverse
                code = code if code > ZERO else ZERO
                code = code if code < codes else codes
                code = np.rint(code)
                error += np.abs((code * scale + least) - value) * turned[1, start + at, lane]
            lanes[ERROR, lane] = error


@machine_code
def _keep_better(lanes: np.ndarray) -> None:
    for lane in range(LANES):
        better = (lanes[SPANNED, lane] > ZERO) & (lanes[ERROR, lane] < lanes[BEST, lane])
        lanes[BEST, lane] = lanes[ERROR, lane] if better else lanes[BEST, lane]
        lanes[SCALE, lane] = lanes[TRIED_SCALE, lane] if better else lanes[SCALE, lane]
        lanes[LEAST, lane] = lanes[TRIED_LEAST, lane] if better else lanes[LEAST, lane]


@machine_code
def _fit_scales(
    parts: np.ndarray,
    low: np.float32,
    high: np.float32,
    cells: np.ndarray,
    reaches: np.ndarray,
    rounds: int,
    found: np.ndarray,
) -> None:
    count, size = parts.shape
    values, levels = np.empty((SIZE, LANES), np.float32), np.empty((SIZE, LANES), np.float32)
    entries = np.empty(LANES, np.uint32)
    lanes = np.empty((ROWS, LANES), np.float32)
    for first in range(0, count, LANES):
        used = min(LANES, count - first)
        _turn(parts[first : first + used], values)
        _find_extremes(values, size, lanes)
        for at in range(len(reaches)):
            for lane in range(LANES):
                lanes[INVERSE, lane] = reaches[at] * _inverse_of(lanes[HIGH, lane])
            for _ in range(rounds):
                for row in range(size):
                    _to_levels(values[row], lanes[INVERSE], low, high, cells, entries, levels[row])
                _add_up_levels(values, levels, size, lanes)
                _keep_better_scale(lanes)
        for lane in range(used):
            found[first + lane] = lanes[SCALE, lane]


@machine_code
def _find_extremes(values: np.ndarray, size: int, lanes: np.ndarray) -> None:
    for lane in range(LANES):
        lanes[HIGH, lane] = values[0, lane]
        lanes[LEAST, lane] = values[0, lane]
        lanes[SCALE, lane] = ZERO
        lanes[BEST, lane] = ZERO
    for at in range(1, size):
        for lane in range(LANES):
            value = values[at, lane]
            high, least = lanes[HIGH, lane], lanes[LEAST, lane]
            lanes[HIGH, lane] = value if value > high else high
            lanes[LEAST, lane] = value if value < least else least
    for lane in range(LANES):
        high, least = lanes[HIGH, lane], lanes[LEAST, lane]
        lanes[HIGH, lane] = least if -least > high else high


@machine_code
def _to_levels(
    values: np.ndarray,
    factors: np.ndarray,
    low: np.float32,
    high: np.float32,
    cells: np.ndarray,
    entries: np.ndarray,
    found: np.ndarray,
) -> None:
    if len(cells) == 0:
        for at in range(len(values)):
            value = np.rint(values[at] * factors[at])
            value = low if value < low else value
            found[at] = high if value > high else value
        return
    for at in range(len(values)):
        entries[at] = _cell_of(values[at] * factors[at], low, high)
    for at in range(len(values)):
        found[at] = cells[entries[at]]


@machine_code
def _cell_of(value: np.float32, low: np.float32, high: np.float32) -> np.int32:
    value = value if value > low else low  # NaN too
    value = high if value > high else value
    return np.int32((value - low) * TWO)


@machine_code
def _add_up_levels(values: np.ndarray, levels: np.ndarray, size: int, lanes: np.ndarray) -> None:
    for lane in range(LANES):
        lanes[SXL, lane] = ZERO
        lanes[SLL, lane] = ZERO
    for start in range(0, size, RUN):
        for lane in range(LANES):
            along, energy = lanes[SXL, lane], lanes[SLL, lane]
            for at in range(RUN):
                value, level = values[start + at, lane], levels[start + at, lane]
                weight = value * value
                along += weight * value * level
                energy += weight * (level * level)
            lanes[SXL, lane], lanes[SLL, lane] = along, energy


@machine_code
def _keep_better_scale(lanes: np.ndarray) -> None:
    for lane in range(LANES):
        along, energy = lanes[SXL, lane], lanes[SLL, lane]
        scale = along / energy
        better = (energy > ZERO) & (along * along > lanes[BEST, lane] * energy)
        lanes[SCALE, lane] = scale if better else lanes[SCALE, lane]
        lanes[BEST, lane] = scale * along if better else lanes[BEST, lane]
        lanes[INVERSE, lane] = _inverse_of(scale)


@machine_code
def _round_to_cells(
    parts: np.ndarray, low: np.float32, high: np.float32, cells: np.ndarray, how: np.ndarray, found: np.ndarray
) -> None:
    entries = np.empty(parts.shape[1], np.uint32)
    for part in range(parts.shape[0]):
        inverse, scale = how[0, part], how[1, part]
        values, rounded = parts[part], found[part]
        for at in range(len(values)):
            entries[at] = _cell_of(values[at] * inverse, low, high)
        for at in range(len(values)):
            rounded[at] = cells[entries[at]] * scale


@machine_code
def _round_to_codes(parts: np.ndarray, low: np.float32, high: np.float32, how: np.ndarray, found: np.ndarray) -> None:
    for part in range(parts.shape[0]):
        inverse, scale, chosen, kept = how[0, part], how[1, part], how[2, part], how[3, part]
        values, rounded = parts[part], found[part]
        for at in range(len(values)):
            code = np.rint((values[at] - chosen) * inverse)
            code = low if code < low else code
            code = high if code > high else code
            rounded[at] = code * scale + kept


@machine_code
def _range_of_blocks(words: np.ndarray, found: np.ndarray) -> None:
    for block in range(words.shape[0]):
        values = words[block]
        least, most = MAGNITUDE, ~MAGNITUDE
        for at in range(len(values)):
            place = _place(values[at])
            least, most = min(least, place), max(most, place)
        if least < -INFINITY - 1 or most > INFINITY:
            least = most = NAN
        found[0, block], found[1, block] = _place(least), _place(most)


@machine_code
def _place(bits: np.int32) -> np.int32:
    """The bits of a float32 as an integer of the same order, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> 31) & MAGNITUDE))
