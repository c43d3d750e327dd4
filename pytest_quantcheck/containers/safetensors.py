"""safetensors: one file, or a folder of shards with an index.

    8 bytes    header length, little-endian u64, at most 100,000,000
    header     JSON object, may be padded with spaces: {name: {"dtype", "shape", "data_offsets": [start, stop]},
               "__metadata__": {str: str}}
    data       every byte belongs to exactly one tensor: no hole, no overlap, nothing behind

Source: safetensors 0.8, safetensors/src/tensor.rs. Stricter in one thing: duplicate tensor names are refused, because
readers differ on which one wins.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.containers import files, folders
from pytest_quantcheck.dtypes import BITS, SAFETENSORS
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import Container, Source, StoredTensor

HEADER_LIMIT = 100_000_000
MAX_COUNT = 2**63 - 1


class Header(NamedTuple):
    """What a safetensors header says; offsets are counted from the start of the file."""

    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    if os.path.isdir(path):
        return any(FOLDER.holds(name) or FOLDER.is_index(name) for name in os.listdir(path))
    return FOLDER.holds(path) or FOLDER.is_index(path)


def open_container(path: str) -> Container:
    """Return the tensors of a `.safetensors` file, of an index, or of a folder that holds either."""
    return folders.open_container(path, FOLDER)


def read_file(file: files.Readable, path: str) -> Container:
    """Return the tensors of one file, here or on a server; `path` is its name."""
    return folders.read_file(file, path, FOLDER)


def read_header(source: Source, size: int) -> Header:
    """Return the header of a file of `size` bytes.

    Two ranges are read, whatever the size, so a remote file can be listed without its data.
    Raises `FormatError` for everything two parsers could read differently.
    """
    if size < 8:
        raise FormatError(f"{size} bytes is too short for a safetensors file (8 bytes of header length)")
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > HEADER_LIMIT:
        raise FormatError(f"header claims {length:,} bytes (limit {HEADER_LIMIT:,})")
    if 8 + length > size:
        raise FormatError(f"header claims {length:,} bytes, the file has {size - 8:,} after the length: truncated")
    raw = source.read(8, 8 + length)
    if raw[:1] != b"{":
        raise FormatError("header does not start with `{`")
    entries = strict_json.parse(raw, None, limit=HEADER_LIMIT)
    if not isinstance(entries, dict):
        raise FormatError("header is not an object of tensors")
    metadata = _metadata(entries.pop("__metadata__")) if "__metadata__" in entries else None
    tensors = {name: _stored(name, entry, source, 8 + length) for name, entry in entries.items()}
    pairs = 4 * len(tensors) + (0 if metadata is None else 1 + len(metadata))
    strict_json.refuse_duplicates(raw, pairs, limit=HEADER_LIMIT)
    _check_coverage(tensors, 8 + length, size)
    return Header(tensors, metadata or {}, 8 + length)


def _metadata(entry: object) -> Mapping[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise FormatError("`__metadata__` is not an object of strings")
    return entry


def _stored(name: str, entry: object, source: Source, base: int) -> StoredTensor:
    if not isinstance(entry, dict) or len(entry) != 3:
        raise FormatError(_FIELDS, tensor=name)
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError:
        raise FormatError(_FIELDS, tensor=name) from None
    bits = _BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise FormatError(f"unknown dtype `{dtype}`", tensor=name)
    if type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise FormatError("`shape` and `data_offsets` are not lists of sizes and of two offsets", tensor=name)
    start, stop = offsets
    for number in (start, stop, *shape):
        # bool is an int to Python and 1.0 equals 1: only a real, non-negative integer is a size.
        if type(number) is not int or number < 0 or number > MAX_COUNT:
            raise FormatError(f"`{number}` is not a size (0 to 2^63-1)", tensor=name)
    nbytes, rest = divmod(prod(shape) * bits, 8)
    if rest:
        raise FormatError(f"{dtype} {shape} does not fill whole bytes", tensor=name)
    if stop - start != nbytes:
        raise FormatError(f"{dtype} {shape} needs {nbytes:,} bytes, its range has {stop - start:,}", tensor=name)
    return StoredTensor(name, dtype, tuple(shape), nbytes, source, base + start)


_BITS = {name: BITS[name] for name in SAFETENSORS}
_FIELDS = "entry has not exactly `dtype`, `shape` and `data_offsets`"


def _check_coverage(tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    at = base
    for stored in tensors.values():
        if stored.offset != at:
            break
        at += stored.nbytes
    else:  # most headers are in the order of the data
        return _check_end(at - base, size - base)
    at = base
    for offset, nbytes, name in sorted((stored.offset, stored.nbytes, name) for name, stored in tensors.items()):
        if offset != at:
            fault = (
                f"leaves a hole of {offset - at:,} bytes before it" if offset > at else "overlaps the tensor before it"
            )
            raise FormatError(f"starts at byte {offset - base:,} and {fault} (no holes, no overlaps)", tensor=name)
        at += nbytes
    return _check_end(at - base, size - base)


def _check_end(at: int, data_size: int) -> None:
    if at > data_size:
        raise FormatError(f"tensors need {at:,} bytes of data, the file has {data_size:,}: truncated")
    if at < data_size:
        raise FormatError(f"{data_size - at:,} bytes follow the last tensor (nothing may)")


def _read_shard(file: files.Readable, *, shown: str) -> folders.Shard:
    try:
        header = read_header(file, file.size)
    except FormatError as error:
        raise error.at(file=shown) from None
    return folders.Shard(header.tensors, {"metadata": header.data_start}, header.metadata)


FOLDER = folders.Layout("safetensors", (".safetensors",), "model.safetensors", _read_shard)
