"""What changed between two artifacts: bytes per tensor and per class, by growth."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.tensor import BYTE_CLASSES, COUNTED, DEAD, ByteClass, LogicalTensor, Role

Change = Literal["added", "removed", "re-encoded", "reshaped", "resized"]


class Stored(NamedTuple):
    """How one tensor is written; `scheme` names the dtype too where it is plain, `sqnr_db` is known to baselines."""

    shape: tuple[int, ...]
    scheme: str
    role: Role
    bytes: dict[ByteClass, int]
    sqnr_db: float | None = None

    @property
    def nbytes(self) -> int:
        """All bytes that belong to it."""
        return sum(self.bytes.values())


class TensorChange(NamedTuple):
    """One tensor that is not what it was; `old_scheme` and `new_scheme` name the dtype too where it is plain."""

    name: str
    change: Change
    old_bytes: int
    new_bytes: int
    old_scheme: str | None
    new_scheme: str | None

    @property
    def growth(self) -> int:
        """Bytes more than before."""
        return self.new_bytes - self.old_bytes


class Total(NamedTuple):
    """One number in both artifacts."""

    old: int
    new: int

    @property
    def growth(self) -> int:
        """How much more it is than before."""
        return self.new - self.old


class Outline(NamedTuple):
    """As much of an artifact as a difference looks at, and a baseline keeps; totals are sums of it."""

    source: str
    container: str
    outside: dict[ByteClass, int]  # bytes of no tensor
    tensors: dict[str, Stored]

    @property
    def classes(self) -> dict[ByteClass, int]:
        """All bytes by class, empty classes left out."""
        found = dict(self.outside)
        for stored in self.tensors.values():
            for kind, size in stored.bytes.items():
                found[kind] = found.get(kind, 0) + size
        return {kind: size for kind, size in found.items() if size}

    @property
    def file_bytes(self) -> int:
        """All bytes."""
        return sum(self.classes.values())

    @property
    def logical_params(self) -> int:
        """The parameters of the unquantized model."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values() if stored.role in COUNTED)


class Difference(NamedTuple):
    """All that changed. `growth` of the tensors and of what is outside of tensors sum to that of `file_bytes`."""

    old_source: str
    new_source: str
    file_bytes: Total
    logical_params: Total
    outside: Total
    classes: dict[str, Total]
    tensors: tuple[TensorChange, ...]
    unchanged: int


def difference(old: Artifact | Outline, new: Artifact | Outline) -> Difference:
    """Return what changed from one artifact to the other: what grew most first, then what shrank most."""
    old, new = (given if isinstance(given, Outline) else outline(given) for given in (old, new))
    before, after = old.tensors, new.tensors
    found = [
        change
        for name in dict.fromkeys([*before, *after])
        if (change := _change(name, before.get(name), after.get(name)))
    ]
    return Difference(
        old.source,
        new.source,
        Total(old.file_bytes, new.file_bytes),
        Total(old.logical_params, new.logical_params),
        Total(sum(old.outside.values()), sum(new.outside.values())),
        {kind: Total(old.classes.get(kind, 0), new.classes.get(kind, 0)) for kind in BYTE_CLASSES},
        tuple(sorted(found, key=lambda change: (change.growth <= 0, -abs(change.growth), change.name))),
        len(before.keys() & after.keys()) - sum(change.change not in ("added", "removed") for change in found),
    )


def outline(artifact: Artifact) -> Outline:
    """Return what a difference needs to know of an artifact."""
    return Outline(
        artifact.source,
        artifact.container,
        {kind: size for kind, size in artifact.overhead.items() if size},
        {tensor.name: _stored(tensor) for tensor in artifact.tensors},
    )


def _stored(tensor: LogicalTensor) -> Stored:
    held: dict[ByteClass, int] = {"dead": tensor.nbytes} if tensor.role in DEAD else tensor.bytes
    return Stored(tensor.shape, _scheme(tensor), tensor.role, held)


def _change(name: str, old: Stored | None, new: Stored | None) -> TensorChange | None:
    """Return what became of one tensor, or None where it is stored as before."""
    kind = _kind(old, new)
    if kind is None:
        return None
    old_bytes, new_bytes = (stored.nbytes if stored else 0 for stored in (old, new))
    return TensorChange(name, kind, old_bytes, new_bytes, old and old.scheme, new and new.scheme)


def _kind(old: Stored | None, new: Stored | None) -> Change | None:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    if old.shape != new.shape:
        return "reshaped"
    if old.scheme != new.scheme:
        return "re-encoded"
    return "resized" if old.bytes != new.bytes or old.role != new.role else None


def _scheme(tensor: LogicalTensor) -> str:
    return tensor.scheme if tensor.quantized else f"plain {tensor.stored.dtype}"
