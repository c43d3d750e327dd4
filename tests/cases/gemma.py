"""Gemma's quantized layers of transformers, decoded by their own methods on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made


def _config(bits: int, **more) -> dict:
    return {"quantization_config": {"quant_method": "gemma", "num_bits": bits, "quantize_embeddings": True} | more}


def _fill(codes: torch.Tensor, scale: torch.Tensor) -> None:
    low, high = (-128, 128) if codes.dtype == torch.int8 else (0, 256)
    with torch.no_grad():
        codes.copy_(torch.randint(low, high, codes.shape))
        scale.uniform_(0.5, 2)


def linear(rows: int, columns: int, bits: int, config: dict, *, bias: bool = False):
    def make() -> Made:
        from transformers.integrations.gemma_quant import QuantizedLinear

        torch.manual_seed(columns)
        layer = QuantizedLinear(columns, rows, bias=bias, num_bits=bits)
        _fill(layer.weight, layer.weight_scale)
        model = nn.Module()
        model.layer = layer
        return Made(layer._dequantize_weights().detach(), model, model.state_dict(), config)

    return make


def embedding(rows: int, columns: int, bits: int, blocks: int, config: dict):
    def make() -> Made:
        from transformers.integrations.gemma_quant import QuantizedEmbedding

        torch.manual_seed(columns)
        layer = QuantizedEmbedding(rows, columns, torch.float32, embed_scale=8.0, num_bits=bits)
        layer.embedding_scale = nn.Parameter(torch.ones(rows, blocks))
        _fill(layer.embedding_quantized, layer.embedding_scale)
        model = nn.Module()
        model.layer = layer
        return Made(layer.weight.detach(), model, model.state_dict(), config)

    return make


def by_hand() -> Made:
    """Four two-bit codes of one byte, lowest bits first: 3 2 1 0 less 2."""
    tensors = {
        "layer.weight": torch.tensor([[0b00_01_10_11]], dtype=torch.uint8),
        "layer.weight_scale": torch.tensor([[0.5]]),
        "layer.input_activation_scale": torch.tensor(0.25),
    }
    return Made(torch.tensor([[0.5, 0.0, -0.5, -1.0]]), None, tensors, _config(2))


PATTERNS = {r"lay.r$": {"num_bits": 2}, "layer": {"num_bits": 8}}  # the first found decides
CASES = [
    Case("gemma-by-hand", by_hand, "gemma-int2", (1, 4), bytes={"codes": 1, "scales": 4, "bookkeeping": 4}),
    Case("gemma-int4", linear(6, 34, 4, _config(4)), "gemma-int4", (6, 34),
         bytes={"codes": 6 * 17, "scales": 24, "bookkeeping": 8}),
    Case("gemma-int4-33-columns-by-config", linear(6, 33, 4, _config(4) | {"hidden_size": 33}), "gemma-int4", (6, 33)),
    Case("gemma-int2-bias", linear(6, 36, 2, _config(2), bias=True), "gemma-int2", (6, 36), total=6 * 36 + 6),
    Case("gemma-int2-35-columns-by-config", linear(6, 35, 2, _config(2) | {"text_config": {"hidden_size": 35}}),
         "gemma-int2", (6, 35)),
    Case("gemma-int8", linear(6, 35, 8, _config(8)), "gemma-int8", (6, 35)),
    Case("gemma-int2-by-pattern", linear(6, 36, 2, _config(4, module_quant_configs=PATTERNS)), "gemma-int2", (6, 36)),
    Case("gemma-embedding-int4", embedding(10, 48, 4, 1, _config(4)), "gemma-int4", (10, 48)),
    Case("gemma-embedding-int2-in-blocks", embedding(10, 48, 2, 3, _config(2)), "gemma-int2", (10, 48)),
    Case("gemma-embedding-int8", embedding(10, 47, 8, 1, _config(8)), "gemma-int8", (10, 47)),
]  # fmt: skip
