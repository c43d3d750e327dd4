"""Tensors of an ONNX model: where their values are, in the graph's file or beside it.

    raw_data                              the values, little-endian; 4 and 2 bits packed, the first in the low bits
    float_data, double_data               the same
    int32_data, int64_data, uint64_data   one varint for each value (for each packed byte): 10 bytes for a negative one
    external_data                         location beneath the folder, offset, length, checksum (SHA-1 of the file)

Tensors of one type and shape that name the same bytes beside the graph are one: tied, the second weighs nothing. Bytes
that are shared in part are refused. So is a file beside the graph that has a name outside of the folder as well (a hard
link): nobody can tell where it belongs. Its checksum is verified up to 256 MiB, and noted above.

Source: onnx 1.23, onnx.proto.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.containers import files
from pytest_quantcheck.containers.onnx_wire import PLACE, VALUES
from pytest_quantcheck.dtypes import BITS
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, StoredTensor

if TYPE_CHECKING:
    import torch

STRING = 8
EXTERNAL = 1


class Type(NamedTuple):
    """A type of the format: its name there, its bits, the dtype it is stored in, the typed field for it."""

    name: str
    bits: int
    dtype: str
    field: str


TYPES = {
    1: Type("FLOAT", 32, "F32", "float_data"),
    2: Type("UINT8", 8, "U8", "int32_data"),
    3: Type("INT8", 8, "I8", "int32_data"),
    4: Type("UINT16", 16, "U16", "int32_data"),
    5: Type("INT16", 16, "I16", "int32_data"),
    6: Type("INT32", 32, "I32", "int32_data"),
    7: Type("INT64", 64, "I64", "int64_data"),
    9: Type("BOOL", 8, "BOOL", "int32_data"),
    10: Type("FLOAT16", 16, "F16", "int32_data"),
    11: Type("DOUBLE", 64, "F64", "double_data"),
    12: Type("UINT32", 32, "U32", "uint64_data"),
    13: Type("UINT64", 64, "U64", "uint64_data"),
    14: Type("COMPLEX64", 64, "C64", "float_data"),
    15: Type("COMPLEX128", 128, "complex128", "double_data"),
    16: Type("BFLOAT16", 16, "BF16", "int32_data"),
    17: Type("FLOAT8E4M3FN", 8, "F8_E4M3", "int32_data"),
    18: Type("FLOAT8E4M3FNUZ", 8, "F8_E4M3FNUZ", "int32_data"),
    19: Type("FLOAT8E5M2", 8, "F8_E5M2", "int32_data"),
    20: Type("FLOAT8E5M2FNUZ", 8, "F8_E5M2FNUZ", "int32_data"),
    21: Type("UINT4", 4, "U8", "int32_data"),
    22: Type("INT4", 4, "U8", "int32_data"),
    23: Type("FLOAT4E2M1", 4, "U8", "int32_data"),
    24: Type("FLOAT8E8M0", 8, "F8_E8M0", "int32_data"),
    25: Type("UINT2", 2, "U8", "int32_data"),
    26: Type("INT2", 2, "U8", "int32_data"),
}

# Gaps up to this before a tensor are its alignment: writers align to a page, or to what Windows maps.
ALIGNMENT = 64 << 10


CHECKSUM_LIMIT = 256 << 20
FILLED_LIMIT = 1 << 34
MAX_DIMENSIONS = 64
PIECE = 1 << 16
CONTINUED = bytes(range(128, 256))  # the bytes of a varint that are not its last


class Constant(NamedTuple):
    """A constant of a graph. `type` is None for text, which has no values; `stored` counts bytes where they share.

    Of a sparse one, `stored` has the dense shape and the bytes of its values, and `indices` are beside it.
    """

    name: str
    type: Type | None
    shape: tuple[int, ...]
    stored: StoredTensor | None
    indices: Constant | None = None


class Varints(NamedTuple):
    """A `Source` over numbers of `width` bytes, each written as a varint."""

    file: files.File
    start: int
    stop: int
    width: int

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the numbers as they would be in `raw_data`."""
        first, last = start // self.width, -(-stop // self.width)
        number, at = self._before(first)
        found, value, shift = bytearray(), 0, 0
        mask = (1 << 8 * self.width) - 1
        while number < last and at < self.stop:
            piece = self.file.read(at, min(at + PIECE, self.stop))
            at += len(piece)
            for byte in piece:
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    if first <= number < last:
                        found += (value & mask).to_bytes(self.width, "little")
                    number, value, shift = number + 1, 0, 0
        skipped = first * self.width
        return found[start - skipped : stop - skipped]

    def _before(self, first: int) -> tuple[int, int]:
        """A number before the one that is wanted (or itself, where it is the first), and a byte of it."""
        passed, at = 0, self.start
        while at < self.stop:
            piece = self.file.read(at, min(at + PIECE, self.stop))
            count = len(piece.translate(None, CONTINUED))
            if passed + count >= first:
                break
            passed, at = passed + count, at + len(piece)
        return passed, at

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""
        return files.load(self, stored, start, stop, device)


class Repeated(NamedTuple):
    """A `Source` over numbers that a node has as an attribute, again and again where it fills a shape with them."""

    content: bytes

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the numbers."""
        width = len(self.content)
        first = start // width
        whole = self.content * (-(-stop // width) - first)
        return bytearray(whole[start - first * width : stop - first * width])

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` as a flat torch tensor on `device`."""
        return files.load(self, stored, start, stop, device)


class Data:
    """The files that hold the values of one model: the graph's own, and those beside it by their real path."""

    def __init__(self, file: files.File, folder: str) -> None:
        self.file = file
        self.folder = folder
        self.beside: dict[str, files.File] = {}
        self.used: dict[str, list[tuple[int, int, str]]] = {}  # real path -> start, stop, tensor
        self.placed: dict[tuple[object, ...], str] = {}  # place, type and shape of what lies beside -> tensor
        self.locations: dict[str, str] = {}  # name beneath the folder -> real path
        self.checksums: dict[str, str] = {}  # real path -> SHA-1 that is said of it
        self.inline = 0  # bytes of numbers that are attributes
        self.varints = 0  # bytes of typed fields beyond those of the values, where no tensor has them

    def constant(self, tensor: Any, name: str, *, alone: bool = False) -> Constant:
        """Return a `TensorProto` of the skeleton as a constant; raises `FormatError` where it contradicts itself.

        `alone`: it is never tied to another one, so one that names the same bytes is refused.
        """
        shape = tuple(tensor.dims)
        if min(shape, default=0) < 0:
            raise FormatError(f"has the shape {list(shape)}", tensor=name)
        if tensor.data_type == STRING:
            return Constant(name, None, shape, None)
        kind = TYPES.get(tensor.data_type)
        if kind is None or tensor.HasField("segment"):
            what = (
                f"data type {tensor.data_type} is none we know" if kind is None else "is a segment, which is not read"
            )
            raise FormatError(what, tensor=name)
        stored = self._stored(tensor, name, kind, shape, alone=alone)
        return Constant(name, kind, shape, stored)

    def _stored(self, tensor: Any, name: str, kind: Type, shape: tuple[int, ...], *, alone: bool) -> StoredTensor:
        size = -(-prod(shape) * kind.bits // 8)
        packed = BITS[kind.dtype] != kind.bits
        stored = StoredTensor(name, kind.dtype, (size,) if packed else shape, size, self.file)
        if tensor.data_location == EXTERNAL:
            if tensor.raw_data:
                raise FormatError("has its values in the graph and beside it", tensor=name)
            return self._shared(self._external(tensor, stored), tensor, alone=alone)
        if tensor.external_data:
            raise FormatError("names external data and says that its values are in the graph", tensor=name)
        number, start, stop = PLACE.unpack(tensor.raw_data) if tensor.raw_data else (9, 0, 0)
        return self._inside(stored, VALUES[number], kind, start, stop)

    def _inside(self, stored: StoredTensor, field: str, kind: Type, start: int, stop: int) -> StoredTensor:
        if field not in ("raw_data", kind.field):
            raise FormatError(f"{kind.name} has its values in `{field}` (raw_data or {kind.field})", tensor=stored.name)
        self.used.setdefault(self.file.path, []).append((start, stop, stored.name))
        width = BITS[stored.dtype] // 8
        written, wanted = stop - start, stored.nbytes
        if field in ("int32_data", "int64_data", "uint64_data"):
            written = _varints(self.file, start, stop) * width
            stored = stored._replace(source=Varints(self.file, start, stop, width), nbytes=stop - start)
        else:
            stored = stored._replace(offset=start)
        if written != wanted:
            what = f"{kind.name} of {wanted:,} bytes has {written:,} in `{field}`"
            raise FormatError(what, tensor=stored.name)
        return stored

    def numbers(self, name: str, values: Sequence[float], *, whole: bool, scalar: bool) -> Constant:
        """Return numbers that are an attribute of a `Constant` node."""
        kind = TYPES[7 if whole else 1]
        content = struct.pack(f"<{len(values)}{'q' if whole else 'f'}", *values)
        written = sum(_varint_bytes(int(value)) for value in values) if whole else len(content)
        self.inline += written
        shape = () if scalar else (len(values),)
        return Constant(name, kind, shape, StoredTensor(name, kind.dtype, shape, written, Repeated(content)))

    def filled(self, name: str, shape: tuple[int, ...], value: Constant | None) -> Constant:
        """Return a tensor of that shape that a graph fills with one value (0 in 32 bit without one)."""
        kind, raw = TYPES[1], bytes(4)
        if value is not None:
            kind, raw = _single(value)
        if min(shape, default=0) < 0 or prod(shape) > FILLED_LIMIT:
            raise FormatError(f"is filled to the shape {list(shape)} (limit {FILLED_LIMIT:,} values)", tensor=name)
        return Constant(name, kind, shape, StoredTensor(name, kind.dtype, shape, 0, Repeated(raw)))

    def zeros(self, name: str, kind: Type, shape: tuple[int, ...]) -> Constant:
        """Return a tensor of that shape of which no value is stored."""
        stored = StoredTensor(name, kind.dtype, shape, 0, Repeated(bytes(BITS[kind.dtype] // 8)))
        return Constant(name, kind, shape, stored)

    def _external(self, tensor: Any, stored: StoredTensor) -> StoredTensor:
        pairs = [(entry.key, entry.value) for entry in tensor.external_data]
        entries = dict(pairs)
        if len(entries) != len(pairs) or not entries.get("location"):
            raise FormatError("external data without a location, or with a key twice", tensor=stored.name)
        offset, length = (_number(entries, key, stored) for key in ("offset", "length"))
        file = self._beside(entries, stored.name)
        start = offset or 0
        if length is not None and length != stored.nbytes:
            raise FormatError(f"needs {stored.nbytes:,} bytes, its external data has {length:,}", tensor=stored.name)
        if start + stored.nbytes > file.size or file.path == self.file.path:
            where = f"bytes {start:,} to {start + stored.nbytes:,} of `{entries['location']}`, which has {file.size:,}"
            raise FormatError(f"is said to be in {where}", tensor=stored.name)
        return stored._replace(source=file, offset=start)

    def _beside(self, entries: Mapping[str, str], name: str) -> files.File:
        """The file that a tensor names."""
        location = entries["location"]
        if location not in self.locations:
            try:
                file = files.open_beneath(self.folder, location)
            except FormatError as error:
                raise error.at(tensor=name) from None
            if files.links_elsewhere(file, self.folder) > 0:
                what = f"`{location}` has another name outside its folder (hard links are not read)"
                raise FormatError(what, tensor=name)
            self.locations[location] = file.path
            self.beside.setdefault(file.path, file)
        file = self.beside[self.locations[location]]
        checksum = entries.get("checksum", "")
        if checksum and self.checksums.setdefault(file.path, checksum.lower()) != checksum.lower():
            raise FormatError(f"says another checksum of `{location}` than tensors before it", tensor=name)
        return file

    def _shared(self, stored: StoredTensor, tensor: Any, *, alone: bool) -> StoredTensor:
        """The tensor; a second one at the same place is tied to the first."""
        assert isinstance(stored.source, files.File)
        path, stop = stored.source.path, stored.offset + stored.nbytes
        place = (path, stored.offset, stop, tensor.data_type, tuple(tensor.dims))
        if stored.nbytes and not alone and self.placed.setdefault(place, stored.name) != stored.name:
            return stored._replace(nbytes=0, role="tied")
        self.used.setdefault(path, []).append((stored.offset, stop, stored.name))
        return stored

    def checked(self) -> Iterator[Finding]:
        """Yield what there is to say about checksums; one that is wrong is a `FormatError`."""
        for path, checksum in self.checksums.items():
            file, name = self.beside[path], os.path.basename(path)
            if file.size > CHECKSUM_LIMIT:
                what = f"the checksum of `{name}` was not verified: {file.size:,} bytes (limit {CHECKSUM_LIMIT:,})"
                yield Finding("external-checksum", "note", None, what)
            elif (found := _sha1(file)) != checksum:
                raise FormatError(f"`{name}` has the SHA-1 {found}, the graph says `{checksum}`")

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return self.file.size + sum(file.size for file in self.beside.values())

    def overhead(self) -> Mapping[ByteClass, int]:
        """Return the bytes that no tensor has, by class; tensors that overlap are a `FormatError`."""
        inside = sum(stop - start for start, stop, _ in self.used.get(self.file.path, ()))
        metadata = self.file.size - inside - self.inline + self.varints
        found: dict[ByteClass, int] = {"metadata": metadata, "padding": 0, "dead": 0}
        for path, file in self.beside.items():
            at, before = 0, ""
            for start, stop, name in sorted(self.used.get(path, ())):
                if start < at and stop > start:
                    raise FormatError(f"shares bytes of its external data with `{before}` (no overlaps)", tensor=name)
                found["padding" if start - at < ALIGNMENT else "dead"] += max(0, start - at)
                at, before = max(at, stop), name
            found["dead"] += file.size - at
        return found


def _varints(file: files.File, start: int, stop: int) -> int:
    """How many varints there are: each ends with a byte under 128."""
    count = last = 0
    for at in range(start, stop, PIECE):
        piece = file.read(at, min(at + PIECE, stop))
        count += len(piece.translate(None, CONTINUED))
        last = piece[-1]
    if last > 127:
        raise FormatError(f"ends within a number, at byte {stop:,}")
    return count


def _single(value: Constant) -> tuple[Type, bytes]:
    """The type and the bytes of a constant of one number."""
    kind, stored = value.type, value.stored
    if kind is None or stored is None or stored.elements != 1 or kind.bits % 8:
        raise FormatError(f"{kind.name if kind else 'STRING'} {list(value.shape)} is not one number", tensor=value.name)
    return kind, bytes(stored.source.read(stored.offset, stored.offset + kind.bits // 8))


def _varint_bytes(value: int) -> int:
    """The bytes of an int64 as a varint."""
    return 10 if value < 0 else max(1, -(-value.bit_length() // 7))


def _sha1(file: files.File) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for at in range(0, file.size, 1 << 20):
        digest.update(file.read(at, min(at + (1 << 20), file.size)))
    return digest.hexdigest()


def _number(entries: Mapping[str, str], key: str, stored: StoredTensor) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FormatError(f"the {key} of its external data is `{text}`, no number of bytes", tensor=stored.name)
    return int(text)


def folder_of(path: str) -> str:
    """Return the folder beneath which external data may be."""
    return os.path.dirname(path) or "."
