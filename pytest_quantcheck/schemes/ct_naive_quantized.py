"""compressed-tensors `int-quantized`, `naive-quantized`, `float-quantized` and `mxfp8-quantized`: one code per byte.

    part               dtype                stored shape         packing
    weight             I8 or F8_E4M3        [..., N, K]          none; integers of fewer bits also take a byte
    weight_scale       F32, BF16, F16       see below            U8 or E8M0: an exponent, 2**(e - 127)
    weight_zero_point  I8, F8_E4M3          as weight_scale      asymmetric only
    weight_g_idx       I32                  [K]                  the group of each column; -1 throughout: not used

    strategy  weight_scale
    tensor    [1], [] or [1, 1]
    channel   [N, 1]
    group     [N, ceil(K/group_size)]
    block     [ceil(N/height), ceil(K/width)]    block_structure; the weight itself is not padded

Formula: w[n, k] = (weight[n, k] - zero) * scale, in float32. The library multiplies in the dtype of the scale.
Source: compressed-tensors 0.20.0, compressors/naive_quantized/, compressors/mxfp8/, quantization/lifecycle/.

A weight that is still float beside its scales (`quantization_status: frozen`, or live before compression) is plain
numbers; the scales are weighed with it. transformers' `CompressedTensorsFP8Linear` holds its scales as [1, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import config_groups, packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

METHODS = ("compressed-tensors", "compressed_tensors")
FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
EXPONENTS = frozenset({"U8", "F8_E8M0"})
ROW_SCALES = "weight_row_scales"  # live only: marks the module whose scales are [1, N]

PARTS: dict[str, ByteClass] = {
    "weight_scale": "scales",
    "weight_global_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_g_idx": "index",
    "input_scale": "scales",
    "input_zero_point": "zero_points",
    "input_global_scale": "scales",
    "output_scale": "scales",
    "output_zero_point": "zero_points",
    config_groups.ARGS: "bookkeeping",
    ROW_SCALES: "bookkeeping",
}

FLOORS_DB = {"ct-int8": 28.0, "ct-float8": 29.5, "ct-mxfp8": 29.5}


class Layout(NamedTuple):
    """How scales lie over the weight; `width` columns share one. None where nothing says it."""

    grid: packing.Grid | None
    width: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a compressed-tensors module that a `weight_scale` belongs to."""
    module = anchor.name.rpartition(".")[0]
    prefix = f"{module}." if module else ""
    if not _is_ours(prefix, namespace):
        return None
    weight = namespace.tensors.get(f"{prefix}weight")
    if weight is None:
        raise FormatError(f"has neither `{prefix}weight` nor `{prefix}weight_packed` beside it", tensor=anchor.name)
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    if DTYPES[weight.dtype].kind == "float" and weight.dtype not in FP8:
        plain = (Part("weight", "unquantized", weight), *parts)
        return LogicalTensor(weight.name, weight.shape, "plain", "parameter", plain, packing.decode_floats)
    if anchor.dtype not in FLOATS and anchor.dtype not in EXPONENTS:
        raise FormatError(f"{anchor.dtype} is no scale (F32, BF16, F16, or U8 and E8M0 for mxfp8)", tensor=anchor.name)
    if weight.dtype != "I8" and weight.dtype not in FP8:
        raise FormatError(f"{weight.dtype} is neither int8 nor float8, but has `weight_scale`", tensor=weight.name)
    layout = _layout(anchor, weight, module, namespace)
    scheme = "ct-int8" if weight.dtype == "I8" else "ct-mxfp8" if anchor.dtype in EXPONENTS else "ct-float8"
    tensor = LogicalTensor(
        weight.name,
        weight.shape,
        scheme,
        "parameter",
        (Part("weight", "codes", weight), *parts),
        decode,
        layout,
        block=layout.width if layout.grid else None,
        floor_db=_floor_db(scheme, namespace),
    )
    _check_parts(tensor)
    return tensor._replace(rounding=_rounding(tensor, layout, next(iter(_bits(namespace)), 8)))


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a float8 tensor of a compressed-tensors checkpoint cannot be plain numbers."""
    if stored.dtype not in FP8 or namespace.quantization.get("format") == "dense":
        return None
    return f"{stored.dtype} {list(stored.shape)} has no `{stored.name}_scale` beside it"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    scale = tensor.part("weight_scale")
    if layout.grid is None:
        what = f"the configuration does not say how scales {list(scale.shape)} lie over it (group or block size)"
        raise NotDecodable(what, tensor=tensor.name)
    rows = slice(start, stop)
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    values = packing.as_float32(codes).view(stop - start, tensor.columns)
    scales = _scales(scale, layout.grid, rows, device)
    scattered = tensor.has("weight_g_idx")
    index = packing.group_index(tensor.part("weight_g_idx"), scales.shape[1], device) if scattered else None
    if tensor.has("weight_zero_point"):
        zeros = packing.as_float32(packing.grid_rows(tensor.part("weight_zero_point"), layout.grid, rows, device))
        values = packing.shift_groups(values, zeros, layout.width) if index is None else values.sub_(zeros[:, index])
    return packing.scale_groups(values, scales, layout.width) if index is None else values.mul_(scales[:, index])


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where there are only scales beside them, in the order of columns."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.grid is None or tensor.has("weight_zero_point") or tensor.has("weight_g_idx"):
        return None
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    return Coded(
        codes, None, _scales(tensor.part("weight_scale"), layout.grid, slice(start, stop), device), layout.width
    )


def _scales(stored: StoredTensor, grid: packing.Grid, rows: slice, device: str) -> torch.Tensor:
    """The scales of each row of a window, as float32."""
    import torch

    scales = packing.grid_rows(stored, grid, rows, device)
    return packing.powers_of_two(scales) if stored.dtype in EXPONENTS else scales.to(torch.float32)


def expose_row_scales(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Mark transformers' FP8 linear, whose scales lie as its kernel wants them."""
    return {ROW_SCALES: b""}


def _is_ours(prefix: str, namespace: Namespace) -> bool:
    names = (config_groups.ARGS, ROW_SCALES)
    if f"{prefix}weight_packed" in namespace.tensors:
        return False
    if namespace.quantization.get("quant_method") in METHODS:
        return True
    return any(f"{prefix}{name}" in namespace.tensors for name in names)


def _layout(scale: StoredTensor, weight: StoredTensor, module: str, namespace: Namespace) -> Layout:
    shape = weight.shape
    if len(shape) < 2:
        raise FormatError(f"{list(shape)} is no matrix, but has `weight_scale`", tensor=weight.name)
    rows, columns = shape[-2:]
    if scale.elements == 1:
        return Layout(packing.Grid(1, 1, prod(shape[:-1]), prod(shape[:-1])), columns)
    live = f"{module}.{ROW_SCALES}" if module else ROW_SCALES
    if scale.shape in ((*shape[:-1], 1), shape[:-1]) or (live in namespace.tensors and scale.shape == (1, rows)):
        return Layout(packing.Grid(rows, 1, rows, 1), columns)
    if len(scale.shape) != len(shape) or scale.shape[:-2] != shape[:-2]:
        raise FormatError(f"{list(scale.shape)} is no grid over {list(shape)}", tensor=scale.name)
    grid = scale.shape[-2], scale.shape[-1]
    if scale.dtype in EXPONENTS and grid == (rows, -(-columns // 32)):
        return Layout(packing.Grid(rows, grid[1], rows, 1), 32)

    def fits(args: Mapping[str, Any]) -> bool:
        block = _block(args) if args.get("type", kind) == kind else None
        return block is not None and grid == (-(-rows // (block[0] or rows)), -(-columns // block[1]))

    kind = "int" if weight.dtype == "I8" else "float"
    args = config_groups.weight_args(module, namespace, fits)
    block = _block(args) if args else None
    return Layout(packing.Grid(grid[0], grid[1], rows, block[0]), block[1]) if block else Layout(None, columns)


def _block(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, by the settings of a group."""
    structure, group = args.get("block_structure"), args.get("group_size")
    if isinstance(structure, str):  # "128x128" in old files
        structure = [int(size) for size in structure.split("x") if size.isdecimal()]
    if isinstance(structure, list) and len(structure) == 2 and all(type(s) is int and s > 0 for s in structure):
        return structure[0], structure[1]
    return (1, group) if isinstance(group, int) and group > 0 else None


def _check_parts(tensor: LogicalTensor) -> None:
    scale = tensor.part("weight_scale")
    if tensor.has("weight_zero_point") and tensor.part("weight_zero_point").shape != scale.shape:
        zero = tensor.part("weight_zero_point")
        raise FormatError(f"{list(zero.shape)} differs from the scales {list(scale.shape)}", tensor=zero.name)
    if tensor.has("weight_g_idx") and tensor.part("weight_g_idx").shape != tensor.shape[-1:]:
        index = tensor.part("weight_g_idx")
        rule = f"is not one group for each of {tensor.columns:,} columns"
        raise FormatError(f"{list(index.shape)} {rule}", tensor=index.name)


def _rounding(tensor: LogicalTensor, layout: Layout, bits: object) -> Rounding | None:
    """Integers may have been calibrated."""
    scale = tensor.part("weight_scale")
    if tensor.stored.dtype in FP8:
        kind = rounding.float_of(tensor.stored)
        powers = scale.dtype in EXPONENTS
        kept = "even" if powers else rounding.kept_in(scale)
        height = layout.grid.height if layout.grid else 1
        gaps = steps.floats(kind, clips=powers)
        return rounding.placed_floats(kind, tensor.shape, height, layout.width, scale=kept, steps=gaps)
    if layout.grid is None or type(bits) is not int or not 1 < bits <= 8:
        return None
    family = rounding.affine if tensor.has("weight_zero_point") else rounding.symmetric
    to_code = family(bits, scale=rounding.kept_in(scale))
    return rounding.placed(to_code, tensor.shape, layout.grid.height, layout.width, margin_db=rounding.COMPENSATED_DB)


def _floor_db(scheme: str, namespace: Namespace) -> float | None:
    """The floor of eight bits; integers of fewer bits are stored in bytes, too, and have none here."""
    return FLOORS_DB[scheme] if all(bits == 8 for bits in _bits(namespace)) else None


def _bits(namespace: Namespace) -> list[object]:
    """The widths that the groups of the configuration name."""
    groups = namespace.quantization.get("config_groups")
    return [
        group["weights"].get("num_bits")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]


SCHEME = Scheme(
    name="ct-naive-quantized",
    title="compressed-tensors, one code per byte (int8, float8, mxfp8)",
    variants=("ct-int8", "ct-float8", "ct-mxfp8"),
    claim=claim,
    anchors=("weight_scale",),
    methods=METHODS,
    live={"transformers.CompressedTensorsFP8Linear": expose_row_scales},
    refuse=refuse,
    coders={decode: coded},
    source="compressed-tensors 0.20.0, compressors/naive_quantized and compressors/mxfp8",
    verified="compressed-tensors 0.20.0",
)
