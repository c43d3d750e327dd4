"""How onnxruntime decodes a weight: the node that takes it runs alone, with an input that makes its output the weight.

    operator              input                  output
    DequantizeLinear      none                   w
    and a MatMul by it    rows of the identity   rows of w
    GatherBlockQuantized  all indices            w
    MatMulBnb4            rows of the identity   columns of w; its rows with `transB` 0
    MatMulNBits           rows of the identity   columns of w

A product with a row of the identity has one value of w and zeros to add up: nothing is rounded by the sum. Constants
and attributes are those of the graph; the graph around the node does not run, but for the product that onnxruntime
makes one kernel of with its DequantizeLinear. Runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.kernels import Kernel, Layer
from pytest_quantcheck.containers import onnx_graph
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import onnx_record
from pytest_quantcheck.schemes.onnx_record import Node

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    import torch

CODES = "codes"
ROWS = 512  # of the identity at once
OPSET = 21
NEWER = {"FLOAT4E2M1": 23, "INT2": 25, "UINT2": 25}  # opsets from which on operators take a type
FATAL = 4  # the level under which onnxruntime logs nothing: what is wrong is raised as well

# The place of the input beside the constants.
INPUTS = {"DequantizeLinear": None, "GatherBlockQuantized": 1, "MatMulBnb4": 0, "MatMulNBits": 0}


class Run(NamedTuple):
    """A node, and whether a product takes what it yields."""

    node: Node
    multiplied: bool


def layers(artifact: Artifact) -> Iterator[Layer]:
    """Yield the quantized tensors of an ONNX model whose operator can run alone."""
    for tensor in artifact.tensors:
        node = onnx_record.node_of(tensor) if tensor.quantized else None
        if node is not None and node.operator in INPUTS and node.through is None:
            multiplied = node.operator == "DequantizeLinear" and tensor.transposed and len(tensor.shape) == 2
            yield Layer(tensor, Run(node, multiplied), "onnxruntime", KERNEL)


def _run(run: Run) -> torch.Tensor:
    """The weight as onnxruntime computes it."""
    import numpy as np
    import torch

    session, node = _session(run), run.node
    found = torch.from_numpy(np.concatenate([session.run(None, feeds)[0] for feeds in _feeds(run)]))
    columns = node.operator == "MatMulNBits" or (node.operator == "MatMulBnb4" and node.integer("transB", 1))
    return found.t() if columns else found


def _feeds(run: Run) -> Iterator[dict[str, np.ndarray]]:
    import numpy as np

    node = run.node
    if node.operator == "DequantizeLinear" and not run.multiplied:
        yield {}
    elif node.operator == "GatherBlockQuantized":
        yield {"x": np.arange(node.shape[node.integer("gather_axis", 0)])}
    else:
        columns = node.shape[0] if run.multiplied else node.integer("K")
        kind = np.float16 if node.type_of(_scales(node)) == "FLOAT16" else np.float32
        for start in range(0, columns, ROWS):
            yield {"x": np.eye(min(ROWS, columns - start), columns, start, dtype=kind)}


def _session(run: Run) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    try:
        return onnxruntime.InferenceSession(_model(run), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes, none of them public
        why = str(error).strip().splitlines()[0].rpartition(" was false. ")[2]
        raise FormatError(f"onnxruntime {onnxruntime.__version__} does not run it: {why}") from None


def _model(run: Run) -> bytes:
    """A model of the node alone: its constants, and `x` where the operator takes something beside them."""
    from onnx import TensorProto, helper

    node = run.node
    slot = next(slot for slot in onnx_graph.OPERATORS[node.operator] if slot.weight == node.input)
    parts = {node.input: "", **{at: part for part, at in slot.parts.items() if part in node.described}}
    constants = [_constant(node, part) for part in parts.values()]
    floats = TensorProto.DataType.Value(node.type_of(_scales(node)))
    varying, names, values = INPUTS[node.operator], {at: part or CODES for at, part in parts.items()}, []
    if varying is not None:
        names[varying] = "x"
    if varying is not None or run.multiplied:
        kind = TensorProto.INT64 if node.operator == "GatherBlockQuantized" else floats
        values = [helper.make_tensor_value_info("x", kind, None)]
    inputs = [names.get(at, "") for at in range(1 + max(names))]
    domain = "" if node.operator == "DequantizeLinear" else "com.microsoft"
    nodes = [helper.make_node(node.operator, inputs, ["w"], domain=domain, **node.attributes)]
    if run.multiplied:
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    output = helper.make_tensor_value_info(nodes[-1].output[0], floats, None)
    graph = helper.make_graph(nodes, "one", values, [output], constants)
    opsets = [helper.make_opsetid("", NEWER.get(node.type, OPSET)), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()  # type: ignore[no-any-return]


def _constant(node: Node, part: str) -> Any:
    import torch
    from onnx import TensorProto, helper

    kind, shape = (node.type_of(part), node.shape_of(part)) if part else (node.type, node.shape)
    raw = node.stored[part].load().view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(part or CODES, TensorProto.DataType.Value(kind), shape, raw, raw=True)


def _scales(node: Node) -> str:
    return "absmax" if "absmax" in node.described else "scales"


KERNEL = Kernel(_run, "onnxruntime.InferenceSession(...).run(...) of its node alone")
