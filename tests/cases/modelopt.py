"""ModelOpt: what version 0.47 exported on the CPU (tests/golden/make_modelopt.py), experts and blocks by definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.cases import Case, Made

GOLDEN = Path(__file__).parent.parent / "golden" / "modelopt.safetensors"
CONFIG = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}
FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def golden(name: str, tolerance: float = 0.0):
    def make() -> Made:
        found = {key: tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
        values = found.pop(f"{name}.values")
        tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in found.items()}
        return Made(values, tensors=tensors, config=CONFIG, tolerance=tolerance)

    return make


def int4_by_hand() -> Made:
    """Two bytes hold four codes of two rows: 0x21 is 1 in the even row and 2 in the odd one, 0x8F is -1 and -8."""
    tensors = {
        "layer.weight": torch.tensor([[0x21, 0x8F]], dtype=torch.uint8),
        "layer.weight_scale": torch.tensor([[1.0], [0.5]]),
        "layer.pre_quant_scale": torch.tensor([1.0, 10.0]),
    }
    return Made(torch.tensor([[1.0, -10.0], [1.0, -40.0]]), tensors=tensors, config=CONFIG)


def nvfp4_by_hand() -> Made:
    """Codes 0..15 under a scale of 2 and a second scale of 4: eight times each value. Multiplying, not dividing."""
    tensors = {
        "layer.weight": torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8),
        "layer.weight_scale": torch.tensor([[2.0]]).to(FP8),
        "layer.weight_scale_2": torch.tensor(4.0),
    }
    return Made(8 * E2M1.view(1, 16), tensors=tensors)


def random_nvfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and what they stand for before the second scale, packed along the last axis."""
    torch.manual_seed(sum(shape))
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = torch.rand(*shape[:-1], shape[-1] // 16).to(FP8)
    values = torch.stack((E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]), -1).flatten(-2)
    return packed, scales, values * scales.float().repeat_interleave(16, -1)


def experts(second: torch.Tensor):
    def make() -> Made:
        packed, scales, values = random_nvfp4(3, 10, 48)
        tensors = {"layer.weight": packed, "layer.weight_scale": scales, "layer.weight_scale_2": second}
        return Made(values * second.view(-1, 1, 1), tensors=tensors, config=CONFIG)

    return make


def bmm_experts() -> Made:
    """Llama-4 and gpt-oss keep experts as [E, K, N]: the library packs along K and turns the result back."""
    packed, scales, values = random_nvfp4(3, 10, 48)
    tensors = {
        "experts.gate_up_proj": packed.transpose(1, 2),
        "experts.gate_up_proj_weight_scale": scales.transpose(1, 2),
        "experts.gate_up_proj_weight_scale_2": torch.tensor(0.5),
        "experts.gate_up_proj_input_scale": torch.tensor(2.0),
    }
    return Made(values.transpose(1, 2) * 0.5, tensors=tensors, config=CONFIG)


def fp8_experts(*scale_shape: int):
    def make() -> Made:
        torch.manual_seed(19)
        weight, scales = torch.randn(3, 6, 10).to(FP8), torch.rand(scale_shape)
        spread = scales.view(3, 1, -1) if scale_shape[1:] == (10,) else scales.view(3, -1, 1)
        tensors = {"experts.down_proj": weight, "experts.down_proj_weight_scale": scales}
        return Made(weight.float() * spread, tensors=tensors, config=CONFIG)

    return make


def fp8_block(rows: int, columns: int):
    def make() -> Made:
        torch.manual_seed(20)
        weight, scales = torch.randn(rows, columns).to(FP8), torch.rand(-(-rows // 128), -(-columns // 128))
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        tensors = {"layer.weight": weight, "layer.weight_scale": scales}
        return Made(weight.float() * spread, tensors=tensors, config=CONFIG)

    return make


def mixed_precision() -> Made:
    """One NVFP4 and one FP8 layer, one that is left alone, and the scales of the key-value cache."""
    low, high = golden("nvfp4")(), golden("fp8")()
    tensors = {name.replace("layer", "mlp.up"): tensor for name, tensor in low.tensors.items()} | high.tensors
    tensors |= {"lm_head.weight": torch.randn(5, 8), "self_attn.k_proj.k_scale": torch.tensor(0.5)}
    tensors["self_attn.v_proj.v_bias"] = torch.rand(16)
    layers = {"mlp.up": {"quant_algo": "NVFP4", "group_size": 16}, "layer": {"quant_algo": "FP8"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return Made(high.values, tensors=tensors, config={"quantization_config": config})


def compressed(rows: int, columns: int, **quantizer):
    """A Linear compressed in memory by the library, and what its own quantizer makes of it again."""

    def make() -> Made:
        pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
        import modelopt.torch.quantization as mtq

        torch.manual_seed(21)
        model = nn.Module()
        model.layer = nn.Linear(columns, rows, bias=False)
        original = model.layer.weight.detach().clone()
        config = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": quantizer, "enable": True},
        ]
        model = mtq.quantize(
            model, {"quant_cfg": config, "algorithm": "max"}, lambda m: m.layer(torch.randn(2, columns))
        )
        mtq.compress(model)
        values = model.layer.weight_quantizer(model.layer.weight).detach().float()
        assert (values - original).norm() < 0.2 * original.norm()
        return Made(values, model, tolerance=1e-7)

    return make


MX = {"scale_bits": (8, 0), "type": "dynamic"}
NV = {"scale_bits": (4, 3), "type": "dynamic"}

LIVE = [
    Case("modelopt-live-nvfp4", compressed(10, 96, num_bits=(2, 1), block_sizes={-1: 16} | NV), "modelopt-nvfp4",
         (10, 96), bytes={"codes": 480, "scales": 60 + 4}),
    Case("modelopt-live-mxfp4", compressed(10, 96, num_bits=(2, 1), block_sizes={-1: 32} | MX), "modelopt-mxfp4",
         (10, 96), bytes={"codes": 480, "scales": 30}),
    Case("modelopt-live-mxfp8", compressed(10, 96, num_bits=(4, 3), block_sizes={-1: 32} | MX), "modelopt-mxfp8",
         (10, 96), bytes={"codes": 960, "scales": 30}),
    Case("modelopt-live-fp8", compressed(10, 33, num_bits=(4, 3)), "modelopt-fp8", (10, 33)),
    Case("modelopt-live-fp8-row", compressed(10, 33, num_bits=(4, 3), axis=0), "modelopt-fp8", (10, 33)),
    Case("modelopt-live-fp8-block", compressed(192, 130, num_bits=(4, 3), block_sizes={-1: 128, -2: 128}),
         "modelopt-fp8", (192, 130)),
    Case("modelopt-live-int8", compressed(10, 33, num_bits=8, axis=0), "modelopt-int8", (10, 33)),
    Case("modelopt-live-int4", compressed(10, 96, num_bits=4, block_sizes={-1: 32, "type": "static"}),
         "modelopt-int4", (10, 96), bytes={"codes": 480, "scales": 120}),
]  # fmt: skip

CASES = [
    *LIVE,
    Case("modelopt-nvfp4-by-hand", nvfp4_by_hand, "modelopt-nvfp4", (1, 16), bytes={"codes": 8, "scales": 5}),
    Case("modelopt-nvfp4", golden("nvfp4", 1e-7), "modelopt-nvfp4", (4, 256), bytes={"codes": 512, "scales": 64 + 8}),
    Case("modelopt-w4a8-nvfp4-fp8", golden("w4a8-nvfp4", 1e-7), "modelopt-nvfp4", (4, 256),
         bytes={"codes": 512, "scales": 32 + 8}),
    Case("modelopt-mxfp4", golden("mxfp4"), "modelopt-mxfp4", (4, 256), bytes={"codes": 512, "scales": 32}),
    Case("modelopt-fp8", golden("fp8", 1e-7), "modelopt-fp8", (4, 256), bytes={"codes": 1024, "scales": 8}),
    Case("modelopt-fp8-row", golden("fp8-row", 1e-7), "modelopt-fp8", (4, 256), bytes={"scales": 16}),
    Case("modelopt-fp8-block-4d", golden("fp8-block", 1e-7), "modelopt-fp8", (4, 256), bytes={"scales": 8}),
    Case("modelopt-fp8-ragged-block", fp8_block(192, 130), "modelopt-fp8", (192, 130)),
    Case("modelopt-mxfp8", golden("mxfp8"), "modelopt-mxfp8", (4, 256), bytes={"codes": 1024, "scales": 32}),
    Case("modelopt-int8", golden("int8", 1e-7), "modelopt-int8", (4, 256), bytes={"codes": 1024, "scales": 16}),
    Case("modelopt-int8-smoothquant", golden("int8-smooth", 1e-6), "modelopt-int8", (4, 256)),
    Case("modelopt-int4-by-hand", int4_by_hand, "modelopt-int4", (2, 2), bytes={"codes": 2, "scales": 16}),
    Case("modelopt-int4-awq", golden("int4-awq", 1e-6), "modelopt-int4", (4, 256),
         bytes={"codes": 512, "scales": 32 + 1024}),
    Case("modelopt-w4a8-awq", golden("w4a8-awq", 1e-6), "modelopt-int4", (4, 256)),
    Case("modelopt-nvfp4-stack", experts(torch.tensor([2.0, 4.0, 8.0])), "modelopt-nvfp4", (3, 10, 48)),
    Case("modelopt-nvfp4-stack-one-scale", experts(torch.tensor(2.0)), "modelopt-nvfp4", (3, 10, 48)),
    Case("modelopt-nvfp4-bmm-experts", bmm_experts, "modelopt-nvfp4", (3, 48, 10), "experts.gate_up_proj"),
    Case("modelopt-fp8-stack-per-expert", fp8_experts(3), "modelopt-fp8", (3, 6, 10), "experts.down_proj"),
    Case("modelopt-fp8-stack-per-row", fp8_experts(3, 6), "modelopt-fp8", (3, 6, 10), "experts.down_proj"),
    Case("modelopt-fp8-stack-per-column", fp8_experts(3, 10), "modelopt-fp8", (3, 6, 10), "experts.down_proj"),
    Case("modelopt-mixed-precision", mixed_precision, "modelopt-fp8", (4, 256), total=2 * 1024 + 40),
]  # fmt: skip
