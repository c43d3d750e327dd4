"""MXFP4 experts of gpt-oss, decoded by transformers; live before loading and after the swizzle."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations import mxfp4

from tests.cases import Case, Made

CONFIG = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 96


def random_experts(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(outputs + inputs)
    blocks = torch.randint(0, 256, (EXPERTS, outputs, inputs // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(115, 130, blocks.shape[:-1], dtype=torch.uint8)


def saved(outputs: int, inputs: int):
    def make() -> Made:
        blocks, scales = random_experts(outputs, inputs)
        tensors = {
            "experts.gate_up_proj_blocks": blocks,
            "experts.gate_up_proj_scales": scales,
            "experts.gate_up_proj_bias": torch.zeros(EXPERTS, outputs, dtype=torch.bfloat16),
        }
        values = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        return Made(values, tensors=tensors, config=CONFIG)

    return make


def by_hand() -> Made:
    """One expert, two outputs, 32 inputs: byte 0x21 is 0.5 then 1, so input 0 and input 1 of an output."""
    blocks, scales = torch.zeros(1, 2, 1, 16, dtype=torch.uint8), torch.tensor([[[127], [128]]], dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x21, 0xF7
    values = torch.zeros(1, 32, 2)
    values[0, 0, 0], values[0, 1, 0], values[0, 30, 1], values[0, 31, 1] = 0.5, 1, 12, -12
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    return Made(values, tensors=tensors, config=CONFIG)


def openai() -> Made:
    """OpenAI's own files: a dot instead of an underscore, and the model keeps outputs first."""
    made = saved(40, 64)()
    tensors = {
        "mlp.mlp1_weight.blocks": made.tensors["experts.gate_up_proj_blocks"],
        "mlp.mlp1_weight.scales": made.tensors["experts.gate_up_proj_scales"],
    }
    return Made(made.values.transpose(1, 2), tensors=tensors)


class StridedLayout:
    """As in `triton_kernels.tensor_details.layout`: values stay where they are, strides change."""

    name = None

    def __init__(self, shape):
        self.shape = shape

    def swizzle_data(self, values):
        return values


def stand_in_kernels(layout):
    """What transformers asks of the kernel package, which needs a GPU; the calls are its own."""

    def convert(tensor, kind, **options):
        tensor.storage = SimpleNamespace(data=kind(tensor.shape).swizzle_data(tensor.storage.data), layout=kind(()))
        return tensor

    def wrap(values, dtype=None):
        return SimpleNamespace(storage=SimpleNamespace(data=values, layout=StridedLayout(())), shape=values.shape)

    details = SimpleNamespace(
        StridedLayout=StridedLayout, make_default_matmul_mxfp4_w_layout=lambda mx_axis: (layout, {})
    )
    return SimpleNamespace(
        tensor=SimpleNamespace(FP4=None, convert_layout=convert, wrap_torch_tensor=wrap),
        tensor_details=SimpleNamespace(layout=details),
        matmul_ogs=SimpleNamespace(
            PrecisionConfig=SimpleNamespace, FlexCtx=SimpleNamespace, InFlexData=SimpleNamespace
        ),
    )  # fmt: skip


def experts_module() -> nn.Module:
    sizes = SimpleNamespace(num_local_experts=EXPERTS, intermediate_size=INTERMEDIATE, hidden_size=HIDDEN)
    model = nn.Module()
    model.experts = mxfp4.Mxfp4GptOssExperts(sizes)
    return model


def loaded(layout=StridedLayout) -> tuple[nn.Module, torch.Tensor]:
    model = experts_module()
    kernels, decoded = stand_in_kernels(layout), []
    for projection, outputs, inputs in (
        ("gate_up_proj", 2 * INTERMEDIATE, HIDDEN),
        ("down_proj", HIDDEN, INTERMEDIATE),
    ):
        blocks, scales = random_experts(outputs, inputs)
        mxfp4.swizzle_mxfp4_convertops(blocks, scales, model.experts, projection, "cpu", kernels)
        decoded.append(mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    return model, decoded


def live() -> Made:
    model, decoded = loaded()
    assert sum(parameter.numel() for parameter in model.parameters()) == EXPERTS * (2 * INTERMEDIATE + HIDDEN)
    return Made(decoded[1], model)


TOTAL = EXPERTS * (3 * INTERMEDIATE * HIDDEN + 2 * INTERMEDIATE + HIDDEN)

CASES = [
    Case("mxfp4-by-hand", by_hand, "mxfp4", (1, 32, 2), "experts.down_proj", bytes={"codes": 32, "scales": 2}),
    Case("mxfp4-experts", saved(40, 64), "mxfp4", (3, 64, 40), "experts.gate_up_proj", total=3 * 40 * 65,
         bytes={"codes": 3840, "scales": 240}),
    Case("mxfp4-openai", openai, "mxfp4", (3, 40, 64), "mlp.mlp1_weight"),
    Case("mxfp4-live-after-swizzle", live, "mxfp4", (3, 96, 64), "experts.down_proj", total=TOTAL,
         bytes={"codes": 3 * 96 * 32, "scales": 3 * 64 * 3}),
]  # fmt: skip
