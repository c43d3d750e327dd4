"""A state dict as stored tensors: names, places and weights of what a torch pickle holds.

What shares a storage is weighed once: the same view under another name is an alias, a part of a larger view is tied,
and what no tensor of the state dict looks at is dead. torchao's tensors come out under the names that torchao itself
gives them in safetensors: `layer._weight_qdata` of `layer.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from pytest_quantcheck.containers import folders
from pytest_quantcheck.containers.pickle_records import WIDTHS, Global, Inert, Tensor, Wrapper
from pytest_quantcheck.containers.storages import PIECES_LIMIT, Coverage, Storage, View, is_contiguous, runs
from pytest_quantcheck.dtypes import DTYPES, OF_TORCH
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, StoredTensor

# Where training frameworks keep the state dict.
NESTED = ("state_dict", "model_state_dict", "model", "module")


class Checkpoint(NamedTuple):
    """What one file holds: the value of its pickle, its storages by key, and the bytes around them."""

    value: object
    storages: Mapping[str, Storage]
    overhead: Mapping[ByteClass, int]
    big_endian: bool = False
    findings: tuple[Finding, ...] = ()


def _state_dict(value: object) -> tuple[str, Mapping[object, object]]:
    """The mapping of names to tensors, and the keys that lead to it."""
    if not isinstance(value, dict):
        raise FormatError(f"holds a {type(value).__name__.lower()}, not a state dict")
    path = _path(value, depth=2)
    if path is None and value:
        keys = ", ".join(f"`{str(key)[:40]}`" for key in list(value)[:5])
        raise FormatError(f"holds no state dict (looked for tensors, then under {', '.join(NESTED)}; has {keys})")
    inner: Any = value
    for key in path or ():
        inner = inner[key]
    return ".".join(path or ()), inner


def _path(value: Mapping[object, object], depth: int) -> list[str] | None:
    """The keys that lead to tensors: a nested state dict goes before tensors that lie beside it (a random state)."""
    for key in NESTED if depth else ():
        inner = value.get(key)
        path = _path(inner, depth - 1) if isinstance(inner, dict) else None
        if path is not None:
            return [key, *path]
    return [] if any(isinstance(entry, (Tensor, Wrapper)) for entry in value.values()) else None


class _Found(NamedTuple):
    """The tensors of a state dict under the names they are stored by, and what torchao says about them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    others: list[str]


def shard(checkpoint: Checkpoint) -> folders.Shard:
    """Return the stored tensors of a checkpoint, every byte of its storages in one class."""
    where, entries = _state_dict(checkpoint.value)
    found = _tensors(entries)
    placed = _place(found.tensors, checkpoint)
    dead = sum(storage.size for storage in checkpoint.storages.values()) - sum(
        stored.nbytes for stored in placed.tensors.values()
    )
    overhead = dict(checkpoint.overhead)
    overhead["dead"] = overhead.get("dead", 0) + dead
    findings = [*checkpoint.findings, *_dead_storage(dead, placed)]
    if where:
        findings.append(Finding("state-dict-key", "note", None, f"the state dict under `{where}` was counted"))
    if found.others:
        names = ", ".join(f"`{name[:80]}`" for name in found.others[:5])
        findings.append(Finding("not-a-tensor", "note", None, f"{len(found.others)} entries are no tensors: {names}"))
    return folders.Shard(placed.tensors, overhead, found.metadata, placed.aliases, tuple(findings))


def _dead_storage(dead: int, placed: _Placed) -> Iterator[Finding]:
    """Storage that nobody looks at: the rest of what views were cut from, and what is outside the state dict."""
    worst = sorted(placed.wasted.items(), key=lambda item: -item[1])[:10]
    for name, size in worst:
        yield Finding("dead-storage", "warning", name, f"keeps {size:,} bytes of a larger storage that nothing uses")
    outside = dead - sum(placed.wasted.values())
    if outside:
        what = f"{outside:,} bytes of storages belong to no tensor of the state dict (optimizer state and the like)"
        yield Finding("dead-storage", "warning", None, what)


def _tensors(entries: Mapping[object, object]) -> _Found:
    found = _Found({}, {}, [])
    for name, entry in entries.items():
        if isinstance(entry, Tensor) and isinstance(name, str):
            found.tensors[name] = entry
        elif isinstance(entry, Wrapper) and isinstance(name, str):
            _flatten(name, entry, found)
        elif isinstance(entry, Inert) and entry.name.startswith("torch._utils."):
            kind = entry.name.removeprefix("torch._utils._rebuild_")
            raise UnknownEncoding(f"is a {kind} of torch, which is not read", tensor=str(name))
        else:
            found.others.append(str(name))
    if found.metadata:
        found.metadata["tensor_names"] = json.dumps([name for name in entries if isinstance(name, str)])
    return found


def _flatten(name: str, wrapper: Wrapper, found: _Found) -> None:
    """Show a tensor subclass as torchao's `flatten_tensor_state_dict` would write it."""
    module, _, parameter = name.rpartition(".")
    prefix = f"{module}._{parameter}_" if module else f"_{parameter}_"
    inner = {str(key): value for key, value in wrapper.state.items() if isinstance(value, Tensor)}
    if not inner:
        raise UnknownEncoding(f"is a `{wrapper.kind.name}`, whose tensors are not in the file", tensor=name)
    for key, tensor in inner.items():
        if prefix + key in found.tensors:
            raise FormatError("two different tensors of the file have this name", tensor=prefix + key)
        found.tensors[prefix + key] = tensor
    attributes = {str(key): _plain(value) for key, value in wrapper.state.items() if not isinstance(value, Tensor)}
    attributes.setdefault("shape", list(wrapper.shape))
    record = {
        "_type": wrapper.kind.name.rpartition(".")[2],
        "_data": attributes,
        "_tensor_data_names": list(inner),
    }
    found.metadata[name] = json.dumps(record)


def _plain(value: object, depth: int = 4) -> object:
    """An attribute as JSON, the way torchao writes it."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, Global):
        return {"_type": "torch.dtype", "_data": value.name.removeprefix("torch.")}
    if isinstance(value, (list, tuple)) and depth and len(value) <= 64:
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, Inert):
        content = value.state if value.state is not None else value.args
        if isinstance(content, tuple) and len(content) == 1:
            content = content[0]
        return {"_type": value.name.rpartition(".")[2], "_data": _plain(content, depth - 1) if depth else None}
    if isinstance(value, dict) and depth and len(value) <= 64:
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    return None


class _Placed(NamedTuple):
    """Stored tensors, those that are another by name, and the bytes that views keep and nothing looks at."""

    tensors: dict[str, StoredTensor]
    aliases: dict[str, str]
    wasted: dict[str, int]


def _place(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> _Placed:
    """Give every tensor its place and its weight."""
    first: dict[Tensor, str] = {}
    twice = {
        name: known for name, tensor in tensors.items() if (known := first.setdefault(_same(tensor), name)) != name
    }
    aliases = _aliases(tensors, twice)
    stored = {name: _stored(name, tensor, checkpoint) for name, tensor in tensors.items() if name not in aliases}
    weights, wasted = _weigh({name: tensors[name] for name in stored}, checkpoint.storages)
    for name, nbytes in weights.items():
        tied = not nbytes and stored[name].elements
        stored[name] = stored[name]._replace(nbytes=nbytes, role="tied" if tied else None)
    return _Placed(stored, aliases, wasted)


def _same(tensor: Tensor) -> Tensor:
    """The tensor with the strides that have no say left out, to tell whether two look at the same values."""
    strides = tuple(step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.strides, strict=True))
    return tensor._replace(strides=strides)


def _aliases(tensors: Mapping[str, Tensor], twice: Mapping[str, str]) -> dict[str, str]:
    """The tensors that go by another name, whole modules only: a part that two weights share belongs to both."""
    alone = {_module(name) for name in tensors if name not in twice}
    return {name: first for name, first in twice.items() if _module(name) not in alone}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _stored(name: str, tensor: Tensor, checkpoint: Checkpoint) -> StoredTensor:
    dtype = OF_TORCH.get(f"torch.{tensor.dtype}")
    if dtype is None or tensor.fault:
        fault = tensor.fault or f"torch's {tensor.dtype} is no number that any scheme reads"
        raise UnknownEncoding(f"is stored, but {fault}" if tensor.fault else fault, tensor=name)
    shape, width = tensor.shape, WIDTHS[tensor.dtype]
    logical = (*shape[:-1], 2 * shape[-1]) if tensor.dtype == "float4_e2m1fn_x2" and shape else shape
    storage = checkpoint.storages[tensor.storage.key]
    swap = width // 2 if DTYPES[dtype].kind == "complex" else width
    if not all(shape):
        return StoredTensor(name, dtype, logical, 0, storage)  # its offset may lie anywhere
    if is_contiguous(shape, tensor.strides) and (swap == 1 or not checkpoint.big_endian):
        return StoredTensor(name, dtype, logical, 0, storage, tensor.offset * width)
    strides = tuple(step * width for step in tensor.strides)
    view = View(storage, tensor.offset * width, shape, strides, width, swap if checkpoint.big_endian else 1)
    return StoredTensor(name, dtype, logical, 0, view)


def _weigh(tensors: Mapping[str, Tensor], storages: Mapping[str, Storage]) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of each tensor, every byte once; and by the first name on a storage, what nobody looks at of it."""
    looked: dict[str, Coverage] = {}
    owners: dict[str, str] = {}
    weights: dict[str, int] = {}
    ranges = _all_ranges(tensors)
    sizes = {name: sum(stop - start for start, stop in found) for name, found in ranges.items()}
    for name in sorted(tensors, key=lambda name: -sizes[name]):
        key = tensors[name].storage.key
        coverage = looked.setdefault(key, Coverage())
        new = sum(coverage.add(start, stop) for start, stop in ranges[name])
        if new not in (0, sizes[name]):
            raise FormatError(f"shares a part of its bytes with `{owners[key]}`: cannot be counted once", tensor=name)
        owners.setdefault(key, name)
        weights[name] = new
    wasted = {name: rest for key, name in owners.items() if (rest := storages[key].size - looked[key].bytes)}
    return weights, wasted


def _all_ranges(tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[int, int]]]:
    found, pieces = {}, 0
    for name, tensor in tensors.items():
        found[name] = _ranges(name, tensor)
        pieces += len(found[name]) if len(found[name]) > 1 else 0
        if pieces > PIECES_LIMIT:
            raise FormatError(f"views in more than {PIECES_LIMIT:,} pieces in all: not read", tensor=name)
    return found


def _ranges(name: str, tensor: Tensor) -> list[tuple[int, int]]:
    """The byte ranges of the storage that a tensor looks at."""
    if not all(tensor.shape):
        return []
    width = WIDTHS[tensor.dtype]
    if is_contiguous(tensor.shape, tensor.strides):
        return [(tensor.offset * width, (tensor.offset + prod(tensor.shape)) * width)]
    try:
        found = runs(tensor.shape, tensor.strides)
    except FormatError as error:
        raise error.at(tensor=name) from None
    return [((tensor.offset + start) * width, (tensor.offset + stop) * width) for start, stop in found]
