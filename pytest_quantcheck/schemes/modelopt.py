"""ModelOpt checkpoints: NVFP4, MXFP4, FP8, MXFP8, INT8 and INT4-AWQ under the same names.

    part             dtype              stored shape                    what
    weight           U8                 [..., N, K/2]                   nvfp4, mxfp4: E2M1, low nibble first
    weight           U8                 [E, K/2, N]                     the same of bmm experts, packed along K
    weight           U8                 [..., N/2, K]                   int4: two rows in a byte, the even one low
    weight           F8_E4M3, I8        [..., N, K]                     one code per byte
    weight_scale     F8_E4M3            [..., N, K/16]                  nvfp4; bmm experts [E, K/16, N]
    weight_scale     U8                 [..., N, K/32]                  mxfp4, mxfp8: an exponent, 2**(e - 127)
    weight_scale     F32, BF16, F16     [..., N, K/group]               int4
    weight_scale     F32, BF16, F16     [], [N], [N, 1], [N/b, K/b]     fp8, int8: per tensor, per row, per block
    weight_scale     F32, BF16, F16     [E], [E, N], [E, K]             stacks: per expert, per row, per column
    weight_scale_2   F32                [] or [E]                       nvfp4: above weight_scale; int4: of its FP8 cast
    pre_quant_scale  F32, BF16, F16     [K]                             AWQ: what the activation is multiplied with
    input_scale      F32                []                              of the activation

Fused experts have `gate_up_proj` with `gate_up_proj_weight_scale` and so on. INT4 codes are two's complement.

Formula: w[n, k] = code[n, k] * weight_scale[n, k // group] * weight_scale_2 * pre_quant_scale[k], in float32. For
nvfp4, `weight_scale_2` multiplies, where the global scale of compressed-tensors divides; for int4 (W4A8) it belongs to
the cast to FP8 that follows at run time and is left out. The layer computes (x * pre_quant_scale) @ w.T, so what stood
there before is the stored weight times `pre_quant_scale`. Scales per block may be [N/b, 1, K/b, 1].
Source: nvidia-modelopt 0.47.0, torch/export/quant_utils.py, torch/export/unified_export_hf.py, torch/quantization/.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

METHODS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
FLOATS = frozenset({"F32", "BF16", "F16"})
PARTS: dict[str, ByteClass] = {
    "weight_scale": "scales",
    "weight_scale_2": "scales",
    "pre_quant_scale": "scales",
    "input_scale": "scales",
    "output_scale": "scales",
}
FP8_BLOCK = 128  # of FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, which the checkpoint does not repeat
FLOORS_DB = {"nvfp4": 19.0, "mxfp4": 17.0, "fp8": 29.5, "mxfp8": 29.5, "int8": 28.0, "int4": 14.0}

ROUNDED = {
    "nvfp4": rounding.codebook(packing.E2M1, scale="e4m3-scaled"),
    "mxfp4": rounding.codebook(packing.E2M1, scale="ceil"),
    "fp8": rounding.small_float("float8_e4m3fn"),
    "mxfp8": rounding.small_float("float8_e4m3fn", scale="ceil"),
    "int8": rounding.symmetric(8, reach=127),
    "int4": rounding.symmetric(4, reach=7),
}


class Layout(NamedTuple):
    """How codes are packed, and how scales lie over the weight; `width` columns share one scale."""

    code: str  # e2m1, int4, byte
    packed_rows: bool  # two rows in a byte, instead of two columns
    grid: packing.Grid | None
    width: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `weight_scale` of ModelOpt belongs to."""
    prefix = anchor.name.removesuffix("weight_scale")
    if not _is_ours(prefix, namespace):
        return None
    name = prefix[:-1] if prefix.endswith("_") else f"{prefix}weight"
    weight = namespace.tensors.get(name)
    if weight is None:
        raise FormatError(f"has no weight `{name}` beside it", tensor=anchor.name)
    if len(weight.shape) < 2 or not weight.elements or not anchor.elements:
        what = f"{list(weight.shape)} under scales {list(anchor.shape)} is no matrix with scales"
        raise FormatError(what, tensor=name)
    variant, shape, layout = _layout(weight, anchor, namespace)
    others = ((part, kind, namespace.tensors.get(f"{prefix}{part}")) for part, kind in PARTS.items())
    parts = [Part(part, kind, stored) for part, kind, stored in others if stored is not None]
    tensor = LogicalTensor(
        name,
        shape,
        f"modelopt-{variant}",
        "parameter",
        (Part("weight", "codes", weight), *parts),
        decode,
        layout,
        block=layout.width if layout.grid else None,
        floor_db=FLOORS_DB[variant],
    )
    _check_parts(tensor, variant)
    return tensor._replace(rounding=_rounding(variant, shape, layout))


def _rounding(variant: str, shape: tuple[int, ...], layout: Layout) -> Rounding | None:
    """Any of them may be calibrated, and is smoothed where it has a `pre_quant_scale`."""
    if layout.grid is None:
        return None
    block, margin = (layout.grid.height, layout.width), rounding.COMPENSATED_DB
    if variant == "fp8":
        return rounding.placed_floats("float8_e4m3fn", shape, *block, margin_db=margin)
    return rounding.placed(ROUNDED[variant], shape, *block, margin_db=margin)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a float8 tensor of a ModelOpt checkpoint cannot be plain numbers."""
    if stored.dtype != "F8_E4M3":
        return None
    return f"{stored.dtype} {list(stored.shape)} has no `{stored.name}_scale` beside it"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout, window = tensor.layout, slice(start, stop)
    assert isinstance(layout, Layout)
    stored = tensor.part("weight_scale")
    if layout.grid is None:
        raise NotDecodable(f"nothing says the blocks of its scales {list(stored.shape)}", tensor=tensor.name)
    values = _codes(tensor, layout, window, device)
    packing.scale_groups(values, _scales(tensor, layout, layout.grid, window, device), layout.width)
    if tensor.has("pre_quant_scale"):
        values.mul_(tensor.part("pre_quant_scale").load(device=device).to(torch.float32))
    return values


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where bytes lie along them and nothing was smoothed."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.grid is None or layout.packed_rows or tensor.has("pre_quant_scale"):
        return None
    codes = packing.byte_codes if layout.code == "byte" else packing.e2m1_codes
    scales = _scales(tensor, layout, layout.grid, slice(start, stop), device)
    return Coded(*codes(tensor.stored, start * tensor.columns, stop * tensor.columns, device), scales, layout.width)


def _scales(tensor: LogicalTensor, layout: Layout, grid: packing.Grid, window: slice, device: str) -> torch.Tensor:
    """The scales of each row of a window, as float32, times the one above them."""
    stored = tensor.part("weight_scale")
    scales = packing.grid_rows(stored, grid, window, device)
    scales = packing.powers_of_two(scales) if stored.dtype == "U8" else packing.as_float32(scales)
    if layout.code != "e2m1" or not tensor.has("weight_scale_2"):
        return scales
    return scales * packing.per_matrix(tensor, "weight_scale_2", window, device)


def _codes(tensor: LogicalTensor, layout: Layout, window: slice, device: str) -> torch.Tensor:
    """The numbers that the codes of a window stand for, before any scale."""
    import torch

    columns = tensor.columns
    if layout.code == "byte":
        codes = tensor.stored.load(window.start * columns, window.stop * columns, device)
        return packing.as_float32(codes).view(-1, columns)
    if not layout.packed_rows:
        raw = tensor.stored.load_bytes(window.start * columns // 2, window.stop * columns // 2, device)
        return packing.e2m1_values(raw).view(-1, columns)
    first, last = window.start // 2, -(-window.stop // 2)
    raw = tensor.stored.load_bytes(first * columns, last * columns, device)
    table = packing.E2M1 if layout.code == "e2m1" else packing.INT4
    pairs = packing.nibble_pairs(torch.tensor(table, device=device), high_first=False)
    values = packing.look_up(raw, pairs).view(last - first, columns, 2)  # (bytes, columns, low and high)
    rows = values.transpose(1, 2).reshape(-1, columns)
    return rows[window.start - 2 * first : window.stop - 2 * first]


def _is_ours(prefix: str, namespace: Namespace) -> bool:
    method = namespace.quantization.get("quant_method")
    return method in METHODS or (method is None and f"{prefix}weight_scale_2" in namespace.tensors)


def _layout(weight: StoredTensor, scale: StoredTensor, namespace: Namespace) -> tuple[str, tuple[int, ...], Layout]:
    if weight.dtype == "U8":
        return _packed(weight, scale)
    if weight.dtype not in ("F8_E4M3", "I8"):
        raise FormatError(f"{weight.dtype} is no weight of ModelOpt (U8, F8_E4M3, I8)", tensor=weight.name)
    shape, columns = weight.shape, weight.shape[-1]
    if scale.dtype == "U8":
        if scale.shape != (*shape[:-1], -(-columns // 32)):
            raise FormatError(f"{list(scale.shape)} is not one for 32 columns of {list(shape)}", tensor=scale.name)
        grid = packing.Grid(shape[-2], scale.shape[-1], shape[-2], 1)
        return "mxfp8", shape, Layout("byte", False, grid, 32)
    if scale.dtype not in FLOATS:
        raise FormatError(f"{scale.dtype} is not the scale of {weight.dtype} codes", tensor=scale.name)
    found, width = _byte_grid(scale, shape, namespace)
    return "int8" if weight.dtype == "I8" else "fp8", shape, Layout("byte", False, found, width)


def _packed(weight: StoredTensor, scale: StoredTensor) -> tuple[str, tuple[int, ...], Layout]:
    """Two codes in a byte: along K, or along the other axis for int4 and for bmm experts."""
    *stack, rows, columns = weight.shape
    if scale.shape[:-2] != tuple(stack) or len(scale.shape) != len(weight.shape):
        raise FormatError(f"{list(scale.shape)} is no grid over {list(weight.shape)} bytes", tensor=scale.name)
    high, wide = scale.shape[-2:]
    if scale.dtype in FLOATS:
        if high != 2 * rows or not 0 < wide <= columns or columns % wide:
            rule = f"[..., {2 * rows}, K/group]: bytes hold two rows"
            raise FormatError(
                f"{list(scale.shape)} does not fit {list(weight.shape)} bytes ({rule})", tensor=scale.name
            )
        grid = packing.Grid(high, wide, high, 1)
        return "int4", (*stack, high, columns), Layout("int4", True, grid, columns // wide)
    if scale.dtype not in ("F8_E4M3", "U8"):
        raise FormatError(f"{scale.dtype} is not the scale of packed codes", tensor=scale.name)
    variant, blocks = ("nvfp4", (16, 32)) if scale.dtype == "F8_E4M3" else ("mxfp4", (32,))
    if high == rows and wide and 2 * columns % wide == 0 and 2 * columns // wide in blocks:
        width = 2 * columns // wide
        return variant, (*stack, rows, 2 * columns), Layout("e2m1", False, packing.Grid(rows, wide, rows, 1), width)
    if wide == columns and high and 2 * rows % high == 0 and 2 * rows // high in blocks:
        grid = packing.Grid(high, wide, 2 * rows, 2 * rows // high)
        return variant, (*stack, 2 * rows, columns), Layout("e2m1", True, grid, 1)
    raise FormatError(f"{list(scale.shape)} is no grid of {blocks} over {list(weight.shape)} bytes", tensor=scale.name)


def _byte_grid(scale: StoredTensor, shape: tuple[int, ...], namespace: Namespace) -> tuple[packing.Grid | None, int]:
    """The grid of scales over codes of one byte, and how many columns share one."""
    *stack, rows, columns = shape
    lead, sizes = tuple(stack), scale.shape
    if scale.elements == 1:
        return packing.Grid(1, 1, prod(shape[:-1]), prod(shape[:-1])), columns
    if sizes in (lead, (*lead, 1, 1)):
        return packing.Grid(1, 1, rows, rows), columns
    by_column = bool(stack) and sizes in ((*lead, columns), (*lead, 1, columns))
    if by_column and rows == columns and len(sizes) < len(shape):
        raise FormatError(f"{list(sizes)} scales the rows or the columns of {list(shape)}", tensor=scale.name)
    if by_column:
        return packing.Grid(1, columns, rows, rows), 1
    if sizes in ((*lead, rows), (*lead, rows, 1)):
        return packing.Grid(rows, 1, rows, 1), columns
    if len(sizes) == 4 and not stack and sizes[1] == sizes[3] == 1:  # [N/b, 1, K/b, 1], as the quantizer keeps it
        sizes = (sizes[0], sizes[2])
    if sizes[:-2] != lead or len(sizes) != len(shape):
        raise FormatError(f"{list(scale.shape)} is no grid over {list(shape)}", tensor=scale.name)
    return _block_grid(sizes[-2], sizes[-1], shape, namespace)


def _block_grid(high: int, wide: int, shape: tuple[int, ...], namespace: Namespace) -> tuple[packing.Grid | None, int]:
    rows, columns = shape[-2:]
    configured = _settings(namespace).get("group_size")
    for block in (configured, FP8_BLOCK, rows // high):
        if isinstance(block, int) and block > 0 and (-(-rows // block), -(-columns // block)) == (high, wide):
            return packing.Grid(high, wide, rows, block), block
    return None, columns


def _settings(namespace: Namespace) -> Mapping[str, Any]:
    """The block that names the algorithm: at the top in config.json, one level down in hf_quant_config.json."""
    inner = namespace.quantization.get("quantization")
    return inner if isinstance(inner, Mapping) else namespace.quantization


def _check_parts(tensor: LogicalTensor, variant: str) -> None:
    if variant == "nvfp4" and not tensor.has("weight_scale_2"):
        raise FormatError("has no `weight_scale_2`", tensor=tensor.part("weight_scale").name)
    matrices = prod(tensor.shape[:-2])
    if tensor.has("weight_scale_2") and tensor.part("weight_scale_2").elements not in (1, matrices):
        share, rule = tensor.part("weight_scale_2"), f"one, or one for each of {matrices:,} matrices"
        raise FormatError(f"{list(share.shape)} does not fit {list(tensor.shape)} ({rule})", tensor=share.name)
    if tensor.has("pre_quant_scale") and tensor.part("pre_quant_scale").elements != tensor.columns:
        stored = tensor.part("pre_quant_scale")
        what = f"{list(stored.shape)} is not one for each of {tensor.columns:,} columns"
        raise FormatError(what, tensor=stored.name)


SCHEME = Scheme(
    name="modelopt",
    title="ModelOpt (NVFP4, MXFP4, FP8, MXFP8, INT8, INT4-AWQ)",
    variants=tuple(f"modelopt-{variant}" for variant in FLOORS_DB),
    claim=claim,
    anchors=("weight_scale",),
    methods=METHODS,
    refuse=refuse,
    coders={decode: coded},
    source="nvidia-modelopt 0.47.0, torch/export/quant_utils.py and torch/export/unified_export_hf.py",
    verified="nvidia-modelopt 0.47.0",
)
