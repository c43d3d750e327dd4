"""What changed between two artifacts: bytes per tensor and per class, by growth."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.tensor import BYTE_CLASSES, LogicalTensor

Change = Literal["added", "removed", "re-encoded", "reshaped", "resized"]


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


def difference(old: Artifact, new: Artifact) -> Difference:
    """Return what changed from one artifact to the other: what grew most first, then what shrank most."""
    before, after = _by_name(old), _by_name(new)
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
        Total(sum(old.overhead.values()), sum(new.overhead.values())),
        {kind: Total(old.bytes[kind], new.bytes[kind]) for kind in BYTE_CLASSES},
        tuple(sorted(found, key=lambda change: (change.growth <= 0, -abs(change.growth), change.name))),
        len(before.keys() & after.keys()) - sum(change.change not in ("added", "removed") for change in found),
    )


def _by_name(artifact: Artifact) -> dict[str, LogicalTensor]:
    return {tensor.name: tensor for tensor in artifact.tensors}


def _change(name: str, old: LogicalTensor | None, new: LogicalTensor | None) -> TensorChange | None:
    """Return what became of one tensor, or None where it is stored as before."""
    kind = _kind(old, new)
    if kind is None:
        return None
    old_bytes, new_bytes = (tensor.nbytes if tensor else 0 for tensor in (old, new))
    return TensorChange(name, kind, old_bytes, new_bytes, old and _scheme(old), new and _scheme(new))


def _kind(old: LogicalTensor | None, new: LogicalTensor | None) -> Change | None:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    if old.shape != new.shape:
        return "reshaped"
    if _scheme(old) != _scheme(new):
        return "re-encoded"
    return "resized" if old.bytes != new.bytes or old.role != new.role else None


def _scheme(tensor: LogicalTensor) -> str:
    return tensor.scheme if tensor.quantized else f"plain {tensor.stored.dtype}"
