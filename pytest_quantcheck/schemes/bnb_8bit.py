"""bitsandbytes 8-bit: LLM.int8, one scale per output row.

    part           dtype  stored shape  packing
    weight         I8     [N, K]        none
    SCB            F32    [N]           the absolute maximum of each row
    weight_format  U8     []            0: rows (bookkeeping)

Formula: w[n, k] = weight[n, k] * SCB[n] * 7.874015718698502e-3, in float32, in this order (the constant is 1/127).
Source: bitsandbytes 0.50.2, functional.py `int8_vectorwise_dequant`, nn/modules.py `Linear8bitLt`.

`SCB` lives on the parameter until the first forward, and on `module.state` from then on. With `has_fp16_weights` the
weight is never quantized and passes as plain numbers. Outlier columns are chosen at run time; none are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Reading, Scheme, joined
from pytest_quantcheck.tensor import Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

ONE_OVER_127 = 7.874015718698502e-3
FLOOR_DB = 28.0


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that an `SCB` (or, live, a `weight_format` without one) belongs to."""
    prefix, _, last = anchor.name.rpartition(".")
    scale_name, weight_name = joined(prefix, "SCB"), joined(prefix, "weight")
    weight, scale = namespace.tensors.get(weight_name), namespace.tensors.get(scale_name)
    if weight is None:
        raise FormatError(f"`{last}` has no `{weight_name}` beside it", tensor=anchor.name)
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise FormatError(f"{weight.dtype} {list(weight.shape)} is not int8 [N, K], but has `SCB`", tensor=weight_name)
    if scale is None and anchor.role is None:
        raise FormatError(f"has no `{scale_name}`: its scale is missing", tensor=weight_name)
    if scale is not None and (scale.dtype != "F32" or scale.elements != weight.shape[0]):
        rule = f"{scale.dtype} {list(scale.shape)} is not one float32 scale for each of {weight.shape[0]:,} rows"
        raise FormatError(rule, tensor=scale_name)
    parts = [Part("weight", "codes", weight)]
    if scale is not None:
        parts.append(Part("SCB", "scales", scale))
    layout = namespace.tensors.get(joined(prefix, "weight_format"))
    if layout is not None:
        parts.append(Part("weight_format", "bookkeeping", layout))
    return LogicalTensor(
        weight_name,
        weight.shape,
        "bnb-int8",
        "parameter",
        tuple(parts),
        decode,
        block=weight.shape[1],
        floor_db=FLOOR_DB,
        rounding=rounding.grouped(
            rounding.symmetric(8, reach=127), weight.shape[1], steps=steps.even(8, fills=steps.SIGNED[8])
        ),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    return packing.expand(coded(tensor, start, stop, device), tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    if not tensor.has("SCB"):
        raise NotDecodable("its parameter lost `SCB` and its module has none: the scale is gone", tensor=tensor.name)
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    scale = tensor.part("SCB").load(start, stop, device)  # (rows,)
    return Coded(codes, None, scale.view(-1, 1), tensor.columns, factor=ONE_OVER_127)


def alternatives(tensor: LogicalTensor) -> Iterator[Reading]:
    """Yield a square weight with a scale for each column, which no shape tells from one for each row."""
    if tensor.has("SCB") and tensor.shape[0] == tensor.shape[1]:
        other = tensor._replace(decoder=_decode_by_column)
        yield Reading("scale-axis", "`SCB` along the columns", other, "the weight was quantized along the other axis")


def _decode_by_column(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    import torch

    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    values = codes.to(torch.float32).view(stop - start, tensor.columns)
    return values.mul_(tensor.part("SCB").load(device=device)).mul_(ONE_OVER_127)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show an int8 module or parameter with its scale, wherever that is now."""
    if name not in ("", "weight"):
        return None
    weight = owner if name else owner._parameters.get("weight")
    if weight is None or str(weight.dtype) != "torch.int8":
        return None
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(owner, "state", None), "SCB", None)
    return {"weight": weight, "weight_format": b""} | ({} if scale is None else {"SCB": scale})


SCHEME = Scheme(
    name="bnb-8bit",
    title="bitsandbytes 8-bit (LLM.int8)",
    variants=("bnb-int8",),
    claim=claim,
    anchors=("SCB", "weight_format"),
    methods=("bitsandbytes", "bitsandbytes_8bit"),
    live={
        "bitsandbytes.Linear8bitLt": expose,
        "bitsandbytes.Embedding8bit": expose,
        "bitsandbytes.Int8Params": expose,
    },
    alternatives=alternatives,
    coders={decode: coded},
    source="bitsandbytes 0.50.2, functional.py and nn/modules.py",
    verified="bitsandbytes 0.50.2",
)
