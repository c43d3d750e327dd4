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
import re
import struct
from collections.abc import Mapping
from itertools import repeat
from math import prod
from operator import eq
from typing import NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.containers import files
from pytest_quantcheck.dtypes import BITS, SAFETENSORS
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, Container, Source, StoredTensor

HEADER_LIMIT = 100_000_000
MAX_COUNT = 2**63 - 1

# JSON files beside the weights that say how they are encoded.
CONFIGS = (
    "config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quanto_qmap.json",
    "quantization_map.json",
    "model.safetensors.index.json.meta.json",
)
SHARD = re.compile(r"-\d{5,}-of-(\d{5,})\.safetensors$")


class Header(NamedTuple):
    """What a safetensors header says; offsets are counted from the start of the file."""

    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    if os.path.isdir(path):
        return any(".safetensors" in name for name in os.listdir(path))
    return path.endswith((".safetensors", ".safetensors.index.json"))


def open_container(path: str) -> Container:
    """Return the tensors of a `.safetensors` file, of an index, or of a folder that holds either."""
    if os.path.isdir(path):
        return _open_folder(path)
    if path.endswith(".index.json"):
        return _open_folder(os.path.dirname(path) or ".", index=os.path.basename(path))
    file = files.open_file(path)
    header = _header_of(file, shown=path)
    overhead: dict[ByteClass, int] = {"metadata": header.data_start}
    return Container("safetensors", path, header.tensors, file.size, overhead, metadata=header.metadata)


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


def _header_of(file: files.File, *, shown: str) -> Header:
    try:
        return read_header(file, file.size)
    except FormatError as error:
        raise error.at(file=shown) from None


def _open_folder(folder: str, *, index: str | None = None) -> Container:
    present = files.listing(folder)
    named = index is not None
    index = index or _find_index(folder, present)
    weight_map, total_size = _read_index(folder, index) if index else (None, None)
    shards = sorted(set(weight_map.values())) if weight_map is not None else _find_weights(folder, present)
    if not named and "model.safetensors" in present.keys() - shards:
        raise FormatError(f"holds both `model.safetensors` and `{index}` (readers differ): name one", file=folder)
    tensors: dict[str, StoredTensor] = {}
    headers = 0
    metadata: dict[str, str] = {}
    for shard in shards:
        header = _header_of(files.open_beneath(folder, shard), shown=os.path.join(folder, shard))
        _check_shard(shard, header.tensors, tensors, weight_map, folder)
        tensors |= header.tensors
        headers += header.data_start
        metadata |= header.metadata
    _check_complete(weight_map, tensors, folder)
    data_bytes = sum(stored.nbytes for stored in tensors.values())
    findings = [*_stale_total(total_size, data_bytes, index), *_orphans(present, shards)]
    beside = {name: size for name, size in present.items() if name not in shards}
    dead = sum(size for name, size in beside.items() if name.endswith(".safetensors"))
    overhead_bytes: dict[ByteClass, int] = {"metadata": headers + sum(beside.values()) - dead, "dead": dead}
    return Container(
        "safetensors",
        folder,
        tensors,
        file_bytes=data_bytes + sum(overhead_bytes.values()),
        overhead=overhead_bytes,
        configs={name: config for name in CONFIGS if (config := files.read_json(folder, name)) is not None},
        findings=tuple(findings),
        metadata=metadata,
    )


def _find_index(folder: str, present: Mapping[str, int]) -> str | None:
    found = [name for name in present if name.endswith(".safetensors.index.json")]
    if "model.safetensors.index.json" in found:
        return "model.safetensors.index.json"
    if len(found) > 1:
        raise FormatError(f"holds {len(found)} indexes ({', '.join(found)}): name one", file=folder)
    return found[0] if found else None


def _find_weights(folder: str, present: Mapping[str, int]) -> list[str]:
    """The weight files of a folder without an index."""
    found = [name for name in present if name.endswith(".safetensors")]
    if not found:
        raise FormatError("holds no weights (looked for *.safetensors)", file=folder)
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) == 1:
        if SHARD.search(found[0]):
            raise FormatError(f"holds the shard `{found[0]}`, but no index and no other shard", file=folder)
        return found
    announced = {match.group(1) if (match := SHARD.search(name)) else "" for name in found}
    if announced == {f"{len(found):0{len(min(announced))}}"}:
        return found
    raise FormatError(
        f"holds {len(found)} safetensors files and no index ({', '.join(found[:3])} ...): name one", file=folder
    )


def _read_index(folder: str, index: str) -> tuple[dict[str, str], object]:
    shown = os.path.join(folder, index)
    content = files.read_json(folder, index)
    if content is None:
        raise FormatError("no such file", file=shown)
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("`weight_map` is not an object of tensor names", file=shown)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise FormatError(f"names `{shard}`, which is not a safetensors file", file=shown, tensor=name)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total


def _check_shard(
    shard: str,
    found: Mapping[str, StoredTensor],
    seen: Mapping[str, StoredTensor],
    weight_map: Mapping[str, str] | None,
    folder: str,
) -> None:
    shown = os.path.join(folder, shard)
    if not found.keys().isdisjoint(seen.keys()):  # a view: of two views the shorter is walked
        twice = next(name for name in found if name in seen)
        raise FormatError("is also in another shard (readers differ on which one wins)", file=shown, tensor=twice)
    if weight_map is None:
        return
    if all(map(eq, map(weight_map.get, found), repeat(shard))):
        return
    for name in found:
        if weight_map.get(name) != shard:
            there = f"`{weight_map[name]}`" if name in weight_map else "nowhere"
            raise FormatError(f"is in this shard, but the index puts it {there}", file=shown, tensor=name)


def _check_complete(weight_map: Mapping[str, str] | None, tensors: Mapping[str, StoredTensor], folder: str) -> None:
    if weight_map is None or len(weight_map) == len(tensors):  # every tensor is in the index: `_check_shard`
        return
    for name, shard in weight_map.items():
        if name not in tensors:
            raise FormatError("is in the index, but not in its shard", file=os.path.join(folder, shard), tensor=name)


def _stale_total(total: object, actual: int, index: str | None) -> list[Finding]:
    if total is None or total == actual:
        return []
    message = f"{index}: `total_size` says {total}, the tensors have {actual:,} bytes"
    return [Finding("index-total-size", "warning", None, message)]


def _orphans(present: Mapping[str, int], shards: list[str]) -> list[Finding]:
    return [
        Finding(
            "orphan-file",
            "warning",
            None,
            f"`{name}` ({size:,} bytes) is no part of this checkpoint: stale or duplicate",
        )
        for name, size in present.items()
        if name.endswith(".safetensors") and name not in shards
    ]
