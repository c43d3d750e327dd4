"""AMD Quark: integers of 2, 3, 4 and 8 bits, FP8, FP6 and FP4, per tensor, per channel, per group, and two-level.

    part               dtype         stored shape       of
    weight             I32           [K, ceil(N/8)]     int4, uint4 per group: transposed, eight along N in a word
    weight             I32           [N, K/8]           int4, uint4 per channel and tensor: along K
    weight             I8, U8, I32   [K, N]             int8, uint8, int2 per group: transposed, one in an element
    weight             I8, U8, I32   [N, K]             the same per channel and tensor
    weight             U8            [K, N/4], [N, K/4] uint2: four in a byte, highest bits first
    weight             U8            [N, 3K/8]          int3: eight in three bytes, lowest bits first, never transposed
    weight             F8            [..., N, K]        fp8
    weight             U8            [..., N, K/2]      fp4: low nibble first
    weight             U8            [..., N, 3K/4]     fp6: four in three bytes, lowest bits first
    weight_scale       F32, BF16     [K/g, N]           integers per group; else [N, K/g], [N], [], blocks [N/a, K/b]
    weight_scale       U8, F8_E4M3   [N, K/g]           e8m0: 2**(e - 127); e4m3 under a weight_scale_2
    weight_zero_point  as weight     packed as weight   float ones are as weight_scale
    weight_scale_2     F32, ...      see below

Words hold element 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on with `pack_method: reorder`, 0 to 7 with `order`;
int4, int3 and int2 are two's complement.
Formula: w = (code - zero_point) * scale, in float32. Two specifications: where the second has `is_scale_quant`, the
scale is weight_scale * weight_scale_2; else the codes belong to the second (weight_scale_2, weight_zero_point_2), and
the result is multiplied with the weight_scale of the first.
Source: amd-quark 0.13, torch/utils/pack.py, torch/export/nn/modules/realquantizer.py, torch/quantization/config/.

Which it is stands in the configuration alone: `layer_quant_config` by pattern, `layer_type_quant_config`,
`global_quant_config`. K of int4 per channel is taken as a multiple of 8: the library packs no other. The scale format
e5m3 is counted and weighed, but not decoded; the older `mx` formats are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

METHOD = "quark"
RECORD = "weight_quark"  # live only, see `expose`
RECORD_LIMIT = 16 << 10


class Code(NamedTuple):
    """How one dtype is packed: stored dtypes, codes of `bits` in `per` stored elements."""

    stored: tuple[str, ...]
    bits: int
    codes: int = 1  # so many codes ...
    elements: int = 1  # ... in so many stored elements
    signed: bool = False
    turns: bool = False  # transposed per group


CODES = {
    "int4": Code(("I32",), 4, 8, signed=True, turns=True),
    "uint4": Code(("I32",), 4, 8, turns=True),
    "int8": Code(("I8",), 8, turns=True),
    "uint8": Code(("U8",), 8, turns=True),
    "int2": Code(("I32", "I8"), 8, turns=True),
    "uint2": Code(("U8",), 2, 4, turns=True),
    "int3": Code(("U8",), 3, 8, 3, signed=True),
    "fp8_e4m3": Code(("F8_E4M3",), 8),
    "fp8_e5m2": Code(("F8_E5M2",), 8),
    "fp4": Code(("U8",), 4, 2),
    "fp6_e2m3": Code(("U8",), 6, 4, 3),
    "fp6_e3m2": Code(("U8",), 6, 4, 3),
}
TABLES = {
    "fp4": packing.E2M1,
    "fp6_e2m3": packing.small_float_table(2, 3),
    "fp6_e3m2": packing.small_float_table(3, 2),
}
SCALE_TURNS = frozenset({"int4", "uint4", "int8", "uint8", "int2", "uint2", "int3"})
REORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each element
FLOATS = frozenset({"F32", "F16", "BF16"})
SCALES = FLOATS | {"U8", "F8_E8M0", "F8_E4M3"}
FLOORS_DB = {"fp8_e4m3": 29.5, "fp8_e5m2": 24.5, "int8": 28.0, "uint8": 28.0}

SUFFIXES: dict[str, ByteClass] = {
    "scale": "scales",
    "zero_point": "zero_points",
    "scale_2": "scales",
    "zero_point_2": "zero_points",
}
LIVE_NAMES = {  # of a single quantizer, and of two in a sequence
    "scale": ("weight_quantizer.scale", "weight_quantizer.0.scale"),
    "zero_point": ("weight_quantizer.zero_point", "weight_quantizer.0.zero_point"),
    "scale_2": ("weight_quantizer.1.scale",),
    "zero_point_2": ("weight_quantizer.1.zero_point",),
}
ACTIVATIONS = ("input_scale", "input_zero_point", "input_scale_2", "output_scale", "output_zero_point")


class Layout(NamedTuple):
    """What the configuration says about one weight, and the parts that its codes belong to."""

    dtype: str
    scheme: str
    group: int
    block: tuple[int, int]
    reorder: bool
    scale_format: str
    codes: tuple[str, str]  # its scale and zero point
    outer: str | None  # the scale above, if there is one


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `weight_scale` of Quark, or a live module's record, belongs to."""
    prefix = anchor.name.removesuffix(RECORD).removesuffix("weight_scale")
    record = namespace.tensors.get(f"{prefix}{RECORD}")
    if record is None and (namespace.quantization.get("quant_method") != METHOD or not anchor.name.endswith("scale")):
        return None
    weight = namespace.tensors.get(f"{prefix}weight")
    if weight is None:
        raise FormatError(f"has no `{prefix}weight` beside it", tensor=anchor.name)
    parts = [Part("weight", "codes", weight), *_parts(prefix, namespace)]
    named = {part.name: part.stored for part in parts}
    fitting = [(layout, shape) for layout in _layouts(prefix, record, namespace) if (shape := _shape(layout, named))]
    if len(fitting) != 1:
        what = f"{weight.dtype} {list(weight.shape)} fits {len(fitting)} of the configured formats (one belongs there)"
        raise FormatError(what, tensor=weight.name)
    layout, shape = fitting[0]
    _check_zero_point(layout, shape, named)
    return LogicalTensor(
        weight.name,
        shape,
        f"quark-{layout.dtype.replace('_', '-')}",
        "parameter",
        tuple(parts),
        decode,
        layout,
        block=layout.group or layout.block[1] or shape[-1],
        floor_db=FLOORS_DB.get(layout.dtype),
        rounding=_rounding(layout, shape, named),
    )


def _rounding(layout: Layout, shape: tuple[int, ...], parts: Mapping[str, StoredTensor]) -> Rounding | None:
    """Any of them may be calibrated; of two levels the inner codes decide."""
    scale, zero = (parts.get(name) for name in layout.codes)
    width = layout.group or layout.block[1] or shape[-1]
    height = {"per_tensor": math.prod(shape[:-1]), "per_block": layout.block[0]}.get(layout.scheme, 1)
    if scale is None:
        return None
    if layout.dtype.startswith("fp8"):
        dtype = "float8_e5m2" if layout.dtype == "fp8_e5m2" else "float8_e4m3fn"
        return rounding.placed_floats(dtype, shape, height, width)
    if layout.dtype in TABLES:
        powers = scale.dtype in ("U8", "F8_E8M0")
        kind: rounding.ScaleKind = "even" if powers else "e4m3-scaled" if scale.dtype == "F8_E4M3" else "float32"
        to_code = rounding.codebook(TABLES[layout.dtype], scale=kind)
    else:
        bits = int(layout.dtype.removeprefix("u").removeprefix("int"))
        to_code = rounding.symmetric(bits) if zero is None else rounding.affine(bits)
    return rounding.placed(to_code, shape, height, width, margin_db=rounding.COMPENSATED_DB)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a float8 tensor of a Quark checkpoint cannot be plain numbers."""
    if not stored.dtype.startswith("F8_"):
        return None
    return f"{stored.dtype} {list(stored.shape)} has no `{stored.name}_scale` beside it"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout, window = tensor.layout, slice(start, stop)
    assert isinstance(layout, Layout)
    if layout.scale_format == "e5m3":
        raise NotDecodable("scales in e5m3 are not decoded here", tensor=tensor.name)
    values = _numbers(tensor, layout, "weight", window, device)[:, : tensor.columns]
    scales, width = _scales(tensor, layout, window, device)
    zeros = _zeros(tensor, layout, window, device)
    if zeros is not None:
        packing.shift_groups(values, zeros, width)
    packing.scale_groups(values, scales, width)
    if layout.outer == "scale":
        values.mul_(tensor.part("scale").load(device=device).to(torch.float32))
    return values


def _numbers(tensor: LogicalTensor, layout: Layout, part: str, window: slice, device: str) -> torch.Tensor:
    """The numbers that the codes of a part stand for, one row for each row of the window."""
    stored, code = tensor.part(part), CODES[layout.dtype]
    width = stored.shape[-1]
    if not (code.turns and layout.scheme == "per_group"):
        loaded = stored.load(window.start * width, window.stop * width, device).view(-1, width)
        return _unpack(loaded, layout)
    first, last = window.start // code.codes, -(-window.stop // code.codes)
    loaded = stored.load(device=device).view(-1, width)[:, first:last]  # (K, N / codes)
    rows = _unpack(loaded.contiguous(), layout).t()
    return rows[window.start - first * code.codes : window.stop - first * code.codes].contiguous()


def _unpack(loaded: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The numbers along the last axis of a stored matrix, as float32."""
    import torch

    code = CODES[layout.dtype]
    if code.codes == 1:
        return loaded.to(torch.float32)
    if layout.dtype == "fp4":
        return packing.e2m1_values(loaded).view(len(loaded), 2 * loaded.shape[1])
    count = loaded.shape[1] * code.codes // code.elements
    codes = packing.row_codes(loaded.view(torch.uint8), code.bits, count)
    if layout.dtype.startswith("fp6"):
        table = packing.small_float_table(*((2, 3) if layout.dtype == "fp6_e2m3" else (3, 2)))
        return torch.tensor(table, device=loaded.device)[codes]
    order = (3, 2, 1, 0) if layout.dtype == "uint2" else REORDER if code.bits == 4 and layout.reorder else None
    if order is not None:
        codes = codes.view(len(codes), count // len(order), len(order))[..., list(order)].flatten(1)
    if code.signed:
        half = 1 << code.bits - 1
        codes = (codes ^ half) - half
    return codes.to(torch.float32)


def _scales(tensor: LogicalTensor, layout: Layout, window: slice, device: str) -> tuple[torch.Tensor, int]:
    """The scale of each row and group, and how many columns share one."""
    import torch

    stored = tensor.part(layout.codes[0])
    if layout.scheme == "per_group" and layout.dtype in SCALE_TURNS:
        scales = stored.load(device=device).view(stored.shape)[:, window].t()
    else:
        scales = packing.grid_rows(stored, _grid(tensor, layout), window, device)
    scales = packing.powers_of_two(scales) if stored.dtype in ("U8", "F8_E8M0") else scales.to(torch.float32)
    if layout.outer == "scale_2":
        scales = scales * tensor.part("scale_2").load(device=device).to(torch.float32)
    return scales, _width(tensor, layout)


def _zeros(tensor: LogicalTensor, layout: Layout, window: slice, device: str) -> torch.Tensor | None:
    import torch

    if not tensor.has(layout.codes[1]):
        return None
    stored = tensor.part(layout.codes[1])
    if layout.scheme == "per_tensor":
        return stored.load(device=device).to(torch.float32).view(1, 1)
    if stored.dtype in FLOATS:
        return stored.load(device=device).to(torch.float32).view(stored.shape)[:, window].t()
    if layout.scheme == "per_group":
        groups = tensor.part(layout.codes[0]).shape[0]
        return _numbers(tensor, layout, layout.codes[1], window, device)[:, :groups]
    packed = stored.load(device=device).view(1, -1)
    return _unpack(packed, layout)[0, window].view(-1, 1)


def _grid(tensor: LogicalTensor, layout: Layout) -> packing.Grid:
    rows = tensor.shape[-2]
    if layout.scheme == "per_tensor":
        return packing.Grid(1, 1, tensor.rows, tensor.rows)
    if layout.scheme == "per_channel":
        return packing.Grid(rows, 1, rows, 1)
    stored = tensor.part(layout.codes[0])
    height = layout.block[0] if layout.scheme == "per_block" else 1
    return packing.Grid(stored.shape[-2], stored.shape[-1], rows, height)


def _width(tensor: LogicalTensor, layout: Layout) -> int:
    return layout.group or layout.block[1] or tensor.columns


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the codes of a live module what its quantizers say about them."""
    quantizer = getattr(owner, "weight_quantizer", None)
    if quantizer is None:
        return None
    levels = list(quantizer) if hasattr(quantizer, "__iter__") else [quantizer]
    weight = [level.qspec.to_dict() if hasattr(level.qspec, "to_dict") else vars(level.qspec) for level in levels]
    record = {"weight": weight, "reorder": bool(getattr(levels[-1], "reorder", True))}
    return {RECORD: json.dumps(record, default=lambda value: getattr(value, "value", str(value))).encode()}


def _parts(prefix: str, namespace: Namespace) -> Iterator[Part]:
    for suffix, kind in SUFFIXES.items():
        for name in (f"weight_{suffix}", *LIVE_NAMES[suffix]):
            if f"{prefix}{name}" in namespace.tensors:
                yield Part(suffix, kind, namespace.tensors[f"{prefix}{name}"])
    for name in ACTIVATIONS:
        if f"{prefix}{name}" in namespace.tensors:
            yield Part(name, "scales", namespace.tensors[f"{prefix}{name}"])
    if f"{prefix}{RECORD}" in namespace.tensors:
        yield Part(RECORD, "bookkeeping", namespace.tensors[f"{prefix}{RECORD}"])


def _layouts(prefix: str, record: StoredTensor | None, namespace: Namespace) -> list[Layout]:
    """The formats that this module may have: its own, or those that the configuration names."""
    if record is not None:
        said = strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
        found = [_layout(said["weight"], bool(said["reorder"]))]
    else:
        export = namespace.quantization.get("export")
        reorder = not isinstance(export, Mapping) or export.get("pack_method", "reorder") == "reorder"
        found = [_layout(weight, reorder) for weight in _weights(prefix.removesuffix("."), namespace.quantization)]
    distinct: list[Layout] = []
    for layout in found:
        if layout is not None and layout not in distinct:
            distinct.append(layout)
    return distinct


def _weights(module: str, quantization: Mapping[str, Any]) -> list[Any]:
    """The `weight` settings that apply to a module: by its name, or else by its type and in general."""
    named = quantization.get("layer_quant_config")
    for pattern, settings in named.items() if isinstance(named, Mapping) else ():
        if fnmatchcase(module, str(pattern)) and isinstance(settings, Mapping):
            return [settings.get("weight")]
    typed = quantization.get("layer_type_quant_config")
    groups = [*(typed.values() if isinstance(typed, Mapping) else ()), quantization.get("global_quant_config")]
    return [group.get("weight") for group in groups if isinstance(group, Mapping)]


def _layout(weight: Any, reorder: bool) -> Layout | None:
    levels = weight if isinstance(weight, list) else [weight]
    if not levels or len(levels) > 2 or not all(isinstance(level, Mapping) for level in levels):
        return None
    scaled = len(levels) == 2 and levels[1].get("is_scale_quant") is True
    level = levels[0] if scaled else levels[-1]
    dtype, scheme, group, block = (level.get(key) for key in ("dtype", "qscheme", "group_size", "block_size"))
    if (
        not isinstance(dtype, str)
        or dtype not in CODES
        or scheme not in ("per_tensor", "per_channel", "per_group", "per_block")
    ):
        return None
    if scheme == "per_channel" and level.get("ch_axis") not in (0, -2, None):
        return None
    sizes = tuple(block) if isinstance(block, (list, tuple)) and len(block) == 2 and scheme == "per_block" else (0, 0)
    progressive = len(levels) == 2 and not scaled
    return Layout(
        dtype,
        scheme,
        group if scheme == "per_group" and isinstance(group, int) else 0,
        (int(sizes[0]), int(sizes[1])),
        reorder,
        str(level.get("scale_format")),
        ("scale_2", "zero_point_2") if progressive else ("scale", "zero_point"),
        "scale_2" if scaled else "scale" if progressive else None,
    )


def _shape(layout: Layout, named: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """The unquantized shape where the stored shapes fit the format, else None."""
    weight, scale, code = named["weight"], named.get(layout.codes[0]), CODES[layout.dtype]
    if scale is None or weight.dtype not in code.stored or scale.dtype not in SCALES:
        return None
    if len(weight.shape) < 2 or not weight.elements:
        return None
    if layout.outer is not None and (layout.outer not in named or named[layout.outer].elements != 1):
        return None
    *stack, rows, width = weight.shape
    long = width * code.codes // code.elements
    if layout.scheme == "per_group" and layout.dtype in SCALE_TURNS:
        return _shape_of_groups(layout, weight, scale)
    fits = {
        "per_tensor": scale.elements == 1,
        "per_channel": scale.shape in ((*stack, rows), (*stack, rows, 1)),
        "per_group": layout.group > 0 and scale.shape == (*stack, rows, -(-long // max(1, layout.group))),
        "per_block": layout.block[1] > 0 and scale.shape == _blocks((*stack, rows, long), layout.block),
    }
    return (*stack, rows, long) if fits[layout.scheme] else None


def _shape_of_groups(layout: Layout, weight: StoredTensor, scale: StoredTensor) -> tuple[int, ...] | None:
    """N is exact in the scales, which are turned, too; int3 turns its scales only."""
    code = CODES[layout.dtype]
    if len(weight.shape) != 2 or len(scale.shape) != 2 or layout.group < 1:
        return None
    groups, rows = scale.shape
    columns, packed = weight.shape
    if not code.turns:
        rows_stored, columns = weight.shape[0], weight.shape[1] * code.codes // code.elements
        return (rows, columns) if (rows_stored, groups) == (rows, -(-columns // layout.group)) else None
    fits = packed == -(-rows // code.codes) and groups == -(-columns // layout.group)
    return (rows, columns) if fits else None


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return *shape[:-2], -(-shape[-2] // max(1, block[0])), -(-shape[-1] // max(1, block[1]))


def _check_zero_point(layout: Layout, shape: tuple[int, ...], named: Mapping[str, StoredTensor]) -> None:
    zero, scale, code = named.get(layout.codes[1]), named[layout.codes[0]], CODES[layout.dtype]
    if zero is None:
        return
    if zero.dtype not in code.stored and (zero.dtype not in FLOATS or layout.scheme == "per_channel"):
        rule = ", ".join(code.stored)
        raise FormatError(f"{zero.dtype} does not hold zero points of {layout.dtype} ({rule})", tensor=zero.name)
    last = -(-shape[-2] // code.codes) * code.elements
    if layout.scheme == "per_tensor":
        wanted: tuple[int, ...] = zero.shape if zero.elements == 1 else ()
    elif zero.dtype in FLOATS and layout.scheme == "per_group":
        wanted = scale.shape
    elif layout.scheme == "per_channel":
        wanted = (last,)
    elif code.turns:
        wanted = (scale.shape[0], last)
    else:
        wanted = (shape[-2], scale.shape[0] * code.elements // code.codes)
    if zero.shape != wanted:
        rule = f"{list(wanted)} for {list(shape)}"
        raise FormatError(f"{list(zero.shape)} does not hold its zero points ({rule})", tensor=zero.name)


SCHEME = Scheme(
    name="quark",
    title="AMD Quark",
    variants=tuple(f"quark-{dtype.replace('_', '-')}" for dtype in CODES),
    claim=claim,
    anchors=("weight_scale", RECORD),
    methods=(METHOD,),
    live={"quark.QParamsLinear": expose},
    refuse=refuse,
    source="amd-quark 0.13, torch/utils/pack.py and torch/export/nn/modules/realquantizer.py",
    verified="amd-quark 0.13",
)
