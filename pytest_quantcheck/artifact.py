"""An artifact: what is checked, as logical tensors, counted and weighed.

This is where containers and schemes meet: `inspect` opens the container, asks the schemes, and adds up.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pytest_quantcheck import containers, schemes, ties
from pytest_quantcheck.containers import live_module
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import BYTE_CLASSES, COUNTED, DEAD, ByteClass, Container, LogicalTensor, SideFile

if TYPE_CHECKING:
    import torch

Subject: TypeAlias = "str | os.PathLike[str] | torch.nn.Module | Artifact"


class BitsPerWeight(NamedTuple):
    """Bits per logical weight: over the quantized tensors, and over all parameters. None where there are none."""

    quantized: float | None
    model: float | None


class SchemeTotal(NamedTuple):
    """What one scheme holds of an artifact."""

    tensors: int
    params: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Artifact:
    """A live model, a file, a checkpoint folder or the URL of a file, as the logical tensors of the unquantized model.

    Counts are exact. Tied weights count once, buffers and the parts of encoded weights never.
    """

    source: str
    container: str
    tensors: tuple[LogicalTensor, ...]
    file_bytes: int
    overhead: Mapping[ByteClass, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    beside: tuple[SideFile, ...] = ()

    def __repr__(self) -> str:
        size = f"{self.logical_params:,} parameters in {len(self.tensors):,} tensors"
        return f"<Artifact {self.source!r} ({self.container}): {size}>"

    @cached_property
    def parameters(self) -> tuple[LogicalTensor, ...]:
        """The tensors that count: parameters of the model and of its adapters."""
        return tuple(tensor for tensor in self.tensors if tensor.role in COUNTED)

    @cached_property
    def logical_params(self) -> int:
        """The number of parameters of the unquantized model, adapters included."""
        return sum(total.params for total in self.schemes.values())

    @cached_property
    def adapter_params(self) -> int:
        """The share of `logical_params` that belongs to adapters (LoRA and its kin)."""
        return sum(tensor.params for tensor in self.parameters if tensor.role == "adapter")

    @cached_property
    def trainable_params(self) -> int | None:
        """The logical parameters an optimizer would see; None for files, which do not say."""
        if self.container != "live":
            return None
        return sum(tensor.params for tensor in self.parameters if tensor.trainable)

    @cached_property
    def frozen_packed_params(self) -> int:
        """The logical parameters that cannot be trained because their codes are packed."""
        return sum(tensor.params for tensor in self.parameters if tensor.quantized and not tensor.trainable)

    @cached_property
    def stored_elements(self) -> int:
        """What `sum(p.numel())` over the stored weights says: the number that lies."""
        return sum(tensor.stored.elements for tensor in self.parameters)

    @cached_property
    def tied_params(self) -> int:
        """The logical parameters that appear a second time, under another name, and are not counted again."""
        targets = set(self.aliases.values())
        by_name = {tensor.name: tensor for tensor in self.parameters if tensor.name in targets}
        aliased = sum(by_name[first].params for first in self.aliases.values() if first in by_name)
        return aliased + sum(tensor.params for tensor in self.tensors if tensor.role == "tied")

    @cached_property
    def buffers(self) -> int:
        """The number of values in buffers, which never count."""
        return sum(tensor.params for tensor in self.tensors if tensor.role == "buffer")

    @cached_property
    def quantized_params(self) -> int:
        """The logical parameters whose values are encoded."""
        return sum(total.params for name, total in self.schemes.items() if name != "plain")

    @property
    def quantized_fraction(self) -> float:
        """The share of logical parameters whose values are encoded, 0 to 1."""
        return self.quantized_params / self.logical_params if self.logical_params else 0.0

    @cached_property
    def bits_per_weight(self) -> BitsPerWeight:
        """Bits per logical weight, scales and bookkeeping of each tensor included, file headers left out."""
        quantized = [total for name, total in self.schemes.items() if name != "plain"]
        return BitsPerWeight(_bits(quantized), _bits(list(self.schemes.values())))

    @cached_property
    def bytes(self) -> dict[ByteClass, int]:
        """All bytes by class; they sum to `file_bytes`."""
        found: dict[ByteClass, int] = dict.fromkeys(BYTE_CLASSES, 0)
        for kind, size in self.overhead.items():
            found[kind] += size
        for tensor in self.tensors:
            if tensor.role in DEAD:
                found["dead"] += tensor.nbytes
                continue
            for part in tensor.parts:
                if not part.between:  # most parts are of one class, and there are many
                    found[part.kind] += part.stored.nbytes
                    continue
                for kind, size in part.bytes:
                    found[kind] += size
        return found

    @cached_property
    def schemes(self) -> dict[str, SchemeTotal]:
        """What each scheme holds of the parameters, by scheme."""
        sums: dict[str, list[int]] = {}
        for tensor in self.parameters:
            total = sums.setdefault(tensor.scheme, [0, 0, 0])
            total[0] += 1
            total[1] += tensor.params
            total[2] += tensor.nbytes
        return {name: SchemeTotal(*total) for name, total in sorted(sums.items())}

    def tensor(self, name: str) -> LogicalTensor:
        """Return the logical tensor of that name, aliases of tied weights included."""
        name = self.aliases.get(name, name)
        for tensor in self.tensors:
            if name in (tensor.name, tensor.stored.name):
                return tensor
        raise KeyError(name)


def inspect(subject: Subject, *, verify_architecture: bool = False) -> Artifact:
    """Return the artifact at a path or URL, or of a live model, as logical tensors.

    Reads headers, the few small tensors that decide a shape, and samples of an output head and an embedding that may
    be the same: no torch for a path, unless an ONNX file has such a pair in an encoding that takes it.
    `verify_architecture` has transformers build the unquantized model of config.json on the meta device and adds a
    finding for every logical tensor that disagrees with it in shape.
    Raises `FormatError` for what cannot be read exactly, and `TypeError` for what is neither a path nor a module.
    """
    artifact = _opened(subject)
    if not verify_architecture:
        return artifact
    from pytest_quantcheck import architecture

    found = architecture.disagreements(artifact.source, artifact.configs, artifact.tensors)
    return replace(artifact, findings=(*artifact.findings, *found))


def _opened(subject: Subject) -> Artifact:
    if isinstance(subject, Artifact):
        return subject
    if isinstance(subject, (str, os.PathLike)):
        with uncollected():
            return of_container(containers.open_path(subject))
    return of_container(live_module.open_module(subject, schemes.exposers()))


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector out: records by the hundred thousand, no cycle among them, walked again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def count_params(subject: Subject, trainable: bool | None = None) -> int:
    """Return the exact number of logical parameters: the drop-in for `sum(p.numel() for p in model.parameters())`.

    `trainable=True` counts what an optimizer would see, `False` the rest; both need a live model, and a path with
    either is a `ValueError`.
    """
    artifact = inspect(subject)
    if trainable is None:
        return artifact.logical_params
    if artifact.trainable_params is None:
        raise ValueError(f"`{artifact.source}` is a file: what is trainable is known for live models only")
    return artifact.trainable_params if trainable else artifact.logical_params - artifact.trainable_params


def logical_numel(parameter: Any) -> int:
    """Return the number of logical values of one parameter: the drop-in for `p.numel()`.

    Raises `UnknownEncoding` for a packed tensor that does not carry its own shape: count the whole model instead.
    """
    # As much of a module as the walk looks at.
    holder: Any = SimpleNamespace(_parameters={"weight": parameter}, _buffers={}, _modules={}, named_modules=None)
    return inspect(holder).logical_params


def of_container(container: Container) -> Artifact:
    """Return what a container holds as logical tensors."""
    try:
        tensors = schemes.logical_tensors(container)
    except FormatError as error:
        raise error.at(file=container.source) from None
    logical = {tensor.stored.name: tensor.name for tensor in tensors}
    aliases = {alias: logical.get(first, first) for alias, first in container.aliases.items()}
    tensors, findings = ties.mark(tensors, container)
    return Artifact(
        container.source,
        container.kind,
        tuple(tensors),
        container.file_bytes,
        container.overhead,
        aliases,
        container.configs,
        (*container.findings, *findings),
        container.beside,
    )


def _bits(totals: list[SchemeTotal]) -> float | None:
    params = sum(total.params for total in totals)
    return 8 * sum(total.bytes for total in totals) / params if params else None
