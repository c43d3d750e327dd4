"""TFLite: integers with a scale and a zero point, for the whole tensor or for each index of one dimension.

    part        dtype              stored shape                     packing
    codes       I8, U8, I16, I32   logical shape                    none; INT4 and INT2 as bytes, lowest bits first
    scale       F32                [1] or [size of the dimension]
    zero_point  I64                as scale, or [1], or missing: 0

Formula: w = scale[c] * (q - zero_point[c]), c the index in `quantized_dimension`.
Source: TensorFlow 2.20, tensorflow/compiler/mlir/lite/schema/schema.fbs; lite/kernels/internal/reference/dequantize.h,
per_channel_dequantize.h; lite/kernels/internal/portable_tensor_utils.cc `UnpackPackedIntToInt8`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

SCALE, ZERO_POINT = ".quantization.scale", ".quantization.zero_point"
BITS = {"INT8": 8, "UINT8": 8, "INT16": 16, "INT32": 32, "INT64": 64, "INT4": 4, "INT2": 2}
FLOORS_DB = {"INT8": 28.0, "UINT8": 28.0}


class Layout(NamedTuple):
    """The type of the codes, the dimension that has scales, and how many."""

    kind: str
    dimension: int
    channels: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the tensor that a scale or zero point belongs to."""
    ending = next((ending for ending in (SCALE, ZERO_POINT) if anchor.name.endswith(ending)), None)
    name = anchor.name.removesuffix(ending or "")
    record = _record(name, namespace)
    codes, scale = namespace.tensors.get(name), namespace.tensors.get(name + SCALE)
    if ending is None or record is None or codes is None or scale is None:
        return None
    shape = tuple(record["shape"])
    layout = Layout(record["type"], record["quantized_dimension"] if scale.elements > 1 else 0, scale.elements)
    parts = [Part("codes", "codes", codes), Part("scale", "scales", scale)]
    zero = namespace.tensors.get(name + ZERO_POINT)
    if zero is not None:
        parts.append(Part("zero_point", "zero_points", zero))
    _check(name, shape, layout, zero)
    scheme = f"tflite-{layout.kind.lower()}"
    floor = FLOORS_DB.get(layout.kind)
    return LogicalTensor(
        name,
        shape,
        scheme,
        codes.role or "parameter",
        tuple(parts),
        decode,
        layout,
        floor_db=floor,
        rounding=_rounding(layout, shape),
    )


def _rounding(layout: Layout, shape: tuple[int, ...]) -> Rounding | None:
    """Weights are symmetric by TFLite's own specification, and their lowest code is not used."""
    bits = BITS[layout.kind]
    if bits > 8 or not shape:
        return None
    grid = [1] * len(shape)
    grid[layout.dimension] = layout.channels
    to_code = rounding.symmetric(bits, reach=2 ** (bits - 1) - 1)
    return rounding.on_grid(to_code, shape, tuple(grid), margin_db=rounding.COMPENSATED_DB)


def _record(name: str, namespace: Namespace) -> dict[str, Any] | None:
    """What the container says about a tensor; None where this is no tensor of a TFLite file."""
    try:
        record = strict_json.parse_object(namespace.metadata.get(name, "").encode(), limit=1 << 16)
    except FormatError:
        return None
    return record if record.keys() == {"type", "shape", "quantized_dimension"} and record["type"] in BITS else None


def _check(name: str, shape: tuple[int, ...], layout: Layout, zero: StoredTensor | None) -> None:
    dimension = layout.dimension
    if layout.channels > 1 and (not 0 <= dimension < len(shape) or shape[dimension] != layout.channels):
        raise FormatError(f"has {layout.channels:,} scales for dimension {dimension} of {list(shape)}", tensor=name)
    if zero is not None and zero.elements not in (1, layout.channels):
        raise FormatError(f"has {zero.elements:,} zero points for {layout.channels:,} scales", tensor=name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start * tensor.columns, stop * tensor.columns
    inner = prod(tensor.shape[layout.dimension + 1 :])
    channel = torch.arange(first, last, device=device) // max(1, inner) % layout.channels
    codes = _codes(tensor.stored, layout.kind, first, last, device)
    if tensor.has("zero_point"):
        zero = tensor.part("zero_point").load(device=device)
        codes = codes - zero.expand(layout.channels)[channel]
    scale = tensor.part("scale").load(device=device)
    return (codes.to(torch.float32) * scale[channel]).view(stop - start, tensor.columns)


def _codes(stored: StoredTensor, kind: str, first: int, last: int, device: str) -> torch.Tensor:
    import torch

    bits = BITS[kind]
    if bits >= 8:
        return stored.load(first, last, device).to(torch.int64)
    codes = packing.bit_stream(stored, first, last, bits, device).to(torch.int64)
    return codes - ((codes >> (bits - 1)) << bits)  # two's complement


SCHEME = Scheme(
    name="tflite-affine",
    title="TFLite integers with scales",
    variants=tuple(f"tflite-{kind.lower()}" for kind in BITS),
    claim=claim,
    anchors=("scale", "zero_point"),
    source="TensorFlow 2.20, lite/schema/schema.fbs, lite/kernels/internal/reference/dequantize.h",
    verified="tflite 2.18.0 (schema)",
)
