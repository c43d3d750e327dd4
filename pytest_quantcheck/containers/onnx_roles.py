"""What a constant of an ONNX graph is that no operator decodes: a parameter, or a buffer.

    by its type       integers of 32 and 64 bits and booleans: shapes, axes, indexes, masks
    by its name       what exporters call tables of angles and masks
    by its operator   statistics, angles, bounds, scales of activations
    by its way        a vector that ends in both Cos and Sin: frequencies
                      a square that is added to what Softmax takes, bytes that end as a condition: masks

Integers of fewer bits that no operator decodes are an unknown encoding. What a graph fills is a buffer unless an
operator takes it as a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from math import prod

from pytest_quantcheck.containers import onnx_graph
from pytest_quantcheck.containers.onnx_graph import Use
from pytest_quantcheck.containers.onnx_tensors import Constant
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import UnknownEncoding
from pytest_quantcheck.tensor import Role, StoredTensor

FLOATS = ("F64", "F32", "F16", "BF16")
INDEXES = ("I64", "I32", "U64", "U32", "BOOL")
WORDS = ("I32", "U32", "I64", "U64")
NAMES = re.compile(
    r"(^|.*[./_])(inv_freq|(cos|sin)_cached?|(causal|attn|attention)_mask|masked_bias|rotary_emb[./].*)", re.DOTALL
)

# What an operator takes that no optimizer sees, by input.
BUFFERS = {
    "BatchNormalization": (3, 4),
    "RotaryEmbedding": (1, 2, 3),
    "GroupQueryAttention": (5, 6, 7, 8),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Clip": (1, 2),
    "Pad": (2,),
    "OneHot": (2,),
    "STFT": (2,),
    # Weights that stay floats and are rounded in the graph: scales, zero points, bits. Quant and kin are QONNX.
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "Quant": (1, 2, 3),
    "IntQuant": (1, 2, 3),
    "BipolarQuant": (1,),
    "FloatQuant": (1, 2, 3, 4, 5),
    "Trunc": (1, 2, 3, 4, 5),
}

# What an operator takes that an optimizer sees, where the graph generates it: weights of models without payload.
WEIGHTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gather": (0,),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}

# Operators that only move values, or multiply frequencies with positions.
MOVES = ("Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
TIMES = ("Mul", "MatMul", "Einsum")
FAR = 64  # nodes that are looked at behind a constant


def role(constant: Constant, uses: list[Use]) -> Role:
    """Return what a constant is; raises `UnknownEncoding` where it may be codes."""
    stored = constant.stored
    assert stored is not None
    assert constant.type is not None
    foreign = next((use for use in uses if use.node.domain not in onnx_graph.DOMAINS), None)
    if foreign is not None and len(constant.shape) > 1 and stored.dtype in WORDS:
        taker = onnx_graph.shown(foreign.node)
        what = f"{constant.type.name} {list(constant.shape)} feeds {taker}: may hold packed codes"
        raise UnknownEncoding(what, tensor=stored.name)
    if not constant.shape or stored.dtype in INDEXES or stored.elements == 0 or NAMES.fullmatch(stored.name):
        return "buffer"
    if all(_is_buffer(use, stored) for use in uses) if uses else stored.elements == 1:
        return "buffer"  # one value that no node takes is what a graph fills a shape with
    if _is_generated(stored) and not any(use.at in WEIGHTS.get(use.node.op_type, ()) for use in uses):
        return "buffer"
    if stored.dtype in FLOATS or DTYPES[stored.dtype].kind == "complex":
        return "parameter"
    taker = onnx_graph.shown(uses[0].node) if uses else "no node"
    raise UnknownEncoding(f"{constant.type.name} {list(constant.shape)} feeds {taker}: not decoded", tensor=stored.name)


def _is_generated(stored: StoredTensor) -> bool:
    """Whether the graph fills it: zeros and masks, unless an operator takes it as a weight."""
    return not stored.nbytes and stored.role is None


def _is_buffer(use: Use, stored: StoredTensor) -> bool:
    """Statistics, angles, masks, and the scale and zero point of activations."""
    operator, shape = use.node.op_type, stored.shape
    if use.at in BUFFERS.get(operator, ()):
        return True
    if stored.elements == 1:
        return use.at > 0 and (operator.startswith("Q") or operator in onnx_graph.OPERATORS)
    if stored.dtype in ("U8", "I8"):
        return _ends(use, MOVES, ("Where", "And", "Not"))
    if stored.elements == max(shape):
        return all(_ends(use, (*MOVES, *TIMES), (end,)) for end in ("Cos", "Sin"))
    is_square = len(shape) > 2 and shape[-1] == shape[-2] and prod(shape[:-2]) == 1
    return is_square and _ends(use, (*MOVES, "Add"), ("Softmax",))


def _ends(use: Use, through: Collection[str], ends: Collection[str]) -> bool:
    """Whether what a node takes gets to one of the ends, by way of operators of the given kinds alone."""
    ahead, seen = [use.node], 0
    while ahead and seen < FAR:
        node = ahead.pop()
        seen += 1
        if node.op_type in ends:
            return True
        if node.op_type in through:
            ahead += [user for output in node.output for user in use.scope.consumers.get(output, ())]
    return False
