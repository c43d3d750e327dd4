"""torchao `NF4Tensor`: NF4 codes in blocks whose absolute maxima are quantized once more. Live only.

    part                 dtype       stored shape                          packing
    quantized_data       U8          [numel / 2]                           flat, high nibble first
    quantized_scalers    I8          [numel / block_size]
    quantization_factor  the model's [blocks / scaler_block_size]
    scaler_mean          the model's []
    nf4                  the model's [16]                                  value of each code, rounded to 4 digits

Formula: w[i] = nf4[code[i]] * (quantized_scalers[b] / quantization_factor[b // scaler_block_size] + scaler_mean), with
b = i // block_size, over the row-major flat tensor.
Source: torchao 0.18, quantization/quantize_/workflows/nf4/nf4_tensor.py.

Departs from the library: it divides, adds and multiplies in the dtype of the model and rounds each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "quantized_data": "codes",
    "quantized_scalers": "scales",
    "quantization_factor": "scales",
    "scaler_mean": "scales",
    "nf4": "codebooks",
}
RECORD = "nf4_tensor"
LIMIT = 4 << 10


class Layout(NamedTuple):
    """Values of one block, and blocks of one outer block."""

    block: int
    outer: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `quantized_data` belongs to."""
    name = anchor.name.removesuffix(".quantized_data")
    record = namespace.tensors.get(f"{name}.{RECORD}")
    if name == anchor.name or record is None or record.role is None:
        return None
    stored = {part: namespace.tensors[f"{name}.{part}"] for part in PARTS}
    attributes = strict_json.parse_object(record.read(limit=LIMIT), limit=LIMIT)
    shape, layout = tuple(attributes["shape"]), Layout(attributes["block_size"], attributes["scaler_block_size"])
    _check(name, shape, layout, stored)
    parts = (
        *(Part(part, kind, stored[part]) for part, kind in PARTS.items()),
        Part(RECORD, "bookkeeping", record),
    )
    expected = rounding.flat(rounding.codebook(packing.NF4, scale="nested-int8"), layout.block, shape[-1])
    tensor = LogicalTensor(
        name, shape, "torchao-nf4", "parameter", parts, decode, layout, layout.block, floor_db=18.5, flat=True
    )
    return tensor._replace(rounding=expected)


def _check(name: str, shape: tuple[int, ...], layout: Layout, stored: Mapping[str, StoredTensor]) -> None:
    blocks = prod(shape) // layout.block
    wanted = {
        "quantized_data": prod(shape) // 2,
        "quantized_scalers": blocks,
        "quantization_factor": blocks // layout.outer,
        "nf4": 16,
    }
    for part, elements in wanted.items():
        if stored[part].elements != elements:
            what = f"has {stored[part].elements:,} values ({elements:,} for {list(shape)} in blocks of {layout.block})"
            raise FormatError(what, tensor=stored[part].name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    first, last = start * tensor.columns, stop * tensor.columns
    lead = first % layout.block
    values = packing.expand(_blocks(tensor, layout, first - lead, last, device)).view(-1)
    return values[lead : lead + last - first].view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where every row is full blocks."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if tensor.columns % layout.block:
        return None
    found = _blocks(tensor, layout, start * tensor.columns, stop * tensor.columns, device)
    return found._replace(scales=found.scales.view(stop - start, -1))


def _blocks(tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str) -> Coded:
    """The blocks from value `first`, where one starts, to the one that holds the last, as one row."""
    import torch

    low, high = first // layout.block, -(-last // layout.block)
    table = tensor.part("nf4").load(device=device).to(torch.float32)
    codes = tensor.stored.load(low * layout.block // 2, high * layout.block // 2, device)
    scales = _scales(tensor, layout, low, high, device).view(1, -1)
    return Coded(codes, packing.nibble_pairs(table, high_first=True), scales, layout.block)


def _scales(tensor: LogicalTensor, layout: Layout, low: int, high: int, device: str) -> torch.Tensor:
    import torch

    codes = tensor.part("quantized_scalers").load(low, high, device).to(torch.float32)
    factors = tensor.part("quantization_factor").load(device=device).to(torch.float32)
    outer = torch.arange(low, high, device=device) // layout.outer
    return codes.div_(factors[outer]).add_(tensor.part("scaler_mean").load(device=device).to(torch.float32))


def expose(owner: Any, name: str) -> Mapping[str, Any]:
    """Show a live `NF4Tensor` by its parts."""
    record = {
        "shape": list(owner.shape),
        "block_size": owner.block_size,
        "scaler_block_size": owner.scaler_block_size,
    }
    shown = {f"{name}.{part}": getattr(owner, part) for part in PARTS}
    return shown | {f"{name}.{RECORD}": json.dumps(record).encode()}


SCHEME = Scheme(
    name="torchao-nf4",
    title="torchao NF4Tensor (QLoRA)",
    variants=("torchao-nf4",),
    claim=claim,
    anchors=("quantized_data",),
    live={"torchao.NF4Tensor": expose},
    coders={decode: coded},
    source="torchao 0.18, nf4_tensor.py",
    verified="torchao 0.18.0",
)
