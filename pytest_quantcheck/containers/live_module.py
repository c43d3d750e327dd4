"""Live modules: everything that holds weights, walked without touching a value.

`parameters()` alone is not enough: quantized layers keep weights in buffers and statistics in plain attributes. What a
library class holds is shown by the schemes (`exposers`, by `package.Class`, so that no library is imported); here only
the walk, names, ties and the wrappers of PEFT are known.

A weight that appears under several names is stored once and has aliases. Names are those of the unquantized model:
`base_model.model.`, `.base_layer`, `.modules_to_save.<adapter>` and `.parametrizations.<name>.original` are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.dtypes import OF_TORCH
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.tensor import Container, Role, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Expose = Callable[[Any, str], Mapping[str, Any] | None]

_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original(?=\.|$)")


class LiveTensor(NamedTuple):
    """A `Source` over a torch tensor that is already in memory."""

    tensor: torch.Tensor

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the tensor, copied to the host."""
        import torch

        if self.tensor.is_meta:
            raise FormatError("a small tensor that decides a shape is on the meta device: it has no values")
        flat = self.tensor.detach().contiguous().view(-1).view(torch.uint8)[start:stop]
        return bytearray(flat.cpu().numpy().tobytes())

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements of the tensor, or its bytes where `stored` asks for another dtype, on `device`."""
        import torch

        if self.tensor.is_meta:
            raise FormatError("is on the meta device: it has a shape and no values", tensor=stored.name)
        flat = self.tensor.detach().contiguous().view(-1)
        if OF_TORCH.get(str(flat.dtype)) != stored.dtype or stored.elements != flat.numel():
            flat = flat.view(torch.uint8)
        return flat[start:stop].to(device)


class Record(NamedTuple):
    """A `Source` over bytes that are no tensor: what a library keeps as Python attributes."""

    content: bytes

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes."""
        return bytearray(self.content[start:stop])

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return the bytes as uint8."""
        import torch

        return torch.frombuffer(bytearray(self.content), dtype=torch.uint8)[start:stop].to(device)


class _Place(NamedTuple):
    """Where the walk is: the name in the unquantized model, and whether PEFT put an adapter or a copy here."""

    prefix: str
    role: Role | None = None

    def child(self, name: str, role: Role | None = None) -> _Place:
        return _Place(f"{self.prefix}.{name}" if self.prefix and name else self.prefix or name, self.role or role)


def open_module(module: Any, exposers: Mapping[str, Expose]) -> Container:
    """Return the tensors of a live `torch.nn.Module`, parameters on the meta device included."""
    if not hasattr(module, "named_modules"):
        raise TypeError(f"`{type(module).__name__}` is neither a path nor a torch.nn.Module")
    walk = _Walk(exposers)
    walk.visit(module, _Place(""))
    config = getattr(module, "config", None)
    configs = {"config.json": config.to_dict()} if config is not None and hasattr(config, "to_dict") else {}
    resident = sum(stored.nbytes for stored in walk.tensors.values())
    return Container("live", type(module).__name__, walk.tensors, resident, {}, configs, walk.aliases)


class _Walk:
    """The state of one walk: what was found, and what was seen before under another name."""

    def __init__(self, exposers: Mapping[str, Expose]) -> None:
        self.exposers = exposers
        self.tensors: dict[str, StoredTensor] = {}
        self.aliases: dict[str, str] = {}
        self.names: dict[object, str] = {}  # identity of a tensor -> its first name

    def visit(self, module: Any, place: _Place) -> None:
        own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        buffers = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
        shown = self._expose(module, "") or {}
        weights = {name: tensor for name, tensor in buffers.items() if name in shown}  # where parameters() is empty
        self._add_group(shown, own | weights, {}, place)
        for name, parameter in own.items():
            if name not in shown:
                group = self._expose(parameter, name)
                if group is None:
                    _refuse_wrapper(parameter, place.child(name).prefix)
                group = group or {name: parameter}
                self._add_group(group, {next(iter(group)): parameter}, {}, place)  # its first tensor stands for it
        self._add_group({name: tensor for name, tensor in buffers.items() if name not in shown}, {}, buffers, place)
        for child, child_place in _children(module, place):
            self.visit(child, child_place)

    def _expose(self, owner: Any, name: str) -> Mapping[str, Any] | None:
        for cls in type(owner).__mro__:
            expose = self.exposers.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
            if expose is not None:
                return expose(owner, name)
        for buffer in getattr(owner, "_buffers", ()):
            if f":{buffer}" in self.exposers:
                return self.exposers[f":{buffer}"](owner, name)
        return None

    def _add_group(
        self, group: Mapping[str, Any], parameters: Mapping[str, Any], buffers: Mapping[str, Any], place: _Place
    ) -> None:
        """Add the tensors of one module or parameter; what ties to a weight seen before brings no parts of its own."""
        tied = False
        for name in (name for name in group if name in parameters):
            tied |= self._add(name, group[name], place, place.role or "parameter", bool(parameters[name].requires_grad))
        for name in (name for name in group if name in buffers):
            self._add(name, group[name], place, "shadow" if place.role == "shadow" else "buffer", None)
        for name in (name for name in group if name not in parameters and name not in buffers and not tied):
            self._add_part(name, group[name], place)

    def _add(self, name: str, tensor: Any, place: _Place, role: Role, trainable: bool | None) -> bool:
        """Add a parameter or buffer and return whether it is tied to one seen before."""
        name, identity = _name(name, place), _identity(tensor)
        first = self.names.get(identity)
        if first is not None and not (role == "parameter" and self.tensors[first].role == "buffer"):
            self.aliases[name] = first
            return True
        if first is not None:  # a buffer that turns out to be a parameter of another module
            del self.tensors[first]
            self.aliases[first] = name
        if name in self.tensors:
            raise FormatError("two different tensors of the model have this name", tensor=name)
        self.names[identity] = name
        self.tensors[name] = _stored(name, tensor, role, trainable)
        return False

    def _add_part(self, name: str, content: Any, place: _Place) -> None:
        """Add what belongs to an encoded weight; parts that several weights share are weighed once."""
        name = _name(name, place)
        if isinstance(content, bytes):
            self.tensors[name] = StoredTensor(name, "U8", (len(content),), 0, Record(content), 0, "part")
            return
        stored, first = _stored(name, content, "part", None), self.names.setdefault(_identity(content), name)
        self.tensors[name] = stored if first == name else stored._replace(nbytes=0)


def _name(name: str, place: _Place) -> str:
    return _PARAMETRIZED.sub(r"\1\2", place.child(name).prefix)


def _stored(name: str, tensor: Any, role: Role, trainable: bool | None) -> StoredTensor:
    dtype = OF_TORCH.get(str(tensor.dtype))
    if dtype is None:
        raise UnknownEncoding(f"{tensor.dtype} is a dtype we do not know", tensor=name)
    shape = tuple(tensor.shape)
    if dtype == "F4":  # torch counts pairs
        shape = (*shape[:-1], 2 * shape[-1])
    nbytes = tensor.numel() * tensor.element_size()
    return StoredTensor(name, dtype, shape, nbytes, LiveTensor(tensor), 0, role, trainable)


def _identity(tensor: Any) -> object:
    """What two names of one tensor share: the object or, where there is memory, the same view of it."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _refuse_wrapper(tensor: Any, name: str) -> None:
    """A tensor subclass has a storage of its own that only a scheme knows."""
    if hasattr(tensor, "__tensor_flatten__"):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise UnknownEncoding(f"`{kind}` is a tensor class that no scheme knows", tensor=name)


def _children(module: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """The child modules and where they stand in the unquantized model."""
    kinds = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("peft.")}
    for name, child in module._modules.items():
        if child is None:
            continue
        if "PeftModel" in kinds:
            yield child, place if name == "base_model" else place.child(name, "adapter")
        elif "BaseTuner" in kinds and name == "model":
            yield child, place
        elif "ModulesToSaveWrapper" in kinds:
            yield from _saved_copies(module, name, child, place)
        elif "AuxiliaryTrainingWrapper" in kinds:
            yield child, place if name == "original_module" else place.child(name, "adapter")
        elif "BaseTunerLayer" in kinds:
            yield child, place if name == "base_layer" else place.child(name, "adapter")
        else:
            yield child, place.child(name)


def _saved_copies(module: Any, name: str, child: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """PEFT's `modules_to_save`: the active copy stands where the original stood, and the original is a shadow."""
    active = [] if module.disable_adapters else module.active_adapters
    if name == "original_module":
        yield child, place.child(name, "shadow") if active else place
        return
    for adapter, copy in child._modules.items():
        yield copy, place if adapter in active else place.child(f"{name}.{adapter}", "shadow")
