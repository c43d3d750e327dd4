"""Loops that take codes out of integer words, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pytest_quantcheck.compiled.machine import machine_code

TILE = 16  # rows and columns of words that are turned at once
EIGHT = 8  # codes of `bits` bits fill `bits` bytes


def turn(words: torch.Tensor) -> torch.Tensor:
    """Return a matrix turned; columns may have been cut out of a wider one.

    words  # (rows, columns) int32
    ->     # (columns, rows)
    """
    rows, columns = words.shape
    stride = words.stride(0)
    flat = words.as_strided((max(0, (rows - 1) * stride + columns),), (1,))
    found = torch.empty((columns, rows), dtype=torch.int32)
    _turn(flat.numpy(), stride, found.numpy())
    return found


def unpack(raw: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of every row, each row a stream of its own, lowest bits first; at most 8 bits.

    raw  # (rows, bytes) uint8
    ->   # (rows, count) uint8
    """
    found = torch.empty((len(raw), count), dtype=torch.uint8)
    _unpack(raw.contiguous().numpy(), bits, found.numpy())
    return found


def fields(words: torch.Tensor, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Return the fields of words as rows: row `j * len(order) + i` has field `order[i]` of each word of row `j`.

    words  # (rows, columns) int32
    ->     # (rows * len(order), columns) uint8
    """
    found = torch.empty((len(words) * len(order), words.shape[1]), dtype=torch.uint8)
    _fields(words.contiguous().numpy(), bits, np.array(order, np.int32), found.numpy())
    return found


def place_scattered(values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> None:
    """Subtract the zero point of each column's group and multiply by its scale, in place.

    values         # (rows, columns) float32
    zeros, scales  # (rows, groups) float32
    index          # (columns,) the group of each column, within range
    """
    groups = index.to(torch.int32).numpy().view(np.uint32)
    _place_scattered(values.numpy(), zeros.contiguous().numpy(), scales.contiguous().numpy(), groups)


@machine_code
def _turn(words: np.ndarray, stride: int, found: np.ndarray) -> None:
    columns, rows = found.shape
    tile = np.empty((TILE, TILE), np.int32)  # lines that lie a power of two apart share few places of the cache
    for left in range(0, columns, TILE):
        right = min(left + TILE, columns)
        for top in range(0, rows, TILE):
            bottom = min(top + TILE, rows)
            for row in range(top, bottom):
                line, kept = words[row * stride + left : row * stride + right], tile[row - top]
                for at in range(len(line)):
                    kept[at] = line[at]
            for column in range(left, right):
                line = found[column, top:bottom]
                for at in range(len(line)):
                    line[at] = tile[at, column - left]


@machine_code
def _unpack(raw: np.ndarray, bits: int, found: np.ndarray) -> None:
    rows, count = found.shape
    mask, half = np.uint32((1 << bits) - 1), np.uint64(4 * bits)
    one, two, three = np.uint32(bits), np.uint32(2 * bits), np.uint32(3 * bits)
    whole = count // EIGHT
    for row in range(rows):
        for at in range(whole):
            word = np.uint64(0)
            for byte in range(bits):
                word |= np.uint64(raw[row, at * bits + byte]) << np.uint64(8 * byte)
            low, high = np.uint32(word), np.uint32(word >> half)
            codes = found[row, at * EIGHT : at * EIGHT + EIGHT]
            codes[0], codes[1] = low & mask, (low >> one) & mask
            codes[2], codes[3] = (low >> two) & mask, (low >> three) & mask
            codes[4], codes[5] = high & mask, (high >> one) & mask
            codes[6], codes[7] = (high >> two) & mask, (high >> three) & mask
        for at in range(whole * EIGHT, count):
            bit = at * bits
            pair = np.uint32(raw[row, bit // 8])
            if bit // 8 + 1 < raw.shape[1]:
                pair |= np.uint32(raw[row, bit // 8 + 1]) << np.uint32(8)
            found[row, at] = (pair >> np.uint32(bit % 8)) & mask


@machine_code
def _fields(words: np.ndarray, bits: int, order: np.ndarray, found: np.ndarray) -> None:
    mask = np.int32((1 << bits) - 1)
    for row in range(words.shape[0]):
        ours = words[row]
        for field in range(len(order)):
            shift = np.int32(order[field] * bits)
            codes = found[row * len(order) + field]
            for at in range(len(ours)):
                codes[at] = (ours[at] >> shift) & mask


@machine_code
def _place_scattered(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray) -> None:
    for row in range(values.shape[0]):
        ours = values[row]
        for at in range(len(ours)):
            group = index[at]
            ours[at] = (ours[at] - zeros[row, group]) * scales[row, group]
