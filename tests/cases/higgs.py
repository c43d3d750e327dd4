"""HIGGS: layers of transformers as its loader makes them; their values need FLUTE's GPU kernel."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made

UP = "model.layers.0.mlp.up_proj"


def _config(bits: int) -> dict:
    return {"quantization_config": {"quant_method": "higgs", "bits": bits, "group_size": 64, "hadamard_size": 128}}


def layer(rows: int, columns: int, bits: int, *, bias: bool = False):
    def make() -> Made:
        from transformers.integrations.higgs import HiggsLinear

        model = nn.Module()
        model.layer = HiggsLinear(columns, rows, bits, bias=bias, dtype=torch.float16, group_size=64, hadamard_size=128)
        return Made(None, model, model.state_dict(), _config(bits))

    return make


def padded() -> Made:
    """192 columns were padded to two blocks of the Hadamard transform: the model's configuration says 192."""
    made = layer(48, 256, 2)()
    tensors = {name.replace("layer", UP, 1): tensor for name, tensor in made.tensors.items()}
    return Made(None, None, tensors, _config(2) | {"hidden_size": 192, "intermediate_size": 48})


CASES = [
    Case("higgs-4bit", layer(48, 128, 4), "higgs-4bit", (48, 128),
         bytes={"codes": 12 * 128 * 2, "scales": 48 * 2 * 2, "codebooks": 16 * 2 + 16 * 16 * 2 * 2}),
    Case("higgs-3bit-bias", layer(48, 256, 3, bias=True), "higgs-3bit", (48, 256), total=48 * 256 + 48),
    Case("higgs-2bit-192-columns-by-config", padded, "higgs-2bit", (48, 192), f"{UP}.weight"),
]  # fmt: skip
