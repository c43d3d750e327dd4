"""EETQ: golden layers laid out by the library's host functions (tests/golden/make_eetq.py)."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from tests.cases import Case, Made

GOLDEN = Path(__file__).parents[1] / "golden" / "eetq.safetensors"
CONFIG = {"quantization_config": {"quant_method": "eetq", "weights": "int8"}}


def golden(name: str, *, bias: bool = False):
    def make() -> Made:
        from transformers.integrations.eetq import EetqLinear

        stored = safetensors.torch.load_file(GOLDEN)
        weight, scales, codes = (stored[f"{name}.{part}"] for part in ("weight", "weight_scales", "codes"))
        layer = EetqLinear(*weight.shape, bias=bias)
        layer.weight.data, layer.weight_scales.data = weight, scales
        model = nn.Module()
        model.layer = layer
        return Made(codes.t().float() * scales.float().view(-1, 1), model, model.state_dict(), CONFIG)

    return make


def in_buffers() -> Made:
    """EETQ's own layer of this name has no parameters."""
    made = golden("sm80")()
    kind = type("EetqLinear", (nn.Module,), {"__module__": "eetq.modules.qlinear"})
    model = nn.Module()
    model.layer = kind()
    for name in ("weight", "weight_scales"):
        model.layer.register_buffer(name, made.tensors[f"layer.{name}"])
    return Made(made.values, model)


def by_hand() -> Made:
    """Column k of output n holds k, and -k for odd outputs: where each byte lands is worked out one by one."""
    weight = torch.zeros(64 * 64, dtype=torch.int8)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    swapped = [0, 2, 1, 3]
    for output in range(64):
        for place in range(64):
            column = place // 16 * 16 + order[place % 16]
            at = output // 2 * 128 + output % 2 * 64 + place // 4 * 4 + swapped[place % 4]
            code = -column if output % 2 else column
            weight[at] = (code + 128 + 128) % 256 - 128
    values = torch.arange(64.0).repeat(64, 1)
    values[1::2] *= -1
    tensors = {"layer.weight": weight.view(64, 64), "layer.weight_scales": torch.ones(64, dtype=torch.float16)}
    return Made(values, None, tensors, CONFIG)


CASES = [
    Case("eetq-by-hand", by_hand, "eetq-int8", (64, 64), bytes={"codes": 4096, "scales": 128}),
    Case("eetq-sm80", golden("sm80"), "eetq-int8", (64, 128)),
    Case("eetq-sm75-bias", golden("sm75", bias=True), "eetq-int8", (64, 64), total=64 * 64 + 64),
    Case("eetq-in-buffers", in_buffers, "eetq-int8", (64, 128)),
]  # fmt: skip
