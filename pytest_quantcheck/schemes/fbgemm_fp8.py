"""FBGEMM FP8: float8 weights with a scale per output, dense and as Llama-4 experts.

    part                dtype         stored shape  of
    weight              F8_E4M3       [N, K]        a linear layer
    weight_scale        F32, BF16     [N, 1]
    gate_up_proj        F8_E4M3       [E, H, 2I]    experts: outputs last
    gate_up_proj_scale  F32           [E, 1, 2I]
    down_proj           F8_E4M3       [E, I, H]
    down_proj_scale     F32           [E, H, 1]     one for each output, too, though it stands the other way round
    input_scale_ub      F32           [1]           upper bound of the activation's scale

Formula: w = code * scale of its output, in float32.
Source: transformers 5.17, integrations/fbgemm_fp8.py (`FbgemmFp8Quantize`, `FbgemmFp8Llama4TextExperts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

METHOD = "fbgemm_fp8"
EXPERTS = ("gate_up_proj", "down_proj")
LIVE = "fbgemm_fp8"  # marks a live module, whose configuration may be out of reach
FLOOR_DB = 30.5


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `weight_scale` or the scale of fused experts belongs to."""
    prefix, _, last = anchor.name.rpartition(".")
    lead = f"{prefix}." if prefix else ""
    mark = namespace.tensors.get(f"{lead}{LIVE}")
    if namespace.quantization.get("quant_method") != METHOD and mark is None:
        return None
    name = f"{lead}{last.removesuffix('_scale')}"
    weight = namespace.tensors.get(name)
    if last != "weight_scale" and last.removesuffix("_scale") not in EXPERTS:
        return None
    if weight is None:
        raise FormatError(f"has no weight `{name}` beside it", tensor=anchor.name)
    if len(weight.shape) < 2:
        raise FormatError(f"{list(weight.shape)} is no matrix, but has `{last}`", tensor=name)
    wanted = _scale_shape(weight, last)
    if weight.dtype != "F8_E4M3" or anchor.shape != wanted or anchor.dtype not in ("F32", "BF16", "F16"):
        rule = f"F8_E4M3 with float scales {list(wanted)}"
        found = f"{weight.dtype} {list(weight.shape)} with {anchor.dtype} scales {list(anchor.shape)}"
        what = f"{found} is not FBGEMM FP8 ({rule})"
        raise FormatError(what, tensor=name)
    parts = [Part("weight", "codes", weight), Part("weight_scale", "scales", anchor)]
    bound = namespace.tensors.get(f"{lead}input_scale_ub")
    if bound is not None and last in ("weight_scale", "gate_up_proj_scale"):
        parts.append(Part("input_scale_ub", "scales", bound))
    if mark is not None and last in ("weight_scale", "gate_up_proj_scale"):
        parts.append(Part("mark", "bookkeeping", mark))
    decoder = decode if last == "weight_scale" else decode_experts
    return LogicalTensor(
        name,
        weight.shape,
        "fbgemm-fp8",
        "parameter",
        tuple(parts),
        decoder,
        block=weight.shape[-1],
        floor_db=FLOOR_DB,
        rounding=rounding.placed_floats(
            "float8_e4m3fn", weight.shape, *_block(weight, last), steps=steps.floats("float8_e4m3fn")
        ),
    )


def _block(weight: StoredTensor, last: str) -> tuple[int, int]:
    """The rows and columns of one output: the experts of `gate_up_proj` have them last."""
    return (weight.shape[-2], 1) if last == "gate_up_proj_scale" else (1, weight.shape[-1])


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say why a float8 tensor of an FBGEMM checkpoint cannot be plain numbers."""
    if stored.dtype != "F8_E4M3":
        return None
    return f"{stored.dtype} {list(stored.shape)} has no `{stored.name}_scale` beside it"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of a linear layer as float32."""
    return packing.expand(coded(tensor, start, stop, device), tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` of a linear layer as codes."""
    import torch

    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    scales = tensor.part("weight_scale").load(start, stop, device).to(torch.float32)
    return Coded(codes, None, scales.view(-1, 1), tensor.columns)


def decode_experts(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of fused experts, whose outputs are columns, as float32."""
    rows = tensor.shape[-2]
    grid = packing.Grid(1, tensor.columns, rows, rows)
    scales = packing.grid_rows(tensor.part("weight_scale"), grid, slice(start, stop), device)
    codes = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    return packing.as_float32(codes).view(stop - start, tensor.columns).mul_(scales)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Mark a live module as FBGEMM FP8; before it is quantized its weight is plain."""
    weights = [owner._parameters.get(own) for own in ("weight", *EXPERTS)]
    return (
        {LIVE: b""} if any(str(getattr(weight, "dtype", "")).startswith("torch.float8") for weight in weights) else None
    )


def _scale_shape(weight: StoredTensor, scale: str) -> tuple[int, ...]:
    if scale == "weight_scale":
        return *weight.shape[:-1], 1
    *stack, _, outputs = weight.shape
    return (*stack, outputs, 1) if scale == "down_proj_scale" else (*stack, 1, outputs)


SCHEME = Scheme(
    name="fbgemm-fp8",
    title="FBGEMM FP8",
    variants=("fbgemm-fp8",),
    claim=claim,
    anchors=("weight_scale", "proj_scale"),
    methods=(METHOD,),
    live={"transformers.FbgemmFp8Linear": expose, "transformers.FbgemmFp8Llama4TextExperts": expose},
    refuse=refuse,
    coders={decode: coded},
    source="transformers 5.17.0, integrations/fbgemm_fp8.py",
    verified="transformers 5.17.0",
)
