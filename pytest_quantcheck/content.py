"""Whether two tensors hold the same values, told by samples, however they are written and whichever way round.

    written alike                 the first and last bytes of all parts are equal
    plain, one dtype, turned      equal where sampled rows of one cross sampled columns of the other
    anything else                 decoded, on the same sample: SQNR at the level of the encodings

The sample are three windows of rows and three of columns: the first, the middle, the last. It is bounded whatever the
tensor's size; tensors that agree in it and differ elsewhere are not told apart. Constant tensors are nobody's copy.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from itertools import chain
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import dtypes
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

EDGE = 1 << 16
WINDOW = 32
FLOOR_DB = 6.0  # of an encoding that has none of its own
BOTH_DB = 3.0  # the noise of two encodings adds up

Window = tuple[int, int]


class Likeness(NamedTuple):
    """How alike two samples are: Pearson's correlation, and the SQNR in dB of the second as a reading of the first."""

    correlation: float
    sqnr_db: float


def fits(one: LogicalTensor, other: LogicalTensor) -> bool:
    """Whether the shapes agree, one of two matrices turned if need be."""
    return one.shape == other.shape or is_turned(one, other)


def is_turned(one: LogicalTensor, other: LogicalTensor) -> bool:
    """Whether one has the shape of the other's transpose; a square matrix is turned where an exporter turned it."""
    if len(one.shape) != 2 or one.shape != other.shape[::-1]:
        return False
    return one.shape != other.shape or one.transposed != other.transposed


def same_values(one: LogicalTensor, other: LogicalTensor, *, decoded: bool = True) -> bool | None:
    """Return whether two tensors of fitting shapes hold the same values, None where that cannot be told.

    That is so where values would have to be decoded, and torch is not there or `decoded` is False; and where a tensor
    has no values at all.
    """
    try:
        stored = _stored_alike(one, other)
        if stored is not None or not decoded or not (one.decoder and other.decoder):
            return stored
        if importlib.util.find_spec("torch") is None and not (one.cells and other.cells):
            return None
        return likeness(one, other, turned=is_turned(one, other)).sqnr_db >= _level_db(one, other)
    except NotDecodable:
        return None


def _stored_alike(one: LogicalTensor, other: LogicalTensor) -> bool | None:
    """What the bytes tell by themselves, None where they have to be decoded."""
    turned = is_turned(one, other)
    if not turned and _written_alike(one, other):
        if _same_edges(one, other):
            return not _is_constant(one)
        return None if one.quantized else False
    if turned and _can_be_crossed(one, other):
        rows, columns = windows_of(one)
        crossed = _crossing(one, rows, columns)
        return len(set(chain(*crossed))) > 1 and crossed == list(zip(*_crossing(other, columns, rows), strict=True))
    return None


def likeness(one: LogicalTensor, other: LogicalTensor, *, turned: bool) -> Likeness:
    """Return how alike samples of two tensors are, the second turned first."""
    rows, columns = windows_of(one)
    first = _sample(one, rows, columns)
    second = [*zip(*_sample(other, columns, rows), strict=True)] if turned else _sample(other, rows, columns)
    return compared([*chain(*first)], [*chain(*second)])


def compared(first: list[float], second: list[float]) -> Likeness:
    """Return how alike two samples of one size are; a constant one correlates with nothing."""
    means = [math.fsum(values) / len(values) for values in (first, second)]
    deviations = [[value - mean for value in values] for values, mean in zip((first, second), means, strict=True)]
    spread = math.sqrt(math.prod(sum(value * value for value in values) for values in deviations))
    correlation = sum(map(mul, *deviations)) / spread if spread > 0 else 0.0
    signal, noise = sum(value * value for value in first), sum(map(_squared_difference, first, second))
    if not signal > 0 or math.isnan(noise) or not spread > 0:
        return Likeness(correlation, -math.inf)
    return Likeness(correlation, 10 * math.log10(signal / noise) if noise else math.inf)


def _squared_difference(one: float, other: float) -> float:
    return (one - other) ** 2


def _sample(tensor: LogicalTensor, rows: Sequence[Window], columns: Sequence[Window]) -> list[Sequence[float]]:
    """The values where windows of rows and of columns cross, row by row; with torch only where they need it."""
    cells = tensor.cells
    if cells is None:
        return [row.tolist() for row in decoded_sample(tensor, rows, columns)]
    each = (row for window in rows for row in range(*window))
    return [[*chain(*(cells(tensor, row, *window) for window in columns))] for row in each]


def decoded_sample(
    tensor: LogicalTensor, rows: Sequence[Window], columns: Sequence[Window], device: str = "cpu"
) -> torch.Tensor:
    """Return the values where windows of rows and of columns cross, as float32 `[rows, columns]`."""
    import torch

    found = [
        torch.cat([window[:, start:stop] for start, stop in columns], dim=1)
        for window in (tensor.decode(start, stop, device) for start, stop in rows)
    ]
    return torch.cat(found)


def windows(size: int, length: int = WINDOW) -> list[Window]:
    """Return the first, the middle and the last indices of so many, in windows that do not overlap.

    >>> windows(1000), windows(40)
    ([(0, 32), (484, 516), (968, 1000)], [(0, 40)])
    """
    if size < 3 * length:
        return [(0, size)]
    middle = (size - length) // 2
    return [(0, length), (middle, middle + length), (size - length, size)]


def windows_of(tensor: LogicalTensor) -> tuple[list[Window], list[Window]]:
    """Return the windows of rows and those of columns that are looked at; of a transpose, the other way round."""
    return windows(tensor.rows), windows(tensor.columns)


def _level_db(one: LogicalTensor, other: LogicalTensor) -> float:
    """The SQNR that two readings of the same values have at least."""
    both = BOTH_DB if one.quantized and other.quantized else 0.0
    return min(FLOOR_DB if tensor.floor_db is None else tensor.floor_db for tensor in (one, other)) - both


def _written_alike(one: LogicalTensor, other: LogicalTensor) -> bool:
    return one.scheme == other.scheme and _written(one) == _written(other)


def _written(tensor: LogicalTensor) -> list[tuple[str, str, int]]:
    return [(part.name, part.stored.dtype, part.stored.nbytes) for part in _parts(tensor)]


def _parts(tensor: LogicalTensor) -> list[Part]:
    """The parts that decide the values: records beside them name the tensor."""
    return [part for part in tensor.parts if part.kind != "bookkeeping"]


def _same_edges(one: LogicalTensor, other: LogicalTensor) -> bool:
    pairs = zip(_parts(one), _parts(other), strict=True)
    return all(_edges(first.stored) == _edges(second.stored) for first, second in pairs)


def _edges(stored: StoredTensor) -> list[bytearray]:
    size = stored.value_bytes
    ranges = ((0, min(EDGE, size)), (max(0, size - EDGE), size))
    return [stored.source.read(stored.offset + start, stored.offset + stop) for start, stop in ranges]


def _is_constant(tensor: LogicalTensor) -> bool:
    """Whether all values, or all rows, look the same."""
    stored = tensor.stored
    widths = (dtypes.BITS.get(stored.dtype, 8) // 8 or 1, stored.value_bytes // max(1, tensor.rows) or 1)
    return any(all(_repeats(edge, width) for edge in _edges(stored)) for width in widths)


def _repeats(raw: bytearray, width: int) -> bool:
    return raw == (raw[:width] * -(-len(raw) // width))[: len(raw)] and len(raw) > width


def _can_be_crossed(one: LogicalTensor, other: LogicalTensor) -> bool:
    """Whether elements of both can be read one by one: plain ones of whole bytes, where they are."""
    first, second = one.stored, other.stored
    plain = not one.quantized and not other.quantized and first.dtype == second.dtype
    return (
        plain
        and len(one.shape) == 2
        and all(s.nbytes * 8 == s.elements * dtypes.BITS[s.dtype] for s in (first, second))
    )


def _crossing(tensor: LogicalTensor, rows: list[Window], columns: list[Window]) -> list[tuple[bytes, ...]]:
    """The elements of a plain matrix where windows cross, row by row."""
    stored, width = tensor.stored, dtypes.BITS[tensor.stored.dtype] // 8
    found = []
    for row in (row for window in rows for row in range(*window)):
        at = stored.offset + row * tensor.columns * width
        raw = b"".join(stored.source.read(at + start * width, at + stop * width) for start, stop in columns)
        found.append(tuple(raw[start : start + width] for start in range(0, len(raw), width)))
    return found
