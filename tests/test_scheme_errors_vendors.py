"""Broken checkpoints of the vendors' formats: an error that names the tensor and what was expected, never a guess."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError
from tests.cases import mxfp4

FP8, F32 = torch.float8_e4m3fn, torch.float32


class Broken(NamedTuple):
    """One checkpoint that must be refused: what it holds, and what the message must say."""

    id: str
    tensors: dict[str, Any]
    quantization: dict[str, Any]
    says: tuple[str, ...]


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}

FINE_GRAINED = [
    Broken("fp8-weight-without-scale", {"layer.weight": zeros(130, 140, dtype=FP8)}, BLOCKS,
           ("layer.weight", "weight_scale")),
    Broken("fp8-scale-without-weight", {"layer.weight_scale_inv": zeros(2, 2)}, BLOCKS,
           ("layer.weight_scale_inv", "no weight `layer.weight`")),
    Broken("fp8-floor-grid", {"layer.weight": zeros(576, 384, dtype=FP8), "layer.weight_scale_inv": zeros(4, 3)},
           BLOCKS, ("layer.weight_scale_inv", "5 x 3", "128 x 128")),
    Broken("fp8-grid-of-another-block", {"layer.weight": zeros(256, 256, dtype=FP8),
                                         "layer.weight_scale_inv": zeros(4, 4)}, BLOCKS, ("2 x 2", "[256, 256]")),
    Broken("fp8-one-scale-where-blocks-belong", {"layer.weight": zeros(256, 256, dtype=FP8),
                                                 "layer.weight_scale_inv": zeros(1)}, BLOCKS, ("2 x 2",)),
    Broken("fp8-blocks-where-one-scale-belongs", {"layer.weight": zeros(256, 256, dtype=FP8),
                                                  "layer.weight_scale_inv": zeros(2, 2)},
           BLOCKS | {"weight_block_size": None}, ("1 x 1", "256 x 256")),
    Broken("fp8-scale-of-a-bf16-weight", {"layer.weight": zeros(256, 256, dtype=torch.bfloat16),
                                          "layer.weight_scale_inv": zeros(2, 2)}, BLOCKS, ("layer.weight", "BF16")),
    Broken("fp8-packed-scales", {"layer.weight": zeros(256, 256, dtype=FP8),
                                 "layer.weight_scale_inv": zeros(2, 2, dtype=torch.int32)}, BLOCKS, ("I32",)),
    Broken("fp8-block-size-is-a-number", {"layer.weight": zeros(256, 256, dtype=FP8),
                                          "layer.weight_scale_inv": zeros(2, 2)},
           BLOCKS | {"weight_block_size": 128}, ("weight_block_size", "128")),
    Broken("fp4-grid-of-fp8", {"layer.weight": zeros(256, 128, dtype=torch.int8),
                               "layer.weight_scale_inv": zeros(2, 2)}, BLOCKS, ("256 x 8", "1 x 32")),
]  # fmt: skip

I32, I64, U8 = torch.int32, torch.int64, torch.uint8


def groups(*weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{at}": {"targets": ["Linear"], "weights": one} for at, one in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": named} | more


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = {
    "layer.weight_packed": zeros(10, 8, dtype=I32),
    "layer.weight_shape": torch.tensor([10, 64]),
    "layer.weight_scale": zeros(10, 2),
}
NVFP4 = {
    "layer.weight_packed": zeros(10, 32, dtype=U8),
    "layer.weight_scale": zeros(10, 4, dtype=FP8),
    "layer.weight_global_scale": zeros(1),
}
BITMASK = {
    "layer.bitmask": zeros(4, 2, dtype=U8),
    "layer.compressed": zeros(3),
    "layer.shape": torch.tensor([4, 10]),
    "layer.row_offsets": zeros(4, dtype=I64),
}
MARLIN = {
    "layer.weight_packed": zeros(4, 128, dtype=I32),
    "layer.scale_packed": zeros(1, 64, dtype=torch.float16),
    "layer.meta": zeros(4, 128, dtype=torch.int16),
}


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


COMPRESSED_TENSORS = [
    Broken("ct-pack-no-scale", without(PACKED, "layer.weight_scale"), groups(INT4),
           ("layer.weight_packed", "weight_scale` is missing")),
    Broken("ct-pack-shape-lies", PACKED | {"layer.weight_shape": torch.tensor([11, 64])}, groups(INT4),
           ("layer.weight_shape", "[11, 64]", "[10, 8]")),
    Broken("ct-pack-shape-of-no-width", PACKED | {"layer.weight_shape": torch.tensor([10, 2000])}, groups(INT4),
           ("layer.weight_packed", "8 words", "2000")),
    Broken("ct-pack-config-of-other-bits", PACKED, groups(INT4 | {"num_bits": 8}), ("layer", "num_bits 8")),
    Broken("ct-pack-config-of-other-groups", PACKED, groups(INT4 | {"group_size": 64}), ("layer", "group_size 64")),
    Broken("ct-pack-scales-of-other-rows", PACKED | {"layer.weight_scale": zeros(9, 2)}, groups(INT4),
           ("layer.weight_scale", "[9, 2]")),
    Broken("ct-pack-zero-points-of-other-rows", PACKED | {"layer.weight_zero_point": zeros(3, 2, dtype=I32)},
           groups(INT4 | {"symmetric": False}), ("layer.weight_zero_point", "[2, 2]")),
    Broken("ct-pack-g-idx-of-other-columns", PACKED | {"layer.weight_g_idx": zeros(63, dtype=I32)}, groups(INT4),
           ("layer.weight_g_idx", "64")),
    Broken("ct-pack-no-shape-no-groups", without(PACKED, "layer.weight_shape") | {"layer.weight_scale": zeros(1)},
           groups(INT4), ("layer.weight_packed", "weight_shape")),
    Broken("ct-pack-pattern-of-a-stranger",
           {"layer.weight_packed": zeros(10, 1, dtype=I32), "layer.weight_shape": torch.tensor([10, 5]),
            "layer.weight_scale": zeros(10, 1)},
           {"quant_method": "compressed-tensors",
            "config_groups": {bits: {"targets": ["re:(a+)+$"],
                                     "weights": {"num_bits": int(bits), "strategy": "channel"}} for bits in "23"}},
           ("too complex",)),
    Broken("ct-int8-no-weight", {"layer.weight_scale": zeros(10, 1)}, groups(INT4), ("layer.weight_scale", "weight")),
    Broken("ct-int8-no-scale", {"layer.weight": zeros(10, 64, dtype=torch.int8)}, groups(INT4), ("layer.weight", "I8")),
    Broken("ct-float8-no-scale", {"layer.weight": zeros(10, 64, dtype=FP8)}, groups(INT4),
           ("layer.weight", "weight_scale")),
    Broken("ct-int8-scales-of-other-groups", {"layer.weight": zeros(10, 64, dtype=torch.int8),
                                              "layer.weight_scale": zeros(10, 3)}, groups(INT4), ("group_size 32",)),
    Broken("ct-nvfp4-no-global-scale", without(NVFP4, "layer.weight_global_scale"), {},
           ("layer.weight_packed", "weight_global_scale")),
    Broken("ct-nvfp4-global-scale-for-each-row", NVFP4 | {"layer.weight_global_scale": zeros(10)}, {},
           ("layer.weight_global_scale", "[10]")),
    Broken("ct-nvfp4-scales-of-mxfp4", NVFP4 | {"layer.weight_scale": zeros(10, 2, dtype=FP8)}, {},
           ("layer.weight_scale", "[10, 2]")),
    Broken("ct-nvfp4-scales-in-bf16", NVFP4 | {"layer.weight_scale": zeros(10, 4, dtype=torch.bfloat16)}, {},
           ("layer.weight_scale", "BF16")),
    Broken("ct-bitmask-no-values", without(BITMASK, "layer.compressed"), {}, ("layer.bitmask", "layer.compressed")),
    Broken("ct-bitmask-of-another-shape", BITMASK | {"layer.shape": torch.tensor([4, 17])}, {},
           ("layer.bitmask", "[4, 17]")),
    Broken("ct-bitmask-no-offsets", without(BITMASK, "layer.row_offsets"), {}, ("layer.compressed", "row_offsets")),
    Broken("ct-marlin-24-no-meta", without(MARLIN, "layer.meta"), {}, ("layer.scale_packed", "layer.meta")),
    Broken("ct-marlin-24-other-rows", MARLIN | {"layer.scale_packed": zeros(1, 128, dtype=torch.float16)}, {},
           ("layer.weight_packed", "128 rows")),
]  # fmt: skip

EXPERTS = {
    "experts.gate_up_proj_blocks": zeros(2, 8, 3, 16, dtype=U8),
    "experts.gate_up_proj_scales": zeros(2, 8, 3, dtype=U8),
}

MXFP4 = [
    Broken("mxfp4-no-scales", without(EXPERTS, "experts.gate_up_proj_scales"), {},
           ("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales")),
    Broken("mxfp4-no-blocks", without(EXPERTS, "experts.gate_up_proj_blocks"), {}, ("experts.gate_up_proj_scales",)),
    Broken("mxfp4-scales-of-other-blocks", EXPERTS | {"experts.gate_up_proj_scales": zeros(2, 8, 2, dtype=U8)}, {},
           ("experts.gate_up_proj_scales", "[2, 8, 3]")),
    Broken("mxfp4-blocks-of-8-bytes", EXPERTS | {"experts.gate_up_proj_blocks": zeros(2, 8, 6, 8, dtype=U8)}, {},
           ("experts.gate_up_proj_blocks", "[E, O, G, 16]")),
]  # fmt: skip

OPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
NVIDIA = {
    "layer.weight": zeros(10, 32, dtype=U8),
    "layer.weight_scale": zeros(10, 4, dtype=FP8),
    "layer.weight_scale_2": zeros(),
}
AWQ = {"layer.weight": zeros(5, 64, dtype=U8), "layer.weight_scale": zeros(10, 2), "layer.pre_quant_scale": zeros(64)}

MODELOPT = [
    Broken("modelopt-nvfp4-no-scale-2", without(NVIDIA, "layer.weight_scale_2"), OPT,
           ("layer.weight_scale", "weight_scale_2")),
    Broken("modelopt-nvfp4-no-weight", without(NVIDIA, "layer.weight"), OPT, ("layer.weight_scale", "layer.weight")),
    Broken("modelopt-nvfp4-no-scale", without(NVIDIA, "layer.weight_scale"), OPT, ("layer.weight",)),
    Broken("modelopt-nvfp4-scales-of-other-columns", NVIDIA | {"layer.weight_scale": zeros(10, 5, dtype=FP8)}, OPT,
           ("layer.weight_scale", "[10, 5]")),
    Broken("modelopt-nvfp4-scale-2-for-each-row", NVIDIA | {"layer.weight_scale_2": zeros(10)}, OPT,
           ("layer.weight_scale_2", "[10]")),
    Broken("modelopt-int4-packed-along-columns", AWQ | {"layer.weight": zeros(10, 32, dtype=U8)}, OPT,
           ("layer.weight_scale", "two rows")),
    Broken("modelopt-int4-pre-quant-scale-of-other-columns", AWQ | {"layer.pre_quant_scale": zeros(32)}, OPT,
           ("layer.pre_quant_scale", "64 columns")),
    Broken("modelopt-fp8-no-scale", {"layer.weight": zeros(10, 64, dtype=FP8)}, OPT, ("layer.weight", "scale")),
    Broken("modelopt-fp8-square-stack", {"experts.down_proj": zeros(3, 6, 6, dtype=FP8),
                                         "experts.down_proj_weight_scale": zeros(3, 6)}, OPT, ("rows or the columns",)),
    Broken("fbgemm-scale-of-columns", {"layer.weight": zeros(10, 64, dtype=FP8), "layer.weight_scale": zeros(64, 1)},
           {"quant_method": "fbgemm_fp8"}, ("layer.weight", "[10, 1]")),
    Broken("fbgemm-no-scale", {"layer.weight": zeros(10, 64, dtype=FP8)}, {"quant_method": "fbgemm_fp8"},
           ("layer.weight", "scale")),
]  # fmt: skip

AMD = {
    "layer.weight": zeros(64, 2, dtype=I32),
    "layer.weight_scale": zeros(2, 16),
    "layer.weight_zero_point": zeros(2, 2, dtype=I32),
}


def quark(**weight: Any) -> dict[str, Any]:
    settings = {"dtype": "uint4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32}
    return {"quant_method": "quark", "global_quant_config": {"weight": settings | weight}}


QUARK = [
    Broken("quark-no-weight", without(AMD, "layer.weight"), quark(), ("layer.weight_scale", "layer.weight")),
    Broken("quark-no-scale", without(AMD, "layer.weight_scale"), quark(), ("layer.weight",)),
    Broken("quark-config-of-other-groups", AMD, quark(group_size=64), ("layer.weight", "0 of the configured")),
    Broken("quark-config-of-other-dtype", AMD, quark(dtype="int8"), ("layer.weight", "0 of the configured")),
    Broken("quark-config-of-unknown-dtype", AMD, quark(dtype="mx9"), ("layer.weight", "0 of the configured")),
    Broken("quark-zero-points-of-other-rows", AMD | {"layer.weight_zero_point": zeros(2, 3, dtype=I32)}, quark(),
           ("layer.weight_zero_point", "[2, 2]")),
    Broken("quark-two-formats-fit", AMD, quark() | {"layer_type_quant_config": {"Linear": {"weight": {
        "dtype": "int4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32}}}}, ("layer.weight", "fits 2")),
]  # fmt: skip

SIX = {
    "layer.quantized_weight_values": zeros(128, 32, dtype=U8),
    "layer.quantized_weight_scale_factors": zeros(512, dtype=FP8),
    "layer.quantized_weight_amax": zeros(1),
    "layer.quantized_weight_metadata": torch.tensor([10, 40, 128, 64, 1, 1], dtype=I32),
}
FOUR = {"quant_method": "fouroversix", "dtype": "nvfp4", "scale_rule": "mse"}
ROTATED = {
    "layer.qweight": zeros(10, 48, dtype=U8),
    "layer.scales": zeros(10, 3, dtype=U8),
    "layer.weight_global_scale": zeros(1),
    "layer.forward_hadamard_matrix": zeros(32, 32),
}
ROTATION = {"quant_method": "fp_quant", "forward_dtype": "mxfp4"}

KERNELS = [
    Broken("fouroversix-no-amax", without(SIX, "layer.quantized_weight_amax"), FOUR,
           ("layer.quantized_weight_values", "quantized_weight_amax")),
    Broken("fouroversix-no-values", without(SIX, "layer.quantized_weight_values"), FOUR, ("layer.quantized_weight",)),
    Broken("fouroversix-no-config", SIX, {}, ("layer.quantized_weight_values", "nothing says its format")),
    Broken("fouroversix-scales-of-another-block", SIX, FOUR | {"dtype": "mxfp4"},
           ("layer.quantized_weight_scale_factors", "256 in F8_E8M0")),
    Broken("fouroversix-metadata-larger-than-padded",
           SIX | {"layer.quantized_weight_metadata": torch.tensor([200, 40, 128, 64, 1, 1])}, FOUR,
           ("layer.quantized_weight_metadata", "200")),
    Broken("fp-quant-no-codes", without(ROTATED, "layer.qweight"), ROTATION,
           ("layer.forward_hadamard_matrix", "qweight")),
    Broken("fp-quant-no-scales", without(ROTATED, "layer.scales"), ROTATION, ("layer.qweight", "scales")),
    Broken("fp-quant-config-of-other-groups", ROTATED, ROTATION | {"forward_dtype": "nvfp4"},
           ("layer.scales", "[10, 6]")),
    Broken("fp-quant-rotation-that-does-not-divide", ROTATED | {"layer.forward_hadamard_matrix": zeros(64, 64)},
           ROTATION, ("layer.forward_hadamard_matrix", "96")),
]  # fmt: skip

ROWS = [*FINE_GRAINED, *COMPRESSED_TENSORS, *MXFP4, *MODELOPT, *QUARK, *KERNELS]


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_is_refused_by_name(row, tmp_path):
    safetensors.torch.save_file(row.tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": row.quantization}))
    with pytest.raises(FormatError) as error:
        inspect(tmp_path)
    for part in row.says:
        assert part in str(error.value)


def test_bitmask_that_does_not_fit_its_values_does_not_decode(tmp_path):
    safetensors.torch.save_file(BITMASK, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="marks 0 values"):
        inspect(tmp_path).tensor("layer.weight").decode()


def test_block_size_unknown_counts_but_does_not_decode(tmp_path):
    tensors = {"layer.weight": zeros(256, 256, dtype=FP8), "layer.weight_scale_inv": zeros(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    tensor = inspect(tmp_path).tensor("layer.weight")
    assert tensor.params == 256 * 256
    with pytest.raises(FormatError, match="weight_block_size"):
        tensor.decode()


def test_mxfp4_before_loading_counts_but_does_not_decode():
    artifact = inspect(mxfp4.experts_module())
    assert artifact.logical_params == mxfp4.TOTAL
    with pytest.raises(FormatError, match="there are no scales"):
        artifact.tensor("experts.gate_up_proj").decode()


def test_mxfp4_permuted_for_hopper_counts_but_does_not_decode():
    class HopperMXValueLayout(mxfp4.StridedLayout):
        name = "HOPPER_VALUE"

    artifact = inspect(mxfp4.loaded(HopperMXValueLayout)[0])
    assert artifact.logical_params == mxfp4.TOTAL
    with pytest.raises(FormatError, match="HOPPER_VALUE"):
        artifact.tensor("experts.gate_up_proj").decode()


def test_modelopt_is_known_by_its_own_file(tmp_path):
    safetensors.torch.save_file(without(AWQ, "layer.pre_quant_scale"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 32}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    tensor = inspect(tmp_path).tensor("layer.weight")
    assert (tensor.scheme, tensor.shape, tensor.block) == ("modelopt-int4", (10, 64), 32)


def test_nvfp4_on_the_fly_counts_but_does_not_decode(monkeypatch):
    from transformers.integrations import nvfp4

    kernel = SimpleNamespace(swizzled_sf_shape=lambda rows, columns: (128, columns // 64))
    monkeypatch.setattr(nvfp4, "load_nvfp4_kernel", lambda: kernel)
    model = torch.nn.Module()
    model.layer = nvfp4.NVFP4Linear(128, 48)
    assert inspect(model).tensor("layer.weight").scheme == "plain"
    model.layer.weight = torch.nn.Buffer(zeros(48, 64, dtype=U8))
    artifact = inspect(model)
    assert (artifact.logical_params, sum(p.numel() for p in model.parameters())) == (48 * 128, 0)
    assert artifact.tensor("layer.weight").bytes == {"codes": 3072, "scales": 128 * 2 * 4 + 48 * 8 + 4}
    with pytest.raises(FormatError, match="GPU kernel"):
        artifact.tensor("layer.weight").decode()
