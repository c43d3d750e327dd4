"""From the names in an ONNX graph to those of parameters, where the exporter's naming allows.

    `model.layers.0.mlp.up_proj.weight`                  itself; also with the ending of a quantizer
    `model.layers.0.mlp.up_proj.MatMul.weight`           onnxruntime-genai names the operator too
    `onnx::MatMul_312` at `/model/layers.0/mlp/up_proj/MatMul_Q4`   by the path of the node that takes it

Source: torch 2.13, onnx exporter; onnxruntime 1.31, quantization/matmul_nbits_quantizer.py, onnx_quantizer.py.
"""

from __future__ import annotations

import re
from typing import Any

from pytest_quantcheck.containers.onnx_graph import Scope, Use, attributes
from pytest_quantcheck.tensor import Origin

QUANTIZER = re.compile(r"(_quantized|_DQ_Q\d+|_Q\d+(G\d+)?|_Bnb4|_(FP|NF)4)$")
OPAQUE = re.compile(r"onnx::.*|.*/.*|(val_|t_?|_)?\d+|.*_output_\d+", re.DOTALL)
NODE = re.compile(r"/(.+)/(MatMul|Gemm|Conv|Gather)(_\d+)?((_matmul)?_Q\d+|_Bnb4|_quant\w*|Integer)*")

MATRICES = {"MatMul": 1, "QLinearMatMul": 3, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1}
GEMMS = {"Gemm": 1, "QGemm": 3}
BETWEEN = ("DequantizeLinear", "Transpose", "Cast", "Identity")


def origin(name: str, rank: int, use: Use | None) -> Origin:
    """Return what a weight was before it was exported, given who uses it."""
    use, turned = _reader(use)
    clean = QUANTIZER.sub("", name).replace(".MatMul.", ".")
    if clean.endswith(".qweight"):
        clean = clean.removesuffix(".qweight") + ".weight"
    if use is None:
        return Origin(clean)
    path = NODE.fullmatch(use.node.name)
    is_weight = use.at in (MATRICES.get(use.node.op_type), GEMMS.get(use.node.op_type), 1, 0)
    if OPAQUE.fullmatch(clean) and path and is_weight:
        clean = path.group(1).replace("/", ".") + ".weight"
    return Origin(clean, transposed=rank == 2 and _is_right_factor(use) != turned)


def _reader(use: Use | None) -> tuple[Use | None, bool]:
    """The node that computes with a constant, behind those that only decode or turn it."""
    turned = False
    for _ in range(len(BETWEEN)):
        if use is None or use.node.op_type not in BETWEEN or use.at:
            break
        turned ^= use.node.op_type == "Transpose"
        use = _next(use.node, use.scope)
    return use, turned


def _next(node: Any, scope: Scope) -> Use | None:
    users = scope.consumers.get(node.output[0], []) if node.output else []
    return Use(users[0], list(users[0].input).index(node.output[0]), scope) if users else None


def _is_right_factor(use: Use) -> bool:
    """Whether it is multiplied as [in, out], which torch's linear keeps as [out, in]."""
    operator = use.node.op_type
    if operator in GEMMS:
        return use.at == GEMMS[operator] and not attributes(use.node).get("transB", 0)
    return use.at == MATRICES.get(operator)
