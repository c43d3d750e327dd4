"""Live modules: everything that holds weights, walked without touching a value.

`parameters()` alone is not enough: quantized layers keep weights in buffers and statistics in plain attributes. What a
library class holds is shown by the schemes (`exposers`, by `package.Class`, so that no library is imported); here only
the walk, names, ties and the wrappers of PEFT, FSDP, DDP and `torch.compile` are known.

A weight that appears under several names is stored once and has aliases. Names are those of the unquantized model:
`base_model.model.`, `.base_layer`, `.modules_to_save.<adapter>`, `_fsdp_wrapped_module`, `_orig_mod`, the `module` of
DDP and `.parametrizations.<name>.original` are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.containers import live_tensor
from pytest_quantcheck.containers.live_tensor import Placed, Record
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import Container, Role, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Expose = Callable[[Any, str], Mapping[str, Any] | None]

_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original(?=\.|$)")
_WRAPPED = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"})


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


def weights_of_modules(module: Any, exposers: Mapping[str, Expose]) -> Iterator[tuple[Any, Callable[[str], str]]]:
    """Yield each module and what names its own tensors in the unquantized model, wrappers before what they wrap."""
    walk = _Walk(exposers)
    walk.visit(module, _Place(""))
    for child in module.modules():
        place = walk.modules.get(id(child))
        if place is not None:
            yield child, partial(_name, place=place)


class _Walk:
    """The state of one walk: what was found, and what was seen before under another name."""

    def __init__(self, exposers: Mapping[str, Expose]) -> None:
        self.exposers = exposers
        self.tensors: dict[str, StoredTensor] = {}
        self.aliases: dict[str, str] = {}
        self.names: dict[object, str] = {}  # identity of a tensor -> its first name
        self.parameters: dict[str, str] = {}  # name of a tensor that stands for a parameter -> name of the parameter
        self.modules: dict[int, _Place] = {}  # identity of a module -> where it was first
        self.managed: dict[int, dict[str, Placed]] = {}  # identity of a module -> what an FSDP1 unit took from it

    def visit(self, module: Any, place: _Place) -> None:
        if self.modules.setdefault(id(module), place) is not place:
            self._alias(self.modules[id(module)], place)
            return
        for owner, name, placed in live_tensor.flat_parameters(module):
            self.managed.setdefault(id(owner), {})[name] = placed
        own, buffers = self._weights(module), _present(module._buffers)
        shown = self._expose(module, "") or {}
        own |= {name: tensor for name, tensor in buffers.items() if name in shown}  # where parameters() is empty
        if _peft_kinds(module):
            place = place._replace(role=place.role or "adapter")
        self._add_group(shown, own, place)
        for name, parameter in own.items():
            if name not in shown:
                self._add_tensor(name, parameter, place, place.role or "parameter")
        for name, buffer in buffers.items():
            if name not in shown:
                self._add_tensor(name, buffer, place, "shadow" if place.role == "shadow" else "buffer")
        for child, child_place in _children(module, self.modules[id(module)]):
            self.visit(child, child_place)

    def _weights(self, module: Any) -> dict[str, Any]:
        """The parameters of a module itself, those that FSDP1 flattened as what they were."""
        own = {name: tensor for name, tensor in _present(module._parameters).items() if not hasattr(tensor, "_fqns")}
        return own | self.managed.get(id(module), {})

    def _expose(self, owner: Any, name: str) -> Mapping[str, Any] | None:
        for cls in type(owner).__mro__:
            expose = self.exposers.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
            if expose is not None:
                return expose(owner, name)
        for buffer in getattr(owner, "_buffers", ()):
            if f":{buffer}" in self.exposers:
                return self.exposers[f":{buffer}"](owner, name)
        return None

    def _add_group(self, group: Mapping[str, Any], own: Mapping[str, Any], place: _Place) -> None:
        """Add what a scheme shows of a module; what ties to a weight seen before brings no parts of its own.

        Names of the module's own tensors, and names without a dot, are weights; the others are parts of one.
        """
        tied, role = False, place.role or "parameter"
        for name in (name for name in group if name in own):
            tensor = own[name] if isinstance(own[name], Placed) else group[name]
            tied |= self._add(name, tensor, place, role, bool(own[name].requires_grad))
        for name, content in group.items():
            if name in own or tied:
                continue
            if isinstance(content, bytes) or "." in name:
                self._add_part(name, content, place)
            else:
                self._add(name, content, place, role, False)

    def _add_tensor(self, name: str, tensor: Any, place: _Place, role: Role) -> None:
        """Add a parameter or a buffer; the first tensor that a scheme shows of its class stands for it."""
        trainable = None if role == "buffer" else bool(tensor.requires_grad)
        local = tensor._local_tensor if live_tensor.is_dtensor(tensor) else tensor
        group = self._expose(local, name)
        if group is None:
            live_tensor.refuse(local, place.child(name).prefix)
            self._add(name, tensor, place, role, trainable)
            return
        main = next(iter(group))
        stands_for = self.parameters[_name(main, place)] = _name(name, place)
        if self._add(main, group[main], place, role, trainable):
            self.aliases[stands_for] = self.aliases.pop(_name(main, place))
            return
        if local is not tensor and tuple(local.shape) != tuple(tensor.shape):
            name_of_main = _name(main, place)
            self.tensors[name_of_main] = self.tensors[name_of_main]._replace(whole=tuple(tensor.shape))
        for part in (part for part in group if part != main):
            self._add_part(part, group[part], place)

    def _add(self, name: str, tensor: Any, place: _Place, role: Role, trainable: bool | None) -> bool:
        """Add a tensor under its own name and return whether it is tied to one seen before."""
        name = _name(name, place)
        live_tensor.refuse(tensor, name)
        identity = live_tensor.identity(tensor)
        first = self.names.get(identity)
        if first is not None and not (role == "parameter" and self.tensors[first].role == "buffer"):
            self.aliases[name] = first
            return True
        if name in self.tensors:
            raise FormatError("two different tensors of the model have this name", tensor=name)
        if first is not None:  # a buffer that turns out to be a parameter of another module
            del self.tensors[first]
            self.aliases = {alias: name if other == first else other for alias, other in self.aliases.items()}
            self.aliases[first] = name
        self.names[identity] = name
        self.tensors[name] = live_tensor.store(name, tensor, role, trainable)
        return False

    def _add_part(self, name: str, content: Any, place: _Place) -> None:
        """Add what belongs to an encoded weight; parts that several weights share are weighed once."""
        name = _name(name, place)
        if isinstance(content, bytes):
            self.tensors[name] = StoredTensor(name, "U8", (len(content),), 0, Record(content), 0, "part")
            return
        stored = live_tensor.store(name, content, "part", None)
        first = self.names.setdefault(live_tensor.identity(content), name)
        self.tensors[name] = stored if first == name else stored._replace(nbytes=0)

    def _alias(self, first: _Place, again: _Place) -> None:
        """A module that was seen before: every weight of it has another name."""
        if not first.prefix or not again.prefix:
            return
        for name, stored in list(self.tensors.items()):
            if name.startswith(f"{first.prefix}.") and stored.role != "part":
                again_here = again.prefix + self.parameters.get(name, name)[len(first.prefix) :]
                self.aliases[again_here] = name


def _present(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _name(name: str, place: _Place) -> str:
    return _PARAMETRIZED.sub(r"\1\2", place.child(name).prefix)


def _peft_kinds(module: Any) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("peft.")}


def _children(module: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """The child modules and where they stand in the unquantized model."""
    wrapper = not _WRAPPERS.isdisjoint(cls.__name__ for cls in type(module).__mro__)
    kinds = _peft_kinds(module)
    for name, child in _present(module._modules).items():
        if name in _WRAPPED or (wrapper and name == "module"):
            yield child, place
        elif kinds:
            yield from _children_of_peft(module, kinds, name, place)
        else:
            yield child, place.child(name)


# The child of each class of PEFT that stands where its parent stands; all others are adapters.
_BASE_OF = {
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",
    "AdaptionPromptModel": "model",
    "AuxiliaryTrainingWrapper": "original_module",
    "TrainableTokensWrapper": "token_adapter",
    "BaseTunerLayer": "base_layer",
    "AdaptedAttention": "model",
}


def _children_of_peft(module: Any, kinds: set[str], name: str, place: _Place) -> Iterator[tuple[Any, _Place]]:
    child = module._modules[name]
    if "ModulesToSaveWrapper" in kinds:
        yield from _saved_copies(module, name, child, place)
    elif any(name == base for kind, base in _BASE_OF.items() if kind in kinds):
        yield child, place
    else:
        yield child, place.child(name, "adapter")


def _saved_copies(module: Any, name: str, child: Any, place: _Place) -> Iterator[tuple[Any, _Place]]:
    """PEFT's `modules_to_save`: the active copy stands where the original stood, and the original is a shadow."""
    active = [] if module.disable_adapters else module.active_adapters
    if name == "original_module":
        yield child, place.child(name, "shadow") if active else place
        return
    for adapter, copy in child._modules.items():
        yield copy, place if adapter in active else place.child(f"{name}.{adapter}", "shadow")
