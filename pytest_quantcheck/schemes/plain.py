"""Plain numbers: every safetensors dtype, F8, F6 and F4 included. The last scheme, so what reaches it is left over.

    part    dtype   stored shape     packing
    weight  any     logical shape    none; F4 and F6 are bit streams, lowest bits first

Formula: the value itself. A header shape of F4 or F6 counts values; torch's `float4_e2m1fn_x2` counts pairs.
Source: safetensors 0.8 (tensor.rs); OCP Microscaling Formats 1.0 for the small floats.

An integer tensor is not a weight in any model, so one that no scheme claimed is an encoding we do not know: an error,
never a count. So is a name that only encoded weights have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import NotDecodable, UnknownEncoding
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Role, StoredTensor

if TYPE_CHECKING:
    import torch

# Last components that models use for buffers, which a file cannot tell from parameters.
BUFFERS = frozenset(
    {
        "position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "cos_cached", "sin_cached",
        "running_mean", "running_var", "num_batches_tracked", "masked_bias", "causal_mask", "attn_mask",
        "relative_position_index", "relative_coords_table", "embed_positions", "mel_filters", "window",
        "e_score_correction_bias",
    }
)  # fmt: skip

# The models of transformers 5.17 that declare one of these names as a parameter.
DECLARED = {"e_score_correction_bias": frozenset({"ernie4_5_moe", "ernie4_5_vl_moe", "laguna"})}

# Last components that only parts of encoded weights have.
PARTS = frozenset(
    {
        "qweight", "qzeros", "g_idx", "W_q", "codebooks", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
        "SCB", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_scales", "weight_zero_point",
        "weight_packed", "weight_shape", "weight_global_scale", "weight_g_idx", "dense_weights", "row_offsets",
        "col_vals", "qbiases", "scaled_zeros", "trellis", "quantized_weight_values", "embedding_quantized",
        "scales_and_zeros", "q_weight", "weight_quantizer",
        "q_scale", "q_scale_max", "q_invperm", "q_groups", "suh", "svh", "s_channel", "s_group",
        "scale_packed", "bitmask", "compressed",
        "quantized_weight_scale_factors", "quantized_weight_amax", "quantized_weight_metadata", "weight_sf",
        "weight_sf_rowmajor", "pre_quant_scale", "dqweight", "forward_hadamard_matrix", "backward_hadamard_matrix",
        "svdquant_lora_a", "svdquant_lora_b", "weight_zp",
    }
)  # fmt: skip
PART_ENDINGS = (
    "_blocks", "_qdata", "_scale_inv", "._data", "._scale", "._shift", ".weight_format",
    "._weight_scale", "._weight_zero_point", "_scale_and_zero", "_per_tensor_scale", "_act_pre_scale",
    ".meta.scale", ".meta.scale2", ".meta.zero", ".meta.scale.x", ".meta.zero.x",
)  # fmt: skip

# SQNR of a healthy cast of bf16 and fp16 is 55.6 and 73.7 dB; an 8-bit float without a scale loses more.
FLOORS_DB = {
    "F64": 120.0, "F32": 120.0, "F16": 50.0, "BF16": 50.0,
    "F8_E4M3": 26.0, "F8_E4M3FNUZ": 26.0, "F8_E5M2": 24.0, "F8_E5M2FNUZ": 24.0,
}  # fmt: skip


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor as its own logical tensor, or raise `UnknownEncoding` where it cannot be plain numbers."""
    role = _role(stored, namespace)
    kind: ByteClass = "buffers" if role == "buffer" else "unquantized"
    return LogicalTensor(
        stored.name,
        stored.shape,
        "plain",
        role,
        (Part("weight", kind, stored, stored.surplus),),
        decode,
        floor_db=FLOORS_DB.get(stored.dtype),
        cells=cells if stored.dtype in packing.FLOATS else None,
    )


def _role(stored: StoredTensor, namespace: Namespace) -> Role:
    last = stored.name.rpartition(".")[2]
    if last in PARTS or stored.name.endswith(PART_ENDINGS):
        raise UnknownEncoding(
            f"{stored.dtype} {list(stored.shape)} is part of an encoded weight that no scheme claims",
            tensor=stored.name,
        )
    if stored.role is not None:
        return _role_of_live(stored)
    declared = namespace.config.get("model_type") in DECLARED.get(last, ())
    if (last in BUFFERS and not declared) or _is_gpt2_mask(stored, last):
        return "buffer"
    kind = DTYPES[stored.dtype].kind
    if kind == "bool" or stored.dtype == "I64" or (kind == "int" and not stored.shape):
        return "buffer"  # masks, position tables, counters
    _refuse_integers(stored)
    return "parameter"


def _role_of_live(stored: StoredTensor) -> Role:
    if stored.role in ("parameter", "adapter") and DTYPES[stored.dtype].kind == "int":
        _refuse_integers(stored)
    return stored.role or "parameter"


def _refuse_integers(stored: StoredTensor) -> None:
    if DTYPES[stored.dtype].kind == "int":
        raise UnknownEncoding(
            f"{stored.dtype} {list(stored.shape)} is an encoding that no scheme claims "
            "(its scales or its quantization state are missing, or the method is unknown)",
            tensor=stored.name,
        )


def _is_gpt2_mask(stored: StoredTensor, last: str) -> bool:
    """GPT-2 saved its causal mask as `attn.bias` (1, 1, n, n)."""
    return (
        last == "bias" and len(stored.shape) == 4 and stored.shape[:2] == (1, 1) and stored.shape[2] == stored.shape[3]
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    stored = tensor.stored
    first, last = start * tensor.columns, stop * tensor.columns
    if stored.dtype in _SMALL_FLOATS:
        bits = DTYPES[stored.dtype].bits
        table = torch.tensor(_SMALL_FLOATS[stored.dtype], device=device)
        values = table[packing.bit_stream(stored, first, last, bits, device)]
    elif DTYPES[stored.dtype].kind == "complex":
        raise NotDecodable("complex values have no float32 form", tensor=tensor.name)
    else:
        return packing.decode_floats(tensor, start, stop, device)
    return values.view(stop - start, tensor.columns)


def cells(tensor: LogicalTensor, row: int, start: int, stop: int) -> list[float]:
    """Return columns `start` up to `stop` of a row, without torch."""
    first = row * tensor.columns
    return packing.floats(tensor.stored, first + start, first + stop)


_SMALL_FLOATS = {
    "F4": packing.E2M1,
    "F6_E2M3": packing.small_float_table(2, 3),
    "F6_E3M2": packing.small_float_table(3, 2),
}

SCHEME = Scheme(
    name="plain",
    title="Plain numbers",
    variants=("plain",),
    claim=claim,
    source="safetensors 0.8, tensor.rs; OCP Microscaling Formats 1.0",
    verified="safetensors 0.8.0, torch 2.13",
)
