"""FP-Quant by the reference of its kernel's own tests (qutlass, tests/mxfp4_test.py): there is no kernel on a CPU."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made

BF16 = torch.bfloat16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * size**-0.5


def codes_of(values: torch.Tensor) -> torch.Tensor:
    return (values.unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)


def quantized(dtype: str, share: float, *, padded: bool):
    """Rotate, scale, round, pack; what is decoded is rotated back and comes near the weight before."""

    def make() -> Made:
        torch.manual_seed(24)
        group, rotation, weight = 32 if dtype == "mxfp4" else 16, hadamard(32), torch.randn(10, 96)
        rotated = (weight.view(-1, 32) @ rotation).view(10, -1, group)
        largest = rotated.abs().amax(-1, keepdim=True)
        if dtype == "mxfp4":
            scales = largest.log2().floor().exp2().to(torch.float8_e8m0fnu)
        else:
            scales = (share * largest / 6).to(torch.float8_e4m3fn)
        codes = codes_of(rotated * share / scales.float())
        values = (E2M1[codes.long()] * scales.float() / share).view(-1, 32) @ rotation.T
        assert (values.view(10, 96) - weight).norm() < 0.15 * weight.norm()
        codes, scales = codes.view(10, 96), scales.view(10, -1).view(torch.uint8)
        if padded:
            scales = nn.functional.pad(scales, (0, -scales.shape[1] % 4, 0, 118), value=7)
        tensors = {
            "layer.qweight": codes[:, ::2] | codes[:, 1::2] << 4,
            "layer.scales": scales,
            "layer.weight": torch.zeros(0),
            "layer.dqweight": torch.zeros(0),
            **common(rotation, share),
        }
        config = {"quant_method": "fp_quant", "forward_dtype": dtype, "forward_method": "abs_max"}
        return Made(values, live(tensors), tensors, {"quantization_config": config}, tolerance=1e-6)

    return make


def common(rotation: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    return {
        "layer.forward_hadamard_matrix": rotation,
        "layer.backward_hadamard_matrix": rotation.clone(),
        "layer.weight_global_scale": torch.tensor([share], dtype=BF16),
        "layer.act_global_scale": torch.tensor([share], dtype=BF16),
    }


def live(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Parameters and buffers as `FPQuantLinear.pre_forward` leaves them."""
    model = nn.Module()
    model.layer = nn.Module()
    for name, tensor in tensors.items():
        name = name.removeprefix("layer.")
        if name in ("qweight", "scales", "dqweight", "weight"):
            kept = nn.Parameter(tensor, requires_grad=False) if tensor.numel() else None
            model.layer.register_parameter(name, kept)
        else:
            model.layer.register_buffer(name, tensor)
    return model


def pseudo() -> Made:
    torch.manual_seed(25)
    rotation, rotated = hadamard(32), torch.randn(10, 96)
    tensors = {"layer.dqweight": rotated, "layer.weight": torch.zeros(0), **common(rotation, 3.0)}
    values = (rotated.view(-1, 32) @ rotation.T).view(10, 96)
    config = {"quantization_config": {"quant_method": "fp_quant", "pseudoquantization": True}}
    return Made(values, live(tensors), tensors, config, tolerance=1e-6)


def master() -> Made:
    torch.manual_seed(26)
    weight = torch.randn(10, 96)
    tensors = {"layer.weight": weight, **common(hadamard(32), 3.0)}
    config = {"quantization_config": {"quant_method": "fp_quant", "store_master_weights": True}}
    return Made(weight, live(tensors), tensors, config)


CASES = [
    Case("fp-quant-mxfp4", quantized("mxfp4", 3.0, padded=False), "fp-quant-mxfp4", (10, 96),
         bytes={"codes": 480, "scales": 30 + 4, "bookkeeping": 8192}),
    Case("fp-quant-mxfp4-padded-scales", quantized("mxfp4", 3.0, padded=True), "fp-quant-mxfp4", (10, 96),
         bytes={"codes": 480, "scales": 512 + 4}),
    Case("fp-quant-nvfp4", quantized("nvfp4", 10.0, padded=False), "fp-quant-nvfp4", (10, 96)),
    Case("fp-quant-pseudo", pseudo, "fp-quant-pseudo", (10, 96)),
    Case("fp-quant-master-weights", master, "plain", (10, 96)),
]  # fmt: skip
