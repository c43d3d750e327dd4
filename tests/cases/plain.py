"""Plain numbers in every dtype that torch and safetensors share."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made


def of_dtype(dtype: torch.dtype):
    def make() -> Made:
        torch.manual_seed(1)
        weight = torch.randn(7, 12).to(dtype)
        model = nn.Module()
        model.layer = nn.Module()
        model.layer.weight = nn.Parameter(weight, requires_grad=False)
        return Made(weight.to(torch.float32), model, {"layer.weight": weight})

    return make


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def float4() -> Made:
    """torch counts pairs, safetensors counts values: the header says [6, 16] where torch says (6, 8)."""
    torch.manual_seed(2)
    raw = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack((table[(raw & 15).long()], table[(raw >> 4).long()]), dim=-1).view(6, 16)
    weight = raw.view(torch.float4_e2m1fn_x2)
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return Made(values, model, {"layer.weight": weight})


CASES = [
    *(Case(f"plain-{str(dtype).removeprefix('torch.')}", of_dtype(dtype), "plain", (7, 12)) for dtype in DTYPES),
    Case("plain-float4-pairs", float4, "plain", (6, 16), bytes={"unquantized": 48}),
]
