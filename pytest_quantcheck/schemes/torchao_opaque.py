"""torchao tensors whose codes only a kernel can read: counted and weighed, not decoded.

    class                                    codes                                   scales
    Int4TilePackedTo4dTensor                 qdata I32 [N/8, K/128, 32, 4], padded   scale_and_zero [K/g, N, 2]
    Int4PlainInt32Tensor (XPU, NPU)          qdata I32 [N, K/8]                      scale, zero_point [K/g, N]
    any other torchao tensor (live): Int4PreshuffledTensor, IntxOpaqueTensor, Int8LutTensor, Float8OpaqueTensor,
    Float8Sparse2x4_*, UIntxBitPackedTensor, ...: its largest inner tensor, and the others

The shape is the class's own, never that of the codes, which may be padded. The first two can be saved, and lie in a
file as `torchao_metadata` says; the others show their inner tensors by name and a record `torchao_opaque`.
Source: torchao 0.18, quantization/quantize_/workflows, prototype, optim, sparsity.

NVIDIA's and AMD's kernels order the nibbles of `Int4TilePackedTo4dTensor` differently under one shape, and a file does
not say which packed it (torch, native/cuda/int4mm.cu `matrix_to_m16n8k16_Bint4_layout`): decoding would be a guess.

A class that wraps one plain tensor of its own shape (for training) holds plain numbers and is shown as that tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.schemes import torchao_metadata
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

ON_DISK = ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor")
RECORD = "torchao_opaque"
LIMIT = 64 << 10
VARIANT = "torchao-opaque"


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a flattened class that can be saved, or of a live record."""
    if anchor.name.endswith(f".{RECORD}"):
        return _of_record(anchor, namespace)
    found = torchao_metadata.find(anchor, "qdata", namespace)
    if found is None or found.kind not in ON_DISK:
        return None
    shape, blocks = found.sizes("shape"), found.sizes("block_size")
    parts = found.parts("qdata")
    return LogicalTensor(
        found.name, shape, VARIANT, "parameter", parts, decode, found.kind, blocks[-1] if blocks else None
    )


def _of_record(record: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    if record.role is None:
        return None
    name = record.name.removesuffix(f".{RECORD}")
    entry = strict_json.parse_object(record.read(limit=LIMIT), limit=LIMIT)
    stored = [(part, namespace.tensors[f"{name}.{part}"]) for part in entry["parts"]]
    parts = (
        Part(stored[0][0], "codes", stored[0][1]),
        *(Part(part, "scales", tensor) for part, tensor in stored[1:]),
        Part(RECORD, "bookkeeping", record),
    )
    return LogicalTensor(name, tuple(entry["shape"]), VARIANT, "parameter", parts, decode, entry["kind"])


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise `NotDecodable`: the order of the codes is a kernel's own."""
    raise NotDecodable(f"is a {tensor.layout}: only its kernel knows the order of its codes", tensor=tensor.name)


def expose(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live torchao tensor by its inner tensors, the largest first."""
    inner = {part: getattr(owner, part) for part in owner.__tensor_flatten__()[0]}
    plain = [tensor for tensor in inner.values() if tensor.shape == owner.shape and tensor.dtype.is_floating_point]
    if len(inner) == 1 and plain:
        return {name: plain[0]}
    ordered = sorted(inner, key=lambda part: -inner[part].numel() * inner[part].element_size())
    record = {"kind": type(owner).__name__, "shape": list(owner.shape), "parts": ordered}
    shown = {f"{name}.{part}": inner[part] for part in ordered}
    return shown | {f"{name}.{RECORD}": json.dumps(record).encode()}


SCHEME = Scheme(
    name="torchao-opaque",
    title="torchao tensors in a kernel's own order",
    variants=(VARIANT,),
    claim=claim,
    anchors=("_qdata", RECORD),
    methods=("torchao",),
    live={
        **{f"torchao.{kind}": torchao_metadata.expose for kind in ON_DISK},
        "torchao.TorchAOBaseTensor": expose,
        "torchao.Float8TrainingTensor": expose,
        "torchao.WeightWithDynamicFloat8CastTensor": expose,
    },
    source="torchao 0.18, quantization/quantize_/workflows and prototype",
    verified="torchao 0.18.0 (count and bytes)",
    decoded="no",
)
