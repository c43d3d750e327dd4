"""BitNet, packed by transformers and unpacked by its own layers."""

from __future__ import annotations

import os

import torch
from torch import nn

from tests.cases import Case, Made

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # `unpack_weights` is compiled at its first call


def _config(linear_class: str) -> dict:
    return {
        "quantization_config": {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    }


def _packed(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.integrations.bitnet import pack_weights

    torch.manual_seed(rows)
    ternary = torch.randint(-1, 2, (rows, columns)).float()
    return ternary, pack_weights(ternary.clone())


def _holder(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layer = layer
    return model


def bit_linear(*, bias: bool):
    """The layer divides by its scale; everything it has is a buffer."""

    def make() -> Made:
        from transformers.integrations.bitnet import BitLinear, unpack_weights

        ternary, packed = _packed(60, 33)
        layer = BitLinear(33, 60, bias=bias, dtype=torch.float32)
        layer.weight.copy_(packed)
        layer.weight_scale.fill_(3.25)
        assert torch.equal(unpack_weights(layer.weight, torch.float32), ternary)
        answer = layer.post_quant_process(ternary, layer.weight_scale, 1.0)  # its product with the identity
        return Made(answer, _holder(layer), _holder(layer).state_dict(), _config("bitlinear"))

    return make


def auto_bit_linear() -> Made:
    """The layer multiplies by its scale and unpacks while loading; the file stays packed."""
    from transformers.integrations.bitnet import AutoBitLinear

    _, packed = _packed(60, 33)
    layer = AutoBitLinear(33, 60, bias=False, dtype=torch.float32)
    file = {"weight": packed, "weight_scale": torch.tensor([0.75])}
    layer.load_state_dict(dict(file))
    values = layer.weight.data * layer.weight_scale
    return Made(values, _holder(layer), {f"layer.{key}": part for key, part in file.items()}, _config("autobitlinear"))


def auto_bit_linear_saved_again() -> Made:
    made = auto_bit_linear()
    return Made(made.values, made.live, made.live.state_dict(), _config("autobitlinear"))


def online() -> Made:
    """In training the layer holds plain numbers."""
    from transformers.integrations.bitnet import AutoBitLinear

    torch.manual_seed(3)
    layer = AutoBitLinear(9, 5, bias=False, online_quant=True)
    config = _config("autobitlinear")
    config["quantization_config"]["quantization_mode"] = "online"
    return Made(layer.weight.data.clone(), _holder(layer), _holder(layer).state_dict(), config)


def padded(*, bias: bool):
    """62 rows are packed as 64: the bias or the model's configuration says so."""

    def make() -> Made:
        ternary, packed = _packed(62, 12)
        name = "model.layers.0.mlp.up_proj"
        tensors = {f"{name}.weight": packed, f"{name}.weight_scale": torch.tensor([2.0])}
        config = _config("bitlinear")
        if bias:
            tensors[f"{name}.bias"] = torch.zeros(62)
        else:
            config |= {"hidden_size": 12, "intermediate_size": 62}
        return Made(ternary / 2, None, tensors, config)

    return make


def by_hand() -> Made:
    """The documentation's own example: the lowest bits of both bytes are row 0 and row 1 of the first column."""
    packed = torch.tensor([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], dtype=torch.uint8)
    ternary = torch.tensor([[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]])
    tensors = {"layer.weight": packed, "layer.weight_scale": torch.tensor([4.0], dtype=torch.bfloat16)}
    return Made(ternary / 4, None, tensors, _config("bitlinear"))


UP = "model.layers.0.mlp.up_proj.weight"
CASES = [
    Case("bitnet-by-hand", by_hand, "bitnet", (8, 2), bytes={"codes": 4, "scales": 2}),
    Case("bitnet-bitlinear-divides", bit_linear(bias=False), "bitnet", (60, 33), bytes={"codes": 15 * 33}),
    Case("bitnet-bias-in-a-buffer", bit_linear(bias=True), "bitnet", (60, 33), total=60 * 33 + 60),
    Case("bitnet-autobitlinear-multiplies", auto_bit_linear, "bitnet", (60, 33)),
    Case("bitnet-autobitlinear-saved-again", auto_bit_linear_saved_again, "bitnet", (60, 33),
         bytes={"codes": 4 * 60 * 33}),
    Case("bitnet-online-is-plain", online, "plain", (5, 9)),
    Case("bitnet-62-rows-by-bias", padded(bias=True), "bitnet", (62, 12), UP, total=62 * 12 + 62),
    Case("bitnet-62-rows-by-config", padded(bias=False), "bitnet", (62, 12), UP, bytes={"codes": 16 * 12}),
]  # fmt: skip
