"""torch.ao, quantized by torch on the CPU: packed parameters that `parameters()` does not list."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tests.cases import Case, Made


def _holder(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layer = layer
    return model


def dynamic(layer, dtype=torch.qint8, weight: str = "weight"):
    """Quantized weights, float activations."""

    def make() -> Made:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(_holder(layer()), {type(layer())}, dtype=dtype)
        quantized = model.layer
        assert not list(quantized.parameters())
        made = quantized.weight() if weight == "weight" else quantized.get_weight()[weight]
        return Made(made.dequantize(), model)

    return make


def static(layer, example: tuple[int, ...]):
    """Quantized weights and activations, calibrated with one batch; weights have a scale for each channel."""

    def make() -> Made:
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(torch.ao.quantization.QuantStub(), layer()).eval()
            model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
            prepared = torch.ao.quantization.prepare(model)
            prepared(torch.randn(example))
            quantized = torch.ao.quantization.convert(prepared)[1]
        return Made(quantized.weight().dequantize(), _holder(quantized))

    return make


def embedding(kind: type, columns: int, *, four_bits: bool):
    def make() -> Made:
        torch.manual_seed(3)
        quantization = torch.ao.quantization
        four, eight = (
            quantization.float_qparams_weight_only_qconfig_4bit,
            quantization.float_qparams_weight_only_qconfig,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(kind(5, columns))
            model[0].qconfig = four if four_bits else eight
            quantized = quantization.convert(quantization.prepare(model))[0]
        return Made(quantized.weight().dequantize(), _holder(quantized), tolerance=1e-6)

    return make


def parameter() -> Made:
    """A quantized tensor that is a parameter of its own."""
    torch.manual_seed(4)
    weight = torch.quantize_per_channel(torch.randn(4, 6), torch.rand(6), torch.arange(6), 1, torch.quint8)
    model = _holder(nn.Module())
    model.layer.register_buffer("scale", torch.ones(()))
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return Made(weight.dequantize(), model)


def fx() -> Made:
    """FX folds a functional linear into an attribute of its graph module."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 6))

        def forward(self, values):
            return nn.functional.linear(values, self.matrix)

    torch.manual_seed(5)
    example = (torch.randn(2, 6),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(Functional().eval(), get_default_qconfig_mapping("fbgemm"), example)
        prepared(*example)
        model = convert_fx(prepared)
    return Made(model._packed_weight_0.unpack()[0].dequantize(), model)


CASES = [
    Case("torch-ao-dynamic-linear", dynamic(lambda: nn.Linear(33, 12)), "torch-ao-int8", (12, 33), total=12 * 33 + 12,
         bytes={"codes": 396, "scales": 4, "zero_points": 4}),
    Case("torch-ao-dynamic-linear-f16", dynamic(lambda: nn.Linear(33, 12), torch.float16), "plain", (12, 33),
         total=12 * 33 + 12, bytes={"unquantized": 792}),
    Case("torch-ao-dynamic-lstm", dynamic(lambda: nn.LSTM(6, 4, 2, bidirectional=True), weight="weight_ih_l1_reverse"),
         "torch-ao-int8", (16, 8), "layer.weight_ih_l1_reverse", total=2 * 16 * (6 + 4 + 2) + 2 * 16 * (8 + 4 + 2)),
    Case("torch-ao-dynamic-gru", dynamic(lambda: nn.GRU(6, 4), weight="weight_hh_l0"), "torch-ao-int8",
         (12, 4), "layer.weight_hh_l0", total=12 * 10 + 2 * 12),
    Case("torch-ao-dynamic-lstm-cell", dynamic(lambda: nn.LSTMCell(6, 4), weight="weight_ih"), "torch-ao-int8",
         (16, 6), "layer.weight_ih", total=16 * 12),
    Case("torch-ao-static-linear", static(lambda: nn.Linear(33, 12), (2, 33)), "torch-ao-int8", (12, 33),
         total=12 * 33 + 12, bytes={"codes": 396, "scales": 48, "zero_points": 48}),
    Case("torch-ao-static-conv", static(lambda: nn.Conv2d(3, 8, (3, 5), bias=False), (1, 3, 9, 9)), "torch-ao-int8",
         (8, 3, 3, 5), total=8 * 45),
    Case("torch-ao-static-conv1d", static(lambda: nn.Conv1d(3, 8, 5), (1, 3, 9)), "torch-ao-int8", (8, 3, 5),
         total=8 * 15 + 8),
    Case("torch-ao-embedding", embedding(nn.Embedding, 7, four_bits=False), "torch-ao-int8", (5, 7)),
    Case("torch-ao-embedding-bag", embedding(nn.EmbeddingBag, 6, four_bits=False), "torch-ao-int8", (5, 6)),
    Case("torch-ao-embedding-4-bits", embedding(nn.Embedding, 6, four_bits=True), "torch-ao-int4", (5, 6),
         bytes={"codes": 15}),
    Case("torch-ao-embedding-bag-4-bits", embedding(nn.EmbeddingBag, 8, four_bits=True), "torch-ao-int4", (5, 8)),
    Case("torch-ao-quantized-parameter", parameter, "torch-ao-int8", (4, 6)),
    Case("torch-ao-fx-packed-attribute", fx, "torch-ao-int8", (4, 6), "_packed_weight_0"),
]  # fmt: skip
