"""fouroversix: what version 1.0.5 made on the CPU (tests/golden/make_fouroversix.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file
from torch import nn

from tests.cases import Case, Made

GOLDEN = Path(__file__).parent.parent / "golden" / "fouroversix.safetensors"


class FourOverSixLinear(nn.Linear):
    """Holds what the library's module of this name holds."""


FourOverSixLinear.__module__ = "fouroversix.model.modules.linear"


def golden(dtype: str, rule: str, settings: dict | None = None):
    def make() -> Made:
        found = {key: tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(f"{dtype}-{rule}.")}
        values = found.pop(f"{dtype}-{rule}.values")
        tensors = {key.removeprefix(f"{dtype}-{rule}."): tensor for key, tensor in found.items()}
        model = nn.Module()
        model.layer = FourOverSixLinear(40, 10, bias=False)
        model.layer.weight = None
        model.layer.config = SimpleNamespace(weight_dtype=dtype, weight_scale_rule=rule)
        for name, tensor in tensors.items():
            model.layer.register_buffer(name.removeprefix("layer."), nn.Parameter(tensor, requires_grad=False))
        config = {"quant_method": "fouroversix", "dtype": dtype, "scale_rule": rule} | (settings or {})
        return Made(values, model, tensors, {"quantization_config": config}, tolerance=1e-6)

    return make


OTHERWISE = {"dtype": "mxfp4", "module_config_overrides": {"layer": {"dtype": "nvfp4", "scale_rule": "mse"}}}

CASES = [
    Case("fouroversix-nvfp4-static-6", golden("nvfp4", "static_6"), "fouroversix-nvfp4", (10, 40),
         bytes={"codes": 128 * 32, "scales": 512 + 4}),
    Case("fouroversix-nvfp4-static-4", golden("nvfp4", "static_4"), "fouroversix-nvfp4", (10, 40)),
    Case("fouroversix-nvfp4-mse", golden("nvfp4", "mse"), "fouroversix-nvfp4", (10, 40)),
    Case("fouroversix-mxfp4", golden("mxfp4", "static_6"), "fouroversix-mxfp4", (10, 40)),
    Case("fouroversix-if4", golden("if4", "mse"), "fouroversix-if4", (10, 40)),
    Case("fouroversix-nvint4", golden("nvint4", "static_6"), "fouroversix-nvint4", (10, 40)),
    Case("fouroversix-override", golden("nvfp4", "mse", OTHERWISE), "fouroversix-nvfp4", (10, 40)),
]  # fmt: skip
