"""ModelOpt in memory: the `QTensorWrapper` parameters that `mtq.compress` leaves, which are not what it exports.

    part                            dtype         stored shape       kind of QTensor
    weight                          U8            [N, K/2]           NVFP4, MXFP4: E2M1, low nibble first
    weight                          U8            [N, padded/2N]     INT4: flat, high nibble first, code - 8
    weight                          F8_E4M3, I8   [N, K]             FP8, MXFP8, INT8
    weight_quantizer._scale         F8_E4M3, U8   [N, K/b] or flat   NVFP4; MXFP4 and MXFP8: 2**(e - 127)
    weight_quantizer._scale         F32           [blocks, 1]        INT4: 7 / largest value, so it divides
    weight_quantizer._scale         F32           [], [N, 1], grid   FP8, INT8
    weight_quantizer._double_scale  F32           []                 NVFP4: multiplies
    input_quantizer._pre_quant_scale  F32, BF16   [K]                AWQ: what the activation is multiplied with

Formula: w = code * scale * double_scale * pre_quant_scale[k]; INT4: (code - 8) / scale, blocks run on across rows.
Shape and block sizes are attributes of the module (`weight.metadata`, `weight_quantizer.block_sizes`). NF4 is counted
and weighed, but not decoded.
Source: nvidia-modelopt 0.47.0, torch/quantization/qtensor/, torch/quantization/nn/modules/tensor_quantizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import modelopt, packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "weight_qtensor"
RECORD_LIMIT = 4 << 10
PARTS: dict[str, ByteClass] = {
    "weight_quantizer._scale": "scales",
    "weight_quantizer._double_scale": "scales",
    "weight_quantizer._scale_zeros": "scales",
    "input_quantizer._pre_quant_scale": "scales",
    RECORD: "bookkeeping",
}
SCALE, SECOND, SMOOTH = "weight_quantizer._scale", "weight_quantizer._double_scale", "input_quantizer._pre_quant_scale"
PACKED = frozenset({"nvfp4", "mxfp4", "int4"})
FLOORS_DB = {"nvfp4": 19.0, "mxfp4": 17.0, "fp8": 29.5, "mxfp8": 29.5, "int8": 28.0, "int4": 14.0}


class Layout(NamedTuple):
    """The kind of QTensor, and the rows and columns that share a scale (0: all of them)."""

    kind: str
    block: tuple[int, int]


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a live module that a record of its QTensor belongs to."""
    prefix = anchor.name.removesuffix(RECORD)
    weight = namespace.tensors.get(f"{prefix}weight")
    if weight is None:  # tied to one seen before
        return None
    record = strict_json.parse_object(anchor.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    kind, shape = str(record["kind"]), tuple(record["shape"])
    tensor = LogicalTensor(
        weight.name,
        shape,
        f"modelopt-{kind}",
        "parameter",
        (Part("weight", "codes", weight), *parts),
        (decode_packed if kind in PACKED else decode_bytes) if kind in FLOORS_DB else None,
        Layout(kind, (record["rows"], record["columns"])),
        block=record["columns"] or shape[-1],
        floor_db=FLOORS_DB.get(kind),
        flat=kind in PACKED,
    )
    _check(tensor)
    return tensor._replace(rounding=_rounding(kind, shape, record["rows"], record["columns"]))


def _rounding(kind: str, shape: tuple[int, ...], rows: int, columns: int) -> Rounding | None:
    if kind not in modelopt.ROUNDED:
        return None
    to_code, width = modelopt.ROUNDED[kind], columns or shape[-1]
    if kind in PACKED:
        return rounding.flat(to_code, width, shape[-1])._replace(margin_db=rounding.COMPENSATED_DB)
    block, margin = (rows or prod(shape[:-1]), width), rounding.COMPENSATED_DB
    if kind == "fp8":
        return rounding.placed_floats("float8_e4m3fn", shape, *block, margin_db=margin)
    return rounding.placed(to_code, shape, *block, margin_db=margin)


def decode_packed(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of a 4-bit weight, whose blocks are flat, as float32."""
    import torch

    layout, columns = tensor.layout, tensor.columns
    assert isinstance(layout, Layout)
    first, last, block = start * columns, stop * columns, layout.block[1]
    low = first // block
    raw = tensor.stored.load_bytes(low * block // 2, -(-last // block) * block // 2, device)
    table = torch.tensor([code - 8.0 for code in range(16)] if layout.kind == "int4" else packing.E2M1, device=device)
    values = packing.look_up(raw, packing.nibble_pairs(table, high_first=layout.kind == "int4")).view(-1, block)
    stored = tensor.part(SCALE)
    scales = stored.load(low, low + len(values), device)
    scales = packing.powers_of_two(scales) if stored.dtype == "U8" else scales.to(torch.float32)
    if layout.kind == "int4":
        values.div_(scales.view(-1, 1))
    else:
        share = tensor.part(SECOND).load(device=device).to(torch.float32) if tensor.has(SECOND) else 1.0
        values.mul_((scales * share).view(-1, 1))
    rows = values.view(-1)[first - low * block : last - low * block].view(stop - start, columns)
    return _unsmoothed(tensor, rows, device)


def decode_bytes(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of an 8-bit weight as float32."""
    import torch

    layout, stored = tensor.layout, tensor.part(SCALE)
    assert isinstance(layout, Layout)
    height, width = layout.block[0] or tensor.rows, layout.block[1] or tensor.columns
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    values = codes.to(torch.float32).view(stop - start, tensor.columns)
    wide = -(-tensor.columns // width)
    grid = packing.Grid(max(1, stored.elements // wide), wide, tensor.rows, height)
    scales = packing.grid_rows(stored, grid, slice(start, stop), device)
    scales = packing.powers_of_two(scales) if stored.dtype == "U8" else scales.to(torch.float32)
    return _unsmoothed(tensor, packing.scale_groups(values, scales, width), device)


def _unsmoothed(tensor: LogicalTensor, values: torch.Tensor, device: str) -> torch.Tensor:
    import torch

    return values.mul_(tensor.part(SMOOTH).load(device=device).to(torch.float32)) if tensor.has(SMOOTH) else values


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the weight of a compressed module its logical shape and how its scales lie."""
    weight, quantizer = owner._parameters.get("weight"), getattr(owner, "weight_quantizer", None)
    metadata = getattr(weight, "metadata", None)
    if not isinstance(metadata, Mapping) or "qtensor_class" not in metadata or quantizer is None:
        return None
    sizes = getattr(quantizer, "block_sizes", None) or {}
    scale = getattr(quantizer, "_scale", None)
    per_row = scale is not None and scale.dim() > 0 and scale.shape[0] == metadata["shape"][0]
    record = {
        "kind": metadata["qtensor_class"].__name__.removesuffix("QTensor").lower(),
        "shape": list(metadata["shape"]),
        "rows": sizes.get(-2) or (1 if per_row or -1 in sizes else 0),
        "columns": sizes.get(-1) or 0,
    }
    return {RECORD: json.dumps(record).encode()}


def _check(tensor: LogicalTensor) -> None:
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if not tensor.has(SCALE):
        raise FormatError(f"has no `{SCALE}`", tensor=tensor.name)
    if tensor.decoder is None:
        return
    block = layout.block[1]
    per_byte = 2 if layout.kind in PACKED else 1
    padded = -(-tensor.params // block) * block if layout.kind in PACKED and block else tensor.params
    if tensor.stored.nbytes * per_byte != padded:
        rule = f"{padded // per_byte:,} for {list(tensor.shape)}"
        raise FormatError(f"has {tensor.stored.nbytes:,} bytes of {layout.kind} codes ({rule})", tensor=tensor.name)


SCHEME = Scheme(
    name="modelopt-live",
    title="ModelOpt, compressed in memory",
    variants=("modelopt-nvfp4", "modelopt-mxfp4", "modelopt-fp8", "modelopt-mxfp8", "modelopt-int8", "modelopt-int4"),
    claim=claim,
    anchors=(RECORD,),
    live={"modelopt.RealQuantLinear": expose},
    source="nvidia-modelopt 0.47.0, torch/quantization/qtensor",
    verified="nvidia-modelopt 0.47.0",
)
