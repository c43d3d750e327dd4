"""Storages: runs of bytes that several tensors may look at, through strides, in either byte order."""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.containers import files
from pytest_quantcheck.errors import FormatError

if TYPE_CHECKING:
    import torch

    from pytest_quantcheck.tensor import StoredTensor

CHUNK = 8 << 20
PIECE_LIMIT = 1 << 16  # contiguous pieces of one view
PIECES_LIMIT = 1 << 17  # of all views of a file that are in pieces
SPAN = 4096  # elements that are read though few of them are wanted


@dataclass(frozen=True)
class Storage:
    """A `Source` over one storage of a file; its checksum is verified before its values are used.

    `crc` is None where the file has none.
    """

    file: files.Readable
    key: str
    start: int
    size: int
    crc: int | None = None

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the storage; where it is read whole, they are held to the checksum."""
        if not 0 <= start <= stop <= self.size:
            raise FormatError(f"bytes {start:,} to {stop:,} of storage `{self.key}`, which has {self.size:,}")
        content = self.file.read(self.start + start, self.start + stop)
        if len(content) == self.size:
            self._check(zlib.crc32(content))
        return content

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements of a tensor on `device`, the whole storage verified the first time."""
        self.verify()
        return files.load(self, stored, start, stop, device)

    def verify(self) -> None:
        """Raise `FormatError` where the checksum is wrong; reads the storage once."""
        self._check(self._sum)

    @cached_property
    def _sum(self) -> int:
        found = 0
        for start in range(0, self.size if self.crc is not None else 0, CHUNK):
            stop = min(start + CHUNK, self.size)
            found = zlib.crc32(self.file.read(self.start + start, self.start + stop), found)
        return found

    def _check(self, found: int) -> None:
        if self.crc is not None and found != self.crc:
            what = f"storage `{self.key}` has the checksum {found:08x}, its file says {self.crc:08x}: damaged"
            raise FormatError(what, file=self.file.path)


class View(NamedTuple):
    """A `Source` over a tensor that is not one little-endian run: reads as if it were, in row-major order.

    `base` and `strides` count bytes; `swap` is the width of the numbers whose bytes are turned round, 1 for none.
    """

    storage: Storage
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    width: int
    swap: int = 1

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes `start` up to `stop` of the row-major tensor."""
        first, last = start // self.width, -(-stop // self.width)
        image = bytearray((last - first) * self.width)
        at = 0
        for box in boxes(self.shape, first, last):
            sizes = tuple(high - low for low, high in box)
            base = self.base + sum(low * step for (low, _), step in zip(box, self.strides, strict=True))
            at += self._copy(base, sizes, memoryview(image)[at:])
        if self.swap > 1:
            image = swapped(image, self.swap)
        return image[start - first * self.width : stop - first * self.width]

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements on `device`, the whole storage verified the first time."""
        self.storage.verify()
        return files.load(self, stored, start, stop, device)

    def _copy(self, base: int, sizes: tuple[int, ...], image: memoryview) -> int:
        """Gather one box at the start of `image`; return its length."""
        count = _prod(sizes)
        if not count:
            return 0
        steps = row_major(sizes)
        for low, part in _pieces(sizes, self.strides, self.width):
            source = base + sum(at * step for at, step in zip(low, self.strides, strict=True))
            target = sum(at * step for at, step in zip(low, steps, strict=True))
            self._gather(source, part, steps, image[target * self.width : count * self.width])
        return count * self.width

    def _gather(self, base: int, sizes: tuple[int, ...], steps: tuple[int, ...], image: memoryview) -> None:
        """Copy a box whose bytes lie close together, along its longest dimension at once."""
        span = sum((size - 1) * step for size, step in zip(sizes, self.strides, strict=True)) + self.width
        content = memoryview(self.storage.read(base, base + span))
        longest = max(range(len(sizes)), key=sizes.__getitem__, default=None)
        outer = tuple(1 if at == longest else size for at, size in enumerate(sizes))
        count, stride, step = (
            (1, 0, 1) if longest is None else (sizes[longest], self.strides[longest], steps[longest] * self.width)
        )
        for index in _indices(outer):
            source = sum(at * step for at, step in zip(index, self.strides, strict=True))
            target = sum(at * step for at, step in zip(index, steps, strict=True)) * self.width
            if stride == step == self.width:
                image[target : target + count * step] = content[source : source + count * step]
                continue
            for byte in range(self.width):
                one = content[source + byte :: stride][:count] if stride else bytes([content[source + byte]]) * count
                image[target + byte : target + byte + (count - 1) * step + 1 : step] = one


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield index ranges that together are elements `start` up to `stop` of a row-major tensor, in order.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 1), (2, 4)), ((1, 2), (0, 4)), ((2, 3), (0, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = _prod(shape[1:])
    first, last = -(-start // row), stop // row
    if start % row:
        end = min(stop, first * row)
        for box in boxes(shape[1:], start % row, end - (first - 1) * row):
            yield ((first - 1, first), *box)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if last >= first and stop % row:
        for box in boxes(shape[1:], 0, stop % row):
            yield ((last, last + 1), *box)


def _pieces(
    sizes: tuple[int, ...], strides: tuple[int, ...], width: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield parts of a box, as start and sizes, whose bytes lie close enough together to be read at once."""
    waiting = [((0,) * len(sizes), sizes)]
    while waiting:
        low, part = waiting.pop()
        count = _prod(part)
        reach = [(size - 1) * step for size, step in zip(part, strides, strict=True)]
        span = sum(reach) // width + 1
        if span <= SPAN or (span <= 4 * count and span * width <= CHUNK):
            yield low, part
            continue
        widest = max(range(len(part)), key=reach.__getitem__)
        half = part[widest] // 2
        for offset, size in ((half, part[widest] - half), (0, half)):
            start = tuple(at + offset if dim == widest else at for dim, at in enumerate(low))
            waiting.append((start, tuple(size if dim == widest else old for dim, old in enumerate(part))))


def _indices(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for index in _indices(sizes[:-1]):
        for at in range(sizes[-1]):
            yield (*index, at)


def swapped(content: bytearray, width: int) -> bytearray:
    """Return numbers of `width` bytes in the other byte order.

    >>> bytes(swapped(bytearray(b"abcd"), 2))
    b'badc'
    """
    turned = bytearray(len(content))
    for byte in range(width):
        turned[byte::width] = content[width - 1 - byte :: width]
    return turned


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are those of a row-major tensor; dimensions of one element have no say."""
    return all(size == 1 or step == wanted for size, step, wanted in zip(shape, strides, row_major(shape), strict=True))


def runs(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the runs of elements that a view looks at, each element once, counted from the first.

    Expanded dimensions (stride 0) look at one element. Raises `FormatError` for a view that overlaps itself or that is
    in more than `PIECE_LIMIT` pieces.

    >>> runs((3, 4), (1, 3)), runs((2, 2), (4, 1)), runs((5, 2), (0, 1))
    ([(0, 12)], [(0, 2), (4, 6)], [(0, 2)])
    """
    dims = sorted((step, size) for size, step in zip(shape, strides, strict=True) if size > 1 and step)
    length, reach = 1, 0
    outer: list[tuple[int, int]] = []
    for step, size in dims:
        if step <= reach:
            raise FormatError("is a view whose rows overlap: not read")
        if step == length and not outer:
            length *= size
        else:
            outer.append((step, size))
        reach += step * (size - 1)
    if _prod(tuple(size for _, size in outer)) > PIECE_LIMIT:
        raise FormatError(f"is a view in more than {PIECE_LIMIT:,} pieces: not read")
    starts = [0]
    for step, size in outer:
        starts = [start + at * step for at in range(size) for start in starts]
    return [(start, start + length) for start in sorted(starts)]


class Coverage:
    """Which bytes of a storage are looked at: disjoint runs in order."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    def add(self, start: int, stop: int) -> int:
        """Add a run and return how many of its bytes are new.

        >>> coverage = Coverage()
        >>> coverage.add(0, 4), coverage.add(2, 6), coverage.add(0, 6), coverage.bytes
        (4, 2, 0, 6)
        """
        first, last = bisect_left(self.stops, start), bisect_right(self.starts, stop)
        old = sum(self.stops[at] - self.starts[at] for at in range(first, last))
        low = min(start, self.starts[first]) if first < last else start
        high = max(stop, self.stops[last - 1]) if first < last else stop
        self.starts[first:last], self.stops[first:last] = [low], [high]
        return high - low - old

    @property
    def bytes(self) -> int:
        """The number of bytes looked at."""
        return sum(self.stops) - sum(self.starts)


def _prod(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
