"""The protobuf of an ONNX model, read without its weights: what is left is small, whatever the model's size.

A field is a varint `number << 3 | wire type`, then: 0 a varint; 1 eight bytes; 2 a length and as many bytes; 5 four
bytes. In place of the values of a tensor its `raw_data` says where they are: `PLACE`, the number of the field that held
them, its first byte in the file and its last. The `onnx` package parses the rest.
Source: onnx 1.23, onnx.proto; protobuf.dev/programming-guides/encoding.

Stricter than the parsers: a message that stands twice where there is one (they merge the two), values in two fields.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pytest_quantcheck.containers.files import File
from pytest_quantcheck.errors import FormatError

PLACE = struct.Struct("<BQQ")
GRAPH_LIMIT = (2 << 30) - 1
SKELETON_LIMIT = 128 << 20
MAX_DEPTH = 64
PIECE = 1 << 20

# The fields that hold a message which may hold tensors, by message; those in `ONCE` come at most once in theirs.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
# Names, which have to be UTF-8: the parser of the package lets others through as bytes.
NAMES = {"node": (1, 2, 3, 4, 7), "attribute": (1,), "tensor": (8,), "function": (1, 10), "entry": (1, 2)}
ONCE = {("model", 7), ("attribute", 5), ("attribute", 6), ("attribute", 22), ("sparse", 1), ("sparse", 2)}
VALUES = {4: "float_data", 5: "int32_data", 7: "int64_data", 9: "raw_data", 10: "double_data", 11: "uint64_data"}
RAW = 9


class Field(NamedTuple):
    """One field: where it begins, where its content is."""

    number: int
    wire: int
    begin: int
    start: int
    stop: int


class _Reader:
    """Bytes of a file, a piece at a time."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.start = 0
        self.piece = b""
        self.kept = 0

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes that are kept; the sum of them is limited."""
        self.kept += stop - start
        if self.kept > SKELETON_LIMIT:
            raise FormatError(f"graph of more than {SKELETON_LIMIT:,} bytes without its weights (limit)")
        if stop - start > PIECE:
            return bytes(self.file.read(start, stop))
        self._hold(start, stop)
        return self.piece[start - self.start : stop - self.start]

    def _hold(self, start: int, stop: int) -> None:
        if not self.start <= start <= stop <= self.start + len(self.piece):
            self.start = start
            self.piece = bytes(self.file.read(start, min(start + PIECE, self.file.size)))

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """Return the number at a byte, and the byte behind it."""
        self._hold(at, min(at + 10, stop))
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                raise FormatError(f"protobuf ends within a number, at byte {at:,}: truncated")
            byte = self.piece[at - self.start]
            value |= (byte & 127) << shift
            at += 1
            if byte < 128:
                return value, at
        raise FormatError(f"protobuf has a number of more than 10 bytes before byte {at:,}")


def skeleton(file: File) -> bytes:
    """Return the model as protobuf, places instead of values; raises `FormatError` where it is none."""
    if file.size > GRAPH_LIMIT:
        raise FormatError(f"graph file of {file.size:,} bytes (limit of protobuf {GRAPH_LIMIT:,})")
    return _message(_Reader(file), "model", 0, file.size, 0)


def _message(reader: _Reader, kind: str, at: int, stop: int, depth: int) -> bytes:
    if depth > MAX_DEPTH:
        raise FormatError(f"graphs nested deeper than {MAX_DEPTH} messages (limit)")
    found, seen = bytearray(), set()
    while at < stop:
        field = _field(reader, at, stop)
        at = field.stop
        once = "values" if kind == "tensor" and field.number in VALUES else field.number
        if once in seen and (once == "values" or (kind, field.number) in ONCE):
            raise FormatError(f"{kind} at byte {field.begin:,} has field {field.number} twice (readers differ)")
        seen.add(once)
        found += _content(reader, kind, field, depth)
    return bytes(found)


def _content(reader: _Reader, kind: str, field: Field, depth: int) -> bytes:
    """A field as it is kept."""
    if kind == "tensor" and field.number in VALUES:
        if field.wire != 2:
            raise FormatError(f"values at byte {field.begin:,} are not packed")
        return _prefixed(RAW, PLACE.pack(field.number, field.start, field.stop))
    below = MESSAGES[kind].get(field.number)
    if below is None:
        if field.number in NAMES.get(kind, ()):
            _check_name(reader.read(field.start, field.stop), field)
        return reader.read(field.begin, field.stop)
    if field.wire != 2:
        raise FormatError(f"field {field.number} of {kind} at byte {field.begin:,} is no message")
    return _prefixed(field.number, _message(reader, below, field.start, field.stop, depth + 1))


def _check_name(raw: bytes, field: Field) -> None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"the name at byte {field.start:,} is not UTF-8") from None


def _prefixed(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _field(reader: _Reader, at: int, stop: int) -> Field:
    begin = at
    key, at = reader.varint(at, stop)
    number, wire = key >> 3, key & 7
    if wire == 0:
        start, (_, end) = at, reader.varint(at, stop)
    elif wire == 2:
        length, start = reader.varint(at, stop)
        end = start + length
    elif wire in (1, 5):
        start, end = at, at + (8 if wire == 1 else 4)
    else:
        raise FormatError(f"not an ONNX file (protobuf has wire type {wire} at byte {begin:,})")
    if end > stop or not number:
        raise FormatError(f"field {number} at byte {begin:,} reaches to byte {end:,} of {stop:,}: truncated or no ONNX")
    return Field(number, wire, begin, start, end)
