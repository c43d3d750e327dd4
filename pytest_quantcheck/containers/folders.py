"""Checkpoint folders: shards with an index, a single file, or a complete set of shards; stale files are found."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import repeat
from operator import eq
from typing import NamedTuple, Protocol

from pytest_quantcheck.containers import files
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, Container, SideFile, StoredTensor

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
SHARD = re.compile(r"-\d{5,}-of-(\d{5,})\.\w+$")

# Files that hold weights and nothing else; where they are no part of the checkpoint, they are stale or duplicates.
WEIGHTS = re.compile(
    r".*\.safetensors|(pytorch_model|diffusion_pytorch_model|adapter_model|model|consolidated)[-.\w]*\.(bin|pt|pth|ckpt)"
)


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors, and the bytes around them by class."""

    tensors: Mapping[str, StoredTensor]
    overhead: Mapping[ByteClass, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


class ReadShard(Protocol):
    """Reads the tensors of one file; `shown` is its name in errors."""

    def __call__(self, file: files.Readable, *, shown: str) -> Shard: ...


class Layout(NamedTuple):
    """How a kind of checkpoint lies in a folder: the endings of its files, and the name of the one that has it all.

    `leave` are names with these endings that hold no weights.
    """

    kind: str
    endings: tuple[str, ...]
    single: str
    read: ReadShard
    leave: re.Pattern[str] | None = None

    def holds(self, name: str) -> bool:
        """Whether a file of this name holds weights of this kind."""
        return name.endswith(self.endings) and not (self.leave and self.leave.fullmatch(name))

    def is_index(self, name: str) -> bool:
        """Whether a file of this name is an index of shards of this kind."""
        return name.endswith(".index.json") and name.removesuffix(".index.json").endswith(self.endings)


def open_container(path: str, layout: Layout) -> Container:
    """Return the tensors of one file, of an index, or of a folder that holds either."""
    if os.path.isdir(path):
        return _open_folder(path, layout)
    if path.endswith(".index.json"):
        return _open_folder(os.path.dirname(path) or ".", layout, index=os.path.basename(path))
    return read_file(files.open_file(path), path, layout)


def read_file(file: files.Readable, path: str, layout: Layout) -> Container:
    """Return the tensors of one file; `path` is its name."""
    shard = layout.read(file, shown=path)
    return Container(
        layout.kind,
        path,
        shard.tensors,
        file.size,
        shard.overhead,
        aliases=shard.aliases,
        findings=shard.findings,
        metadata=shard.metadata,
    )


def _open_folder(folder: str, layout: Layout, *, index: str | None = None) -> Container:
    present = files.listing(folder)
    named = index is not None
    index = index or _find_index(folder, present, layout)
    weight_map, total_size = _read_index(folder, index, layout) if index else (None, None)
    shards = sorted(set(weight_map.values())) if weight_map is not None else _find_weights(folder, present, layout)
    if not named and layout.single in present.keys() - shards:
        raise FormatError(f"holds both `{layout.single}` and `{index}` (readers differ): name one", file=folder)
    whole = _read_shards(folder, shards, weight_map, layout)
    data_bytes = sum(stored.nbytes for stored in whole.tensors.values())
    beside = {name: size for name, size in present.items() if name not in shards}
    orphans = {name: size for name, size in beside.items() if WEIGHTS.fullmatch(name)}
    overhead: dict[ByteClass, int] = dict(whole.overhead)
    overhead["metadata"] = overhead.get("metadata", 0) + sum(beside.values()) - sum(orphans.values())
    overhead["dead"] = overhead.get("dead", 0) + sum(orphans.values())
    return Container(
        layout.kind,
        folder,
        whole.tensors,
        file_bytes=data_bytes + sum(overhead.values()),
        overhead=overhead,
        configs={name: config for name in CONFIGS if (config := files.read_json(folder, name)) is not None},
        aliases=whole.aliases,
        findings=(*_stale_total(total_size, whole, data_bytes, index), *whole.findings, *_orphans(orphans)),
        metadata=whole.metadata,
        beside=tuple(SideFile(name, "dead" if name in orphans else "metadata", beside[name]) for name in beside),
    )


def with_beside(container: Container, folder: str, beside: Mapping[str, int], stale: Collection[str] = ()) -> Container:
    """Return a container as that of its folder: the files beside it weigh too, `stale` ones as dead."""
    dead = {name: size for name, size in beside.items() if name in stale}
    added: dict[ByteClass, int] = {"dead": sum(dead.values())}
    added["metadata"] = sum(beside.values()) - added["dead"]
    return replace(
        container,
        source=folder,
        file_bytes=container.file_bytes + sum(beside.values()),
        overhead={
            **container.overhead,
            **{kind: container.overhead.get(kind, 0) + size for kind, size in added.items()},
        },
        findings=(*container.findings, *_orphans(dead)),
        beside=tuple(SideFile(name, "dead" if name in dead else "metadata", size) for name, size in beside.items()),
    )


def _read_shards(folder: str, shards: list[str], weight_map: Mapping[str, str] | None, layout: Layout) -> Shard:
    """All shards as one."""
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    metadata: dict[str, str] = {}
    overhead: dict[ByteClass, int] = {}
    findings: list[Finding] = []
    seen: set[str] = set()
    for name in shards:
        shown = os.path.join(folder, name)
        found = layout.read(files.open_beneath(folder, name), shown=shown)
        names = found.tensors.keys() | found.aliases.keys() if found.aliases else found.tensors.keys()
        _check_shard(name, names, seen, weight_map, shown)
        seen.update(names)  # `|=` with a view would copy the set, shard after shard
        tensors |= found.tensors
        aliases |= found.aliases
        metadata |= found.metadata
        findings += found.findings
        for kind, size in found.overhead.items():
            overhead[kind] = overhead.get(kind, 0) + size
    _check_complete(weight_map, seen, folder)
    return Shard(tensors, overhead, metadata, aliases, tuple(findings))


def _find_index(folder: str, present: Mapping[str, int], layout: Layout) -> str | None:
    found = [name for name in present if layout.is_index(name)]
    if f"{layout.single}.index.json" in found:
        return f"{layout.single}.index.json"
    if len(found) > 1:
        raise FormatError(f"holds {len(found)} indexes ({', '.join(found)}): name one", file=folder)
    return found[0] if found else None


def _find_weights(folder: str, present: Mapping[str, int], layout: Layout) -> list[str]:
    """The weight files of a folder without an index."""
    found = [name for name in present if layout.holds(name)]
    if not found:
        wanted = ", ".join(f"*{ending}" for ending in layout.endings)
        raise FormatError(f"holds no weights (looked for {wanted})", file=folder)
    if layout.single in found:
        return [layout.single]
    if len(found) == 1:
        if SHARD.search(found[0]):
            raise FormatError(f"holds the shard `{found[0]}`, but no index and no other shard", file=folder)
        return found
    announced = {match.group(1) if (match := SHARD.search(name)) else "" for name in found}
    if announced == {f"{len(found):0{len(min(announced))}}"}:
        return found
    raise FormatError(
        f"holds {len(found)} {layout.kind} files and no index ({', '.join(found[:3])} ...): name one", file=folder
    )


def _read_index(folder: str, index: str, layout: Layout) -> tuple[dict[str, str], object]:
    shown = os.path.join(folder, index)
    content = files.read_json(folder, index)
    if content is None:
        raise FormatError("no such file", file=shown)
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("`weight_map` is not an object of tensor names", file=shown)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(layout.endings):
            raise FormatError(f"names `{shard}`, which is not a {layout.kind} file", file=shown, tensor=name)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total


def _check_shard(
    shard: str, found: AbstractSet[str], seen: set[str], weight_map: Mapping[str, str] | None, shown: str
) -> None:
    if not seen.isdisjoint(found):
        raise FormatError(
            "is also in another shard (readers differ on which one wins)", file=shown, tensor=min(found & seen)
        )
    if weight_map is None or all(map(eq, map(weight_map.get, found), repeat(shard))):
        return
    for name in found:
        if weight_map.get(name) != shard:
            there = f"`{weight_map[name]}`" if name in weight_map else "nowhere"
            raise FormatError(f"is in this shard, but the index puts it {there}", file=shown, tensor=name)


def _check_complete(weight_map: Mapping[str, str] | None, found: set[str], folder: str) -> None:
    if weight_map is None or len(weight_map) == len(found):  # every tensor is in the index: `_check_shard`
        return
    for name, shard in weight_map.items():
        if name not in found:
            raise FormatError("is in the index, but not in its shard", file=os.path.join(folder, shard), tensor=name)


def _stale_total(total: object, whole: Shard, actual: int, index: str | None) -> list[Finding]:
    """Tied weights of a torch file are in one place, and writers differ on whether the total has them twice."""
    tied = sum(whole.tensors[first].nbytes for first in whole.aliases.values())
    if total is None or total in (actual, actual + tied):
        return []
    message = f"{index}: `total_size` says {total}, the tensors have {actual:,} bytes"
    return [Finding("index-total-size", "warning", None, message)]


def _orphans(orphans: Mapping[str, int]) -> list[Finding]:
    return [
        Finding(
            "orphan-file",
            "warning",
            None,
            f"`{name}` ({size:,} bytes) is no part of this checkpoint: stale or duplicate",
        )
        for name, size in orphans.items()
    ]
