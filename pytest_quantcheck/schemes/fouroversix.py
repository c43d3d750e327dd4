"""fouroversix: NVFP4, MXFP4, NVINT4 and IF4 under one scale per block, padded for Blackwell.

    part                            dtype    stored shape           packing
    quantized_weight_values         U8       [Np, Kp/2]             low nibble first; E2M1, or two's complement
    quantized_weight_scale_factors  F8_E4M3  [Np * Kp / 16]         nvfp4, nvint4, if4
    quantized_weight_scale_factors  E8M0     [Np * Kp / 32]         mxfp4
    quantized_weight_amax           F32      [] or [1]              the largest value of the weight
    quantized_weight_metadata       I32      [6]                    N, K, Np, Kp, packed, blocked

Np is N in full 128s, Kp is K in full 4 blocks. Scales are row-major, or where `blocked` is 1 in tiles of 128 rows and 4
blocks: scale (r, c) of a tile lies at r % 32 * 16 + r // 32 * 4 + c.
Formula: w = code * scale * amax / (most * top), in float32, where `most` is the largest code (6; 7 for nvint4; 4 with
the rule static_4) and `top` the largest scale (448; 256 for nvfp4 with a rule that is not static). mxfp4: code * scale.
if4: a negative scale marks integers, which are code * 6 / 7 under its absolute value.
Source: fouroversix 1.0.5, quantize/backend.py, quantize/dequantize_utils.py, model/modules/linear.py.

The dtype and the rule stand in the configuration (`weight_dtype` or `dtype`, `weight_scale_rule` or `scale_rule`,
`module_config_overrides`), live on the module. The 6-bit and 3-bit formats of later versions are counted and weighed,
but not decoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

METHOD = "fouroversix"
RECORD = "quantized_weight_config"  # live only, see `expose`
RECORD_LIMIT = 1 << 10
VALUES, SCALES, AMAX = "quantized_weight_values", "quantized_weight_scale_factors", "quantized_weight_amax"
SIZES = "quantized_weight_metadata"
PARTS: dict[str, ByteClass] = {SCALES: "scales", AMAX: "scales", SIZES: "bookkeeping", RECORD: "bookkeeping"}

BLOCKS = {"nvfp4": 16, "if4": 16, "nvint4": 16, "mxfp4": 32}
MOST = {"nvfp4": 6.0, "if4": 6.0, "nvint4": 7.0}
STATIC = ("static_6", "static_4")
FLOORS_DB = {"nvfp4": 19.0, "mxfp4": 17.0}
# With the largest code at 6; the rules that also try 4 do no worse.
_STEPS = steps.levels(packing.E2M1, 1.0, 0x22, clips=True)
ROUNDING = {
    "nvfp4": rounding.grouped(rounding.codebook(packing.E2M1, scale="e4m3-scaled"), 16, steps=_STEPS),
    "mxfp4": rounding.grouped(rounding.codebook(packing.E2M1, scale="floor"), 32, steps=_STEPS),
    "nvint4": rounding.grouped(rounding.symmetric(4, reach=7, scale="e4m3-scaled"), 16),
    "if4": rounding.grouped(rounding.codebook(packing.E2M1, scale="e4m3-scaled"), 16),
}


class Layout(NamedTuple):
    """The format of the codes, how many scales a padded row has, and what divides the largest value."""

    dtype: str
    stored_columns: int
    blocked: bool
    divisor: float


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `quantized_weight_values` hold."""
    prefix = anchor.name.removesuffix(VALUES)
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    present = {part.name: part.stored for part in parts}
    for name in (SCALES, AMAX, SIZES):
        if name not in present:
            raise FormatError(f"has no `{prefix}{name}`", tensor=anchor.name)
    sizes = packing.read_integers(present[SIZES])
    if present[AMAX].elements != 1:
        raise FormatError(f"{list(present[AMAX].shape)} is not one largest value", tensor=present[AMAX].name)
    settings = _settings(prefix.removesuffix("."), present.get(RECORD), namespace)
    dtype, rule = str(settings["dtype"]), str(settings["scale_rule"])
    decoded = dtype in BLOCKS
    if len(sizes) != 6 or not all(size > 0 for size in sizes[:4]) or sizes[0] > sizes[2] or sizes[1] > sizes[3]:
        raise FormatError(f"{list(sizes)} is not N, K, Np, Kp and two marks", tensor=present[SIZES].name)
    if decoded:
        _check(anchor, present[SCALES], sizes, dtype)
    divisor = 4.0 if rule == "static_4" else MOST.get(dtype, 1.0)
    top = 256.0 if dtype == "nvfp4" and rule not in STATIC else 448.0
    return LogicalTensor(
        f"{prefix}weight",
        sizes[:2],
        f"fouroversix-{dtype}",
        "parameter",
        (Part(VALUES, "codes", anchor), *parts),
        decode if decoded else None,
        Layout(dtype, sizes[3], sizes[5] == 1, divisor * top),
        block=BLOCKS.get(dtype),
        floor_db=FLOORS_DB.get(dtype),
        rounding=ROUNDING.get(dtype),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    width, block = layout.stored_columns // 2, BLOCKS[layout.dtype]
    raw = tensor.stored.load_bytes(start * width, stop * width, device).view(stop - start, width)
    scales = _scales(tensor, layout, start, stop, device)  # (rows, Kp / block)
    values = _numbers(raw, packing.E2M1)
    if layout.dtype == "nvint4":
        values = _numbers(raw, packing.INT4)
    elif layout.dtype == "if4":
        whole = (scales.signbit()).repeat_interleave(block, 1)
        values = torch.where(whole, _numbers(raw, packing.INT4) * (6 / 7), values)
        scales = scales.abs()
    packing.scale_groups(values, scales, block)
    if layout.dtype != "mxfp4":
        amax = tensor.part(AMAX).load(device=device).to(torch.float32)
        values.mul_(amax).div_(layout.divisor)
    return values[:, : tensor.columns].contiguous()


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` of mxfp4 as codes; the others are multiplied and divided once more."""
    layout, columns = tensor.layout, tensor.columns
    assert isinstance(layout, Layout)
    if layout.dtype != "mxfp4" or columns % 2:
        return None
    width = layout.stored_columns
    codes, pairs = packing.e2m1_codes(tensor.stored, start * width, stop * width, device)
    codes = codes.view(-1, width // 2)[:, : columns // 2].reshape(-1)
    blocks = -(-columns // BLOCKS[layout.dtype])
    scales = _scales(tensor, layout, start, stop, device)[:, :blocks].contiguous()
    return Coded(codes, pairs, scales, BLOCKS[layout.dtype])


def _numbers(raw: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    import torch

    pairs = packing.nibble_pairs(torch.tensor(table, device=raw.device), high_first=False)
    return packing.look_up(raw, pairs).flatten(1)


def _scales(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    stored, columns = tensor.part(SCALES), layout.stored_columns // BLOCKS[layout.dtype]
    if layout.blocked:
        low, high = start // 128, -(-stop // 128)
        tiles = stored.load(low * 128 * columns, high * 128 * columns, device)
        scales = packing.unblocked(tiles, columns)[start - low * 128 : stop - low * 128]
    else:
        scales = stored.load(start * columns, stop * columns, device).view(stop - start, columns)
    return packing.as_float32(scales)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Add to the buffers of a live module the format that only its `config` names."""
    config = getattr(owner, "config", None)
    if VALUES not in owner._buffers or config is None:
        return None
    said = {
        "dtype": getattr(config, "weight_dtype", None) or getattr(config, "dtype", None),
        "scale_rule": getattr(config, "weight_scale_rule", None) or getattr(config, "scale_rule", None),
    }
    return {RECORD: json.dumps({key: getattr(value, "value", value) for key, value in said.items()}).encode()}


def _settings(module: str, record: StoredTensor | None, namespace: Namespace) -> Mapping[str, Any]:
    if record is not None:
        return strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
    said: Mapping[str, Any] = namespace.quantization
    if said.get("quant_method") != METHOD:
        what = f"nothing says its format (quant_method `{said.get('quant_method')}`, `{METHOD}` belongs there)"
        raise FormatError(what, tensor=f"{module}.{VALUES}" if module else VALUES)
    overrides = said.get("module_config_overrides")
    if isinstance(overrides, Mapping) and isinstance(overrides.get(module), Mapping):
        said = overrides[module]
    return {
        "dtype": said.get("weight_dtype") or said.get("dtype") or "nvfp4",
        "scale_rule": said.get("weight_scale_rule") or said.get("scale_rule") or "mse",
    }


def _check(values: StoredTensor, scales: StoredTensor, sizes: tuple[int, ...], dtype: str) -> None:
    rows, columns = sizes[2:4]
    if values.dtype != "U8" or values.shape != (rows, columns // 2):
        rule = f"U8 [{rows}, {columns // 2}]"
        raise FormatError(f"{values.dtype} {list(values.shape)} are not its codes ({rule})", tensor=values.name)
    wanted = "F8_E8M0" if dtype == "mxfp4" else "F8_E4M3"
    if scales.dtype != wanted or scales.elements != rows * columns // BLOCKS[dtype]:
        rule = f"{rows * columns // BLOCKS[dtype]:,} in {wanted}"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} are not its scales ({rule})", tensor=scales.name)


SCHEME = Scheme(
    name="fouroversix",
    title="fouroversix (NVFP4, MXFP4, NVINT4, IF4)",
    variants=tuple(f"fouroversix-{dtype}" for dtype in BLOCKS),
    claim=claim,
    anchors=(VALUES,),
    methods=(METHOD,),
    live={"fouroversix.FourOverSixLinear": expose},
    coders={decode: coded},
    source="fouroversix 1.0.5, quantize/backend.py and model/modules/linear.py",
    verified="fouroversix 1.0.5",
)
