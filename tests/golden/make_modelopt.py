"""Write modelopt.safetensors: one layer as ModelOpt exports it in each of its formats, and what it stands for.

Run with `nvidia-modelopt==0.47.0` installed (it needs no GPU for these): python tests/golden/make_modelopt.py

`values` is the library's own fake quantization of the same weight, by the quantizer that the export is made from; where
the weight was smoothed, times `pre_quant_scale`, which must come near the weight before all of it.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, KEPT = 128, 4  # the library wants 128 for int4; four rows say as much
LAYER = "model.layers.0.mlp.down_proj"
CONFIGS = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "w4a8-nvfp4": mtq.W4A8_NVFP4_FP8_CFG,
    "mxfp4": mtq.W4A8_MXFP4_FP8_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-row": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8-block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "int8-smooth": mtq.INT8_SMOOTHQUANT_CFG,
    "int4-awq": mtq.INT4_AWQ_CFG,
    "w4a8-awq": mtq.W4A8_AWQ_BETA_CFG,
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=ROWS, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def calibrate(quantized: torch.nn.Module) -> None:
    for _ in range(2):
        quantized(torch.randint(0, 32, (2, 16)))


def meaning(layer: torch.nn.Module, exported: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What the library itself takes the exported weight for."""
    weight = exported["weight"]
    if name.endswith("nvfp4"):
        packed = NVFP4QTensor(torch.Size((ROWS, 256)), torch.float32, weight)
        block = {-1: 256 // exported["weight_scale"].shape[1]}
        scales = {"scale": exported["weight_scale"], "double_scale": exported["weight_scale_2"]}
        return packed.dequantize(torch.float32, **scales, block_sizes=block)
    if name in ("mxfp4", "mxfp8"):
        packed = (MXFP4QTensor if name == "mxfp4" else MXFP8QTensor)(torch.Size((ROWS, 256)), torch.float32, weight)
        return packed.dequantize(torch.float32, scale=exported["weight_scale"], block_sizes={-1: 32})
    quantizer = layer.weight_quantizer
    return (quantizer[0] if isinstance(quantizer, torch.nn.Sequential) else quantizer)(layer.weight).detach().float()


def export(name: str, config: dict[str, object]) -> dict[str, torch.Tensor]:
    base = model()
    quantized = mtq.quantize(copy.deepcopy(base), config, calibrate)
    layer = copy.deepcopy(quantized.get_submodule(LAYER))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export_hf_checkpoint(quantized, dtype=torch.float32, export_dir=folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    exported = {key.removeprefix(f"{LAYER}."): tensor for key, tensor in tensors.items() if key.startswith(LAYER)}
    values = meaning(layer, exported, name)
    if "pre_quant_scale" in exported:
        values = values * exported["pre_quant_scale"]
    original = base.get_submodule(LAYER).weight.detach()
    assert (values - original).norm() < 0.2 * original.norm(), name
    kept = {f"{name}.layer.{key}": first_rows(tensor) for key, tensor in exported.items()}
    return kept | {f"{name}.values": values[:KEPT]}


def first_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The first rows of a part that has a row, or half a row, for each output."""
    if tensor.dim() and tensor.shape[0] in (ROWS, ROWS // 2):
        return tensor[: KEPT * tensor.shape[0] // ROWS]
    return tensor


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, config in CONFIGS.items():
        tensors |= export(name, config)
    path = Path(__file__).with_name("modelopt.safetensors")
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"library": f"nvidia-modelopt {modelopt.__version__}"})


if __name__ == "__main__":
    main()
