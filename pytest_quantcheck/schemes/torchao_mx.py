"""torchao block floats: `NVFP4Tensor` and `MXTensor` (fp4, fp6, fp8).

    part              dtype               stored shape               packing
    qdata             U8                  [..., N, K/2]              fp4: low nibble first
                      U8                  [..., N, K]                fp6: one code a byte, in the low bits
                      F8_E4M3, F8_E5M2    [..., N, K]                fp8
    scale             F8_E4M3 (NVFP4),    [..., N, K/block]          plain, or in tiles of 128 x 4 of the whole matrix,
                      F8_E8M0 (MX)        or [32*ceil(N/128), 16*ceil(K/block/4)]     rows padded to 128, columns to 4
    per_tensor_scale  F32                 [] or [E, 1, 1]            NVFP4, optional

Formula: w = element * (per_tensor_scale * scale), each of its block of 16 (NVFP4) or `block_size` (MX) along K.
Source: torchao 0.18, prototype/mx_formats/nvfp4_tensor.py, mx_tensor.py, utils.py.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding, steps, torchao_metadata
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.schemes.torchao_metadata import Flattened
from pytest_quantcheck.tensor import Coded, LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

ELEMENTS = {  # by `elem_dtype`: variant, stored dtype, elements a byte, table of values
    "float4_e2m1fn_x2": ("mxfp4", "U8", 2, packing.E2M1),
    "fp6_e2m3": ("mxfp6-e2m3", "U8", 1, packing.small_float_table(2, 3)),
    "fp6_e3m2": ("mxfp6-e3m2", "U8", 1, packing.small_float_table(3, 2)),
    "float8_e4m3fn": ("mxfp8-e4m3", "F8_E4M3", 1, ()),
    "float8_e5m2": ("mxfp8-e5m2", "F8_E5M2", 1, ()),
}
FLOORS_DB = {"nvfp4": 19.0, "mxfp4": 17.0, "mxfp8-e4m3": 29.5, "mxfp8-e5m2": 24.5}


class Layout(NamedTuple):
    """Values of the codes (empty: the stored dtype says them), codes a byte, values a scale, and where scales lie."""

    table: tuple[float, ...]
    packed: int
    block: int
    swizzled: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a flattened `qdata` of one of the two classes."""
    found = torchao_metadata.find(anchor, "qdata", namespace)
    if found is None or found.kind not in ("NVFP4Tensor", "MXTensor"):
        return None
    variant, dtype, layout = _layout(found)
    if anchor.dtype != dtype or not anchor.shape:
        raise FormatError(
            f"{anchor.dtype} {list(anchor.shape)} is not the {dtype} of {variant} codes", tensor=anchor.name
        )
    shape = found.check_shape((*anchor.shape[:-1], anchor.shape[-1] * layout.packed))
    _check_scales(found, shape, layout)
    return LogicalTensor(
        found.name,
        shape,
        f"torchao-{variant}",
        "parameter",
        found.parts("qdata"),
        decode,
        layout,
        block=layout.block,
        floor_db=FLOORS_DB.get(variant),
        rounding=_rounding(found, anchor, layout),
    )


def _rounding(found: Flattened, codes: StoredTensor, layout: Layout) -> Rounding:
    if found.kind == "NVFP4Tensor":
        scale: rounding.ScaleKind = "e4m3-scaled" if "per_tensor_scale" in found.stored else "e4m3"
    else:
        scale = "floor"
    if not layout.table:
        dtype = rounding.float_of(codes)
        gaps = steps.floats(dtype, clips=True)
        return rounding.grouped(rounding.small_float(dtype, scale=scale), layout.block, steps=gaps)
    one = layout.table.index(1.0)
    gaps = steps.levels(layout.table, 1.0, one * 0x11 if layout.packed == 2 else one, clips=True)
    return rounding.grouped(rounding.codebook(layout.table, scale=scale), layout.block, steps=gaps)


def _layout(found: Flattened) -> tuple[str, str, Layout]:
    block, swizzled = found.attributes.get("block_size"), found.attributes.get("is_swizzled_scales") is True
    if type(block) is not int or block < 1:
        raise FormatError(f"is a {found.kind} with the block size `{block}`", tensor=found.name)
    if found.kind == "NVFP4Tensor":
        return "nvfp4", "U8", Layout(packing.E2M1, 2, block, swizzled)
    element = found.attributes.get("elem_dtype")
    name = element.get("_data") if isinstance(element, dict) else element
    if not isinstance(name, str) or name not in ELEMENTS:
        raise FormatError(f"has the element dtype `{name}` (one of {', '.join(ELEMENTS)})", tensor=found.name)
    variant, dtype, packed, table = ELEMENTS[name]
    return variant, dtype, Layout(table, packed, block, swizzled)


def _check_scales(found: Flattened, shape: tuple[int, ...], layout: Layout) -> None:
    rows, columns = prod(shape[:-1]), shape[-1]
    if columns % layout.block:
        raise FormatError(f"{list(shape)} does not divide into blocks of {layout.block}", tensor=found.name)
    blocks = columns // layout.block
    grid = (-(-rows // 128) * 128, -(-blocks // 4) * 4) if layout.swizzled else (rows, blocks)
    found.check_elements("scale", grid)
    scale, wanted = found.part("scale"), "F8_E4M3" if found.kind == "NVFP4Tensor" else "F8_E8M0"
    if scale.dtype != wanted:
        raise FormatError(f"{scale.dtype} is not the {wanted} of a {found.kind}", tensor=scale.name)
    if "per_tensor_scale" in found.stored and found.stored["per_tensor_scale"].elements != 1:
        found.check_elements("per_tensor_scale", shape[:1])


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device), tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last, scales = start * tensor.columns, stop * tensor.columns, _scales(tensor, layout, start, stop, device)
    if layout.packed == 2:
        return Coded(*packing.e2m1_codes(tensor.stored, first, last, device), scales, layout.block)
    if not layout.table:
        return Coded(*packing.byte_codes(tensor.stored, first, last, device), scales, layout.block)
    table = torch.full((256, 1), torch.nan, device=device)  # of a byte that is no code
    table[: len(layout.table), 0] = torch.tensor(layout.table, device=device)
    return Coded(tensor.stored.load(first, last, device), table, scales, layout.block)


def _scales(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    stored, blocks = tensor.part("scale"), tensor.columns // layout.block
    if layout.swizzled:
        scale = packing.unswizzled_rows(stored, blocks, start, stop, device)
    else:
        scale = stored.load(start * blocks, stop * blocks, device).view(stop - start, blocks)
    scale = packing.as_float32(scale)
    if not tensor.has("per_tensor_scale"):
        return scale
    import torch

    outer = tensor.part("per_tensor_scale").load(device=device).to(torch.float32)
    if len(outer) == 1:
        return scale * outer
    rows = torch.arange(start, stop, device=device) // (tensor.rows // tensor.shape[0])
    return scale * outer[rows].view(-1, 1)


SCHEME = Scheme(
    name="torchao-mx",
    title="torchao NVFP4 and MX (fp4, fp6, fp8)",
    variants=("torchao-nvfp4", *(f"torchao-{variant}" for variant, *_ in ELEMENTS.values())),
    claim=claim,
    anchors=("_qdata",),
    methods=("torchao",),
    live={"torchao.NVFP4Tensor": torchao_metadata.expose, "torchao.MXTensor": torchao_metadata.expose},
    coders={decode: coded},
    source="torchao 0.18, prototype/mx_formats",
    verified="torchao 0.18.0",
)
