"""What an ONNX graph says about an encoded weight: the record `<weight>.onnx_node` beside it.

    {"operator": ..., "node": ..., "input": 1, "through": ..., "type": ..., "shape": [...],
     "parts": {part: {"type": ..., "shape": [...]}}, "attributes": {...}}

`type` and `shape` are those of the stored codes in the graph, which are that input of the node; `through` is an
operator between them and the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes.scheme import Namespace
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

RECORD = "onnx_node"
INDICES = "indices"  # of a sparse weight
LIMIT = 64 << 10
KINDS: dict[str, ByteClass] = {
    "zero_points": "zero_points",
    "g_idx": "index",
    INDICES: "index",
    "shape": "bookkeeping",
}


class Node(NamedTuple):
    """An operator and the weight it decodes."""

    name: str
    operator: str
    input: int
    through: str | None
    type: str
    shape: tuple[int, ...]
    described: Mapping[str, Mapping[str, Any]]
    attributes: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    record: StoredTensor

    @property
    def codes(self) -> StoredTensor:
        """The stored codes."""
        return self.stored[""]

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an attribute that is an integer; one without a default has to be there."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise FormatError(f"{self.operator} has the {name} `{value}`", tensor=self.name)
        return value

    def part(self, name: str) -> StoredTensor:
        """Return a part that the operator cannot be without."""
        if name not in self.stored:
            raise FormatError(f"{self.operator} has no {name}", tensor=self.name)
        return self.stored[name]

    def shape_of(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part as it is in the graph."""
        return tuple(self.described[part]["shape"])

    def type_of(self, part: str) -> str:
        """Return the type of a part as it is in the graph."""
        self.part(part)
        return str(self.described[part]["type"])

    def parts(self, padding: int = 0) -> tuple[Part, ...]:
        """Return all parts with their byte classes, the codes first; `padding` bytes of them are no values."""
        between: tuple[tuple[ByteClass, int], ...] = (("padding", padding),) if padding else ()
        named = [
            Part(name, KINDS.get(name, "scales"), part, part.surplus) for name, part in self.stored.items() if name
        ]
        return (
            Part("codes", "codes", self.codes, (*between, *self.codes.surplus)),
            *named,
            Part(RECORD, "bookkeeping", self.record),
        )


def find(anchor: StoredTensor, operators: tuple[str, ...], namespace: Namespace) -> Node | None:
    """Return the node whose record the anchor is; None where it is another scheme's."""
    name = anchor.name.removesuffix(f".{RECORD}")
    if anchor.role != "part" or name == anchor.name:
        return None
    record = _read(anchor)
    if record["operator"] not in operators:
        return None
    parts = {part: namespace.tensors[f"{name}.{part}"] for part in record["parts"]}
    return _node(name, record, {"": namespace.tensors[name], **parts}, anchor)


def node_of(tensor: LogicalTensor) -> Node | None:
    """Return the node that decodes a weight; None where no graph says how."""
    if not tensor.has(RECORD):
        return None
    parts = {part.name: part.stored for part in tensor.parts if part.name not in ("codes", RECORD)}
    return _node(tensor.name, _read(tensor.part(RECORD)), {"": tensor.stored, **parts}, tensor.part(RECORD))


def _read(record: StoredTensor) -> Mapping[str, Any]:
    return strict_json.parse_object(record.read(limit=LIMIT), limit=LIMIT)


def _node(name: str, record: Mapping[str, Any], stored: Mapping[str, StoredTensor], anchor: StoredTensor) -> Node:
    return Node(
        name,
        record["operator"],
        record["input"],
        record["through"],
        record["type"],
        tuple(record["shape"]),
        record["parts"],
        record["attributes"],
        stored,
        anchor,
    )
