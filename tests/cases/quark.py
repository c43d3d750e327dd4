"""AMD Quark: what version 0.13 exported and took back in on the CPU (tests/golden/make_quark.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.cases import Case, Made

GOLDEN = Path(__file__).parent.parent / "golden" / "quark.safetensors"


def golden(name: str):
    def make() -> Made:
        found = {key: tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
        with safe_open(GOLDEN, framework="pt") as file:
            config = json.loads(file.metadata()[name])
        values = found.pop(f"{name}.values")
        tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in found.items()}
        return Made(values, tensors=tensors, config={"quantization_config": config}, tolerance=1e-7)

    return make


def live(name: str):
    """The same in the module that Quark keeps in memory."""

    def make() -> Made:
        pytest.importorskip("quark.torch", reason="amd-quark is not installed")
        from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
        from quark.torch.quantization.config.config import QLayerConfig, QTensorConfig

        made = golden(name)()
        said = made.config["quantization_config"]["global_quant_config"]["weight"]
        weight = (
            [QTensorConfig.from_dict(one) for one in said] if isinstance(said, list) else QTensorConfig.from_dict(said)
        )
        model = nn.Module()
        model.layer = QParamsLinear(nn.Linear(64, 8, bias=False), "quark", "reorder", QLayerConfig(weight=weight))
        model.layer.weight.requires_grad_(False)
        model.layer.weight.data = made.tensors["layer.weight"]
        quantizers = model.layer.weight_quantizer
        for level, quantizer in enumerate(quantizers if isinstance(said, list) else [quantizers]):
            for part in ("scale", "zero_point"):
                stored = made.tensors.get(f"layer.weight_{part}{'_2' if level else ''}")
                if stored is not None:
                    setattr(quantizer, part, stored)
        return Made(made.values, model, tolerance=1e-7)

    return make


def by_hand(order: str):
    """One word 0x76543210 holds eight codes along K: in order, or 0, 4, 1, 5, 2, 6, 3, 7 for elements 0 to 7."""

    def make() -> Made:
        codes = [0, 1, 2, 3, 4, 5, 6, 7] if order == "order" else [0, 4, 1, 5, 2, 6, 3, 7]
        weight = {"dtype": "uint4", "qscheme": "per_channel", "ch_axis": 0, "group_size": None}
        config = {"quant_method": "quark", "global_quant_config": {"weight": weight}, "export": {"pack_method": order}}
        tensors = {
            "layer.weight": torch.tensor([[0x76543210]], dtype=torch.int32),
            "layer.weight_scale": torch.tensor([2.0]),
            "layer.weight_zero_point": torch.tensor([0x1], dtype=torch.int32),
        }
        values = torch.tensor([[2.0 * (code - 1) for code in codes]])
        return Made(values, tensors=tensors, config={"quantization_config": config})

    return make


def uint2_by_hand() -> Made:
    """The byte 0b00_01_10_11 holds 0, 1, 2, 3 along N, highest bits first: four rows of one column."""
    weight = {"dtype": "uint2", "qscheme": "per_group", "ch_axis": -1, "group_size": 1}
    tensors = {
        "layer.weight": torch.tensor([[0b00011011]], dtype=torch.uint8),
        "layer.weight_scale": torch.tensor([[1.0, 1.0, 1.0, 10.0]]),
    }
    config = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    return Made(torch.tensor([[0.0], [1.0], [2.0], [30.0]]), tensors=tensors, config={"quantization_config": config})


def by_layer() -> Made:
    """Another format for some layers, one left alone: told apart by pattern and by what is stored."""
    low, high = golden("uint4-group")(), golden("fp8-channel")()
    tensors = {name.replace("layer", "mlp.up_proj"): tensor for name, tensor in low.tensors.items()} | high.tensors
    tensors["lm_head.weight"] = torch.randn(5, 8)
    low_config, high_config = low.config["quantization_config"], high.config["quantization_config"]
    layers = {"layer_quant_config": {"*up_proj": low_config["global_quant_config"]}, "exclude": ["lm_head"]}
    return Made(high.values, tensors=tensors, config={"quantization_config": high_config | layers}, tolerance=1e-7)


FORMATS = {
    "uint4-group": "uint4", "int4-group": "int4", "int4-group-order": "int4", "uint4-channel": "uint4",
    "int4-channel-order": "int4", "int4-tensor": "int4", "int8-group": "int8", "uint8-group": "uint8",
    "int8-channel": "int8", "int8-tensor": "int8", "int3-channel": "int3", "int3-group": "int3", "int2-group": "int2",
    "uint2-group": "uint2", "fp8-tensor": "fp8-e4m3", "fp8-channel": "fp8-e4m3", "mxfp6-e2m3": "fp6-e2m3",
    "mxfp6-e3m2": "fp6-e3m2", "mxfp4": "fp4", "nvfp4": "fp4", "fp8-int4": "int4",
}  # fmt: skip
BYTES = {
    "uint4-group": {"codes": 256, "scales": 64, "zero_points": 8},
    "int3-group": {"codes": 192, "scales": 256, "zero_points": 24},
    "mxfp4": {"codes": 256, "scales": 16},
    "nvfp4": {"codes": 256, "scales": 32 + 4},
}

CASES = [
    Case("quark-by-hand-order", by_hand("order"), "quark-uint4", (1, 8), bytes={"codes": 4, "scales": 4}),
    Case("quark-by-hand-reorder", by_hand("reorder"), "quark-uint4", (1, 8)),
    Case("quark-uint2-by-hand", uint2_by_hand, "quark-uint2", (4, 1), bytes={"codes": 1, "scales": 16}),
    *(Case(f"quark-{name}", golden(name), f"quark-{dtype}", (8, 64), bytes=BYTES.get(name))
      for name, dtype in FORMATS.items()),
    Case("quark-by-layer", by_layer, "quark-fp8-e4m3", (8, 64), total=512 + 512 + 40),
    *(Case(f"quark-in-memory-{name}", live(name), f"quark-{FORMATS[name]}", (8, 64))
      for name in ("uint4-group", "int8-channel", "mxfp4", "fp8-int4")),
]  # fmt: skip
