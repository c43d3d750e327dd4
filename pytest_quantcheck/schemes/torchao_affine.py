"""torchao with one byte for each code: `Int8Tensor`, `IntxUnpackedToInt8Tensor`, `Float8Tensor`.

    part           dtype              stored shape               packing
    qdata          I8, F8_E4M3, ...   logical shape              none, also for codes of 1 to 7 bits
    scale          F32, BF16          grid of blocks             row-major
    zero_point     like scale, I8     grid of blocks             where the class has one
    act_pre_scale  float              [K]                        multiplies the activation
    act_quant_*    float, int         small                      of static activation quantization

Formula: w = (qdata - zero_point) * scale, each of its block. `block_size` has the size of a block in every dimension;
where it is missing, the grid is the shape of the scale. An `act_pre_scale` multiplies the input of the layer, so column
k of the weight is multiplied by `act_pre_scale[k]`: the layer then does what the unquantized one did.
Source: torchao 0.18, quantization/quantize_/workflows/{int8,intx,float8}, quant_primitives.py `dequantize_affine`.

Departs from the library: its `dequantize()` computes in the dtype of the model and leaves `act_pre_scale` out.
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

CODES = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    "PrototypeFloat8Tensor": ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
}
FLOORS_DB = {"int8": 28.0, "float8": 29.5, "int4": 14.0, "int3": 7.0}


class Layout(NamedTuple):
    """The number of blocks in each dimension."""

    grid: tuple[int, ...]


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight of a flattened `qdata` of one of the three classes."""
    found = torchao_metadata.find(anchor, "qdata", namespace)
    if found is None or found.kind not in CODES:
        return None
    if anchor.dtype not in CODES[found.kind]:
        raise FormatError(
            f"{anchor.dtype} is no code of a {found.kind} ({', '.join(CODES[found.kind])})", tensor=anchor.name
        )
    shape = found.check_shape(anchor.shape)
    grid = _grid(found, shape)
    found.check_elements("scale", grid)
    if "zero_point" in found.stored:
        found.check_elements("zero_point", grid)
    if "act_pre_scale" in found.stored and found.stored["act_pre_scale"].elements not in (1, shape[-1]):
        found.check_elements("act_pre_scale", shape[-1:])
    kind = _kind(found, anchor)
    return LogicalTensor(
        found.name,
        shape,
        f"torchao-{kind}",
        "parameter",
        found.parts("qdata"),
        decode,
        Layout(grid),
        block=shape[-1] // grid[-1] if grid[-1] else None,
        floor_db=24.5 if anchor.dtype.startswith("F8_E5M2") else FLOORS_DB.get(kind),
        rounding=_rounding(found, anchor, kind, grid),
    )


def _rounding(found: Flattened, codes: StoredTensor, kind: str, grid: tuple[int, ...]) -> Rounding | None:
    """An `act_pre_scale` says that the weight was smoothed: nothing is said of its steps then."""
    smoothed, kept = "act_pre_scale" in found.stored, rounding.kept_in(found.part("scale"))
    margin = rounding.COMPENSATED_DB if smoothed else 1.5
    if kind == "float8":
        dtype = rounding.float_of(codes)
        gaps = None if smoothed else steps.floats(dtype)
        block = prod(codes.shape[:-1]) // max(1, prod(grid[:-1])), codes.shape[-1] // max(1, grid[-1])
        return rounding.placed_floats(dtype, codes.shape, *block, scale=kept, margin_db=margin, steps=gaps)
    bits = int(kind.removeprefix("int"))
    if bits < 2:
        return None
    asymmetric = "zero_point" in found.stored and found.attributes.get("mapping_type") == "ASYMMETRIC"
    to_code = rounding.affine(bits, scale=kept) if asymmetric else rounding.symmetric(bits, scale=kept)
    clipped = steps.even(8, fills=steps.SIGNED[8])
    return rounding.on_grid(to_code, codes.shape, grid, margin_db=margin, steps=None if smoothed else clipped)


def _kind(found: Flattened, codes: StoredTensor) -> str:
    if codes.dtype != "I8":
        return "float8"
    target = found.attributes.get("target_dtype")
    name = target.get("_data") if isinstance(target, dict) else "int8"
    if name not in {f"int{bits}" for bits in range(1, 9)}:
        raise FormatError(f"has the target dtype `{name}` (int1 to int8)", tensor=found.name)
    return str(name)


def _grid(found: Flattened, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not found.attributes.get("block_size"):
        scale = found.part("scale")
        grid = scale.shape if len(scale.shape) == len(shape) else (1,) * len(shape)
        blocks = tuple(size // number if number else 0 for size, number in zip(shape, grid, strict=True))
    else:
        blocks = found.sizes("block_size")
        grid = tuple(size // block if block else 0 for size, block in zip(shape, blocks, strict=False))
    whole = len(grid) == len(blocks) == len(shape) and all(
        number * block == size for size, number, block in zip(shape, grid, blocks, strict=True)
    )
    if not whole:
        raise FormatError(f"{list(shape)} does not divide into blocks of {list(blocks)}", tensor=found.name)
    return grid


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    values = packing.expand(_coded(tensor, start, stop, device)).view(stop - start, tensor.columns)
    if tensor.has("act_pre_scale"):
        values.mul_(tensor.part("act_pre_scale").load(device=device).to(torch.float32))
    return values


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where no scale of activations is in them."""
    return None if tensor.has("act_pre_scale") else _coded(tensor, start, stop, device)


def _coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    layout = tensor.layout
    assert isinstance(layout, Layout)
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    scales, zeros = (
        packing.block_values(tensor.part(part), tensor.shape, layout.grid, range(start, stop), device)
        if tensor.has(part)
        else None
        for part in ("scale", "zero_point")
    )
    assert scales is not None
    return Coded(codes, None, scales, tensor.columns // max(1, layout.grid[-1]), zeros)


SCHEME = Scheme(
    name="torchao-affine",
    title="torchao int8, intx in int8 and float8",
    variants=(*(f"torchao-int{bits}" for bits in range(1, 9)), "torchao-float8"),
    claim=claim,
    anchors=("_qdata",),
    methods=("torchao",),
    live={f"torchao.{kind}": torchao_metadata.expose for kind in CODES},
    coders={decode: coded},
    source="torchao 0.18, quantization/quantize_/workflows/{int8,intx,float8}",
    verified="torchao 0.18.0",
)
