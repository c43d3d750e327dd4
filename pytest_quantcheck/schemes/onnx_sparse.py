"""ONNX sparse tensors: plain numbers of which only those that are stored take bytes.

    part     dtype  stored shape            packing
    values   any    the dense shape         none; the container puts zeros between them
    indices  I64    [NNZ] or [NNZ, rank]    none

Formula: the value itself, 0 where none is stored. These are plain numbers, not quantized ones; a quantized operator
that takes a sparse tensor has the indices as a part of its own weight (`onnx_record`).
Source: onnx 1.23, onnx.proto (`SparseTensorProto`).
"""

from __future__ import annotations

from pytest_quantcheck.schemes import onnx_record, plain
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the tensor that indices belong to."""
    values = namespace.tensors.get(anchor.name.removesuffix(f".{onnx_record.INDICES}"))
    if anchor.role != "part" or values is None:
        return None
    dense = plain.claim(values, namespace)
    return dense._replace(parts=(*dense.parts, Part("indices", "index", anchor, anchor.surplus)))


SCHEME = Scheme(
    name="onnx-sparse",
    title="ONNX sparse tensors (plain numbers)",
    variants=(),
    claim=claim,
    anchors=(onnx_record.INDICES,),
    source="onnx 1.23, onnx.proto",
    verified="onnx 1.23.2",
)
