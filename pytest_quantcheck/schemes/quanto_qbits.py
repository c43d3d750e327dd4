"""optimum-quanto 4 and 2 bits: unsigned codes, one scale and one shift for each output row or group.

    part          dtype           stored shape              packing
    _data._data   U8              [ceil(R * bits / 8), C]   slabs of rows, the first slab in the lowest bits
    _scale        F32, F16, BF16  [R, 1]
    _shift        like _scale, U8   [R, 1]                    an integer shift is a zero point
    input_scale   like _scale     []                        of the module; 1 unless calibrated
    output_scale  like _scale     []                        of the module

Ungrouped, R x C is the weight (R = N, more dimensions follow for a convolution). Grouped, it is the weight as rows of
`group_size` values: R = N * K / group_size. Where K > 128, it groups by the first of 128, 96, 64, 32 that divides K.
Formula: row r of the unpacked matrix is slab r // packed_rows, packed row r % packed_rows. A float shift is subtracted
behind the scale, w = scale * code - shift, an integer one before it, w = scale * (code - shift).
Source: optimum-quanto 0.2.7, tensor/packed.py, tensor/grouped.py, tensor/qbits.py, tensor/weights/qbits.py.

A grouped weight on disk does not say its [N, K]: the length of the bias does, else the model's config.json; where
neither does, it is an error. A convolution with grouped codes is seen as [N, K]. A weight of one ungrouped row has one
scale for each column.
Departs from the library in one thing: it computes in the dtype of the scale and rounds, we compute in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding
from pytest_quantcheck.schemes import architecture, packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (128, 96, 64, 32)
BITS = {"qint4": 4, "qint2": 2}
FLOORS_DB = {"qint4": 16.5, "qint2": 2.5}  # asymmetric groups of 128
RECORD = "quanto"  # live only: what the tensor class knows
RECORD_LIMIT = 4 << 10


class Layout(NamedTuple):
    """How the codes lie: bits of one, rows and columns of the unpacked matrix, and the axis that has the scales."""

    bits: int
    rows: int
    columns: int
    axis: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a `_data._data`."""
    name = anchor.name.removesuffix("._data._data")
    if name == anchor.name:
        return None
    scale, shift = (_companion(anchor, f"{name}.{part}", namespace) for part in ("_scale", "_shift"))
    if anchor.dtype != "U8":
        raise FormatError(f"{anchor.dtype} is not the uint8 of packed codes", tensor=anchor.name)
    if shift.shape != scale.shape:
        raise FormatError(f"{list(shift.shape)} is not the shape of `_scale` {list(scale.shape)}", tensor=shift.name)
    record = _record(name, namespace)
    layout = _live_layout(record, anchor) if record else _layout(name, anchor, scale, namespace)
    shape = tuple(record["shape"]) if record else _shape(name, layout, anchor, namespace)
    parts = (
        Part("_data", "codes", anchor),
        Part("_scale", "scales", scale),
        Part("_shift", "zero_points", shift),
        *_beside(name, namespace),
    )
    return LogicalTensor(
        name,
        shape,
        f"quanto-qint{layout.bits}",
        "parameter",
        parts,
        decode,
        layout,
        block=layout.columns,
        floor_db=FLOORS_DB[f"qint{layout.bits}"] if layout.columns <= GROUP_SIZES[0] else None,
        rounding=_rounding(layout, shape, shift),
        flat=True,
    )


def _rounding(layout: Layout, shape: tuple[int, ...], shift: StoredTensor) -> Rounding | None:
    """One row that is not grouped has a scale for each column: nothing is lost, and nothing expected."""
    if layout.axis != 0:
        return None
    family = rounding.affine if shift.dtype == "U8" else rounding.from_least
    gaps = steps.even(layout.bits, clips=(True, True), least=True)
    return rounding.flat(family(layout.bits), layout.columns, shape[-1], steps=gaps)


def _companion(anchor: StoredTensor, name: str, namespace: Namespace) -> StoredTensor:
    stored = namespace.tensors.get(name)
    if stored is None:
        raise FormatError(f"has no `{name}`", tensor=anchor.name)
    return stored


def _beside(name: str, namespace: Namespace) -> list[Part]:
    module = name.rpartition(".")[0]
    kinds: dict[str, ByteClass] = {"input_scale": "scales", "output_scale": "scales"}
    found = [
        Part(last, kind, stored)
        for last, kind in kinds.items()
        if (stored := namespace.tensors.get(f"{module}.{last}" if module else last)) is not None
    ]
    record = namespace.tensors.get(f"{name}.{RECORD}")
    return found if record is None or record.role is None else [*found, Part(RECORD, "bookkeeping", record)]


def _record(name: str, namespace: Namespace) -> Mapping[str, Any]:
    stored = namespace.tensors.get(f"{name}.{RECORD}")
    if stored is None or stored.role is None:
        return {}
    return strict_json.parse_object(stored.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)


def _live_layout(record: Mapping[str, Any], codes: StoredTensor) -> Layout:
    layout = Layout(record["bits"], record["rows"], record["columns"], record["axis"])
    if codes.shape[0] != _packed_rows(layout.rows, layout.bits):
        rule = f"{list(codes.shape)} does not pack {layout.rows} rows of {layout.bits} bits"
        raise FormatError(rule, tensor=codes.name)
    return layout


def _layout(name: str, codes: StoredTensor, scale: StoredTensor, namespace: Namespace) -> Layout:
    """The layout of a file: rows as there are scales, bits as the map says or else as the packed rows say."""
    ones = (1,) * (len(codes.shape) - 1)
    one_row = codes.shape[:1] == (1,) and scale.shape == codes.shape
    if not ones or (scale.shape != (*scale.shape[:1], *ones) and not one_row):
        raise FormatError(f"{list(scale.shape)} is not one scale a row for {list(codes.shape)}", tensor=scale.name)
    rows = scale.shape[0]
    fitting = [bits for bits in BITS.values() if _packed_rows(rows, bits) == codes.shape[0]]
    entry = namespace.quantization.get(name.rpartition(".")[0])
    said = entry.get("weights") if isinstance(entry, Mapping) else None
    if said is not None:
        fitting = [bits for bits in fitting if bits == BITS.get(said)]
    if len(fitting) != 1:
        rule = f"the quantization map says `{said}`" if said else "4 bits pack 2 rows into one, 2 bits 4"
        raise FormatError(f"{codes.shape[0]} packed rows of {rows} rows are not clear ({rule})", tensor=codes.name)
    return Layout(fitting[0], rows, prod(codes.shape[1:]), 0)


def _packed_rows(rows: int, bits: int) -> int:
    return -(-rows * bits // 8)


def _shape(name: str, layout: Layout, codes: StoredTensor, namespace: Namespace) -> tuple[int, ...]:
    """The shape of a file's weight: as stored where the codes cannot be grouped, else as the bias or the model says."""
    ungrouped = (layout.rows, *codes.shape[1:])
    if len(codes.shape) > 2 or layout.columns not in GROUP_SIZES:
        return ungrouped
    params = layout.rows * layout.columns
    module = name.rpartition(".")[0]
    bias = namespace.tensors.get(f"{module}.bias" if module else "bias")
    if bias is not None and bias.elements and params % bias.elements == 0:
        return (bias.elements, params // bias.elements)
    shape = architecture.linear_shape(name, params, namespace.config)
    if shape is None:
        raise UnknownEncoding(
            f"has {params:,} values in groups of {layout.columns}, but nothing says its rows and columns "
            "(no bias; config.json of a known architecture is needed)",
            tensor=name,
        )
    return shape


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.axis != 0:
        raise NotDecodable("is quantized along its last axis, which no module of quanto does", tensor=tensor.name)
    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    found = coded(tensor, start, stop, device)
    if found is not None:
        return packing.expand(found).view(stop - start, tensor.columns)
    first, last = start * tensor.columns, stop * tensor.columns
    low, high = first // layout.columns, -(-last // layout.columns)  # rows of the unpacked matrix
    values = _codes(tensor.stored, layout, low, high, device).view(-1, layout.columns).to(torch.float32)
    scale, shift = (_of_rows(tensor.part(part), layout, low, high, device) for part in ("_scale", "_shift"))
    values = values.mul_(scale).sub_(shift) if _is_float(tensor.part("_shift")) else values.sub_(shift).mul_(scale)
    lead = first - low * layout.columns
    return values.view(-1)[lead : lead + last - first].view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where rows are full groups."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    by_column = layout.rows == 1 and tensor.part("_scale").elements == layout.columns > 1
    if layout.axis != 0 or by_column or not layout.columns or tensor.columns % layout.columns:
        return None
    groups = tensor.columns // layout.columns
    low, high = start * groups, stop * groups
    codes = _codes(tensor.stored, layout, low, high, device)
    scales, shifts = (
        _of_rows(tensor.part(part), layout, low, high, device).view(stop - start, groups)
        for part in ("_scale", "_shift")
    )
    found = Coded(codes, None, scales, layout.columns)
    return found._replace(shifts=-shifts) if _is_float(tensor.part("_shift")) else found._replace(zeros=shifts)


def _codes(stored: StoredTensor, layout: Layout, low: int, high: int, device: str) -> torch.Tensor:
    """The codes of some rows of the unpacked matrix, flat."""
    import torch

    return torch.cat([_slab(stored, layout, span, device) for span in _spans(layout, low, high)])


def _of_rows(stored: StoredTensor, layout: Layout, low: int, high: int, device: str) -> torch.Tensor:
    """A scale or a shift of each row, or of each column where there is only one row."""
    import torch

    if layout.rows == 1 and stored.elements == layout.columns:
        return stored.load(device=device).to(torch.float32).view(1, -1)
    return stored.load(low, high, device).to(torch.float32).view(-1, 1)


def _is_float(stored: StoredTensor) -> bool:
    return DTYPES[stored.dtype].kind == "float"


class Span(NamedTuple):
    """Packed rows, and which slab of them: the shift of its bits."""

    slab: int
    start: int
    stop: int


def _spans(layout: Layout, low: int, high: int) -> list[Span]:
    """Where rows `low` up to `high` of the unpacked matrix lie."""
    packed = _packed_rows(layout.rows, layout.bits)
    slabs = range(low // packed, -(-high // packed))
    spans = [(slab, max(low, slab * packed), min(high, (slab + 1) * packed)) for slab in slabs]
    return [Span(slab, start - slab * packed, stop - slab * packed) for slab, start, stop in spans]


def _slab(codes: StoredTensor, layout: Layout, span: Span, device: str) -> torch.Tensor:
    packed = codes.load(span.start * layout.columns, span.stop * layout.columns, device)
    return (packed >> (layout.bits * span.slab)) & ((1 << layout.bits) - 1)


def expose(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `WeightQBitsTensor` as it would be saved, and what its class knows."""
    packed = owner._data
    record = {
        "shape": list(owner.shape),
        "bits": packed._bits,
        "rows": packed.shape[0],
        "columns": prod(packed.shape[1:]),
        "axis": owner._axis,
    }
    return {
        f"{name}._data._data": packed._data,
        f"{name}._scale": owner._scale,
        f"{name}._shift": owner._shift,
        f"{name}.{RECORD}": json.dumps(record).encode(),
    }


SCHEME = Scheme(
    name="quanto-qbits",
    title="optimum-quanto 4 and 2 bits (qint4, qint2)",
    variants=tuple(f"quanto-{qtype}" for qtype in BITS),
    claim=claim,
    anchors=("_data",),
    methods=("quanto",),
    live={"optimum.WeightQBitsTensor": expose},
    coders={decode: coded},
    source="optimum-quanto 0.2.7, tensor/packed.py and tensor/qbits.py",
    verified="optimum-quanto 0.2.7",
)
