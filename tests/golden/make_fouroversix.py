"""Write fouroversix.safetensors: one weight as fouroversix saves it in each of its formats, and what it decodes to.

Run with `fouroversix==1.0.5` installed (its PyTorch backend needs no GPU): python tests/golden/make_fouroversix.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from fouroversix.quantize import QuantizationConfig, dequantize, quantize_to_fp4
from safetensors.torch import save_file

CASES = (
    ("nvfp4", "static_6"), ("nvfp4", "static_4"), ("nvfp4", "mse"), ("mxfp4", "static_6"), ("if4", "mse"),
    ("nvint4", "static_6"),
)  # fmt: skip


def export(dtype: str, rule: str) -> dict[str, torch.Tensor]:
    """The parts of `FourOverSixLinear.get_quantized_parameters`, and the library's decode in float32."""
    config = QuantizationConfig(dtype=dtype, scale_rule=rule, backend="pytorch")
    weight = quantize_to_fp4(torch.randn(10, 40, dtype=torch.bfloat16), config)
    sizes = [*weight.original_shape, *weight.padded_shape, 1, int(weight.scale_factors_are_in_blackwell_layout)]
    parts = {
        "layer.quantized_weight_values": weight.values,
        "layer.quantized_weight_scale_factors": weight.scale_factors,
        "layer.quantized_weight_amax": weight.amax,
        "layer.quantized_weight_metadata": torch.tensor(sizes),
        "values": dequantize(weight, torch.float32, intermediate_dtype=torch.float32)[:10, :40],
    }
    return {f"{dtype}-{rule}.{name}": tensor.contiguous().clone() for name, tensor in parts.items()}


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for case in CASES:
        tensors |= export(*case)
    path = Path(__file__).with_name("fouroversix.safetensors")
    save_file(tensors, path, metadata={"library": f"fouroversix {version('fouroversix')}"})


if __name__ == "__main__":
    main()
