"""HQQ: codes of a grouped matrix, packed in slabs, with a float scale and zero point per group.

    part               dtype     stored shape   packing
    W_q                U8, I32   [P, C]         P = R / slabs; 3 bits: I32, ten slabs, R rounded up; live: a parameter
    scale, zero        float     [R, 1]         axis 1: one per row; axis 0: [1, C], one per column
    zero_scale         float     [2, ...]       both in one, where the metadata is kept in host memory
    shape              I64       [2]            of the weight
    nbits, group_size, axis                     I32 (nbits 1.58: F32), scalars
    packing, unpack_view_dtype, compute_dtype   U8, text
    view_as_float and eight more flags          U8, scalars

Formula: m[r, c] = (code[r, c] - zero) * scale, in float32; m read row by row is the weight read row by row. With groups
of g, m is [N * K / g, g] on axis 1 and [g, N * K / g] on axis 0.
Source: hqq 0.2.8.post1, core/quantize.py (`Quantizer`, `HQQLinear`), core/bitpack.py, core/utils.py.

Slabs: row r is in packed row r % P, in the field r // P from the top: two of 4 bits, four of 2, eight of 1, ten of 3.
5 and 6 bits take a byte each, 1.58 takes two bits. `view_as_float` views W_q as compute_dtype: its shape and dtype say
nothing then. Where the slabs don't divide the rows, hqq's packer drops the last rows: counted, not decoded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding, slabs
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

META = "W_q.meta"  # live only, see `expose`
NUMBERS = ("shape", "nbits", "group_size", "axis", "view_as_float", "channel_wise", "quant_scale", "quant_zero")
TEXTS = ("packing", "unpack_view_dtype", "compute_dtype")
FLAGS = ("offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")

PARTS: dict[str, ByteClass] = {
    "W_q": "codes",
    "scale": "scales",
    "zero": "zero_points",
    "zero_scale": "scales",
    "scale_q": "scales",
    "zero_q": "zero_points",
    META: "bookkeeping",
    **dict.fromkeys((*NUMBERS, *TEXTS, *FLAGS), "bookkeeping"),
}

PACKINGS = ("8bit_u8", "4bit_u8", "3bit_32", "2bit_u8", "1bit_u8")
FLOAT_DTYPES = {"F16", "BF16", "F32", "F64"}


# Worst of Gaussian, Student-t and outlier weights, less 1 dB: bits, largest group, floor. Those of three and two bits
# are of plain rounding in groups of 128, which HQQ's search improves.
FLOORS_DB = ((8, 128, 41.4), (4, 64, 18.5), (4, 128, 16.8), (3, 128, 9.9), (2, 128, 3.4))


class Layout(NamedTuple):
    """The grouped matrix [rows, columns] and how its codes are packed."""

    packing: str | None
    rows: int
    columns: int
    axis: int
    dropped: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `W_q` belongs to."""
    stem, _, last = anchor.name.rpartition(".")
    if last != "W_q":
        return None
    prefix = f"{stem}." if stem else ""
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    meta = _meta(found, anchor)
    shape = _shape(meta, anchor)
    layout = _layout(found, meta, shape, anchor)
    _check_sizes(found, layout, meta)
    size = layout.columns if layout.axis == 1 else layout.rows
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "hqq",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        layout,
        block=size,
        floor_db=next((floor for bits, group, floor in FLOORS_DB if meta.get("nbits") == bits and size <= group), None),
        rounding=_rounding(meta.get("nbits"), size, shape, kept_in_groups=layout.axis == 1),
        flat=True,
    )


def _rounding(bits: object, size: int, shape: tuple[int, ...], *, kept_in_groups: bool) -> Rounding | None:
    """Plain rounding, which HQQ's search improves.

    Groups along the other axis run through the whole matrix: for them stand groups of as many neighbours.
    """
    if type(bits) is not int or not 1 < bits <= 8:
        return None
    expected = rounding.flat(rounding.from_least(bits), size, shape[-1])
    return expected if kept_in_groups else expected._replace(margin_db=rounding.COMPENSATED_DB)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    found = coded(tensor, start, stop, device)
    if found is not None:
        return packing.expand(found).view(stop - start, tensor.columns)
    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start * tensor.columns, stop * tensor.columns
    low, high = first // layout.columns, -(-last // layout.columns)
    codes = _codes(tensor, layout, low, max(low, high), device).to(torch.float32)  # (high - low, C)
    zero, scale = _parameters(tensor, layout, low, max(low, high), device)
    values = ((codes - zero) * scale).view(-1)
    return values[first - low * layout.columns :][: last - first].view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where rows are full groups."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    _check_decodable(tensor, layout)
    floats = layout.packing is None and tensor.stored.dtype != "U8"
    if layout.axis != 1 or floats or not layout.columns or tensor.columns % layout.columns:
        return None
    groups = tensor.columns // layout.columns
    low, high = start * groups, stop * groups
    codes = _codes(tensor, layout, low, high, device)
    zeros, scales = (
        each.expand(high - low, 1).reshape(stop - start, groups)
        for each in _parameters(tensor, layout, low, high, device)
    )
    return Coded(codes.view(-1), None, scales, layout.columns, zeros)


def _check_decodable(tensor: LogicalTensor, layout: Layout) -> None:
    if tensor.has("scale_q") or tensor.has("zero_q"):
        raise NotDecodable("its scales are quantized themselves, which hqq dropped: not decoded", tensor=tensor.name)
    if layout.dropped:
        what = f"hqq's packer dropped the last {layout.dropped} of {layout.rows:,} rows of groups: they are lost"
        raise NotDecodable(what, tensor=tensor.name)


def _codes(tensor: LogicalTensor, layout: Layout, low: int, high: int, device: str) -> torch.Tensor:
    """Rows `low` up to `high` of the codes."""
    if layout.packing is None:
        codes = tensor.stored.load(low * layout.columns, high * layout.columns, device)
        return codes.view(-1, layout.columns)
    shape, rows = (layout.rows, layout.columns), range(low, high)
    return slabs.unpack(tensor.stored, slabs.PACKINGS[layout.packing], shape=shape, rows=rows, device=device)


def _parameters(
    tensor: LogicalTensor, layout: Layout, low: int, high: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero points and scales of some rows, as float32, in a shape that fits them."""
    import torch

    if tensor.has("zero_scale"):
        both = tensor.part("zero_scale").load(device=device).to(torch.float32).view(2, -1)
        zero, scale = both[0], both[1]
    else:
        zero, scale = (tensor.part(part).load(device=device).to(torch.float32) for part in ("zero", "scale"))
    return _place(zero, layout, low, high), _place(scale, layout, low, high)


def _place(values: torch.Tensor, layout: Layout, low: int, high: int) -> torch.Tensor:
    if values.numel() == 1:
        return values.view(1, 1)
    return values.view(-1, 1)[low:high] if layout.axis == 1 else values.view(1, -1)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show an HQQLinear as it would be saved: most of it lives in a dict that no one else sees."""
    meta = getattr(owner, "meta", None)
    if name or not isinstance(meta, dict) or getattr(owner, "W_q", None) is None:
        return None
    shown = {"W_q": owner.W_q}
    shown |= {part: meta[part] for part in _TENSORS if hasattr(meta.get(part), "is_meta")}
    if hasattr(getattr(owner, "bias", None), "is_meta"):
        shown["bias"] = owner.bias
    record = {part: _plain(meta[part]) for part in (*NUMBERS, *TEXTS) if part in meta}
    return shown | {META: json.dumps(record).encode()}


_TENSORS = ("scale", "zero", "zero_scale", "scale_q", "zero_q")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _meta(parts: Mapping[str, StoredTensor], anchor: StoredTensor) -> Mapping[str, Any]:
    """What the small tensors beside the codes say; live, what the module's dict says."""
    if META in parts:
        return strict_json.parse_object(parts[META].read(limit=1 << 16), limit=1 << 16)
    meta: dict[str, Any] = {part: _read_text(parts[part]) for part in TEXTS if part in parts}
    for part in NUMBERS:
        if part in parts:
            numbers = _read_numbers(parts[part])
            meta[part] = numbers if part == "shape" else numbers[0]
    for part in ("shape", "packing", "axis"):
        if part not in meta:
            name = f"{anchor.name.removesuffix('W_q')}{part}"
            raise FormatError(f"has no `{name}` beside it", tensor=anchor.name)
    return meta


_FORMATS = {"U8": "B", "BOOL": "?", "I32": "i", "I64": "q", "F32": "f"}


def _read_numbers(stored: StoredTensor) -> list[Any]:
    code = _FORMATS.get(stored.dtype)
    if code is None or not 1 <= stored.elements <= 8:
        raise FormatError(f"{stored.dtype} {list(stored.shape)} is not a small number", tensor=stored.name)
    return list(struct.unpack(f"<{stored.elements}{code}", stored.read(limit=64)))


def _read_text(stored: StoredTensor) -> str:
    if stored.dtype != "U8":
        raise FormatError(f"{stored.dtype} {list(stored.shape)} is not text in bytes", tensor=stored.name)
    return stored.read(limit=256).decode("ascii", "replace")


def _shape(meta: Mapping[str, Any], anchor: StoredTensor) -> tuple[int, ...]:
    shape = meta.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise FormatError(f"belongs to the shape `{shape}` (a list of sizes belongs there)", tensor=anchor.name)
    return tuple(shape)


def _layout(
    parts: Mapping[str, StoredTensor], meta: Mapping[str, Any], shape: tuple[int, ...], anchor: StoredTensor
) -> Layout:
    packing, axis = meta.get("packing"), meta.get("axis")
    if (packing is not None and packing not in PACKINGS) or axis not in (0, 1):
        known = ", ".join(PACKINGS)
        raise FormatError(f"is packed as `{packing}` on axis `{axis}` ({known}; 0 or 1)", tensor=anchor.name)
    rows, columns = _grouped(shape, meta, parts.get("scale"), anchor)
    dropped = rows % slabs.PACKINGS[packing].fields if packing and not slabs.PACKINGS[packing].padded else 0
    return Layout(packing, rows, columns, axis, dropped)


def _grouped(
    shape: tuple[int, ...], meta: Mapping[str, Any], scale: StoredTensor | None, anchor: StoredTensor
) -> tuple[int, int]:
    """The size of the matrix whose rows (axis 1) or columns (axis 0) share a scale."""
    total, group = prod(shape), meta.get("group_size")
    one_scale = scale is not None and scale.elements == 1
    if meta.get("channel_wise") in (0, False) or group is None or (one_scale and total != group):
        return shape[0], total // shape[0]
    if type(group) is not int or group < 1 or total % group:
        raise FormatError(f"has groups of `{group}`, which do not divide {total:,} values", tensor=anchor.name)
    return (total // group, group) if meta["axis"] == 1 else (group, total // group)


def _check_sizes(parts: Mapping[str, StoredTensor], layout: Layout, meta: Mapping[str, Any]) -> None:
    codes = parts["W_q"]
    width = codes.nbytes // max(1, codes.elements)
    packing = slabs.PACKINGS[layout.packing] if layout.packing else slabs.Packing(1, 8 * width, width)
    wanted = packing.packed_rows(layout.rows) * layout.columns * packing.width
    if codes.nbytes != wanted:
        rule = f"{wanted:,} for {layout.rows:,} x {layout.columns:,} codes in `{layout.packing}`"
        raise FormatError(f"has {codes.nbytes:,} bytes ({rule})", tensor=codes.name)
    if not meta.get("view_as_float") and layout.packing and codes.dtype != ("I32" if packing.width == 4 else "U8"):
        raise FormatError(
            f"is {codes.dtype}, but packed as `{layout.packing}` and not viewed as float", tensor=codes.name
        )
    groups = layout.rows if layout.axis == 1 else layout.columns
    for part, stored in _scales(parts).items():
        values = stored.elements // 2 if part == "zero_scale" else stored.elements
        if stored.dtype not in FLOAT_DTYPES or values not in (1, groups):
            what = f"{stored.dtype} {list(stored.shape)} is not one float for each of {groups:,} groups"
            raise FormatError(what, tensor=stored.name)


def _scales(parts: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The parts that hold scales and zero points as floats; an error where one is missing."""
    if "zero_scale" in parts:
        return {"zero_scale": parts["zero_scale"]}
    for part in ("scale", "zero"):
        if part not in parts and f"{part}_q" not in parts:
            name = f"{parts['W_q'].name.removesuffix('W_q')}{part}"
            raise FormatError(f"has no `{name}` beside it", tensor=parts["W_q"].name)
    return {part: parts[part] for part in ("scale", "zero") if part in parts}


SCHEME = Scheme(
    name="hqq",
    title="HQQ (8 to 1 bits)",
    variants=("hqq",),
    claim=claim,
    anchors=("W_q",),
    methods=("hqq",),
    live={"hqq.HQQLinear": expose},
    coders={decode: coded},
    source="hqq 0.2.8.post1, core/quantize.py, core/bitpack.py and core/utils.py",
    verified="hqq 0.2.8.post1",
)
