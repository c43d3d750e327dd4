"""GGUF: one file, the splits of one model, or a folder that holds either.

    4 bytes    "GGUF"
    u32        version, 2 or 3; every number of the file is little-endian, or every one big-endian
    i64 i64    number of tensors, number of keys
    keys       name, u32 type, value; an array is u32 element type, u64 length, elements
    tensors    name, u32 number of dimensions (to 4), i64 each, row length first, u32 ggml type, u64 offset in the data
    padding    to `general.alignment`, a power of two (32)
    data       the tensors in that order, each padded to the alignment: no hole, no overlap

A string is u64 length and UTF-8. Values are skipped where nobody asks for them: a vocabulary costs one step per token.
Source: llama.cpp, ggml/src/gguf.cpp (067d44f6) and src/llama-model-loader.cpp, whose limits these are. Stricter:
nothing may follow the last tensor, and a tensor name holds no NUL. Looser: types that are not in the table are read
too, since shape and offsets say how many values and bytes they have.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import dtypes
from pytest_quantcheck.containers import files, folders, gguf_names
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, Container, Origin, Source, StoredTensor

if TYPE_CHECKING:
    import torch

METADATA_LIMIT = 64 << 20
FIRST_READ = 1 << 20
NAME_LIMIT = 63
MAX_COUNT = 2**63 - 1
TENSOR_LIMIT = KEY_LIMIT = 100_000
# Longer values are skipped, and lists when there are many: nobody asks for a vocabulary or a chat template here.
KEPT_TEXT, KEPT_ARRAY, KEPT_NUMBERS = 1024, 4096, 1 << 16

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, STRING, ARRAY = 4, 8, 9

TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
UNKNOWN = "GGML_UNKNOWN"
# Types that a file must not hold: removed ones, and those that only activations have.
REFUSED = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$", re.DOTALL)

Read = Callable[[int, int], bytes | bytearray]
Value = int | float | str | tuple[int | float, ...]


class Info(NamedTuple):
    """One tensor as the header announces it: `shape` with the row length last, bytes counted from the file's start."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        """The name of the ggml type."""
        return TYPES.get(self.type, UNKNOWN)


class Header(NamedTuple):
    """What a GGUF header says. `size` is its own, up to the padding; `values` are those that were kept."""

    values: Mapping[str, Value]
    infos: tuple[Info, ...]
    size: int
    big_endian: bool


class BigEndian(NamedTuple):
    """A `Source` over one tensor of a big-endian file: as a little-endian file has it; blocks when loaded only."""

    file: files.Readable
    dtype: str
    offset: int

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes of whole numbers, each turned round; those of blocks as they are in the file."""
        raw = self.file.read(start, stop)
        if DTYPES[self.dtype].kind == "block":
            return raw
        width = DTYPES[self.dtype].bits // 8
        if (start - self.offset) % width or len(raw) % width:
            raise ValueError(f"bytes {start} to {stop} cut a {self.dtype}")
        turned = bytearray(len(raw))
        for at in range(width):
            turned[at::width] = raw[width - 1 - at :: width]
        return turned

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements `start` up to `stop` with the bytes of every number turned round."""
        order = _byte_order(self.dtype)
        if order is None:
            raise NotDecodable(f"big-endian {self.dtype} is nowhere defined", tensor=stored.name)
        width, item = len(order), dtypes.nbytes(stored.dtype, 1)
        first, last = start * item // width, -(-stop * item // width)
        raw = stored._replace(dtype="U8", offset=self.offset)
        turned = self.file.load(raw, first * width, last * width, "cpu").view(-1, width)[:, order].view(-1)
        wanted = turned[start * item - first * width :][: (stop - start) * item]
        return wanted.clone().view(_torch_dtype(stored)).to(device)


def _torch_dtype(stored: StoredTensor) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, str(DTYPES[stored.dtype].torch))
    return dtype


# Where the float16 of a block are. llama.cpp's own conversion knows these and no more.
_HALVES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "MXFP4": (), "NVFP4": ()}


def _byte_order(dtype: str) -> list[int] | None:
    """Where each byte of a little-endian value or block is in the big-endian one."""
    width = DTYPES[dtype].bits // 8
    if DTYPES[dtype].kind != "block":
        return list(reversed(range(width)))
    if dtype not in _HALVES:
        return None
    order = list(range(width))
    for at in _HALVES[dtype]:
        order[at], order[at + 1] = order[at + 1], order[at]
    return order


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    if os.path.isdir(path):
        return any(name.endswith(".gguf") for name in os.listdir(path))
    return path.endswith(".gguf")


def open_container(path: str) -> Container:
    """Return the tensors of a `.gguf` file (of the first split: of all splits), or of a folder with one model."""
    if not os.path.isdir(path):
        return read_file(files.open_file(path), path)
    present = files.listing(path)
    first = _find_model(path, present)
    beside = {name: size for name, size in present.items() if not name.endswith(".gguf")}
    return folders.with_beside(open_container(os.path.join(path, first)), path, beside)


def read_header(read: Read, size: int) -> Header:
    """Return the header of a file of `size` bytes, given a function that reads a byte range of it.

    Raises `FormatError` for everything llama.cpp refuses, and for what two parsers could read differently.
    """
    cursor = _Cursor(read, size)
    _read_magic(cursor)
    tensors = cursor.count("tensors", at_least=24, limit=TENSOR_LIMIT)
    keys = cursor.count("keys", at_least=13, limit=KEY_LIMIT)
    values = _read_values(cursor, keys)
    alignment = _alignment(values)
    infos = [_read_info(cursor) for _ in range(tensors)]
    for name, times in Counter(info.name for info in infos).most_common(1):
        if times > 1:
            raise FormatError("appears twice in the header (names are unique)", tensor=name)
    data_start = -(-cursor.at // alignment) * alignment
    placed = _place(infos, data_start, alignment, size)
    end = placed[-1].stop if placed else cursor.at
    padded = -(-end // alignment) * alignment
    if size > padded:
        raise FormatError(f"{size - padded:,} bytes follow the last tensor (nothing may but padding)")
    return Header(values, placed, cursor.at, cursor.big_endian)


class _Cursor:
    """A place in the header, which is read in ever larger pieces as far as it is needed."""

    def __init__(self, read: Read, size: int) -> None:
        self.read = read
        self.size = size
        self.at = 0
        self.big_endian = False
        self.buffer = bytearray(read(0, min(size, FIRST_READ)))

    def need(self, stop: int) -> None:
        """Read on until the bytes up to `stop` are there."""
        if stop <= len(self.buffer):
            return
        if stop > self.size:
            raise FormatError(f"header goes on to byte {stop:,}, the file has {self.size:,}: truncated")
        if stop > METADATA_LIMIT:
            raise FormatError(f"metadata of over {METADATA_LIMIT:,} bytes (limit {METADATA_LIMIT:,})")
        end = min(self.size, METADATA_LIMIT, max(stop, 4 * len(self.buffer)))
        self.buffer += self.read(len(self.buffer), end)

    def take(self, count: int) -> bytes:
        self.need(self.at + count)
        self.at += count
        return bytes(self.buffer[self.at - count : self.at])

    def numbers(self, code: str, count: int) -> tuple[int | float, ...]:
        layout = f"{'>' if self.big_endian else '<'}{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def integer(self, code: str) -> int:
        return int(self.numbers(code, 1)[0])

    def text(self, what: str) -> str:
        try:
            return self.take(self.integer("Q")).decode()
        except UnicodeDecodeError:
            raise FormatError(f"{what} is not UTF-8") from None

    def count(self, what: str, *, at_least: int, limit: int) -> int:
        """Return a number of things that take `at_least` bytes each."""
        count = self.integer("q")
        if not 0 <= count <= self.size // at_least:
            raise FormatError(f"claims {count:,} {what} (a file of {self.size:,} bytes has no room for them)")
        if count > limit:
            raise FormatError(f"has {count:,} {what} (limit {limit:,})")
        return count

    def skip_texts(self, count: int) -> None:
        """Step over `count` strings: the one loop that a vocabulary costs."""
        at, buffer = self.at, self.buffer
        length = struct.Struct(">Q" if self.big_endian else "<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(buffer):
                self.need(at + 8)
            at += 8 + length(buffer, at)[0]
        self.need(at)
        self.at = at


def _read_magic(cursor: _Cursor) -> None:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise FormatError(f"starts with {magic!r} (GGUF files start with b'GGUF')")
    version = cursor.integer("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        cursor.big_endian = True
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version} (2 and 3 are read; version 1 files can be converted by llama.cpp)")


def _read_values(cursor: _Cursor, keys: int) -> Mapping[str, Value]:
    """Read the keys; values that are long, or of a kind that nobody asks for, are stepped over."""
    found: dict[str, Value | None] = {}
    kept = 0
    for _ in range(keys):
        key = cursor.text("a key")
        if not key or key in found:
            raise FormatError(f"key `{key}` appears twice" if key else "a key is empty")
        kind = cursor.integer("I")
        if key == "general.alignment" and kind != U32:
            raise FormatError(f"key `{key}` has the type {kind} (it is a u32, type {U32})")
        value = _read_value(cursor, key, kind)
        kept += len(value) if isinstance(value, tuple) else 0
        found[key] = None if isinstance(value, tuple) and kept > KEPT_NUMBERS else value
    return {key: value for key, value in found.items() if value is not None}


def _read_value(cursor: _Cursor, key: str, kind: int) -> Value | None:
    if kind == ARRAY:
        return _read_array(cursor, key)
    if kind == STRING:
        length = cursor.integer("Q")
        cursor.need(cursor.at + length)
        if length <= KEPT_TEXT:
            return cursor.take(length).decode(errors="replace")
        cursor.at += length
        return None
    if kind not in SCALARS:
        raise FormatError(f"key `{key}` has the type {kind} (0 to 12)")
    return cursor.numbers(SCALARS[kind], 1)[0]


def _read_array(cursor: _Cursor, key: str) -> Value | None:
    kind, length = cursor.integer("I"), cursor.integer("Q")
    if kind not in SCALARS and kind != STRING:
        raise FormatError(f"key `{key}` is an array of the type {kind} (0 to 12, and no arrays of arrays)")
    width = 8 if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")
    if length * width > cursor.size - cursor.at:
        raise FormatError(
            f"key `{key}` claims {length:,} elements, the file has {cursor.size - cursor.at:,} bytes left"
        )
    if kind == STRING:
        cursor.skip_texts(length)
        return None
    if length <= KEPT_ARRAY:
        return cursor.numbers(SCALARS[kind], length)
    cursor.need(cursor.at + length * width)
    cursor.at += length * width
    return None


def _alignment(values: Mapping[str, Value]) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment is {alignment} (a power of two)")
    return alignment


def _read_info(cursor: _Cursor) -> Info:
    """Read one tensor info; `start` and `stop` are still offsets in the data, and those of known types only."""
    name = cursor.text("a tensor name")
    if len(name.encode()) > NAME_LIMIT or "\0" in name:
        what = f"a name of {len(name.encode())} bytes" if "\0" not in name else "a name with a NUL in it"
        raise FormatError(f"{what} (at most {NAME_LIMIT}, without NUL)", tensor=name)
    rank = cursor.integer("I")
    if rank > 4:
        raise FormatError(f"has {rank:,} dimensions (at most 4)", tensor=name)
    sizes = [int(size) for size in cursor.numbers("q", rank)]
    kind, start = cursor.integer("I"), cursor.integer("Q")
    shape = tuple(reversed(sizes))
    _check_shape(name, kind, shape)
    length = 0 if kind not in TYPES else dtypes.nbytes(TYPES[kind], prod(shape))
    return Info(name, kind, shape, start, start + length)


def _check_shape(name: str, kind: int, shape: tuple[int, ...]) -> None:
    if any(size < 0 for size in shape) or prod(shape) > MAX_COUNT:
        raise FormatError(f"has the shape {list(shape)} (sizes from 0, under 2^63 values in all)", tensor=name)
    if kind >= 1 << 31:
        raise FormatError(f"has the ggml type {kind:,} (a positive i32)", tensor=name)
    if kind in REFUSED:
        raise FormatError(f"has the ggml type {kind} ({REFUSED[kind]}), which no file may hold", tensor=name)
    block, row = DTYPES[TYPES.get(kind, UNKNOWN)].block, shape[-1] if shape else 1
    if row % block:
        raise FormatError(f"has rows of {row:,} values (a multiple of {block} for {TYPES[kind]})", tensor=name)


def _place(infos: list[Info], data_start: int, alignment: int, size: int) -> tuple[Info, ...]:
    """Turn offsets into bytes of the file: the tensors follow each other, padded, from the start of the data."""
    placed, expected = [], 0
    for number, info in enumerate(infos):
        if info.start != expected:
            raise FormatError(_misplaced(info.start, expected, alignment), tensor=info.name)
        stop = info.stop
        if info.type not in TYPES:  # it goes on to the next tensor, whatever it is
            stop = infos[number + 1].start if number + 1 < len(infos) else max(expected, size - data_start)
            _check_density(info, stop - info.start)
        if data_start + stop > size:
            what = f"ends at byte {data_start + stop:,}, the file has {size:,}: truncated"
            raise FormatError(what, tensor=info.name)
        placed.append(info._replace(start=data_start + info.start, stop=data_start + stop))
        expected = max(expected, -(-stop // alignment) * alignment)
    return tuple(placed)


def _check_density(info: Info, length: int) -> None:
    """No format writes a value in less than a bit, so a type we do not know does not either."""
    if prod(info.shape) > 8 * max(0, length):
        what = f"claims {prod(info.shape):,} values of the unknown ggml type {info.type} in {length:,} bytes"
        raise FormatError(f"{what} (at most 8 in a byte)", tensor=info.name)


def _misplaced(start: int, expected: int, alignment: int) -> str:
    if start % alignment:
        return f"starts at byte {start:,} of the data (a multiple of the alignment {alignment:,})"
    fault = "overlaps the tensor before it" if start < expected else f"leaves a hole of {start - expected:,} bytes"
    return f"starts at byte {start:,} of the data and {fault} (no holes, no overlaps)"


def read_file(file: files.Readable, path: str) -> Container:
    """Return the tensors of one file, here or on a server, and of the splits beside the first; `path` is its name."""
    header = _header(file, path)
    splits = header.values.get("split.count", 0)
    opened: list[tuple[files.Readable, Header]] = [(file, header)]
    if isinstance(splits, int) and splits > 1:
        if not isinstance(file, files.File):
            raise FormatError(f"is one of {splits} splits: of a URL one file is read, download them", file=path)
        opened += _other_splits(path, splits, header)
    tensors: dict[str, StoredTensor] = {}
    for split, its_header in opened:
        _add(tensors, split, its_header)
    _check_total(header, tensors, path)
    used = sum(stored.nbytes for stored in tensors.values())
    headers = sum(its_header.size for _, its_header in opened)
    file_bytes = sum(split.size for split, _ in opened)
    overhead: dict[ByteClass, int] = {"metadata": headers, "padding": file_bytes - headers - used}
    return Container(
        "gguf",
        path,
        tensors,
        file_bytes,
        overhead,
        findings=tuple(_findings(header, [info for _, its_header in opened for info in its_header.infos])),
        metadata={key: str(value) for key, value in header.values.items()},
        origins=_origins(header, tensors),
    )


def _header(file: files.Readable, shown: str) -> Header:
    try:
        return read_header(file.read, file.size)
    except FormatError as error:
        raise error.at(file=shown) from None


def _other_splits(path: str, splits: int, first: Header) -> list[tuple[files.Readable, Header]]:
    folder, name = os.path.split(path)
    match = SPLIT.match(name)
    if match is None or int(match[3]) != splits:
        raise FormatError(f"is one of {splits} splits (named `...-00001-of-{splits:05}.gguf`)", file=path)
    if first.values.get("split.no") != 0 or int(match[2]) != 1:
        raise FormatError(f"is not the first split: name `{match[1]}-00001-of-{splits:05}.gguf`", file=path)
    found: list[tuple[files.Readable, Header]] = []
    for number in range(1, splits):
        name = f"{match[1]}-{number + 1:05}-of-{splits:05}.gguf"
        file = files.open_beneath(folder or ".", name)
        header = _header(file, os.path.join(folder, name))
        its_place = header.values.get("split.no"), header.values.get("split.count")
        if its_place != (number, splits):
            what = f"says split.no {its_place[0]} of {its_place[1]} ({number} of {splits} belongs here)"
            raise FormatError(what, file=os.path.join(folder, name))
        found.append((file, header))
    return found


def _check_total(header: Header, tensors: Mapping[str, StoredTensor], path: str) -> None:
    total = header.values.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise FormatError(f"split.tensors.count is {total}, the splits have {len(tensors):,} tensors", file=path)


def _add(tensors: dict[str, StoredTensor], file: files.Readable, header: Header) -> None:
    """Add the stored tensors of one file."""
    for info in header.infos:
        if info.name in tensors:
            raise FormatError("is in two splits (names are unique)", file=file.path, tensor=info.name)
        turned = header.big_endian and DTYPES[info.dtype].bits > 8
        source: Source = BigEndian(file, info.dtype, info.start) if turned else file
        role = gguf_names.role(info.name, info.dtype, header.values)
        size = info.stop - info.start
        tensors[info.name] = StoredTensor(info.name, info.dtype, info.shape, size, source, info.start, role)


def _origins(header: Header, tensors: Mapping[str, StoredTensor]) -> dict[str, Origin]:
    """Where the tensors come from; a name that is taken already is not given a second time."""
    origins, taken = {}, set(tensors)
    for name, stored in tensors.items():
        origin = gguf_names.origin(name, stored.shape, header.values)
        if origin is not None and origin.name not in taken:
            origins[name] = origin
            taken.add(origin.name)
    return origins


def _findings(header: Header, infos: list[Info]) -> list[Finding]:
    found = []
    kind = header.values.get("general.type", "model")
    if kind != "model":
        found.append(Finding("file-type", "note", None, f"general.type is `{kind}`: this is no model of its own"))
    unknown: dict[int, list[str]] = {}
    for info in infos:
        if info.type not in TYPES:
            unknown.setdefault(info.type, []).append(info.name)
    for number, names in sorted(unknown.items()):
        what = f"ggml type {number} is not in our table: counted by shape, weighed by its offsets, not decoded"
        more = f" ({len(names):,} tensors)" if len(names) > 1 else ""
        found.append(Finding("unknown-type", "warning", names[0], what + more))
    return found


def _find_model(folder: str, present: Mapping[str, int]) -> str:
    """The one file, or the first of the one set of splits, that a folder holds."""
    models: dict[str, list[str]] = {}
    for name in present:
        if name.endswith(".gguf"):
            match = SPLIT.match(name)
            models.setdefault(f"{match[1]} of {match[3]}" if match else name, []).append(name)
    if not models:
        raise FormatError("holds no weights (looked for *.gguf)", file=folder)
    if len(models) != 1:
        shown = ", ".join(sorted(names[0] for names in models.values())[:3])
        raise FormatError(f"holds {len(models)} GGUF models ({shown} ...): name one", file=folder)
    (names,) = models.values()
    return min(names)
