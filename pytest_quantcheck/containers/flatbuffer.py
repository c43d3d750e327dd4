"""A flatbuffer, read with pread: tables, vectors and strings by offset, every one of them inside the file.

    root      u32 at byte 0: where the root table is; bytes 4 to 8 name the format
    table     i32: distance back to its vtable; then the fields
    vtable    u16 its bytes, u16 bytes of the table, then for every field u16: its distance from the table, 0 if absent
    vector    u32 length, then the elements; a string is a vector of bytes, a table in a field or vector a u32 distance

Source: FlatBuffers 25.12, docs/source/internals.md. All numbers are little-endian.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pytest_quantcheck.containers.files import Readable
from pytest_quantcheck.errors import FormatError

PAGE = 1 << 16
PAGES = 256
VECTOR_LIMIT = 1_000_000
NAME_LIMIT = 1 << 16


class Vector(NamedTuple):
    """Where the elements of a vector are, and how many."""

    start: int
    length: int


class Flatbuffer:
    """One file; a few pages of it are kept."""

    def __init__(self, file: Readable) -> None:
        self.file = file
        self._page = lru_cache(maxsize=PAGES)(self._read_page)

    def _read_page(self, number: int) -> bytes:
        return bytes(self.file.read(number * PAGE, min(number * PAGE + PAGE, self.file.size)))

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes; what reaches out of the file is a `FormatError`."""
        if start < 0 or start + count > self.file.size:
            raise FormatError(
                f"flatbuffer points to bytes {start:,} to {start + count:,}, the file has {self.file.size:,}"
            )
        first, last = start // PAGE, (start + count - 1) // PAGE
        pages = b"".join(self._page(number) for number in range(first, last + 1))
        return pages[start - first * PAGE :][:count]

    def number(self, at: int, width: int, *, signed: bool = False) -> int:
        """Return the number at a byte."""
        return int.from_bytes(self.read(at, width), "little", signed=signed)

    def follow(self, at: int) -> int:
        """Return where the distance at a byte points to."""
        return at + self.number(at, 4)

    def root(self) -> Table:
        """Return the root table."""
        return Table(self, self.follow(0))


class Table:
    """One table: its fields by number."""

    def __init__(self, buffer: Flatbuffer, at: int) -> None:
        self.buffer, self.at = buffer, at
        self._vtable = at - buffer.number(at, 4, signed=True)
        self._vtable_size = buffer.number(self._vtable, 2)
        self._size = buffer.number(self._vtable + 2, 2)
        if self._vtable_size < 4 or self._vtable_size % 2 or self._size < 4:
            raise FormatError(f"flatbuffer table at byte {at:,} has a broken vtable")
        buffer.read(at, self._size)

    def _field(self, number: int, width: int) -> int | None:
        place = 4 + 2 * number
        offset = self.buffer.number(self._vtable + place, 2) if place + 2 <= self._vtable_size else 0
        if offset and offset + width > self._size:
            raise FormatError(f"flatbuffer table at byte {self.at:,} has no room for its field {number}")
        return self.at + offset if offset else None

    def number(self, field: int, width: int, default: int = 0, *, signed: bool = False) -> int:
        """Return a scalar field."""
        at = self._field(field, width)
        return default if at is None else self.buffer.number(at, width, signed=signed)

    def table(self, field: int) -> Table | None:
        """Return a table, None where it is absent."""
        at = self._field(field, 4)
        return None if at is None else Table(self.buffer, self.buffer.follow(at))

    def vector(self, field: int, width: int) -> Vector:
        """Return where a vector of elements of `width` bytes is; empty where it is absent."""
        at = self._field(field, 4)
        if at is None:
            return Vector(0, 0)
        start = self.buffer.follow(at)
        length = self.buffer.number(start, 4)
        if start + 4 + length * width > self.buffer.file.size:
            raise FormatError(f"flatbuffer vector at byte {start:,} claims {length:,} elements: truncated")
        return Vector(start + 4, length)

    def numbers(self, field: int, width: int, *, limit: int = 64) -> tuple[int, ...]:
        """Return a short vector of signed integers."""
        start, length = self.vector(field, width)
        if length > limit:
            raise FormatError(f"flatbuffer vector of {length:,} numbers (limit {limit})")
        raw = self.buffer.read(start, length * width) if length else b""
        return tuple(int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width))

    def tables(self, field: int) -> list[Table]:
        """Return a vector of tables."""
        start, length = self.vector(field, 4)
        if length > VECTOR_LIMIT:
            raise FormatError(f"flatbuffer vector of {length:,} tables (limit {VECTOR_LIMIT:,})")
        return [Table(self.buffer, self.buffer.follow(start + 4 * at)) for at in range(length)]

    def text(self, field: int) -> str:
        """Return a string, empty where it is absent."""
        start, length = self.vector(field, 1)
        if length > NAME_LIMIT:
            raise FormatError(f"flatbuffer string of {length:,} bytes (limit {NAME_LIMIT:,})")
        try:
            return self.buffer.read(start, length).decode("utf-8") if length else ""
        except UnicodeDecodeError:
            raise FormatError(f"flatbuffer string at byte {start:,} is not UTF-8") from None
