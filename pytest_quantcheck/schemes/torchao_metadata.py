"""How torchao flattens a tensor subclass: several stored tensors and one JSON entry that says what they are.

    `M._P_<part>`           one tensor for each part of the parameter `M.P`: qdata, scale, zero_point ...
    `__metadata__["M.P"]`   {"_type": class, "_data": {attribute: value}, "_tensor_data_names": [part, ...]}

A live tensor shows the same parts, and the JSON entry as a record `M._P_torchao`.
Source: torchao 0.18, prototype/safetensors/safetensors_support.py and safetensors_utils.py, utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes.scheme import Namespace
from pytest_quantcheck.tensor import ByteClass, Part, StoredTensor

RECORD = "torchao"  # live only
LIMIT = 64 << 10
ATTRIBUTES = (
    "shape",
    "block_size",
    "is_swizzled_scales",
    "elem_dtype",
    "target_dtype",
    "bit_width",
    "act_mapping_type",
)

KINDS: dict[str, ByteClass] = {"zero_point": "zero_points", "qzeros": "zero_points", "group_zero": "zero_points"}


class Flattened(NamedTuple):
    """A flattened parameter: its name, its class, the attributes of that class, and its stored parts by name."""

    name: str
    kind: str
    attributes: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    record: StoredTensor | None

    def part(self, name: str) -> StoredTensor:
        """Return a part that the class cannot be without."""
        if name not in self.stored:
            raise FormatError(f"is a {self.kind} and has no `{_part_name(self.name, name)}`", tensor=self.name)
        return self.stored[name]

    def parts(self, main: str) -> tuple[Part, ...]:
        """Return all parts with their byte classes, the codes first."""
        others = [Part(name, KINDS.get(name, "scales"), stored) for name, stored in self.stored.items() if name != main]
        record = [] if self.record is None else [Part(RECORD, "bookkeeping", self.record)]
        return (Part(main, "codes", self.stored[main]), *others, *record)

    def sizes(self, attribute: str) -> tuple[int, ...]:
        """Return an attribute that is a list of sizes."""
        value = self.attributes.get(attribute)
        if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
            raise FormatError(f"is a {self.kind} whose `{attribute}` is `{value}`, not sizes", tensor=self.name)
        return tuple(value)

    def check_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `shape`, which what is declared or alive must agree with."""
        if "shape" in self.attributes and self.sizes("shape") != shape:
            raise FormatError(
                f"declares the shape {self.attributes['shape']}, its parts have {list(shape)}", tensor=self.name
            )
        return shape

    def check_elements(self, part: str, grid: Iterable[int]) -> None:
        """A part has as many values as the grid of blocks."""
        stored, wanted = self.part(part), list(grid)
        if stored.elements != prod(wanted):
            raise FormatError(f"{list(stored.shape)} is not one value for each block of {wanted}", tensor=stored.name)


def find(anchor: StoredTensor, main: str, namespace: Namespace) -> Flattened | None:
    """Return the flattened parameter whose part `main` the anchor is; None where the name is somebody else's.

    Raises `FormatError` where the metadata is missing, or names parts that are not there.
    """
    module, _, last = anchor.name.rpartition(".")
    if not last.startswith("_") or not last.endswith(f"_{main}") or len(last) < len(main) + 3:
        return None
    parameter = last[1 : -len(main) - 1]
    name = f"{module}.{parameter}" if module else parameter
    record = namespace.tensors.get(_part_name(name, RECORD))
    entry = _entry(name, record, namespace)
    declared = entry.get("_tensor_data_names")
    kind, attributes = entry.get("_type"), entry.get("_data")
    if not isinstance(declared, list) or not isinstance(kind, str) or not isinstance(attributes, dict):
        raise FormatError("its torchao metadata has not `_type`, `_data` and `_tensor_data_names`", tensor=name)
    stored = {part: namespace.tensors.get(_part_name(name, part)) for part in declared if isinstance(part, str)}
    missing = [_part_name(name, part) for part, tensor in stored.items() if tensor is None]
    if missing or main not in stored:
        raise FormatError(f"is a {kind} and has no `{(missing or [_part_name(name, main)])[0]}`", tensor=name)
    present = {part: tensor for part, tensor in stored.items() if tensor is not None}
    return Flattened(name, kind, attributes, present, record)


def _entry(name: str, record: StoredTensor | None, namespace: Namespace) -> dict[str, Any]:
    if record is not None and record.role is not None:
        return strict_json.parse_object(record.read(limit=LIMIT), limit=LIMIT)
    text = namespace.metadata.get(name)
    if text is None:
        raise FormatError("has flattened parts of a torchao tensor, and no entry in `__metadata__`", tensor=name)
    try:
        return strict_json.parse_object(text.encode(), limit=LIMIT)
    except FormatError as error:
        raise error.at(tensor=name) from None


def _part_name(name: str, part: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{part}" if module else f"_{parameter}_{part}"


def expose(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `TorchAOBaseTensor` as it would be flattened."""
    optional = [part for part in getattr(owner, "optional_tensor_data_names", []) if getattr(owner, part) is not None]
    names = [*owner.tensor_data_names, *optional]
    attributes = {key: _plain(getattr(owner, key)) for key in ATTRIBUTES if hasattr(owner, key)}
    entry = {"_type": type(owner).__name__, "_data": attributes, "_tensor_data_names": names}
    shown = {_part_name(name, part): getattr(owner, part) for part in names}
    return shown | {_part_name(name, RECORD): json.dumps(entry).encode()}


def _plain(value: Any) -> Any:
    """An attribute as torchao writes it into JSON."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return {"_type": type(value).__name__, "_data": str(value).removeprefix("torch.")}
