"""Scales of activations and of the key-value cache that stand on their own, beside no encoded weight.

    part                                       dtype            stored shape
    k_scale, v_scale, q_scale, kv_scale        F32, BF16, F16   [], [1], [heads, 1, 1]
    input_scale, output_scale, ..._zero_point  F32, BF16, I8    [], [1]
    k_proj.k_bias, v_proj.v_bias               F32, BF16        ModelOpt, affine cache: an offset of each channel

They are no parameters of the unquantized model: listed as buffers, weighed as scales. Only in a checkpoint that
declares a quantization: a model may have a parameter of such a name.
Source: compressed-tensors 0.20.0, quantization/lifecycle/initialize.py; nvidia-modelopt 0.47.0, torch/export/;
transformers 5.17, quantizers/.
"""

from __future__ import annotations

from math import prod

from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

OF = ("k", "v", "q", "kv", "k_cache", "v_cache", "prob", "prob_output", "input", "output", "activation", "act")
KINDS = ("scale", "zero_point", "global_scale", "scale_ub")
NAMES = frozenset(f"{of}_{kind}" for of in OF for kind in KINDS)
CACHE_BIASES = ("k_proj.k_bias", "v_proj.v_bias")  # elsewhere a `v_bias` is a parameter
LIMIT = 1 << 16  # values: one for each head, at most


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the scale as a buffer of its own, or None where it could be a parameter."""
    known = anchor.name.rpartition(".")[2] in NAMES or anchor.name.endswith(CACHE_BIASES)
    if not known or not namespace.quantization or prod(anchor.shape) > LIMIT:
        return None
    parts = (Part("scale", "scales", anchor),)
    return LogicalTensor(anchor.name, anchor.shape, "activation-scale", "buffer", parts, packing.decode_floats)


SCHEME = Scheme(
    name="activation-scales",
    title="Scales of activations and of the key-value cache",
    variants=("activation-scale",),
    claim=claim,
    anchors=("_scale", "_zero_point", "_scale_ub", "k_bias", "v_bias"),
    source="compressed-tensors 0.20.0; nvidia-modelopt 0.47.0",
    verified="compressed-tensors 0.20.0",
)
