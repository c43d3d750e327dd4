"""Loops over windows of values, on tensors of the CPU.

Sums are taken in lanes of float32 over `STRETCH` values at most, and added up in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pytest_quantcheck.compiled.machine import adding, machine_code

if TYPE_CHECKING:
    from pytest_quantcheck.tensor import Coded, Rounding

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]  # of rows, signal and noise of blocks, the largest error

STRETCH = 1024  # values that stay in the innermost cache
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign; as integers, magnitudes have the same order
ZERO = np.float32(0)


def compare(values: torch.Tensor, reference: torch.Tensor, block: int) -> Sums:
    """Return the sums of each row, those of squares of each block, and the largest error; NaN where any is.

    values, reference  # (rows, columns) float32; blocks run on across rows
    ->                 # (5, rows) float64, in the order of `Sums`; (1, blocks) float32 of the reference, of the error
    """
    sums, blocks = _empty_sums(reference, block)
    largest = _compare(values.contiguous().numpy(), reference.contiguous().numpy(), block, sums.numpy(), blocks.numpy())
    return sums, blocks[:1], blocks[1:], _float(largest)


def compare_coded(
    coded: Coded, reference: torch.Tensor, block: int, rounding: Rounding | None = None
) -> tuple[Sums, Sums | None, int, int]:
    """Return the same of codes, decoded on the way, and how many zeros there are on either side.

    `rounding` is tried on the reference on the way too: its `levels` must be known, and rows be full blocks of it.

    reference  # (rows, columns) float32, or bfloat16 as it is stored
    """
    narrow = reference.dtype == torch.bfloat16
    words = reference.contiguous().view(torch.int16 if narrow else torch.int32)
    shift = 16 if narrow else 0
    table = coded.table.contiguous()
    table = table.view(torch.float64) if table.shape[1] == 2 else table  # two values travel as one of twice the width
    ours, theirs = torch.empty(STRETCH), torch.empty(STRETCH)
    sums, blocks = _empty_sums(reference, block)
    rounded_sums, rounded_blocks = _empty_sums(reference, block) if rounding else _NONE
    largest, zeros, reference_zeros = _coded(
        coded.codes.view(torch.uint8).numpy(),
        table.view(-1).numpy(),
        coded.scales.contiguous().numpy(),
        coded.size,
        words.numpy(),
        shift,
        block,
        (ours.numpy(), ours.view(table.dtype).numpy()),
        (theirs.numpy(), theirs.view(torch.int32).numpy()),
        (sums.numpy(), blocks.numpy()),
        *_rounded(words, shift, rounding),
        (rounded_sums.numpy(), rounded_blocks.numpy()),
    )
    rounded = (rounded_sums, rounded_blocks[:1], rounded_blocks[1:], 0.0) if rounding else None
    return (sums, blocks[:1], blocks[1:], _float(largest)), rounded, zeros, reference_zeros


def _empty_sums(reference: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros((5, len(reference)), dtype=torch.float64)
    return sums, torch.zeros((2, -(-reference.numel() // block)))


_NONE = torch.zeros((5, 0), dtype=torch.float64), torch.zeros((2, 0))


def _rounded(
    words: torch.Tensor, shift: int, rounding: Rounding | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Steps, scales and the table of a rounding, and the size of its blocks; 0 where nothing is rounded."""
    if rounding is None or rounding.levels is None:
        nothing = _NONE[1][0].numpy()
        return nothing, nothing, nothing, 0
    found = torch.empty((words.numel() // rounding.size, 1))
    _largest_of_blocks(words.view(-1, rounding.size).numpy(), shift, found.view(torch.int32).numpy())
    levels = rounding.levels(found)
    return levels.steps.view(-1).numpy(), levels.scales.view(-1).numpy(), levels.table.numpy(), rounding.size


def count_zeros(values: torch.Tensor) -> int:
    """Return how many values are exactly zero."""
    return _zeros(values.contiguous().view(-1).numpy())


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
    _largest_of_blocks(blocks.contiguous().view(torch.int32).numpy(), 0, found.view(torch.int32).numpy())
    return found


def look_up_nearest(blocks: torch.Tensor, steps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the entry of a table that is nearest to each value times the step of its block; 0 is its middle.

    blocks  # (n, size) float32
    steps   # (n, 1) float32
    table   # (entries,) float32, an odd number
    ->      # (n, size)
    """
    found = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    _nearest_of_blocks(blocks.contiguous().numpy(), steps.contiguous().numpy(), table.numpy(), found.numpy())
    return found


def _float(bits: np.int32) -> float:
    return float(np.int32(bits).view(np.float32))


@machine_code
def _compare(values: np.ndarray, reference: np.ndarray, block: int, sums: np.ndarray, blocks: np.ndarray) -> np.int32:
    largest = np.int32(0)
    rows, columns = values.shape
    for row in range(rows):
        for start in range(0, columns, STRETCH):
            ours, theirs = values[row, start : start + STRETCH], reference[row, start : start + STRETCH]
            _add_up(ours, theirs, row, row * columns + start, block, sums, blocks)
            largest = max(largest, _largest(ours, theirs))
    return largest


@machine_code
def _coded(
    codes: np.ndarray,
    table: np.ndarray,
    scales: np.ndarray,
    size: int,
    reference: np.ndarray,
    shift: int,
    block: int,
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    steps: np.ndarray,
    kept: np.ndarray,
    levels: np.ndarray,
    rounds: int,
    rounded: tuple[np.ndarray, np.ndarray],
) -> tuple[np.int32, int, int]:
    largest, zeros, reference_zeros = np.int32(0), 0, 0
    rows, columns = reference.shape
    width = len(ours[0]) // len(ours[1])
    entries = np.empty(STRETCH, np.uint32)
    for row in range(rows):
        for start in range(0, columns, STRETCH):
            stop = min(start + STRETCH, columns)
            first = row * columns + start
            _look_up(codes[first // width : (first + stop - start) // width], table, ours[1])
            values, wanted = ours[0][: stop - start], theirs[0][: stop - start]
            _widen(reference[row, start:stop], shift, theirs[1])
            group = start // size
            until = (group + 1) * size - start
            at = 0
            while at < len(values):
                _multiply(values[at:until], scales[row, group])
                at, until, group = until, until + size, group + 1
            _add_up(values, wanted, row, first, block, *found)
            largest = max(largest, _largest(values, wanted))
            zeros += int(_few_zeros(values))
            reference_zeros += int(_few_zeros(wanted))
            if rounds:  # in the place of the decoded values
                group = first // rounds
                until = (group + 1) * rounds - first
                at = 0
                while at < len(values):
                    _nearest(wanted[at:until], steps[group], levels, entries, values[at:until])
                    _multiply(values[at:until], kept[group])
                    at, until, group = until, until + rounds, group + 1
                _add_up(values, wanted, row, first, block, *rounded)
    return largest, zeros, reference_zeros


@adding
def _add_up(
    values: np.ndarray,
    reference: np.ndarray,
    row: int,
    first: int,
    size: int,
    sums: np.ndarray,
    blocks: np.ndarray,
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
        blocks[0, block] += signal
        blocks[1, block] += noise
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
def _largest(values: np.ndarray, reference: np.ndarray) -> np.int32:
    largest = np.int32(0)
    for at in range(len(values)):
        error = np.float32(values[at] - reference[at])
        largest = max(largest, np.int32(error.view(np.int32) & MAGNITUDE))
    return largest


@machine_code
def _zeros(values: np.ndarray) -> int:
    zeros = 0
    for start in range(0, len(values), STRETCH):
        zeros += int(_few_zeros(values[start : start + STRETCH]))
    return zeros


@machine_code
def _few_zeros(values: np.ndarray) -> np.int32:
    few = np.int32(0)
    for at in range(len(values)):
        few += np.int32(values[at] == ZERO)
    return few


@machine_code
def _look_up(codes: np.ndarray, table: np.ndarray, found: np.ndarray) -> None:
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
def _multiply(values: np.ndarray, factor: float) -> None:
    for at in range(len(values)):
        values[at] *= factor


@machine_code
def _largest_of_blocks(words: np.ndarray, shift: int, found: np.ndarray) -> None:
    for block in range(words.shape[0]):
        largest = np.int32(0)
        for at in range(words.shape[1]):
            largest = max(largest, np.int32((np.int32(words[block, at]) << shift) & MAGNITUDE))
        found[block, 0] = largest


@machine_code
def _nearest_of_blocks(blocks: np.ndarray, steps: np.ndarray, table: np.ndarray, found: np.ndarray) -> None:
    entries = np.empty(blocks.shape[1], np.uint32)
    for block in range(blocks.shape[0]):
        _nearest(blocks[block], steps[block, 0], table, entries, found[block])


@machine_code
def _nearest(values: np.ndarray, step: float, table: np.ndarray, entries: np.ndarray, found: np.ndarray) -> None:
    last, middle = np.float32(len(table) - 1), np.float32(len(table) // 2 + 0.5)
    for at in range(len(values)):
        entry = np.float32(np.float32(values[at] * step) + middle)
        entry = entry if entry > ZERO else ZERO  # NaN too
        entries[at] = np.int32(entry if entry < last else last)
    for at in range(len(values)):
        found[at] = table[entries[at]]
