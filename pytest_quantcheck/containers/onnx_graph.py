"""The constants of an ONNX graph, and what its operators do with them.

Constants are initializers, dense and sparse, the values of `Constant` nodes, and what `ConstantOfShape` makes of a
constant shape, in the main graph, in the graphs that are attributes of its nodes, and in functions. Those of inner
graphs are named `<output of the node>/<attribute>/<name>`, those of functions `<domain>:<function>/<name>`.
Source: onnx 1.23, onnx.proto, defs; onnxruntime 1.31, contrib_ops.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pytest_quantcheck.containers import onnx_sparse
from pytest_quantcheck.containers.onnx_tensors import MAX_DIMENSIONS, Constant, Data
from pytest_quantcheck.errors import FormatError, UnknownEncoding

CONSTANT_LIMIT = 200_000


class Slot(NamedTuple):
    """Which input of an operator is an encoded weight, and which its other parts are."""

    weight: int
    parts: Mapping[str, int]


def _slot(weight: int, scales: int | None = None, zero_points: int | None = None, **others: int) -> Slot:
    named = {"scales": scales, "zero_points": zero_points, **others}
    return Slot(weight, {name: at for name, at in named.items() if at is not None})


OPERATORS: dict[str, tuple[Slot, ...]] = {
    "MatMulNBits": (_slot(1, 2, 3, g_idx=4),),
    "GatherBlockQuantized": (_slot(0, 2, 3),),
    "DequantizeLinear": (_slot(0, 1, 2),),
    "MatMulInteger": (_slot(0, None, 2), _slot(1, None, 3)),
    "ConvInteger": (_slot(1, None, 3),),
    "DynamicQuantizeMatMul": (_slot(1, 2, 3),),
    "MatMulIntegerToFloat": (_slot(1, 3, 5),),
    "QLinearMatMul": (_slot(0, 1, 2), _slot(3, 4, 5)),
    "QLinearConv": (_slot(3, 4, 5), _slot(8, 4, x_scale=1)),
    "QGemm": (_slot(3, 4, 5), _slot(6, 4, x_scale=1)),
    "QAttention": (_slot(1, 4, 7),),
    "QEmbedLayerNormalization": tuple(_slot(at, at + 6, at + 11) for at in range(2, 7)),
    "DynamicQuantizeLSTM": (_slot(1, 8, 9), _slot(2, 10, 11)),
    "GemmFloat8": (_slot(1, 4),),
    "MatMulBlockQuantizedFp8Weight": (_slot(1, 2),),
    "MatMulBnb4": (_slot(1, absmax=2),),
    "MatMulFpQ4": (_slot(1, shape=2),),
    "MatMulNBitsMlp": (_slot(3, 4), _slot(6, 7)),
    "MatMulNBitsQkv": (_slot(3, 4), _slot(6, 7), _slot(9, 10)),
    "QMoE": (_slot(2, 3, 11, global_scale=15), _slot(5, 6, 12, global_scale=16), _slot(8, 9, 13)),
}  # fmt: skip
DOMAINS = ("", "ai.onnx", "com.microsoft")
WITHOUT_SCALE = ("MatMulInteger", "ConvInteger")
WHOLE_CODES = (
    "DequantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    "QLinearMatMul", "QLinearConv", "QGemm", "QAttention",
)  # fmt: skip


class Use(NamedTuple):
    """A node that takes a constant: as which input, and in which scope."""

    node: Any
    at: int
    scope: Scope


class Encoded(NamedTuple):
    """An encoded weight, its other parts by name, and the node that takes them, the weight as input `at`."""

    weight: Constant
    parts: Mapping[str, Constant]
    node: Any
    at: int
    scope: Scope
    through: str | None = None  # the operator between the weight and the node


@dataclass
class Scope:
    """One graph: what its names stand for. Names of the graph around it are seen from inside."""

    prefix: str
    parent: Scope | None
    constants: dict[str, Constant] = field(default_factory=dict)
    producers: dict[str, Any] = field(default_factory=dict)
    consumers: dict[str, list[Any]] = field(default_factory=dict)

    def constant(self, name: str) -> Constant | None:
        """Return the constant of that name, seen from here."""
        if name in self.constants:
            return self.constants[name]
        if name in self.producers or self.parent is None:
            return None
        return self.parent.constant(name)


@dataclass
class Graphs:
    """All constants of a model by their full names, who uses them, and the encoded weights among them."""

    constants: dict[str, Constant] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    encoded: list[Encoded] = field(default_factory=list)


def read_model(model: Any, data: Data) -> Graphs:
    """Return the constants of a model and their uses."""
    graphs = Graphs()
    if model.training_info:
        raise UnknownEncoding("has `training_info`, whose graphs are not read")
    _read_graph(model.graph, Scope("", None), graphs, data)
    for function in model.functions:
        _read_nodes(function.node, Scope(f"{function.domain}:{function.name}/", None), graphs, data)
    return graphs


def _read_graph(graph: Any, scope: Scope, graphs: Graphs, data: Data) -> None:
    for tensor in graph.initializer:
        _add(data.constant(tensor, scope.prefix + tensor.name), tensor.name, scope, graphs)
    for sparse in graph.sparse_initializer:
        name = sparse.values.name
        _add(onnx_sparse.constant(sparse, scope.prefix + name, data), name, scope, graphs)
    _read_nodes(graph.node, scope, graphs, data)


def _add(constant: Constant, name: str, scope: Scope, graphs: Graphs) -> None:
    if not name:
        raise FormatError("has a constant without a name")
    if name in scope.constants or constant.name in graphs.constants:
        raise FormatError("names two constants (readers differ on which one wins)", tensor=constant.name)
    if len(graphs.constants) >= CONSTANT_LIMIT:
        raise FormatError(f"more than {CONSTANT_LIMIT:,} constants (limit)")
    scope.constants[name] = graphs.constants[constant.name] = constant


def _read_nodes(nodes: Any, scope: Scope, graphs: Graphs, data: Data) -> None:
    for node in nodes:
        if node.op_type == "Constant" and node.domain in DOMAINS[:2]:
            _read_constant(node, scope, graphs, data)
            continue
        if node.op_type == "ConstantOfShape" and node.domain in DOMAINS[:2] and _input(node, 0, scope):
            _read_filled(node, scope, graphs, data)
            continue
        for output in node.output:
            scope.producers[output] = node
        for name in node.input:
            scope.consumers.setdefault(name, []).append(node)
    for node in nodes:
        for index, name in enumerate(node.input):
            constant = scope.constant(name) if name else None
            if constant is not None:
                graphs.uses.setdefault(constant.name, []).append(Use(node, index, scope))
        graphs.encoded += _encoded(node, scope)
        for attribute in node.attribute:
            _read_attribute(attribute, node, scope, graphs, data)


def _read_attribute(attribute: Any, node: Any, scope: Scope, graphs: Graphs, data: Data) -> None:
    """Inner graphs; a tensor that is an attribute of anything but `Constant` is one value to fill with."""
    if node.op_type == "Constant" and node.domain in DOMAINS[:2]:
        return
    if (
        node.op_type == "ConstantOfShape"
        and attribute.name == "value"
        and node.output
        and node.output[0] in scope.constants
    ):
        return
    inner = [attribute.g] if attribute.HasField("g") else []
    for number, graph in enumerate((*inner, *attribute.graphs)):
        where = node.output[0] if node.output else node.name
        place = f"{scope.prefix}{where}/{attribute.name}{f'.{number}' if number else ''}/"
        _read_graph(graph, Scope(place, scope), graphs, data)
    where = f"{scope.prefix}{node.output[0] if node.output else node.name}.{attribute.name}"
    tensors = [attribute.t] if attribute.HasField("t") else []
    for number, tensor in enumerate((*tensors, *attribute.tensors)):
        constant = data.constant(tensor, f"{where}{f'.{number}' if number else ''}")
        _add(constant, constant.name, scope, graphs)
    few = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for number, sparse in enumerate((*few, *attribute.sparse_tensors)):
        constant = onnx_sparse.constant(sparse, f"{where}{f'.{number}' if number else ''}", data)
        _add(constant, constant.name, scope, graphs)


def _read_constant(node: Any, scope: Scope, graphs: Graphs, data: Data) -> None:
    name = node.output[0] if node.output else ""
    place = scope.prefix + name
    for attribute in node.attribute:
        kind = attribute.name
        if kind == "value" and attribute.HasField("t"):
            constant = data.constant(attribute.t, place)
        elif kind == "sparse_value" and attribute.HasField("sparse_tensor"):
            constant = onnx_sparse.constant(attribute.sparse_tensor, place, data)
        elif kind in ("value_float", "value_floats"):
            values = attribute.floats if kind.endswith("s") else [attribute.f]
            constant = data.numbers(place, values, whole=False, scalar=not kind.endswith("s"))
        elif kind in ("value_int", "value_ints"):
            values = attribute.ints if kind.endswith("s") else [attribute.i]
            constant = data.numbers(place, values, whole=True, scalar=not kind.endswith("s"))
        elif kind in ("value_string", "value_strings"):
            constant = Constant(place, None, (), None)
        else:
            raise UnknownEncoding(f"is a Constant with `{kind}`, which is not read", tensor=place or node.name)
        _add(constant, name, scope, graphs)


def _read_filled(node: Any, scope: Scope, graphs: Graphs, data: Data) -> None:
    """A tensor of a constant shape, filled with the value of the attribute: it has values and no bytes."""
    name = node.output[0] if node.output else ""
    place, shape = scope.prefix + name, _input(node, 0, scope)
    if shape is None or shape.type is None or shape.type.dtype != "I64" or shape.stored is None:
        raise FormatError("is filled to a shape that is not INT64", tensor=place)
    if shape.stored.elements > MAX_DIMENSIONS:
        raise FormatError(f"has {shape.stored.elements:,} dimensions (limit {MAX_DIMENSIONS})", tensor=place)
    count = shape.stored.elements
    raw = shape.stored.source.read(shape.stored.offset, shape.stored.offset + 8 * count)
    tensors = [attribute.t for attribute in node.attribute if attribute.name == "value" and attribute.HasField("t")]
    value = data.constant(tensors[0], f"{place}.value") if tensors else None
    if value is not None:
        _add(value, value.name, scope, graphs)
    _add(data.filled(place, struct.unpack(f"<{count}q", raw), value), name, scope, graphs)


def _encoded(node: Any, scope: Scope) -> Iterator[Encoded]:
    """The encoded weights that a node takes."""
    if node.domain not in DOMAINS:
        return
    for slot in OPERATORS.get(node.op_type, ()):
        through = None
        weight = _input(node, slot.weight, scope)
        if weight is None and node.op_type in ("DequantizeLinear", *WITHOUT_SCALE):
            through, weight = _gathered(node, slot.weight, scope)
        if weight is None:
            continue
        parts = {}
        for part, at in slot.parts.items():
            found = _input(node, at, scope)
            if found is not None:
                parts[part] = found
            elif at < len(node.input) and node.input[at]:
                raise UnknownEncoding(f"{_shown(node)} takes {part} that are computed", tensor=weight.name)
        if node.op_type in WITHOUT_SCALE:
            parts |= _scale_behind(node, scope, weight)
        yield Encoded(weight, parts, node, slot.weight, scope, through)


def _input(node: Any, index: int, scope: Scope) -> Constant | None:
    name = node.input[index] if index < len(node.input) else ""
    return scope.constant(name) if name else None


def _gathered(node: Any, index: int, scope: Scope) -> tuple[str | None, Constant | None]:
    """Rows of a table are looked up first and decoded then."""
    producer = scope.producers.get(node.input[index]) if index < len(node.input) else None
    if producer is None or producer.op_type != "Gather":
        return None, None
    return "Gather", _input(producer, 0, scope)


def _scale_behind(node: Any, scope: Scope, weight: Constant) -> dict[str, Constant]:
    """The scale of an integer product: `Mul(Cast(product), Mul(scale of a, scale of b))`.

    Where both are constants the quantizer's naming tells them apart: `<name>_quantized` has `<name>_scale`.
    """
    cast = next((user for user in _users(node, scope) if user.op_type == "Cast"), None)
    users = _users(cast, scope) if cast is not None else []
    own = weight.name.removesuffix("_quantized") + "_scale"
    for scaled in (user for user in users if user.op_type == "Mul"):
        for name in scaled.input:
            producer = scope.producers.get(name)
            names = producer.input if producer is not None and producer.op_type == "Mul" else [name]
            scales = [scale for one in names if (scale := scope.constant(one)) is not None]
            if len(scales) > 1:
                scales = [scale for scale in scales if scale.name == own]
            if len(scales) == 1:
                return {"scales": scales[0]}
    raise UnknownEncoding(f"{_shown(node)} is not followed by a Cast and a Mul with its scale", tensor=weight.name)


def _users(node: Any, scope: Scope) -> list[Any]:
    return scope.consumers.get(node.output[0], []) if node.output else []


def _shown(node: Any) -> str:
    return f"{node.op_type} (node `{node.name}`)"


def attributes(node: Any) -> dict[str, int | float | str]:
    """Return the numbers and words that a node has as attributes."""
    found: dict[str, int | float | str] = {}
    for attribute in node.attribute:
        if attribute.name in found:
            raise FormatError(f"{_shown(node)} has the attribute `{attribute.name}` twice")
        if attribute.type == 1:
            found[attribute.name] = attribute.f
        elif attribute.type == 2:
            found[attribute.name] = attribute.i
        elif attribute.type == 3:
            found[attribute.name] = attribute.s.decode("utf-8", "replace")
    return found


def shown(node: Any) -> str:
    """Return an operator and its node, for an error."""
    return _shown(node)
