"""ONNX MatMulFpQ4 (com.microsoft): a blob of four-bit blocks as the kernels of one processor want it.

    part    dtype   stored shape   packing
    codes   UINT8   [bytes]        the kernel's own, scales and zero points among the codes
    shape   I64     [2]            [K, N]

Counted by its shape, not decoded: the order depends on the processor that packed it.
Source: onnxruntime 1.31, contrib_ops/cpu/matmul_fpq4.cc.
"""

from __future__ import annotations

import struct

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import onnx_record
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

RANK = 2
BYTES = 8 * RANK


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that the record of a MatMulFpQ4 belongs to."""
    node = onnx_record.find(anchor, ("MatMulFpQ4",), namespace)
    if node is None:
        return None
    if node.type_of("shape") != "INT64" or node.shape_of("shape") != (RANK,):
        raise FormatError(f"its shape is {node.type_of('shape')} {list(node.shape_of('shape'))}", tensor=node.name)
    stored = node.part("shape")
    shape = struct.unpack("<2q", stored.source.read(stored.offset, stored.offset + BYTES))
    if min(shape) < 1 or node.type != "UINT8" or 2 * node.codes.elements < shape[0] * shape[1]:
        what = f"{node.codes.elements:,} bytes cannot hold {list(shape)} in four bits"
        raise FormatError(what, tensor=node.name)
    return LogicalTensor(node.name, shape, "onnx-fpq4", "parameter", node.parts(), None)


SCHEME = Scheme(
    name="onnx-fpq4",
    title="ONNX MatMulFpQ4",
    variants=("onnx-fpq4",),
    claim=claim,
    anchors=(onnx_record.RECORD,),
    source="onnxruntime 1.31, contrib_ops/cpu/matmul_fpq4.cc",
    verified="onnxruntime 1.31.1",
    decoded="no",
)
