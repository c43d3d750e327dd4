"""compressed-tensors `nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `mxfp6-pack-quantized`: small floats in bytes.

    part                 dtype              stored shape    packing
    weight_packed        U8                 [..., N, K/2]   nvfp4, mxfp4: E2M1, low nibble first
    weight_packed        U8                 [..., N, 3K/4]  mxfp6: E2M3, four codes in three bytes, lowest bits first
    weight_scale         F8_E4M3            [..., N, K/16]  nvfp4
    weight_scale         U8 or E8M0         [..., N, K/32]  mxfp4, mxfp6: an exponent, 2**(e - 127)
    weight_global_scale  F32                [1]             nvfp4 only
    input_global_scale   F32                [1]             of the activation

Formula: w[n, k] = E2M1[code] * (scale[n, k // 16] / global_scale), in float32: the global scale divides, where the
`weight_scale_2` of ModelOpt multiplies. The mx formats have no global scale. The library computes in bfloat16.
Source: compressed-tensors 0.20.0, compressors/nvfp4/, compressors/mxfp4/, compressors/mxfp6/.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import config_groups, packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

METHODS = ("compressed-tensors", "compressed_tensors")
EXPONENTS = frozenset({"U8", "F8_E8M0"})
PARTS: dict[str, ByteClass] = {
    "weight_scale": "scales",
    "weight_global_scale": "scales",
    "input_scale": "scales",
    "input_global_scale": "scales",
    "output_scale": "scales",
    "weight_shape": "bookkeeping",
    config_groups.ARGS: "bookkeeping",
}


class Layout(NamedTuple):
    """Bits of a code, and how many columns share a scale."""

    bits: int
    group: int


# bytes of codes under one scale, and whether that is an exponent -> what they are
LAYOUTS = {
    (8, False): ("ct-nvfp4", Layout(4, 16), 19.0),
    (16, True): ("ct-mxfp4", Layout(4, 32), 17.0),
    (24, True): ("ct-mxfp6", Layout(6, 32), None),
}
ROUNDED = {
    "ct-nvfp4": rounding.codebook(packing.E2M1, scale="e4m3-scaled"),
    "ct-mxfp4": rounding.codebook(packing.E2M1, scale="even"),
    "ct-mxfp6": rounding.codebook(packing.small_float_table(2, 3), scale="even"),
}


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `weight_packed` of bytes holds."""
    if anchor.dtype != "U8":
        return None
    prefix = anchor.name.removesuffix("weight_packed")
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    scale = namespace.tensors.get(f"{prefix}weight_scale")
    if scale is None:
        raise FormatError(f"has no `{prefix}weight_scale`", tensor=anchor.name)
    variant, layout, floor = _layout(anchor, scale)
    if variant == "ct-nvfp4":
        _check_global_scale(anchor, namespace.tensors.get(f"{prefix}weight_global_scale"), prefix)
    return LogicalTensor(
        f"{prefix}weight",
        (*anchor.shape[:-1], anchor.shape[-1] * 8 // layout.bits),
        variant,
        "parameter",
        (Part("weight_packed", "codes", anchor), *parts),
        decode,
        layout,
        block=layout.group,
        floor_db=floor,
        rounding=rounding.grouped(ROUNDED[variant], layout.group, margin_db=rounding.COMPENSATED_DB),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    packed = coded(tensor, start, stop, device)
    if packed is not None:
        return packing.expand(packed, tensor.columns)
    row = tensor.stored.shape[-1]
    raw = tensor.stored.load_bytes(start * row, stop * row, device).view(stop - start, row)
    table = torch.tensor(packing.small_float_table(2, 3), device=device)
    values = table[packing.row_codes(raw, layout.bits, tensor.columns)]
    return packing.scale_groups(values, _scales(tensor, layout, start, stop, device), layout.group)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where two are in a byte."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.bits != 4:
        return None
    codes = packing.e2m1_codes(tensor.stored, start * tensor.columns, stop * tensor.columns, device)
    return Coded(*codes, _scales(tensor, layout, start, stop, device), layout.group)


def _scales(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The scales of rows as float32, those of nvfp4 divided by the one above them."""
    groups, scale = tensor.columns // layout.group, tensor.part("weight_scale")
    scales = scale.load(start * groups, stop * groups, device).view(stop - start, groups)
    if scale.dtype in EXPONENTS:
        return packing.powers_of_two(scales)
    return packing.as_float32(scales) / packing.per_matrix(tensor, "weight_global_scale", slice(start, stop), device)


def _layout(packed: StoredTensor, scale: StoredTensor) -> tuple[str, Layout, float | None]:
    exponents = scale.dtype in EXPONENTS
    if not exponents and scale.dtype != "F8_E4M3":
        rule = "F8_E4M3 for nvfp4, U8 or E8M0 for mxfp4 and mxfp6"
        raise FormatError(f"{scale.dtype} is not the scale of a packed float ({rule})", tensor=scale.name)
    width, groups = (shape[-1] if shape else 0 for shape in (packed.shape, scale.shape))
    found = LAYOUTS.get((width // groups, exponents)) if groups and width % groups == 0 else None
    if found is None or len(packed.shape) < 2 or scale.shape[:-1] != packed.shape[:-1]:
        rule = "one for 8 bytes of nvfp4, for 16 of mxfp4, for 24 of mxfp6"
        raise FormatError(
            f"{list(scale.shape)} scales do not fit {list(packed.shape)} bytes ({rule})", tensor=scale.name
        )
    return found


def _check_global_scale(packed: StoredTensor, scale: StoredTensor | None, prefix: str) -> None:
    if scale is None:
        raise FormatError(f"has no `{prefix}weight_global_scale`", tensor=packed.name)
    matrices = prod(packed.shape[:-2])
    if scale.elements not in (1, matrices) or DTYPES[scale.dtype].kind != "float":
        rule = f"one float, or one for each of {matrices:,} matrices"
        raise FormatError(f"{scale.dtype} {list(scale.shape)} is no global scale ({rule})", tensor=scale.name)


SCHEME = Scheme(
    name="ct-float-packed",
    title="compressed-tensors, packed small floats (NVFP4, MXFP4, MXFP6)",
    variants=("ct-nvfp4", "ct-mxfp4", "ct-mxfp6"),
    claim=claim,
    anchors=("weight_packed",),
    methods=METHODS,
    coders={decode: coded},
    source="compressed-tensors 0.20.0, compressors/nvfp4, compressors/mxfp4 and compressors/mxfp6",
    verified="compressed-tensors 0.20.0",
)
