"""Loops over blocks with a scale of their own, on tensors of the CPU: rounding to integers, ggml's searches.

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

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
INFINITY, NAN = np.int32(0x7F800000), np.int32(0x7FC00000)
TINY = np.float32(1e-30)


def fit_lines(
    parts: torch.Tensor, codes: int, spreads: tuple[float, ...], *, absolute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum of each part, as `ggml_search` fits them.

    parts  # (n, size) float32
    ->     # (n, 1) twice
    """
    found = torch.empty((2, len(parts)))
    reaches = np.array([codes + spread for spread in spreads], np.float32)
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
            width = lanes[HIGH, lane] - lanes[LEAST, lane]
            lanes[SCALE, lane] = width / codes
            lanes[INVERSE, lane] = _inverse_of(lanes[SCALE, lane])
            lanes[TRIED_SCALE, lane] = lanes[SCALE, lane]
            lanes[TRIED_LEAST, lane] = lanes[LEAST, lane]
        _add_up(turned, size, codes, lanes)
        _measure(turned, size, absolute, codes, lanes)
        for lane in range(LANES):
            lanes[BEST, lane] = lanes[ERROR, lane]
        for at in range(len(reaches)):
            for lane in range(LANES):
                lanes[INVERSE, lane] = reaches[at] * _inverse_of(lanes[HIGH, lane] - lanes[LEAST, lane])
            _add_up(turned, size, codes, lanes)
            _solve(lanes)
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
def _solve(lanes: np.ndarray) -> None:
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
