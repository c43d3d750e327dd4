"""TransformerEngine parameters under `fp8_model_init`. Live only: its state dict is written in high precision.

    class                   codes                                       scales
    Float8Tensor            data U8 [..., K], transpose a copy of it    scale_inv F32 [1]
    Float8BlockwiseQTensor  rowwise_data U8 [..., K], columnwise_data   rowwise_scale_inv F32, columnwise_scale_inv
                            a transposed copy                           2D: [ceil(M/128), ceil(K/128) padded to 4]
                                                                        1D: [ceil(K/128), M padded to 4]
    MXFP8Tensor             rowwise_data U8, columnwise_data U8         E8M0 in U8, padded
    NVFP4Tensor             rowwise_data U8 [..., K/2], columnwise_data E4M3 in U8, padded; amax_rowwise F32

Formula: w = float8(code) * scale_inv of the tensor, or of its block of 128 x 128 or 1 x 128.
Source: TransformerEngine (main, 2026), pytorch/tensor/storage/{float8,float8_blockwise,mxfp8,nvfp4}_tensor_storage.py.

Read, not run: the library needs a GPU. The last two are counted and weighed; their decode is inside its C++ extension.
The shape is the tensor's own. Copies for the backward pass weigh as codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "transformer_engine"
LIMIT = 4 << 10
BLOCK = 128
CODES = ("_data", "_rowwise_data", "_columnwise_data", "_transpose")
SCALES = ("_scale_inv", "_rowwise_scale_inv", "_columnwise_scale_inv", "_amax_rowwise", "_amax_columnwise")
VARIANTS = {
    "Float8Tensor": "te-float8",
    "Float8BlockwiseQTensor": "te-float8-blockwise",
    "MXFP8Tensor": "te-mxfp8",
    "NVFP4Tensor": "te-nvfp4",
}
OTHER = "te-quantized"


class Layout(NamedTuple):
    """The class, the torch dtype of its codes, and whether its blocks are square."""

    kind: str
    dtype: str
    square: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a live record belongs to."""
    name = anchor.name.removesuffix(f".{RECORD}")
    if anchor.role is None or name == anchor.name:
        return None
    record = strict_json.parse_object(anchor.read(limit=LIMIT), limit=LIMIT)
    found = {
        part: namespace.tensors[f"{name}.{part[1:]}"]
        for part in CODES + SCALES
        if f"{name}.{part[1:]}" in namespace.tensors
    }
    shape, layout = tuple(record["shape"]), Layout(record["kind"], record["dtype"], record["square"])
    variant, main = VARIANTS.get(layout.kind, OTHER), next(iter(found))
    packed = 2 if variant == "te-nvfp4" else 1
    if variant != OTHER and found[main].elements * packed != prod(shape):
        raise FormatError(f"{list(found[main].shape)} does not hold {list(shape)}", tensor=found[main].name)
    parts = (
        *(Part(part, "codes" if part in CODES else "scales", stored) for part, stored in found.items()),
        Part(RECORD, "bookkeeping", anchor),
    )
    decodable = layout.kind in ("Float8Tensor", "Float8BlockwiseQTensor") and main in ("_data", "_rowwise_data")
    expected = rounding.grouped(rounding.small_float(layout.dtype), shape[-1]) if decodable else None
    return LogicalTensor(
        name, shape, variant, "parameter", parts, decode if decodable else decode_inside, layout, rounding=expected
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    codes = tensor.stored.load_bytes(start * tensor.columns, stop * tensor.columns, device)
    values = codes.view(getattr(torch, layout.dtype)).to(torch.float32).view(stop - start, tensor.columns)
    if layout.kind == "Float8Tensor":
        return values.mul_(tensor.part("_scale_inv").load(device=device))
    stored = tensor.part("_rowwise_scale_inv")
    scale = stored.load(device=device).view(stored.shape)
    across = torch.arange(tensor.columns, device=device) // BLOCK
    if not layout.square:
        return values.mul_(scale[across, start:stop].t())
    down = torch.arange(start, stop, device=device) // BLOCK
    return values.mul_(scale[down][:, across])


def decode_inside(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Raise `NotDecodable`: only the extension of the library knows how, or only a transposed copy is left."""
    raise NotDecodable("needs `dequantize` of TransformerEngine's own extension (GPU)", tensor=tensor.name)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a live quantized tensor by what it holds."""
    held = {part: getattr(owner, part, None) for part in CODES + SCALES}
    shown = {f"{name}.{part[1:]}": tensor for part, tensor in held.items() if tensor is not None}
    if not shown:
        raise FormatError("is a TransformerEngine tensor that holds nothing", tensor=name)
    record = {
        "kind": next((cls.__name__ for cls in type(owner).__mro__ if cls.__name__ in VARIANTS), type(owner).__name__),
        "shape": list(owner.shape),
        "dtype": "float8_e5m2" if "E5M2" in str(getattr(owner, "_fp8_dtype", "")) else "float8_e4m3fn",
        "square": bool(getattr(owner, "_is_2D_scaled", True)),
    }
    return shown | {f"{name}.{RECORD}": json.dumps(record).encode()}


SCHEME = Scheme(
    name="transformer-engine",
    title="TransformerEngine FP8 and FP4 parameters",
    variants=(*VARIANTS.values(), OTHER),
    claim=claim,
    anchors=(RECORD,),
    live={f"transformer_engine.{kind}": expose for kind in (*VARIANTS, "QuantizedTensor")},
    source="TransformerEngine (main, 2026), pytorch/tensor/storage",
    verified="read, not run",
    decoded="not run: needs a GPU",
)
