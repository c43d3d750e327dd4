"""BitNet b1.58: ternary codes, four to a byte, the four from quarters of the matrix that lie far apart.

    part          dtype   stored shape    packing
    weight        U8      [R, K]          R = ceil(N / 4); row n is bits 2 * (n // R) of byte row n % R, code = t + 1
    weight_scale  float   [1]

    weight        float   [N, K]          unpacked t, which `AutoBitLinear` holds live and saves again
    weight_scale  float   [1]

Formula: w = t / weight_scale for `BitLinear`, w = t * weight_scale for `AutoBitLinear`: the `linear_class` of the
configuration decides, the bytes do not.
Source: transformers 5.17, integrations/bitnet.py (`pack_weights`, `unpack_weights`, `BitLinear`, `AutoBitLinear`).

`pack_weights` pads N to a multiple of four, and a file does not say from where: the bias says it, or the model's
configuration. Where neither does, N is 4 * R, which is all that transformers can load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import architecture
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "bitnet_linear"  # live only: the class and its sizes
RECORD_LIMIT = 1 << 10
CLASSES = ("bitlinear", "autobitlinear")


class Layout(NamedTuple):
    """Which way the scale goes, and whether four codes share a byte."""

    divides: bool
    packed: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight beside a `weight_scale`, where the configuration or the live class says BitNet."""
    prefix, _, last = anchor.name.rpartition(".")
    name = joined(prefix, "weight")
    record = namespace.tensors.get(joined(prefix, RECORD))
    if last != "weight_scale" or (record is None and namespace.quantization.get("quant_method") != "bitnet"):
        return None
    weight = namespace.tensors.get(name)
    if weight is None:
        raise FormatError(f"has no weight `{name}` beside it", tensor=anchor.name)
    if anchor.elements != 1 or DTYPES[anchor.dtype].kind != "float":
        raise FormatError(f"{anchor.dtype} {list(anchor.shape)} is not one scale", tensor=anchor.name)
    live = strict_json.parse_object(record.read(limit=RECORD_LIMIT), limit=RECORD_LIMIT) if record else {}
    layout = Layout(_class(live, namespace, name) == "bitlinear", weight.dtype == "U8")
    parts = [Part("weight", "codes", weight), Part("weight_scale", "scales", anchor)]
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
    shape = _shape(weight, live, namespace)
    return LogicalTensor(name, shape, "bitnet", "parameter", tuple(parts), decode, layout, floor_db=None)


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say what a packed weight of a BitNet checkpoint lacks."""
    if stored.dtype != "U8" or not stored.name.endswith(".weight"):
        return None
    return f"{stored.dtype} {list(stored.shape)} is packed ternary, but has no `{stored.name}_scale`"


def _class(live: Mapping[str, Any], namespace: Namespace, name: str) -> str:
    kind = live.get("linear_class") or namespace.quantization.get("linear_class", "bitlinear")
    if kind not in CLASSES:
        raise FormatError(f"linear_class `{kind}` is neither `bitlinear` nor `autobitlinear`", tensor=name)
    return str(kind)


def _shape(weight: StoredTensor, live: Mapping[str, Any], namespace: Namespace) -> tuple[int, ...]:
    if len(weight.shape) != 2 or (weight.dtype != "U8" and DTYPES[weight.dtype].kind != "float"):
        rule = "U8 [ceil(N / 4), K], or the codes as floats"
        raise FormatError(f"{weight.dtype} {list(weight.shape)} is no BitNet weight ({rule})", tensor=weight.name)
    if weight.dtype != "U8":
        return weight.shape
    packed, columns = weight.shape
    rows = live["out_features"] if live else _rows(weight, namespace)
    if -(-rows // 4) != packed:
        raise FormatError(f"has {packed:,} rows of four codes for {rows:,} outputs", tensor=weight.name)
    return rows, columns


def _rows(weight: StoredTensor, namespace: Namespace) -> int:
    """N, which lies within three of four times the stored rows."""
    packed, columns = weight.shape
    bias = namespace.tensors.get(weight.name.removesuffix("weight") + "bias")
    if bias is not None:
        return bias.elements
    shape = architecture.fitting_shape(
        weight.name, namespace.config, lambda rows, width: width == columns and -(-rows // 4) == packed
    )
    return shape[0] if shape else 4 * packed


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    scale = tensor.part("weight_scale").load(device=device).float().view(())
    ternary = _unpack(tensor, start, stop, device) if layout.packed else _load(tensor, start, stop, device).float()
    return ternary / scale if layout.divides else ternary * scale  # not in place: live codes are the model's own


def _unpack(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Rows of t: a window may cross from one quarter of the matrix into the next."""
    import torch

    packed = tensor.stored.shape[0]
    values = torch.empty(stop - start, tensor.columns, device=device)
    row = start
    while row < stop:
        quarter, first = divmod(row, packed)
        count = min(stop - row, packed - first)
        bytes_ = _load(tensor, first, first + count, device)
        values[row - start : row - start + count] = (bytes_ >> 2 * quarter & 3).float() - 1
        row += count
    return values


def _load(tensor: LogicalTensor, first: int, last: int, device: str) -> torch.Tensor:
    return tensor.stored.load(first * tensor.columns, last * tensor.columns, device).view(last - first, tensor.columns)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a BitNet layer with its class; `AutoBitLinear` that quantizes while training holds plain numbers."""
    held = {**owner._parameters, **owner._buffers}
    if name or held.get("weight_scale") is None:
        return None
    record = {"linear_class": type(owner).__name__.lower(), "out_features": owner.out_features}
    shown = {part: held[part] for part in ("weight", "bias") if held.get(part) is not None}
    return shown | {"weight_scale": held["weight_scale"], RECORD: json.dumps(record).encode()}


SCHEME = Scheme(
    name="bitnet",
    title="BitNet b1.58 (ternary)",
    variants=("bitnet",),
    claim=claim,
    anchors=("weight_scale",),
    methods=("bitnet",),
    live={"transformers.BitLinear": expose, "transformers.AutoBitLinear": expose},
    refuse=refuse,
    source="transformers 5.17, integrations/bitnet.py",
    verified="transformers 5.17.0",
)
