"""llm-compressor's presets in compressed-tensors: `fp8`, `fp8-dynamic`, `nvfp4`, `mxfp4`.

    preset       weight                   weight_scale           beside it
    fp8          F8_E4M3 [N, K]           [1], model's dtype     input_scale [1], model's dtype
    fp8-dynamic  F8_E4M3 [N, K]           [N, 1], model's dtype
    nvfp4        weight_packed [N, K/2]   F8_E4M3 [N, K/16]      weight_global_scale, input_global_scale F32 [1]
    mxfp4        weight_packed [N, K/2]   U8 [N, K/32]

Encoded: the linears of the layers and of single experts, no router and no head. The experts of gpt-oss are one tensor a
layer: `mxfp4` writes those as gpt-oss is published (`_blocks` and `_scales`) and nothing else.
Source: compressed-tensors 0.20.0, quantization/quant_scheme.py, compressors/; transformers 5.17, integrations/mxfp4.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, each, in_layers, stored
from pytest_quantcheck.recipes.recipe import check_calibrated as check
from pytest_quantcheck.tensor import StoredTensor

GPT_OSS_BLOCK = 32


class Preset(NamedTuple):
    """The format of the configuration, what it says of weights, the multiple that columns must be, and the parts."""

    format: str
    weights: Mapping[str, object]
    multiple: int
    parts: Callable[[Weight, str], Iterator[StoredTensor]]


def _fp8(weight: Weight, dtype: str) -> Iterator[StoredTensor]:
    yield stored(weight.name, "F8_E4M3", *weight.linear_shape)
    yield stored(f"{weight.module}.weight_scale", dtype, 1)
    yield stored(f"{weight.module}.input_scale", dtype, 1)


def _fp8_dynamic(weight: Weight, dtype: str) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    yield stored(weight.name, "F8_E4M3", rows, columns)
    yield stored(f"{weight.module}.weight_scale", dtype, rows, 1)


def _nvfp4(weight: Weight, dtype: str) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    yield stored(f"{weight.module}.weight_packed", "U8", rows, columns // 2)
    yield stored(f"{weight.module}.weight_scale", "F8_E4M3", rows, columns // 16)
    yield stored(f"{weight.module}.weight_global_scale", "F32", 1)
    yield stored(f"{weight.module}.input_global_scale", "F32", 1)


def _mxfp4(weight: Weight, dtype: str) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    yield stored(f"{weight.module}.weight_packed", "U8", rows, columns // 2)
    yield stored(f"{weight.module}.weight_scale", "U8", rows, columns // 32)


FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
PRESETS: Mapping[str, Preset] = {
    "fp8": Preset("float-quantized", FLOAT8 | {"strategy": "tensor"}, 1, _fp8),
    "fp8-dynamic": Preset("float-quantized", FLOAT8 | {"strategy": "channel"}, 1, _fp8_dynamic),
    "nvfp4": Preset("nvfp4-pack-quantized", FLOAT4 | {"strategy": "tensor_group", "group_size": 16}, 16, _nvfp4),
    "mxfp4": Preset("mxfp4-pack-quantized", FLOAT4 | {"strategy": "group", "group_size": 32}, 32, _mxfp4),
}


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors of a saved compressed model."""
    if options["preset"] == "mxfp4" and any(_is_gpt_oss(weight) for weight in model.weights):
        return Written(each(model, _is_gpt_oss, _gpt_oss), {"quant_method": "mxfp4"})
    preset = PRESETS[options["preset"]]
    check(model, columns=preset.multiple, rows=1)
    group = {"targets": ["Linear"], "weights": preset.weights, "input_activations": None, "format": preset.format}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": preset.format,
        "config_groups": {"group_0": group},
        "ignore": [],
        "quantization_status": "compressed",
    }
    return Written(each(model, in_layers, lambda weight: preset.parts(weight, model.dtype)), quantization)


def _is_gpt_oss(weight: Weight) -> bool:
    return weight.kind == "stack" and weight.name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _gpt_oss(weight: Weight) -> Iterator[StoredTensor]:
    experts, columns, rows = weight.shape
    if columns % GPT_OSS_BLOCK:
        raise ValueError(f"`{weight.name}` has {columns:,} inputs, no multiple of {GPT_OSS_BLOCK}")
    yield stored(f"{weight.name}_blocks", "U8", experts, rows, columns // GPT_OSS_BLOCK, GPT_OSS_BLOCK // 2)
    yield stored(f"{weight.name}_scales", "U8", experts, rows, columns // GPT_OSS_BLOCK)


RECIPE = Recipe(
    re.compile(f"(?P<preset>{'|'.join(PRESETS)})"), tuple(PRESETS), "compressed-tensors", "safetensors", write
)
