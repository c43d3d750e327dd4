"""Write quark.safetensors: one layer as AMD Quark exports it in each of its formats, and what it stands for.

Run with `amd-quark==0.13` installed (it needs no GPU for these): python tests/golden/make_quark.py

`values` is what Quark's own import makes of the exported layer, or where this version cannot take a format back in
(int3), the fake-quantized weight that it exported. The configuration of each case is in the metadata.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import quark.torch.quantization.config.config as specs
import torch
from quark import __version__
from quark.torch import ModelQuantizer, export_safetensors, import_model_from_safetensors
from quark.torch.quantization.config.config import QConfig, QLayerConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0.mlp.down_proj"
INT = {"scale_type": "float", "round_method": "half_even", "is_dynamic": False}
GROUP = {"ch_axis": -1, "group_size": 32}
OBSERVED = {"observer_method": "min_max", "is_dynamic": False}

SPECS = {
    "uint4-group": specs.Uint4PerGroupSpec(**GROUP, symmetric=False, **INT),
    "int4-group": specs.Int4PerGroupSpec(**GROUP, symmetric=True, **INT),
    "int4-group-order": specs.Int4PerGroupSpec(**GROUP, symmetric=True, **INT),
    "uint4-channel": specs.Uint4PerChannelSpec(ch_axis=0, symmetric=False, **INT),
    "int4-channel-order": specs.Int4PerChannelSpec(ch_axis=0, symmetric=True, **INT),
    "int4-tensor": specs.Int4PerTensorSpec(symmetric=True, **INT, observer_method="min_max"),
    "int8-group": specs.Int8PerGroupSpec(**GROUP, symmetric=True, **INT),
    "uint8-group": specs.Uint8PerGroupSpec(**GROUP, symmetric=False, **INT),
    "int8-channel": specs.Int8PerChannelSpec(ch_axis=0, symmetric=True, **INT),
    "int8-tensor": specs.Int8PerTensorSpec(symmetric=True, **INT, observer_method="min_max"),
    "int3-channel": specs.Int3PerChannelSpec(ch_axis=0, symmetric=True, **INT),
    "int3-group": specs.Int3PerGroupSpec(ch_axis=-1, group_size=8, symmetric=True, **INT),
    "int2-group": specs.Int2PerGroupSpec(**GROUP, symmetric=True, **INT),
    "uint2-group": None,
    "fp8-tensor": specs.FP8E4M3PerTensorSpec(**OBSERVED),
    "fp8-channel": specs.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False),
    "mxfp6-e2m3": specs.OCP_MXFP6E2M3Spec(ch_axis=-1, is_dynamic=False),
    "mxfp6-e3m2": specs.OCP_MXFP6E3M2Spec(ch_axis=-1, is_dynamic=False),
    "mxfp4": specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
    "nvfp4": specs.ScaleQuantSpec(
        first_stage=specs.FP4PerGroupSpec(ch_axis=-1, group_size=16, is_dynamic=False),
        second_stage=specs.FP8E4M3PerTensorSpec(**OBSERVED),
    ),
    "fp8-int4": specs.ProgressiveSpec(
        first_stage=specs.FP8E4M3PerTensorSpec(**OBSERVED),
        second_stage=specs.Int4PerChannelSpec(ch_axis=0, symmetric=False, **INT),
    ),
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def weight_spec(name: str) -> object:
    if name == "uint2-group":
        config = specs.Int2PerGroupSpec(**GROUP, symmetric=True, **INT).to_quantization_spec()
        config.dtype, config.symmetric = specs.Dtype.uint2, False
        return config
    return SPECS[name].to_quantization_spec()


def export(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    config = QConfig(
        global_quant_config=QLayerConfig(weight=weight_spec(name)),
        exclude=["lm_head", "*self_attn*", "*gate_proj", "*up_proj"],
    )
    quantizer = ModelQuantizer(config)
    quantized = quantizer.freeze(quantizer.quantize_model(model(), [torch.randint(0, 32, (1, 8))]))
    layer = quantized.get_submodule(LAYER)
    values = layer.get_quant_weight(layer.weight).detach().float().clone()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_safetensors(quantized, folder, pack_method="order" if name.endswith("order") else "reorder")
        tensors = load_file(Path(folder) / "model.safetensors")
        settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        try:
            layer = import_model_from_safetensors(model(), folder, device="cpu").get_submodule(LAYER)
            imported = layer._get_qweight(layer.weight).float()
            assert (imported - values).abs().max() < 1e-6, name
            values = imported
        except (RuntimeError, ValueError) as error:
            print(f"{name}: cannot be taken back in ({str(error)[:200]})")
    original = model().get_submodule(LAYER).weight.detach()
    print(name, float((values - original).norm() / original.norm()))
    exported = {key.removeprefix(f"{LAYER}."): tensor for key, tensor in tensors.items() if key.startswith(LAYER)}
    for key, tensor in exported.items():
        print("   ", key, tensor.dtype, tuple(tensor.shape))
    return {f"{name}.layer.{key}": tensor for key, tensor in exported.items()} | {f"{name}.values": values}, settings


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"library": f"amd-quark {__version__}"}
    for name in SPECS:
        found, settings = export(name)
        tensors |= {key: tensor.contiguous().clone() for key, tensor in found.items()}
        weight = {"global_quant_config": {"weight": settings["global_quant_config"]["weight"]}}
        kept = {"quant_method": settings["quant_method"], "export": {"pack_method": settings["export"]["pack_method"]}}
        metadata[name] = json.dumps(weight | kept | {"exclude": settings["exclude"]})
    save_file(tensors, Path(__file__).with_name("quark.safetensors"), metadata=metadata)


if __name__ == "__main__":
    main()
