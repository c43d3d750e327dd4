"""Fine-grained FP8, by transformers' own modules and operations, and by DeepSeek's formula where those are wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Embedding,
    FP8Experts,
    FP8Linear,
    Fp8Quantize,
)

from tests.cases import Case, Made

FP8, E8M0, BF16, F32 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def config(method: str = "fp8", **settings) -> dict:
    return {"quantization_config": {"quant_method": method, "activation_scheme": "dynamic", **settings}}


def random_scales(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.exp2(torch.randint(-9, -4, shape).float()).to(dtype)


def dequant(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """DeepSeek-V3's `weight_dequant`, with a ragged last block: each scale is repeated, the rest cut off."""
    rows, columns = weight.shape[-2:]
    repeated = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * repeated[..., :rows, :columns]


def linear(rows: int, columns: int, block: tuple[int, int] | None, scale_fmt: str = "float", scheme: str = "dynamic"):
    torch.manual_seed(rows + columns)
    layer = FP8Linear(columns, rows, block, scheme, scale_fmt)
    layer.weight.data = torch.randn(rows, columns).to(FP8)
    layer.weight_scale_inv.data = random_scales(*layer.weight_scale_inv.shape, dtype=layer.weight_scale_inv.dtype)
    model = nn.Module()
    model.layer = layer
    return model


def by_block(rows: int, columns: int, scale_fmt: str = "float"):
    """The library's module; the library's decode where the blocks divide the weight."""

    def make() -> Made:
        model = linear(rows, columns, (128, 128), scale_fmt)
        weight, scales = model.layer.weight.data, model.layer.weight_scale_inv.data
        values = dequant(weight, scales, (128, 128))
        if rows % 128 == columns % 128 == 0:
            assert torch.equal(values, Fp8Dequantize(None)._dequantize_one(weight, scales, F32))
        return Made(values, model, model.state_dict(), config(weight_block_size=[128, 128]))

    return make


def silently_wrong_in_transformers() -> Made:
    """192 rows under blocks of 128: transformers takes 192 // 2 = 96 rows for a block."""
    made = by_block(192, 128)()
    layer = made.live.layer
    theirs = Fp8Dequantize(None)._dequantize_one(layer.weight.data, layer.weight_scale_inv.data, F32)
    wrong = (theirs != made.values).any(dim=1)
    assert 0 < wrong.sum() <= 32
    assert wrong[:96].sum() == wrong[128:].sum() == 0
    return made


def refused_by_transformers() -> Made:
    """The 576 rows of DeepSeek's `kv_a_proj_with_mqa` are four blocks and a half."""
    made = by_block(576, 384)()
    layer = made.live.layer
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        Fp8Dequantize(None)._dequantize_one(layer.weight.data, layer.weight_scale_inv.data, F32)
    return made


def quantized_by_transformers() -> Made:
    torch.manual_seed(8)
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(16, 32), scale_fmt="float"))
    weight = torch.randn(48, 96)
    tensors = Fp8Quantize(quantizer).convert({"layer.weight": weight})
    values = Fp8Dequantize(None)._dequantize_one(tensors["layer.weight"], tensors["layer.weight_scale_inv"], F32)
    assert (values - weight).abs().max() < 0.04 * weight.abs().max()
    return Made(values, tensors=tensors, config=config(weight_block_size=[16, 32]))


def by_hand() -> Made:
    """A weight of 3 x 5 under blocks of 2 x 4: the last blocks are one row high and one column wide."""
    weight = torch.tensor([[0x38, 0x40, 0x44, 0xB8, 0x38], [0x30, 0, 0x7E, 0xFE, 1], [0x38] * 5], dtype=torch.uint8)
    scales = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    values = [[2, 4, 6, -2, 3], [1, 0, 896, -896, 3 * 2**-9], [4, 4, 4, 4, 5]]
    tensors = {"layer.weight": weight.view(FP8), "layer.weight_scale_inv": scales}
    return Made(torch.tensor(values), tensors=tensors, config=config(weight_block_size=[2, 4]))


def per_tensor(name: str, shape: tuple[int, ...], scheme: str = "static"):
    def make() -> Made:
        model = linear(24, 40, None, scheme=scheme)
        scale = random_scales(*shape)
        model.layer.weight_scale_inv.data = scale
        tensors = {"layer.weight": model.layer.weight.data, f"layer.{name}": scale.clone()}
        tensors["layer.input_scale" if name == "weight_scale" else "layer.activation_scale"] = torch.tensor(0.5)
        settings = {"weight_block_size": None} if name == "weight_scale_inv" else {}
        return Made(model.layer.weight.data.float() * scale.item(), model, tensors, config(**settings))

    return make


def deepseek_v4() -> Made:
    """`.scale` instead of `.weight_scale_inv`, in E8M0."""
    made = by_block(130, 140, "ue8m0")()
    tensors = {"layer.weight": made.tensors["layer.weight"], "layer.scale": made.tensors["layer.weight_scale_inv"]}
    return Made(made.values, None, tensors, config(weight_block_size=[128, 128], scale_fmt="ue8m0"))


def default_block() -> Made:
    made = by_block(130, 260)()
    return Made(made.values, None, made.tensors, config())


def nested_config() -> Made:
    made = by_block(130, 260)()
    return Made(made.values, None, made.tensors, {"text_config": config(weight_block_size=[128, 128])})


def fp4_weight(dtype: torch.dtype, scale_dtype: torch.dtype, **settings):
    def make() -> Made:
        torch.manual_seed(9)
        packed = torch.randint(0, 256, (6, 48), dtype=torch.uint8)
        scales = random_scales(6, 3, dtype=scale_dtype)
        values = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), scales, F32)
        assert values[0, 1] == E2M1[int(packed[0, 0]) >> 4] * scales[0, 0].float()
        tensors = {"layer.weight": packed.view(dtype), "layer.scale": scales}
        return Made(values, tensors=tensors, config=config(weight_block_size=[128, 128]) | settings)

    return make


def experts(expert_dtype: str, intermediate: int, scale_fmt: str = "float", scheme: str = "dynamic", block=(128, 128)):
    """A fused stack as transformers holds it: the first projection is gate over up."""

    def make() -> Made:
        torch.manual_seed(10)
        sizes = SimpleNamespace(
            num_experts=3, hidden_size=160, intermediate_size=intermediate, hidden_act="silu", expert_dtype=expert_dtype
        )
        model = nn.Module()
        model.experts = FP8Experts(sizes, block, scheme, scale_fmt)
        for parameter in model.experts.parameters():
            shape, dtype = parameter.shape, parameter.dtype
            if dtype == torch.int8:
                parameter.data = torch.randint(-128, 128, shape, dtype=dtype)
            else:
                parameter.data = torch.randn(shape).to(dtype) if dtype == FP8 else random_scales(*shape, dtype=dtype)
        weight, scales = model.experts.gate_up_proj.data, model.experts.gate_up_proj_scale_inv.data
        if expert_dtype == "fp4":
            values = Fp8Dequantize(None)._dequantize_one(weight, scales, F32)
        elif block is None:
            values = dequant(weight, scales, (intermediate, 160))
        elif 2 * intermediate <= 128:  # one row of scales for each half
            values = dequant(weight, scales, (intermediate, 128))
        else:
            values = dequant(weight, scales, (128, 128))
        settings = config(weight_block_size=list(block) if block else None) | {"expert_dtype": expert_dtype}
        return Made(values, model, model.state_dict(), settings)

    return make


def embedding() -> Made:
    torch.manual_seed(11)
    model = nn.Module()
    model.layer = FP8Embedding(50, 24)
    model.layer.weight.data = torch.randn(50, 24).to(FP8)
    model.layer.weight_scale.data = torch.tensor([0.25])
    values = model.layer(torch.arange(50))
    settings = config(weight_block_size=[128, 128], modules_to_convert=["layer"])
    return Made(values.detach(), model, model.state_dict(), settings)


def mxfp8(scale_dtype: torch.dtype):
    def make() -> Made:
        torch.manual_seed(12)
        weight, scales = torch.randn(7, 96).to(FP8), random_scales(7, 3, dtype=E8M0)
        values = Fp8Dequantize(None)._dequantize_one(weight, scales.view(scale_dtype), F32)
        tensors = {"layer.weight": weight, "layer.weight_scale_inv": scales.view(scale_dtype)}
        return Made(values, tensors=tensors, config=config("mxfp8"))

    return make


def e5m2_with_bf16_scales() -> Made:
    torch.manual_seed(13)
    weight, scales = torch.randn(130, 70).to(torch.float8_e5m2), random_scales(2, 1, dtype=BF16)
    tensors = {"layer.weight": weight, "layer.weight_scale_inv": scales}
    return Made(dequant(weight, scales, (128, 128)), tensors=tensors, config=config(weight_block_size=[128, 128]))


def per_row() -> Made:
    torch.manual_seed(14)
    weight, scales = torch.randn(9, 33).to(FP8), random_scales(9, 1)
    tensors = {"layer.weight": weight, "layer.weight_scale": scales}
    return Made(weight.float() * scales, tensors=tensors, config=config(weight_block_size=None))


CASES = [
    Case("fp8-by-hand-3x5", by_hand, "fp8-block", (3, 5), bytes={"codes": 15, "scales": 16}),
    Case("fp8-256x384", by_block(256, 384), "fp8-block", (256, 384), bytes={"codes": 98304, "scales": 24}),
    Case("fp8-ragged-200x130", by_block(200, 130), "fp8-block", (200, 130), bytes={"codes": 26000, "scales": 16}),
    Case("fp8-192-rows-wrong-in-transformers", silently_wrong_in_transformers, "fp8-block", (192, 128)),
    Case("fp8-576-rows-refused-by-transformers", refused_by_transformers, "fp8-block", (576, 384)),
    Case("fp8-quantized-by-transformers", quantized_by_transformers, "fp8-block", (48, 96)),
    Case("fp8-ue8m0", by_block(200, 300, "ue8m0"), "fp8-block", (200, 300), bytes={"scales": 6}),
    Case("fp8-default-block-size", default_block, "fp8-block", (130, 260)),
    Case("fp8-config-in-text-config", nested_config, "fp8-block", (130, 260)),
    Case("fp8-deepseek-v4-scale", deepseek_v4, "fp8-block", (130, 140), bytes={"scales": 4}),
    Case("fp8-e5m2-bf16-scales", e5m2_with_bf16_scales, "fp8-block", (130, 70)),
    Case("fp8-per-tensor-static", per_tensor("weight_scale_inv", ()), "fp8-tensor", (24, 40), bytes={"scales": 8}),
    Case("fp8-per-tensor-autofp8", per_tensor("weight_scale", (1,)), "fp8-tensor", (24, 40), bytes={"scales": 8}),
    Case("fp8-per-row", per_row, "fp8-row", (9, 33)),
    Case("fp8-embedding", embedding, "fp8-tensor", (50, 24)),
    Case("fp8-fused-experts", experts("fp8", 200), "fp8-block", (3, 400, 160), "experts.gate_up_proj",
         total=3 * 160 * 200 * 3),
    Case("fp8-fused-experts-static", experts("fp8", 200, scheme="static"), "fp8-block", (3, 400, 160),
         "experts.gate_up_proj", total=3 * 160 * 200 * 3),
    Case("fp8-fused-experts-one-block-two-scales", experts("fp8", 48), "fp8-block", (3, 96, 160),
         "experts.gate_up_proj", total=3 * 160 * 48 * 3),
    Case("fp8-fused-experts-per-tensor-two-scales", experts("fp8", 48, block=None), "fp8-block", (3, 96, 160),
         "experts.gate_up_proj", total=3 * 160 * 48 * 3),
    Case("fp4-fused-experts", experts("fp4", 96, "ue8m0"), "fp8-e2m1", (3, 192, 160), "experts.gate_up_proj",
         total=3 * 160 * 96 * 3, bytes={"codes": 3 * 192 * 80, "scales": 3 * 192 * 5}),
    Case("fp4-int8-by-expert-dtype", fp4_weight(torch.int8, E8M0, expert_dtype="fp4"), "fp8-e2m1", (6, 96)),
    Case("fp4-int8-without-expert-dtype", fp4_weight(torch.int8, F32), "fp8-e2m1", (6, 96)),
    Case("fp4-float4-pairs", fp4_weight(torch.float4_e2m1fn_x2, E8M0), "fp8-e2m1", (6, 96)),
    Case("mxfp8-bytes", mxfp8(torch.uint8), "fp8-mx", (7, 96), bytes={"codes": 672, "scales": 21}),
    Case("mxfp8-e8m0", mxfp8(E8M0), "fp8-mx", (7, 96)),
]  # fmt: skip
