"""Loops over windows of values, on tensors of the CPU.

Sums are taken in lanes of float32 over `STRETCH` values at most, and added up in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pytest_quantcheck.compiled.machine import adding, machine_code
from pytest_quantcheck.tensor import Floats, Integers

if TYPE_CHECKING:
    from pytest_quantcheck.tensor import Coded, Levels, Rounding

# Of rows, signal and noise of blocks, the largest error, zeros of the values and of the reference.
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, tuple[int, ...]]

Factors = tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]  # zero points, scales, shifts; what multiplies all
Among = tuple[np.ndarray, np.float32, np.float32, np.int32, np.int32]  # of levels: a table; low, high; finer, least

STRETCH = 1024  # values that stay in the innermost cache
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign; as integers, magnitudes have the same order
EXPONENT = np.int32(0x7F800000)
SIGN = np.int32(-0x80000000)
MANTISSA = 23  # bits of it
ZERO = np.float32(0)


def compare(values: torch.Tensor, reference: torch.Tensor, blocks: tuple[int, int]) -> Sums:
    """Return the sums of each row, those of squares of each block, the largest error, and the zeros on either side.

    Of blocks, their size is given, and how many values after one row the next begins.

    values, reference  # (rows, columns) float32
    ->                 # (5, rows) float64, in the order of `Sums`; (1, blocks) float32 of the reference, of the error
    """
    found = sums, squares = _empty_sums(reference, blocks)
    size, pitch = blocks
    seen = _compare(values.contiguous().numpy(), reference.contiguous().numpy(), (size, pitch), _arrays(found))
    return sums, squares[:1], squares[1:], _float(seen[0]), (int(seen[1]), int(seen[2]))


def compare_coded(
    coded: Coded,
    reference: torch.Tensor,
    blocks: tuple[int, int],
    rounding: Rounding | None = None,
    whole: float | None = None,
) -> tuple[Sums, Sums | None]:
    """Return the same of codes, decoded on the way, with the sums of what was rounded.

    `rounding` is tried on the reference on the way too: its `levels` must be known. `whole` is the largest magnitude
    where that is of the whole tensor.

    reference  # (rows, columns) float32, or bfloat16 as it is stored
    """
    narrow = reference.dtype == torch.bfloat16
    words = reference.contiguous().view(torch.int16 if narrow else torch.int32)
    shift = 16 if narrow else 0
    table = _table(coded)
    ours, theirs = torch.empty(STRETCH), torch.empty(STRETCH)
    found = sums, squares = _empty_sums(reference, blocks)
    size, pitch = blocks
    rounds = rounded_sums, rounded_squares = _empty_sums(reference, blocks) if rounding else _NONE
    seen = _coded(
        _codes(coded),
        table.numpy(),
        _factors(coded),
        coded.size,
        words.numpy(),
        shift,
        (size, pitch),
        (ours.numpy(), ours.view(table.dtype).numpy()),
        (theirs.numpy(), theirs.view(torch.int32).numpy()),
        _arrays(found),
        *_rounded(words, shift, rounding, whole),
        _arrays(rounds),
    )
    rounded = (rounded_sums, rounded_squares[:1], rounded_squares[1:], 0.0, (0, 0)) if rounding else None
    return (sums, squares[:1], squares[1:], _float(seen[0]), (int(seen[1]), int(seen[2]))), rounded


def _empty_sums(reference: torch.Tensor, blocks: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For five sums of each row, and two of each block."""
    size, pitch = blocks
    sums = torch.zeros((5, len(reference)), dtype=torch.float64)
    return sums, torch.zeros((2, -(-len(reference) * pitch // size)))


def _arrays(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return found[0].numpy(), found[1].numpy()


_NONE = torch.zeros((5, 0), dtype=torch.float64), torch.zeros((2, 0))


def decode(coded: Coded) -> torch.Tensor:
    """Return the values of codes, as `packing.expand` does."""
    table, rows = _table(coded), len(coded.scales)
    values = torch.empty((rows, coded.codes.numel() * table.itemsize // 4 // max(1, rows)))
    entries = values.view(-1).view(table.dtype)
    _decode(_codes(coded), table.numpy(), _factors(coded), coded.size, (values.numpy(), entries.numpy()))
    return values


def _table(coded: Coded) -> torch.Tensor:
    """The entries of a table, two values as one of twice the width; none where codes are integers."""
    if coded.table is None:
        return _values_of_bytes(coded.codes.dtype) if coded.codes.is_floating_point() else torch.empty(0)
    table = coded.table.contiguous()
    return (table.view(torch.float64) if table.shape[1] == 2 else table).view(-1)


def _values_of_bytes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


def _codes(coded: Coded) -> np.ndarray:
    codes = coded.codes.view(torch.uint8) if coded.codes.is_floating_point() else coded.codes
    return codes.numpy()


def _factors(coded: Coded) -> Factors:
    """Zero points, scales and shifts, without columns where there are none; and what multiplies all."""
    zeros, scales, shifts = (
        _NONE[1].numpy() if factors is None else factors.contiguous().numpy()
        for factors in (coded.zeros, coded.scales, coded.shifts)
    )
    return zeros, scales, shifts, np.float32(coded.factor)


def _rounded(
    words: torch.Tensor, shift: int, rounding: Rounding | None, whole: float | None
) -> tuple[np.ndarray, np.ndarray, Among, tuple[int, int]]:
    """Steps and scales of a rounding, what is rounded to, and the rows and columns of its blocks; 0: nothing is."""
    if rounding is None or rounding.levels is None:
        return _NONE[1].numpy(), _NONE[1].numpy(), _among(Integers(0, 0)), (0, 0)
    rows, columns = words.shape
    height, width = (rounding.rows, rounding.size) if rounding.size else (rows, columns)
    found = torch.full((-(-rows // height), -(-columns // width)), whole or 0.0)
    if whole is None:
        _largest_of_blocks(words.numpy(), shift, height, width, found.view(torch.int32).numpy())
    levels = rounding.levels(found.view(-1, 1))
    steps, scales = (values.reshape(found.shape).numpy() for values in (levels.steps, levels.scales))
    return steps, scales, _among(levels.among), (height, width)


def _among(levels: torch.Tensor | Integers | Floats) -> Among:
    nothing, none, zero = _NONE[1][0].numpy(), np.float32(0), np.int32(0)
    if isinstance(levels, Integers):
        return nothing, np.float32(levels.low), np.float32(levels.high), zero, zero
    if isinstance(levels, Floats):
        top, exponent = np.float32(levels.top), np.float32(2.0**levels.least).view(np.int32)
        return nothing, -top, top, np.int32(MANTISSA - levels.mantissa << MANTISSA), exponent
    return levels.numpy(), none, none, zero, zero


def small_floats(values: torch.Tensor) -> torch.Tensor:
    """Return floats of one byte as float32.

    ->  # as `values`
    """
    found = torch.empty(values.shape)
    entries = _values_of_bytes(values.dtype).numpy()
    _look_up(values.contiguous().view(-1).view(torch.uint8).numpy(), entries, found.view(-1).numpy())
    return found


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the one or two values of each byte.

    codes  # (n,) uint8
    table  # (256, width) float32
    ->     # (n, width)
    """
    found = torch.empty((len(codes), table.shape[1]))
    entry = torch.float64 if table.shape[1] == 2 else torch.float32
    _look_up(codes.numpy(), table.contiguous().view(entry).view(-1).numpy(), found.view(entry).view(-1).numpy())
    return found


def scale_blocks(values: torch.Tensor, scales: torch.Tensor, size: int) -> None:
    """Multiply each block of `size` columns by its scale, in place; the last of a row may be shorter.

    values  # (rows, columns)
    scales  # (rows, ceil(columns / size))
    """
    _scale(values.numpy(), scales.numpy(), size)


def largest_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each block, NaN where one is.

    blocks  # (n, size) float32
    ->      # (n, 1)
    """
    found = torch.empty((len(blocks), 1))
    words = blocks.contiguous().view(torch.int32).numpy()
    _largest_of_blocks(words, 0, 1, max(1, blocks.shape[1]), found.view(torch.int32).numpy())
    return found


def nearest(blocks: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Return what is nearest to each value times the step of its block.

    blocks  # (n, size) float32
    ->      # (n, size)
    """
    found = blocks.mul(levels.steps).contiguous()
    _nearest_of_all(found.view(-1).numpy(), _among(levels.among))
    one_zero = isinstance(levels.among, Floats) and levels.among.dtype.endswith("fnuz")
    return found.add_(0.0) if one_zero else found  # -0.0 + 0.0 is 0.0


def _float(bits: np.int64) -> float:
    return float(np.int32(bits).view(np.float32))


@machine_code
def _compare(
    values: np.ndarray, reference: np.ndarray, blocks: tuple[int, int], found: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    seen = np.zeros(3, np.int64)
    rows, columns = values.shape
    size, pitch = blocks
    for row in range(rows):
        for start in range(0, columns, STRETCH):
            ours, theirs = values[row, start : start + STRETCH], reference[row, start : start + STRETCH]
            _add_up(ours, theirs, row, row * pitch + start, size, *found)
            _count(ours, theirs, seen)
    return seen


@machine_code
def _coded(
    codes: np.ndarray,
    table: np.ndarray,
    factors: Factors,
    size: int,
    reference: np.ndarray,
    shift: int,
    blocks: tuple[int, int],
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    steps: np.ndarray,
    kept: np.ndarray,
    levels: Among,
    tiles: tuple[int, int],
    rounded: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    seen = np.zeros(3, np.int64)
    rows, columns = reference.shape
    width = len(ours[0]) // len(ours[1])
    entries = np.empty(STRETCH, np.uint32)
    block, pitch = blocks
    height, wide = tiles
    nothing, one = np.empty((0, 0), np.float32), np.float32(1)
    for row in range(rows):
        for start in range(0, columns, STRETCH):
            stop = min(start + STRETCH, columns)
            first = row * columns + start
            _look_up(codes[first // width : (first + stop - start) // width], table, ours[1])
            values, wanted = ours[0][: stop - start], theirs[0][: stop - start]
            _widen(reference[row, start:stop], shift, theirs[1])
            _place(values, row, start, size, factors)
            _add_up(values, wanted, row, row * pitch + start, block, *found)
            _count(values, wanted, seen)
            if wide:  # in the place of the decoded values
                _copy(wanted, values)
                _place(values, row // height, start, wide, (nothing, steps, nothing, one))
                _nearest(values, levels, entries)
                _place(values, row // height, start, wide, (nothing, kept, nothing, one))
                _add_up(values, wanted, row, row * pitch + start, block, *rounded)
    return seen


@machine_code
def _decode(
    codes: np.ndarray,
    table: np.ndarray,
    factors: Factors,
    size: int,
    values: tuple[np.ndarray, np.ndarray],
) -> None:
    found, entries = values
    rows, columns = found.shape
    width = found.size // max(1, len(entries))
    for row in range(rows):
        for start in range(0, columns, STRETCH):
            stop = min(start + STRETCH, columns)
            first, last = (row * columns + start) // width, (row * columns + stop) // width
            _look_up(codes[first:last], table, entries[first:last])
            _place(found[row, start:stop], row, start, size, factors)


@machine_code
def _place(values: np.ndarray, row: int, start: int, size: int, factors: Factors) -> None:
    zeros, scales, shifts, factor = factors
    group = start // size
    until = (group + 1) * size - start
    at = 0
    while at < len(values):
        if zeros.size:
            _add(values[at:until], -zeros[row, group])
        _multiply(values[at:until], scales[row, group])
        if shifts.size:
            _add(values[at:until], shifts[row, group])
        at, until, group = until, until + size, group + 1
    if factor != 1:
        _multiply(values, factor)


@adding
def _add_up(
    values: np.ndarray,
    reference: np.ndarray,
    row: int,
    first: int,
    size: int,
    sums: np.ndarray,
    squares: np.ndarray,
) -> None:
    block = first // size
    until = (block + 1) * size - first
    start = 0
    while start < len(values):  # a loop of its own over each block: vectors do not break off
        ours, theirs = values[start:until], reference[start:until]
        signal, noise = ZERO, ZERO
        for at in range(len(ours)):
            error = ours[at] - theirs[at]
            signal += theirs[at] * theirs[at]
            noise += error * error
        squares[0, block] += signal
        squares[1, block] += noise
        sums[0, row] += signal
        sums[1, row] += noise
        start, until, block = until, until + size, block + 1
    cross, total, drift = ZERO, ZERO, ZERO
    for at in range(len(values)):
        error = values[at] - reference[at]
        cross += reference[at] * error
        total += reference[at]
        drift += error
    sums[2, row] += cross
    sums[3, row] += total
    sums[4, row] += drift


@machine_code
def _count(values: np.ndarray, reference: np.ndarray, seen: np.ndarray) -> None:
    """The bits of the largest error so far, and the zeros of values and of reference."""
    largest, zeros, reference_zeros = np.int32(0), np.int32(0), np.int32(0)
    for at in range(len(values)):
        error = np.float32(values[at] - reference[at])
        largest = max(largest, np.int32(error.view(np.int32) & MAGNITUDE))
        zeros += np.int32(values[at] == ZERO)
        reference_zeros += np.int32(reference[at] == ZERO)
    seen[0] = max(seen[0], np.int64(largest))
    seen[1] += zeros
    seen[2] += reference_zeros


@machine_code
def _copy(values: np.ndarray, found: np.ndarray) -> None:
    for at in range(len(values)):
        found[at] = values[at]


@machine_code
def _look_up(codes: np.ndarray, table: np.ndarray, found: np.ndarray) -> None:
    if not len(table):
        for at in range(len(codes)):
            found[at] = np.float32(codes[at])
        return
    for at in range(len(codes)):
        found[at] = table[codes[at]]


@machine_code
def _widen(words: np.ndarray, shift: int, found: np.ndarray) -> None:
    for at in range(len(words)):
        found[at] = np.int32(words[at]) << shift


@machine_code
def _scale(values: np.ndarray, scales: np.ndarray, size: int) -> None:
    for row in range(scales.shape[0]):
        for block in range(scales.shape[1]):
            _multiply(values[row, block * size : (block + 1) * size], scales[row, block])


@machine_code
def _add(values: np.ndarray, term: float) -> None:
    for at in range(len(values)):
        values[at] += term


@machine_code
def _multiply(values: np.ndarray, factor: np.float32) -> None:
    for at in range(len(values)):
        values[at] *= factor


@machine_code
def _largest_of_blocks(words: np.ndarray, shift: int, height: int, width: int, found: np.ndarray) -> None:
    for row in range(words.shape[0]):
        for block in range(found.shape[1]):
            some = words[row, block * width : (block + 1) * width]
            largest = np.int32(0)
            for at in range(len(some)):
                largest = max(largest, np.int32((np.int32(some[at]) << shift) & MAGNITUDE))
            before = found[row // height, block] if row % height else np.int32(0)
            found[row // height, block] = max(largest, before)


@machine_code
def _nearest_of_all(values: np.ndarray, levels: Among) -> None:
    entries = np.empty(STRETCH, np.uint32)
    for start in range(0, len(values), STRETCH):
        _nearest(values[start : start + STRETCH], levels, entries)


@machine_code
def _nearest(values: np.ndarray, levels: Among, entries: np.ndarray) -> None:
    table, low, high, finer, least = levels
    if len(table):
        _nearest_entry(values, table, entries)
    elif finer:
        _nearest_float(values, high, finer, least)
    else:
        _nearest_integer(values, low, high)


@machine_code
def _nearest_integer(values: np.ndarray, low: np.float32, high: np.float32) -> None:
    for at in range(len(values)):
        number = np.rint(values[at])
        number = number if not number < low else low  # NaN stays
        values[at] = number if not number > high else high


@machine_code
def _nearest_float(values: np.ndarray, top: np.float32, finer: np.int32, least: np.int32) -> None:
    """Adds and subtracts the power of two whose last bit is the last one that is kept; `finer` lies between the two."""
    for at in range(len(values)):
        number = values[at] if not values[at] < -top else -top  # NaN stays
        word = np.float32(number if not number > top else top).view(np.int32)
        power = np.int32(max(np.int32(word & EXPONENT), least) + finer).view(np.float32)
        magnitude = np.int32(word & MAGNITUDE).view(np.float32)
        kept = np.float32(np.float32(magnitude + power) - power).view(np.int32)
        values[at] = np.int32(kept | np.int32(word & SIGN)).view(np.float32)


@machine_code
def _nearest_entry(values: np.ndarray, table: np.ndarray, entries: np.ndarray) -> None:
    last, middle = np.float32(len(table) - 1), np.float32(len(table) // 2 + 0.5)
    for at in range(len(values)):
        entry = np.float32(values[at] + middle)
        entry = entry if entry > ZERO else ZERO  # NaN too
        entries[at] = np.int32(entry if entry < last else last)
    for at in range(len(values)):
        values[at] = table[entries[at]]
