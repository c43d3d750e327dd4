"""Metal: transformers' own affine codes for Apple GPUs, in 32-bit words along each row.

    part     dtype   stored shape          packing
    weight   U32     [N, K * bits / 32]    lowest bits first; bits is 2, 4 or 8
    scales   float   [N, K / group]
    qbiases  float   [N, K / group]

Formula: w = code * scale + qbias.
Source: transformers 5.17, integrations/metal_quantization.py (`MetalLinear`, `_affine_dequantize_tensor`).

The shapes give bits * group only; the configuration (live: the layer) says which. A `MetalLinear` that is not quantized
yet holds plain numbers and empty scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "metal_linear"  # live only: bits and group_size
RECORD_LIMIT = 1 << 10
BITS = (2, 4, 8)
FLOORS_DB = {8: 39.0, 4: 16.5}


class Layout(NamedTuple):
    """Bits of a code, and how many share a scale."""

    bits: int
    group: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `qbiases` belong to, or `scales` where the configuration announces the method."""
    prefix, _, last = anchor.name.rpartition(".")
    name = joined(prefix, "weight")
    weight, scales, qbiases = (
        namespace.tensors.get(part) for part in (name, joined(prefix, "scales"), joined(prefix, "qbiases"))
    )
    announced = namespace.quantization.get("quant_method") == "metal"
    if last not in ("scales", "qbiases") or (qbiases is None and not announced):
        return None
    for part, stored in (("weight", weight), ("scales", scales), ("qbiases", qbiases)):
        if stored is None:
            raise FormatError(f"has no `{joined(prefix, part)}` beside it", tensor=anchor.name)
    assert weight is not None
    assert scales is not None
    assert qbiases is not None
    record = namespace.tensors.get(joined(prefix, RECORD))
    parts = [Part("weight", "codes", weight), Part("scales", "scales", scales), Part("qbiases", "zero_points", qbiases)]
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
        if weight.dtype != "U32":
            parts[0] = Part("weight", "unquantized", weight)
            return LogicalTensor(name, weight.shape, "plain", "parameter", tuple(parts), None)
    layout = _layout(record, namespace, name)
    _check(weight, scales, qbiases, layout)
    return LogicalTensor(
        name,
        (weight.shape[0], scales.shape[1] * layout.group),
        f"metal-{layout.bits}bit",
        "parameter",
        tuple(parts),
        decode,
        layout,
        block=layout.group,
        floor_db=FLOORS_DB.get(layout.bits) if layout.group <= 128 else None,
        rounding=rounding.grouped(
            rounding.from_least(layout.bits, scale=rounding.kept_in(scales)),
            layout.group,
            steps=steps.even(layout.bits, clips=(True, True), least=True),
        ),
    )


def _layout(record: StoredTensor | None, namespace: Namespace, name: str) -> Layout:
    settings: Mapping[str, Any] = namespace.quantization
    if record is not None:
        settings = strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
    if settings.get("quant_method", "metal") != "metal" or not settings:
        raise UnknownEncoding("has `qbiases`, and no configuration of method `metal` says its bits", tensor=name)
    bits, group = settings.get("bits", 4), settings.get("group_size", 64)
    if bits not in BITS or type(group) is not int or group < 1:
        raise FormatError(f"has {bits} bits in groups of {group} by its configuration ({BITS} bits)", tensor=name)
    return Layout(bits, group)


def _check(weight: StoredTensor, scales: StoredTensor, qbiases: StoredTensor, layout: Layout) -> None:
    if weight.dtype != "U32" or len(weight.shape) != 2:
        raise FormatError(f"{weight.dtype} {list(weight.shape)} is not U32 [N, words]", tensor=weight.name)
    rows, words = weight.shape
    columns = 32 * words // layout.bits
    for stored in (scales, qbiases):
        if stored.shape != (rows, columns // layout.group) or columns % layout.group:
            rule = f"{layout.bits} bits in groups of {layout.group}"
            raise FormatError(f"{list(stored.shape)} does not match {rows} x {columns} ({rule})", tensor=stored.name)
        if DTYPES[stored.dtype].kind != "float":
            raise FormatError(f"{stored.dtype} is not a float", tensor=stored.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device)).view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    return packing.biased_rows(tensor, slice(start, stop), layout.bits, layout.group, device, biases="qbiases")


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer with its bits and group size."""
    if name:
        return None
    record = {"bits": owner.bits, "group_size": owner.group_size}
    held = {part: owner._parameters[part] for part in ("weight", "scales", "qbiases")}
    return held | {RECORD: json.dumps(record).encode()}


SCHEME = Scheme(
    name="metal",
    title="Metal (transformers' affine codes for Apple GPUs)",
    variants=tuple(f"metal-{bits}bit" for bits in BITS),
    claim=claim,
    anchors=("qbiases", "scales"),
    methods=("metal",),
    live={"transformers.MetalLinear": expose},
    coders={decode: coded},
    source="transformers 5.17, integrations/metal_quantization.py",
    verified="transformers 5.17.0",
)
