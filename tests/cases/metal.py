"""Metal: quantized and decoded by transformers' own functions on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made


def layer(rows: int, columns: int, bits: int, group: int, *, dtype=torch.float32, bias: bool = False):
    def make() -> Made:
        from transformers.integrations.metal_quantization import (
            MetalLinear,
            _affine_dequantize_tensor,
            _affine_quantize_tensor,
        )

        torch.manual_seed(bits)
        linear = MetalLinear(columns, rows, bias=bias, bits=bits, group_size=group)
        codes, scales, biases = _affine_quantize_tensor(torch.randn(rows, columns), group, bits)
        linear.weight.data, linear.scales.data, linear.qbiases.data = codes, scales.to(dtype), biases.to(dtype)
        values = _affine_dequantize_tensor(linear.weight, linear.scales, linear.qbiases, group, bits)
        model = nn.Module()
        model.layer = linear
        config = {"quantization_config": {"quant_method": "metal", "bits": bits, "group_size": group}}
        return Made(values.detach(), model, model.state_dict(), config, tolerance=1e-7)

    return make


def by_hand() -> Made:
    """Sixteen two-bit codes of one word, lowest bits first: 0 1 2 3, four times."""
    tensors = {
        "layer.weight": torch.tensor([[0b11_10_01_00_11_10_01_00_11_10_01_00_11_10_01_00]], dtype=torch.uint32),
        "layer.scales": torch.tensor([[0.5, 1.0]]),
        "layer.qbiases": torch.tensor([[-1.0, 10.0]]),
    }
    values = torch.tensor([[-1.0, -0.5, 0.0, 0.5] * 2 + [10.0, 11.0, 12.0, 13.0] * 2])
    config = {"quantization_config": {"quant_method": "metal", "bits": 2, "group_size": 8}}
    return Made(values, None, tensors, config)


CASES = [
    Case("metal-by-hand", by_hand, "metal-2bit", (1, 16), bytes={"codes": 4, "scales": 8, "zero_points": 8}),
    Case("metal-2bit", layer(7, 96, 2, 32), "metal-2bit", (7, 96), bytes={"codes": 7 * 24, "scales": 7 * 12}),
    Case("metal-4bit-bf16", layer(7, 192, 4, 64, dtype=torch.bfloat16), "metal-4bit", (7, 192)),
    Case("metal-8bit-bias", layer(5, 48, 8, 16, bias=True), "metal-8bit", (5, 48), total=5 * 48 + 5),
]  # fmt: skip
