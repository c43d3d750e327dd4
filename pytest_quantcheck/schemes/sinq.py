"""SINQ: codes in slabs as hqq packs them, one scale per row of groups and a second one per column.

    part               dtype    stored shape          packing
    W_q                U8, I32  [P, C]                slabs of [R, C], the weight read row by row in groups of C
    meta.scale         float    [R, 1]                1D tiles; 2D tiles [T, C, 1]: per tile and row
    meta.zero          float    as scale, or []       in code units
    meta.scale2        float    [1, K]                1D tiles; 2D tiles [T, 1, C]: per tile and column
    meta.scale.x .s .m U8, float, float               scale as bytes: x * s + m (`quantAux`); zero likewise
    meta.awq_scale     float    any                   already within the other scales
    sidecar            JSON     nbits, group_size, shape, axis, packing, method, of every layer in one file

Formula: w[n, k] = (code - zero[r]) * scale[r] * scale2[k], in float32, r the row of groups; NF3 and NF4 look their
codes up in a table first. 2D tiles are C x C, row after row of tiles.
Source: sinq 0.2.0, quantizer.py, bitpack.py, dual_shift.py, sinqlinear_hf.py, patch_model.py.

C is the width of W_q: sinq halves a group size that does not divide the inputs and forgets to say so. A W_q of U8 with
as many values as the weight is not packed, whatever `packing` says. What is not a tensor is in the file
`model.safetensors.index.json.meta.json`; without it a checkpoint has no shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import rounding, slabs
from pytest_quantcheck.schemes.packing import NF4
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

SIDECAR = "model.safetensors.index.json.meta.json"
RECORD = "meta.record"  # live only, see `expose`
PARTS: dict[str, ByteClass] = {
    "W_q": "codes",
    "meta.scale": "scales",
    "meta.scale.x": "scales",
    "meta.scale.s": "scales",
    "meta.scale.m": "scales",
    "meta.zero": "zero_points",
    "meta.zero.x": "zero_points",
    "meta.zero.s": "zero_points",
    "meta.zero.m": "zero_points",
    "meta.scale2": "scales",
    "meta.awq_scale": "scales",
    RECORD: "bookkeeping",
}
FLOATS = ("F16", "BF16", "F32", "F64")

NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
    0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip


class Layout(NamedTuple):
    """The matrix of groups [rows, columns], its packing, whether tiles are square, and the table of its codes."""

    packing: str
    rows: int
    columns: int
    square: bool
    table: tuple[float, ...] | None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `W_q` with `meta.` tensors beside it belongs to."""
    stem, _, last = anchor.name.rpartition(".")
    prefix = f"{stem}." if stem else ""
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    if last != "W_q" or not any(part.startswith("meta.") for part in found):
        return None
    meta = _meta(found, namespace, stem, anchor)
    shape = _shape(meta, anchor)
    layout = _layout(found, meta, shape, anchor)
    _check_sizes(found, layout, shape)
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "sinq",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        layout,
        block=layout.columns,
        rounding=_rounding(layout, meta.get("nbits")),
    )


def _rounding(layout: Layout, bits: object) -> Rounding | None:
    """With one scale: the second one, of the columns, does no worse."""
    if layout.table is not None:
        to_level = rounding.codebook(layout.table)
    elif type(bits) is int and 1 < bits <= 8:
        to_level = rounding.from_least(bits)
    else:
        return None
    return rounding.grouped(to_level, layout.columns, margin_db=rounding.COMPENSATED_DB)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    shape, per_row = (layout.rows, layout.columns), tensor.columns // layout.columns
    rows = range(start * per_row, stop * per_row)
    codes = slabs.unpack(tensor.stored, slabs.PACKINGS[layout.packing], shape=shape, rows=rows, device=device)
    if layout.table is None:
        values = codes.to(torch.float32)
    else:
        values = torch.tensor(layout.table, device=device)[codes.clamp_(max=len(layout.table) - 1).long()]
    row = torch.arange(rows.start, rows.stop, device=device)
    tile = row // (per_row * layout.columns) * per_row + row % per_row  # of a square tiling, row after row of tiles
    if layout.square:
        row = tile * layout.columns + row // per_row % layout.columns
    values = (values - _per_row(tensor, "zero", row, device)) * _per_row(tensor, "scale", row, device)
    if tensor.has("meta.scale2"):
        second = tensor.part("meta.scale2").load(device=device).to(torch.float32).view(-1, layout.columns)
        values *= second[tile if layout.square else row % per_row]
    return values.view(stop - start, tensor.columns)


def _per_row(tensor: LogicalTensor, name: str, row: torch.Tensor, device: str) -> torch.Tensor:
    """The scales or zero points of some rows of groups, as float32, in a column."""
    import torch

    part = f"meta.{name}"
    if tensor.has(part):
        values = tensor.part(part).load(device=device).to(torch.float32)
    else:
        x, s, m = (tensor.part(f"{part}.{at}").load(device=device) for at in "xsm")
        values = (x.view(-1, s.numel()) * s + m).to(torch.float32).view(-1)
    return values.view(1, 1) if values.numel() == 1 else values[row].view(-1, 1)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a SINQLinear as it would be saved: it has neither parameters nor buffers."""
    if name or not isinstance(getattr(owner, "meta", None), dict) or getattr(owner, "W_q", None) is None:
        return None
    bias = getattr(owner, "bias_param", getattr(owner, "bias", None))
    return _show("", owner.W_q, owner.meta) | ({} if bias is None else {"bias": bias})


def expose_experts(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the experts of a SINQExperts one by one, under the names of the fused weights and their numbers."""
    if name:
        return None
    shown: dict[str, Any] = {}
    for weight, codes, metas in _EXPERTS:
        for at, (packed, meta) in enumerate(zip(getattr(owner, codes), getattr(owner, metas), strict=True)):
            if packed is not None and meta is not None:
                shown |= _show(f"{weight}.{at}.", packed, meta)
    return shown or None


_EXPERTS = (("gate_up_proj", "gate_up_W_q", "gate_up_meta"), ("down_proj", "down_W_q", "down_meta"))


def _show(prefix: str, codes: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {key: value for key, value in _flat("meta", meta) if hasattr(value, "is_meta")}
    numbers = {
        key: value for key, value in meta.items() if key in ("nbits", "packing", "axis", "method", "view_as_float")
    }
    record = json.dumps(numbers | {"shape": list(meta["shape"])}).encode()
    return {f"{prefix}W_q": codes, **{prefix + key: value for key, value in tensors.items()}, prefix + RECORD: record}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of nested metadata by dotted names; a scale as bytes is a tuple until it was saved once."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, (tuple, list)) and len(value) == 4 and hasattr(value[0], "is_meta"):
        yield from zip((f"{name}.x", f"{name}.s", f"{name}.m"), value[:3], strict=True)
    else:
        yield name, value


def _meta(
    parts: Mapping[str, StoredTensor], namespace: Namespace, layer: str, anchor: StoredTensor
) -> Mapping[str, Any]:
    if RECORD in parts:
        return strict_json.parse_object(parts[RECORD].read(limit=1 << 16), limit=1 << 16)
    found = namespace.files.get(SIDECAR, {}).get(layer)
    meta = found.get("meta") if isinstance(found, Mapping) else None
    if not isinstance(meta, Mapping):
        raise FormatError(f"has no entry in `{SIDECAR}`, which says its shape", tensor=anchor.name)
    return meta


def _shape(meta: Mapping[str, Any], anchor: StoredTensor) -> tuple[int, int]:
    shape = meta.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise FormatError(f"belongs to the shape `{shape}` (two sizes belong there)", tensor=anchor.name)
    return shape[0], shape[1]


def _layout(
    parts: Mapping[str, StoredTensor], meta: Mapping[str, Any], shape: tuple[int, int], anchor: StoredTensor
) -> Layout:
    packing, method = meta.get("packing"), str(meta.get("method", "")).lower()
    if anchor.dtype == "U8" and anchor.elements == prod(shape):
        packing = "8bit_u8"
    if packing not in slabs.PACKINGS or meta.get("axis", 1) != 1 or len(anchor.shape) != 2:
        what = f"{list(anchor.shape)} is packed as `{packing}` on axis {meta.get('axis')}"
        raise FormatError(f"{what} ({', '.join(slabs.PACKINGS)}; axis 1)", tensor=anchor.name)
    columns = anchor.nbytes // max(1, anchor.shape[0]) // slabs.PACKINGS[packing].width
    if not columns or shape[1] % columns:
        raise FormatError(f"has groups of {columns:,}, which do not divide {shape[1]:,} inputs", tensor=anchor.name)
    second = parts.get("meta.scale2")
    square = second is not None and len(second.shape) == 3
    table = NF4 if "nf4" in method else NF3 if "nf3" in method else None
    return Layout(packing, prod(shape) // columns, columns, square, table)


def _check_sizes(parts: Mapping[str, StoredTensor], layout: Layout, shape: tuple[int, int]) -> None:
    codes, packing = parts["W_q"], slabs.PACKINGS[layout.packing]
    wanted = packing.packed_rows(layout.rows) * layout.columns * packing.width
    if codes.nbytes != wanted or (not packing.padded and layout.rows % packing.fields):
        rule = f"{wanted:,} for {layout.rows:,} x {layout.columns:,} codes in `{layout.packing}`"
        raise FormatError(f"has {codes.nbytes:,} bytes ({rule})", tensor=codes.name)
    if layout.square and shape[0] % layout.columns:
        what = f"is tiled in squares of {layout.columns}, which do not divide {shape[0]:,} rows"
        raise FormatError(what, tensor=codes.name)
    for name in ("scale", "zero"):
        _check_values(parts, name, layout.rows)
    second = parts.get("meta.scale2")
    wanted = layout.rows if layout.square else shape[1]
    if second is not None and (second.dtype not in FLOATS or second.elements != wanted):
        raise FormatError(f"{second.dtype} {list(second.shape)} is not {wanted:,} floats", tensor=second.name)


def _check_values(parts: Mapping[str, StoredTensor], name: str, rows: int) -> None:
    """One value for each row of groups, or one for all; as floats or as bytes with a scale and an offset."""
    part = f"meta.{name}"
    kinds: tuple[str, ...] = ("U8",)
    if part in parts:
        stored, kinds = parts[part], (*FLOATS, "I64")
    else:
        missing = [f"{part}.{at}" for at in "xsm" if f"{part}.{at}" not in parts]
        if missing:
            raise FormatError(f"has no `{missing[0]}` beside it", tensor=parts["W_q"].name)
        stored = parts[f"{part}.x"]
        s, m = parts[f"{part}.s"], parts[f"{part}.m"]
        if s.dtype not in FLOATS or s.elements != m.elements or not s.elements or stored.elements % s.elements:
            what = f"{s.dtype} {list(s.shape)} does not scale the bytes {list(stored.shape)}"
            raise FormatError(what, tensor=s.name)
    if stored.dtype not in kinds or stored.elements not in (1, rows):
        what = f"{stored.dtype} {list(stored.shape)} is not one value for each of {rows:,} rows of groups"
        raise FormatError(what, tensor=stored.name)


SCHEME = Scheme(
    name="sinq",
    title="SINQ (8 to 1 bits, NF4, NF3; 1D and 2D tiles)",
    variants=("sinq",),
    claim=claim,
    anchors=("W_q",),
    methods=("sinq",),
    live={"sinq.SINQLinear": expose, "sinq.SINQExperts": expose_experts},
    source="sinq 0.2.0, quantizer.py, bitpack.py, dual_shift.py, sinqlinear_hf.py, patch_model.py",
    verified="sinq 0.2.0",
)
