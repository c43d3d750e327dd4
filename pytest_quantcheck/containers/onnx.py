"""ONNX: one file with the graph, its weights in it or in files beside it.

Stored tensors are the constants under their names in the graph (`onnx_graph`), wherever their values are
(`onnx_tensors`). Beside an encoded weight are `<weight>.scales`, `<weight>.zero_points` and its kin, taken from the
operator that decodes it, and `<weight>.onnx_node`, a JSON record of operator, node, type, shape and attributes.
Beside a sparse tensor, which is shown in its dense shape, are `<name>.indices`.
Integers that no operator decodes are shapes, axes and indexes where they have 32 or 64 bits, and an unknown encoding
where they have fewer. Text stays with the graph.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pytest_quantcheck.containers import files, folders, onnx_graph, onnx_names, onnx_roles, onnx_wire
from pytest_quantcheck.containers.live_tensor import Record
from pytest_quantcheck.containers.onnx_graph import Encoded, Graphs
from pytest_quantcheck.containers.onnx_tensors import Constant, Data, folder_of
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import Container, Origin, StoredTensor

ENDING = ".onnx"
RECORD = "onnx_node"
SHOWN = 8
STALE = re.compile(r".*\.(onnx_data(_\d+)?|onnx\.data|onnx_weights)")


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    if os.path.isdir(path):
        return any(name.endswith(ENDING) for name in os.listdir(path))
    return path.endswith(ENDING)


def open_container(path: str) -> Container:
    """Return the constants of an `.onnx` file with the data beside it, or of a folder with one model."""
    if not os.path.isdir(path):
        return _opened(path)[0]
    present = files.listing(path)
    models = [name for name in present if name.endswith(ENDING)]
    if len(models) != 1:
        named = ", ".join(models[:SHOWN]) + (f" and {len(models) - SHOWN} more" if len(models) > SHOWN else "")
        raise FormatError(f"holds {len(models)} ONNX models ({named}): name one", file=path)
    container, data = _opened(os.path.join(path, models[0]))
    used = {models[0], *(os.path.normpath(location) for location in data.locations)}
    beside = {name: size for name, size in present.items() if name not in used}
    return folders.with_beside(container, path, beside, [name for name in beside if _is_stale(name)])


def _is_stale(name: str) -> bool:
    """Whether a file holds weights and nothing else: those of this model are in its graph, or named by it."""
    return STALE.fullmatch(name) is not None or folders.WEIGHTS.fullmatch(name) is not None


def _opened(path: str) -> tuple[Container, Data]:
    try:
        return _open(files.open_file(path), path)
    except FormatError as error:
        raise error.at(file=path) from None


def _open(file: files.File, path: str) -> tuple[Container, Data]:
    data = Data(file, folder_of(path))
    graphs = onnx_graph.read_model(_parsed(file), data)
    stored, origins = _tensors(graphs)
    overhead = data.overhead()
    findings = [*data.checked()]
    if overhead["dead"]:
        what = f"{overhead['dead']:,} bytes of external data belong to no tensor"
        findings.append(Finding("dead-bytes", "warning", None, what))
    return Container("onnx", path, stored, data.size, overhead, findings=tuple(findings), origins=origins), data


def _parsed(file: files.File) -> Any:
    try:
        onnx = importlib.import_module("onnx")
        message = importlib.import_module("google.protobuf.message")
    except ImportError:
        raise FormatError("needs the onnx package: pip install 'pytest-quantcheck[onnx]'") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(onnx_wire.skeleton(file))
    except message.DecodeError:
        raise FormatError("not an ONNX model (the onnx package cannot parse it)") from None
    if not model.HasField("graph") or not model.ir_version:
        raise FormatError("not an ONNX model (it has no graph or no ir_version)")
    return model


def _tensors(graphs: Graphs) -> tuple[dict[str, StoredTensor], dict[str, Origin]]:
    encoded = _by_weight(graphs)
    parts = {part.name for one in encoded.values() for part in one.parts.values()}
    stored: dict[str, StoredTensor] = {}
    weighed: set[str] = set()
    origins: dict[str, Origin] = {}
    for name, constant in graphs.constants.items():
        if name in encoded:
            _put(_encoded(encoded[name], weighed), stored)
        elif constant.stored is not None and name not in parts:
            uses = graphs.uses.get(name, [])
            role = onnx_roles.role(constant, uses)
            tied = role == "parameter" and constant.stored.role == "tied"
            _put([constant.stored._replace(role="tied" if tied else role), *_indices(constant)], stored)
        if name in stored and stored[name].role != "buffer":
            first = next(iter(graphs.uses.get(name, [])), None)
            origins[name] = onnx_names.origin(name, len(constant.shape), first)
    return stored, _unambiguous(origins, stored)


def _indices(constant: Constant) -> list[StoredTensor]:
    """The indices of a sparse constant."""
    if constant.indices is None or constant.indices.stored is None:
        return []
    return [constant.indices.stored._replace(role="part")]


def _put(tensors: list[StoredTensor], stored: dict[str, StoredTensor]) -> None:
    for tensor in tensors:
        if tensor.name in stored:
            raise FormatError("names two tensors", tensor=tensor.name)
        stored[tensor.name] = tensor


def _by_weight(graphs: Graphs) -> dict[str, Encoded]:
    """The encoded weights by name; a table may be looked up and multiplied, but has to be decoded in one way."""
    found: dict[str, Encoded] = {}
    for one in graphs.encoded:
        if one.weight.stored is None or one.weight.stored.dtype in onnx_roles.FLOATS:
            raise UnknownEncoding(
                f"{onnx_graph.shown(one.node)} takes it, which is not encoded", tensor=one.weight.name
            )
        _check_sparse(one)
        first = found.setdefault(one.weight.name, one)
        if first is not one and _decoding(first) != _decoding(one):
            nodes = f"{onnx_graph.shown(first.node)} and {onnx_graph.shown(one.node)}"
            raise UnknownEncoding(f"is decoded in two ways, by {nodes}", tensor=one.weight.name)
    return found


def _check_sparse(one: Encoded) -> None:
    """A weight of whole codes may be sparse, no other part."""
    packed = one.weight.indices is not None and one.node.op_type not in onnx_graph.WHOLE_CODES
    sparse = [part for part, constant in one.parts.items() if constant.indices is not None]
    if packed or sparse:
        what = f"sparse {', '.join(sparse) or 'codes'} for {onnx_graph.shown(one.node)}, which are not decoded"
        raise UnknownEncoding(what, tensor=one.weight.name)


def _decoding(one: Encoded) -> tuple[object, ...]:
    attributes = onnx_graph.attributes(one.node)
    parts = {name: part.name for name, part in one.parts.items()}
    return parts, attributes.get("bits"), attributes.get("block_size"), attributes.get("axis")


def _encoded(one: Encoded, weighed: set[str]) -> list[StoredTensor]:
    """The stored tensors of an encoded weight; a part that several have weighs nothing the second time."""
    name = one.weight.name
    assert one.weight.stored is not None
    assert one.weight.type is not None
    parts = {**one.parts, "indices": one.weight.indices} if one.weight.indices is not None else one.parts
    shared = all(constant.stored and constant.stored.role for constant in (one.weight, *parts.values()))
    found = [one.weight.stored._replace(role="tied" if shared else None)]
    for part, constant in parts.items():
        if constant.stored is None:
            raise FormatError(f"its {part} are text", tensor=name)
        tensor = constant.stored._replace(name=f"{name}.{part}", role=None)
        found.append(tensor._replace(nbytes=0) if constant.name in weighed else tensor)
        weighed.add(constant.name)
    record = {
        "operator": one.node.op_type,
        "node": one.node.name,
        "input": one.at,
        "through": one.through,
        "type": one.weight.type.name,
        "shape": list(one.weight.shape),
        "parts": {part: _described(constant) for part, constant in parts.items()},
        "attributes": onnx_graph.attributes(one.node),
    }
    content = json.dumps(record).encode()
    found.append(StoredTensor(f"{name}.{RECORD}", "U8", (len(content),), 0, Record(content), role="part"))
    return found


def _described(constant: Constant) -> Mapping[str, object]:
    return {"type": constant.type.name if constant.type else None, "shape": list(constant.shape)}


def _unambiguous(origins: Mapping[str, Origin], stored: Mapping[str, StoredTensor]) -> dict[str, Origin]:
    """Origins whose names are nobody else's; the others keep the name they have in the graph."""
    times = Counter(origin.name for origin in origins.values())
    times.update(stored.keys() - origins.keys())
    return {
        name: origin if times[origin.name] == 1 else origin._replace(name=name)
        for name, origin in origins.items()
        if origin.name != name or origin.transposed
    }
