"""torch.ao eager and FX: 8-bit and 4-bit weights inside packed parameters, which `parameters()` does not list.

    part        dtype               shown shape          packing
    <weight>    I8, U8, I32         logical shape        none
                U8 (quint4x2)       [ceil(numel / 2)]    flat, low nibble first
    .scale      F32                 [] or [channels]
    .zero_point I32, F32 (float)    [] or [channels]
    .torch_ao   record              JSON: shape, axis, bits

Formula: w = (code - zero_point) * scale, per tensor or per index of `axis`. Embeddings have float zero points.
Source: torch 2.13, torch/ao/nn/quantized, aten/src/ATen/native/quantized/affine_quantizer_base.cpp.

The packed parameters are an opaque `ScriptObject`: what it unpacks to is shown and weighed; the padding and the column
sums that a kernel adds are not seen. With float16 the weight is plain numbers. These modules are saved by pickle only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "torch_ao"
LIMIT = 4 << 10
FLOORS_DB = {8: 28.0, 4: 14.0}


class Layout(NamedTuple):
    """Bits of a code, and the dimension whose indices have a scale each; None where the tensor has one."""

    bits: int
    axis: int | None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a live record belongs to."""
    name = anchor.name.removesuffix(f".{RECORD}")
    if anchor.role is None or name == anchor.name:
        return None
    record = strict_json.parse_object(anchor.read(limit=LIMIT), limit=LIMIT)
    shape, layout = tuple(record["shape"]), Layout(record["bits"], record["axis"])
    codes, scale, zero = (namespace.tensors[f"{name}{part}"] for part in ("", ".scale", ".zero_point"))
    wanted = 1 if layout.axis is None else shape[layout.axis]
    if scale.elements != wanted or zero.elements != wanted:
        raise FormatError(f"has {scale.elements:,} scales and {zero.elements:,} zero points ({wanted:,})", tensor=name)
    parts = (
        Part("weight", "codes", codes),
        Part("scale", "scales", scale),
        Part("zero_point", "zero_points", zero),
        Part(RECORD, "bookkeeping", anchor),
    )
    block = prod(shape) // max(1, wanted)
    variant = f"torch-ao-int{layout.bits}"
    return LogicalTensor(
        name,
        shape,
        variant,
        "parameter",
        parts,
        decode,
        layout,
        block,
        floor_db=FLOORS_DB.get(layout.bits),
        rounding=_rounding(layout, shape, codes, zero),
    )


def _rounding(layout: Layout, shape: tuple[int, ...], codes: StoredTensor, zero: StoredTensor) -> Rounding | None:
    """Embeddings have float zero points, weights of signed codes none, and observers may clip what is rare."""
    if zero.dtype == "F32":
        to_code = rounding.from_least(layout.bits)
    else:
        to_code = rounding.symmetric(8) if codes.dtype == "I8" else rounding.affine(8)
    if layout.bits > 8 or not shape:
        return None
    grid = [1] * len(shape)
    if layout.axis is not None:
        grid[layout.axis] = shape[layout.axis]
    fills = steps.SIGNED[8] if codes.dtype == "I8" else (0x00, 0xFF)
    gaps = steps.even(layout.bits, fills=fills, clips=(True, True), least=zero.dtype == "F32")
    return rounding.on_grid(to_code, shape, tuple(grid), margin_db=rounding.COMPENSATED_DB, steps=gaps)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start * tensor.columns, stop * tensor.columns
    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    if layout.bits < 8:
        codes = packing.bit_stream(tensor.stored, first, last, layout.bits, device)
    else:
        codes = tensor.stored.load(first, last, device)
    values = codes.to(torch.float32).view(stop - start, tensor.columns)
    rows = torch.arange(start, stop, device=device)
    scale, zero = (_by_element(tensor, part, layout, rows) for part in ("scale", "zero_point"))
    return values.sub_(zero).mul_(scale)


def _by_element(tensor: LogicalTensor, part: str, layout: Layout, rows: torch.Tensor) -> torch.Tensor:
    """The factor of each element, ready to be broadcast over the rows."""
    import torch

    factors = tensor.part(part).load(device=str(rows.device)).to(torch.float32)
    if layout.axis is None:
        return factors
    if layout.axis == len(tensor.shape) - 1:
        return factors.view(1, -1)
    inner = prod(tensor.shape[layout.axis + 1 : -1])
    return factors[rows // inner % tensor.shape[layout.axis]].view(-1, 1)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a quantized tensor, or a module of torch.ao that keeps its weights packed."""
    if name:
        return _show(name, owner) if getattr(owner, "is_quantized", False) else None
    if not _is_quantized_module(owner):
        return None
    shown: dict[str, Any] = {}
    for weight, tensor in _weights(owner).items():
        shown |= _show(weight, tensor)
    return shown


def expose_graph(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show what FX folded into attributes of its graph module."""
    shown: dict[str, Any] = {}
    for attribute, packed in vars(owner).items():
        if type(packed).__name__ == "ScriptObject" and packed._has_method("unpack"):
            weight, bias = packed.unpack()[:2]
            shown |= _show(attribute, weight) | ({} if bias is None else {f"{attribute}_bias": bias})
    return shown or None


def _is_quantized_module(owner: Any) -> bool:
    paths = [cls.__module__ for cls in type(owner).__mro__ if cls.__module__.startswith("torch.ao.nn")]
    return any(".quantized" in path and ".reference" not in path for path in paths)


def _weights(owner: Any) -> dict[str, Any]:
    """The tensors of a module under the names of the float module."""
    if hasattr(owner, "get_weight"):  # recurrent layers
        return {**owner.get_weight(), **{name: bias for name, bias in owner.get_bias().items() if bias is not None}}
    found = {}
    for name in ("weight", "bias"):
        held = getattr(owner, name, None)
        tensor = held() if callable(held) and not hasattr(held, "dtype") else held
        if tensor is not None:
            found[name] = tensor
    return found


def _show(name: str, tensor: Any) -> dict[str, Any]:
    if not tensor.is_quantized:
        half = tensor.half()
        packed_as_half = (
            str(tensor.dtype) == "torch.float32" and name.startswith("weight") and half.float().equal(tensor)
        )
        return {name: half if packed_as_half else tensor}
    per_channel = "per_channel" in str(tensor.qscheme())
    if per_channel:
        scale, zero = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    else:
        scale, zero = _scalar(tensor.q_scale(), "float32"), _scalar(tensor.q_zero_point(), "int32")
    record = {
        "shape": list(tensor.shape),
        "bits": {"torch.quint4x2": 4, "torch.quint2x4": 2, "torch.qint32": 32}.get(str(tensor.dtype), 8),
        "axis": tensor.q_per_channel_axis() if per_channel else None,
    }
    return {
        name: tensor.int_repr(),
        f"{name}.scale": scale.float(),
        f"{name}.zero_point": zero if zero.dtype.is_floating_point else zero.int(),
        f"{name}.{RECORD}": json.dumps(record).encode(),
    }


def _scalar(value: float, dtype: str) -> torch.Tensor:
    import torch

    return torch.tensor(value, dtype=getattr(torch, dtype))


# The float classes that quantized ones are named like or derive from; `expose` tells them apart.
MODULES = ("Linear", "_ConvNd", "Embedding", "RNNBase", "RNNCellBase", "PReLU")

SCHEME = Scheme(
    name="torch-ao",
    title="torch.ao quantized modules (eager and FX)",
    variants=("torch-ao-int8", "torch-ao-int4", "torch-ao-int2", "torch-ao-int32"),
    claim=claim,
    anchors=(RECORD,),
    live={
        **{f"torch.{name}": expose for name in MODULES},
        "torch.Parameter": expose,
        "torch.Tensor": expose,
        "torch.GraphModule": expose_graph,
    },
    source="torch 2.13, torch/ao/nn/quantized",
    verified="torch 2.13.0",
)
