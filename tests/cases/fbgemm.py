"""FBGEMM FP8 in transformers' modules, quantized row by row as its GPU kernel does."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.cases import Case, Made

CONFIG = {"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8_per_row` of FBGEMM: the largest value of a row becomes 448."""
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def dense() -> Made:
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

    torch.manual_seed(22)
    model = nn.Module()
    model.layer = FbgemmFp8Linear(33, 10, bias=True)
    codes, scale = quantize(torch.randn(10, 33))
    model.layer.weight.data, model.layer.weight_scale.data = codes, scale
    tensors = model.state_dict() | {"layer.input_scale_ub": torch.tensor([1200.0])}
    return Made(codes.float() * scale, model, tensors, CONFIG)


def experts(projection: str):
    """Quantized as `FbgemmFp8Quantize` does: outputs are rows while their scales are found, and columns again after."""

    def make() -> Made:
        from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts

        torch.manual_seed(23)
        sizes = SimpleNamespace(num_local_experts=3, intermediate_size=10, hidden_size=12, hidden_act="silu")
        model = nn.Module()
        model.experts = FbgemmFp8Llama4TextExperts(sizes)
        decoded = {}
        for name in ("gate_up_proj", "down_proj"):
            held = getattr(model.experts, name)
            codes, scale = quantize(torch.randn(held.shape).transpose(1, 2))  # (E, outputs, inputs), (E, outputs, 1)
            held.data = codes.transpose(1, 2).contiguous()
            scales = getattr(model.experts, f"{name}_scale")
            scales.data = scale.reshape(scales.shape)
            decoded[name] = (codes.float() * scale).transpose(1, 2)
        return Made(decoded[projection], model, model.state_dict(), CONFIG)

    return make


TOTAL = 3 * (12 * 20 + 10 * 12)

CASES = [
    Case("fbgemm-linear", dense, "fbgemm-fp8", (10, 33), total=340, bytes={"codes": 330, "scales": 44}),
    Case("fbgemm-gate-up", experts("gate_up_proj"), "fbgemm-fp8", (3, 12, 20), "experts.gate_up_proj", total=TOTAL),
    Case("fbgemm-down", experts("down_proj"), "fbgemm-fp8", (3, 10, 12), "experts.down_proj", total=TOTAL,
         bytes={"codes": 360, "scales": 144}),
]  # fmt: skip
