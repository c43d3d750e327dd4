"""Sparse tensors of an ONNX model: some values, where they belong, and zeros everywhere else.

    part     type                stored shape   order
    values   any of whole bytes  [NNZ]          that of their places
    indices  INT64               [NNZ]          places in the flat tensor (row-major), ascending, none twice
    indices  INT64               [NNZ, rank]    the same, an index for each dimension

Formula: w.flat[indices[i]] = values[i], or w[indices[i, 0], ..., indices[i, rank - 1]] = values[i]; else 0.
Source: onnx 1.23, onnx.proto (`SparseTensorProto`), checker.cc (`check_sparse_tensor`).

As strict as the checker, external indices too. Values of 4 and 2 bits are refused: onnxruntime reads none either.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from operator import ge
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.containers import files
from pytest_quantcheck.containers.onnx_tensors import FILLED_LIMIT, MAX_DIMENSIONS, Constant, Data
from pytest_quantcheck.dtypes import BITS
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.tensor import StoredTensor

if TYPE_CHECKING:
    import torch

PIECE = 1 << 13
PIECES = 1 << 8  # indices written as varints are passed over once for each piece


class Sparse(NamedTuple):
    """A `Source` over the dense tensor; `marks` are the places at which pieces of `step` indices begin."""

    values: StoredTensor
    indices: StoredTensor
    shape: tuple[int, ...]
    step: int
    marks: tuple[int, ...]

    @property
    def width(self) -> int:
        """The bytes of one value."""
        return BITS[self.values.dtype] // 8

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the dense tensor."""
        width = self.width
        first, last = start // width, -(-stop // width)
        found = bytearray((last - first) * width)
        for low, high in self._pieces(first, last):
            places = _places(self.indices, self.shape, low, high)
            begin, end = bisect_left(places, first), bisect_left(places, last)
            raw = self._raw(low + begin, low + end)
            for at, place in enumerate(places[begin:end]):
                to = (place - first) * width
                found[to : to + width] = raw[at * width : (at + 1) * width]
        return found[start - first * width : stop - first * width]

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""
        import torch

        if stop <= start:
            return files.load(self, stored, start, stop, device)
        width, unit = self.width, BITS[stored.dtype] // 8
        first, last = start * unit // width, -(-stop * unit // width)
        found = bytearray((last - first) * width)
        cells = torch.frombuffer(found, dtype=torch.uint8).view(-1, width)
        for low, high in self._pieces(first, last):
            places = _loaded_places(self.indices, self.shape, low, high)
            begin, end = torch.searchsorted(places, torch.tensor([first, last])).tolist()
            if begin < end:
                raw = torch.frombuffer(self._raw(low + begin, low + end), dtype=torch.uint8)
                cells[places[begin:end] - first] = raw.view(-1, width)
        skipped = first * width // unit
        dense = stored._replace(offset=0)
        return files.load(files.Held(found), dense, start - skipped, stop - skipped, device)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges of indices among which those of the places `first` up to `last` are."""
        begin = max(0, bisect_right(self.marks, first) - 1)
        for piece in range(begin, bisect_left(self.marks, last)):
            low = piece * self.step
            yield low, min(low + self.step, self.values.elements)

    def _raw(self, start: int, stop: int) -> bytearray:
        at = self.values.offset
        return self.values.source.read(at + start * self.width, at + stop * self.width)


def constant(tensor: Any, name: str, data: Data) -> Constant:
    """Return a `SparseTensorProto` of the skeleton as a constant of its dense shape, its indices beside it.

    Raises `FormatError` where it contradicts itself.
    """
    shape = tuple(tensor.dims)
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"has {len(shape):,} dimensions (limit {MAX_DIMENSIONS})", tensor=name)
    if not shape or min(shape) <= 0 or prod(shape) > FILLED_LIMIT:
        raise FormatError(f"is sparse with the shape {list(shape)} (limit {FILLED_LIMIT:,} values)", tensor=name)
    if not tensor.HasField("values"):
        raise FormatError("is sparse and has no values", tensor=name)
    values = data.constant(tensor.values, name, alone=True)
    if values.type is None or values.stored is None or values.type.bits % 8:
        raise UnknownEncoding(f"is sparse {values.type.name if values.type else 'STRING'}, not read", tensor=name)
    if len(values.shape) != 1:
        raise FormatError(f"is sparse with values of the shape {list(values.shape)} ([NNZ])", tensor=name)
    if not tensor.HasField("indices"):
        if values.stored.elements:
            raise FormatError(f"is sparse with {values.stored.elements:,} values and no indices", tensor=name)
        return data.zeros(name, values.type, shape)
    indices = data.constant(tensor.indices, f"{name}.indices", alone=True)
    surplus = sum(size for _, size in values.stored.surplus)
    data.varints += surplus
    source = _source(values.stored, indices, shape)
    dense = StoredTensor(name, values.type.dtype, shape, values.stored.nbytes - surplus, source)
    return Constant(name, values.type, shape, dense, indices)


def _source(values: StoredTensor, indices: Constant, shape: tuple[int, ...]) -> Sparse:
    """The dense tensor, its indices checked."""
    count, found = values.elements, indices.stored
    if found is None or indices.type is None or indices.type.name != "INT64":
        what = f"are {indices.type.name if indices.type else 'STRING'}, the indices of a sparse tensor (INT64)"
        raise FormatError(what, tensor=indices.name)
    if indices.shape not in ((count,), (count, len(shape))):
        wanted = f"[{count}] or [{count}, {len(shape)}]"
        raise FormatError(f"{list(indices.shape)} are no indices of {count:,} values ({wanted})", tensor=indices.name)
    step = max(1, PIECE // prod(found.shape[1:]), -(-count // PIECES))
    return Sparse(values, found, shape, step, tuple(_marks(found, shape, step)))


def _marks(indices: StoredTensor, shape: tuple[int, ...], step: int) -> Iterator[int]:
    """The first place of each piece of indices; raises `FormatError` where they leave the shape or do not ascend."""
    count, before = indices.shape[0], -1
    for start in range(0, count, step):
        places = _places(indices, shape, start, min(start + step, count))
        if places[0] <= before or any(map(ge, places, islice(places, 1, None))):
            what = f"do not ascend among indices {start:,} to {start + len(places):,} (sorted, none twice)"
            raise FormatError(what, tensor=indices.name)
        before = places[-1]
        yield places[0]


def _places(indices: StoredTensor, shape: tuple[int, ...], start: int, stop: int) -> Sequence[int]:
    """Some indices as places in the flat tensor."""
    sizes = _sizes(indices, shape)
    row = 8 * len(sizes)
    raw = indices.source.read(indices.offset + start * row, indices.offset + stop * row)
    numbers = struct.unpack(f"<{len(raw) // 8}q", raw)
    places: Sequence[int] = (0,) * (stop - start)
    for at, size in enumerate(sizes):
        column = numbers[at :: len(sizes)]
        if not 0 <= min(column) <= max(column) < size:
            what = f"are {min(column):,} to {max(column):,} along {size:,} of {list(shape)}: out of range"
            raise FormatError(what, tensor=indices.name)
        places = column if at == 0 else [place * size + index for place, index in zip(places, column, strict=True)]
    return places


def _loaded_places(indices: StoredTensor, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """The same on torch: int64 [stop - start]."""
    sizes = _sizes(indices, shape)
    columns = indices.load(start * len(sizes), stop * len(sizes)).view(-1, len(sizes))
    places = columns[:, 0]
    for at, size in enumerate(sizes[1:], 1):
        places = places * size + columns[:, at]
    return places.contiguous()


def _sizes(indices: StoredTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions that an index has."""
    return shape if len(indices.shape) == 2 else (prod(shape),)
