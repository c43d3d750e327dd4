"""Broken groups of packed weights: each is refused, by an error that names the tensor and what was expected."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import FormatError, inspect

U8, I16, I32, I64, U32, F16, F32 = (
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.float16, torch.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Broken:
    """Stored tensors as (dtype, shape) or as they are, the configuration, and what the error must say."""

    id: str
    tensors: dict
    error: str
    config: dict = field(default_factory=dict)


def mlx(**changes) -> dict:
    """A sound 4-bit group of [6, 128] in groups of 64, with changes; None leaves a tensor out."""
    group = {"weight": (U32, (6, 16)), "scales": (F16, (6, 2)), "biases": (F16, (6, 2))} | changes
    return {f"layer.{name}": content for name, content in group.items() if content is not None}


FOUR_BITS = {"quantization": {"group_size": 64, "bits": 4}}

MLX = [
    Broken("mlx-no-scales", mlx(scales=None), "layer.weight: has no `layer.scales`", FOUR_BITS),
    Broken("mlx-no-biases", mlx(biases=None), "layer.weight: has no `biases`", FOUR_BITS),
    Broken("mlx-no-scales-and-no-biases", mlx(scales=None, biases=None), "layer.weight: .*encoding", FOUR_BITS),
    Broken("mlx-biases-with-small-float-scales", mlx(scales=(U8, (6, 4))), "layer.weight: has `biases`", FOUR_BITS),
    Broken("mlx-rows-of-scales", mlx(scales=(F16, (5, 2))), "layer.scales: .*does not match codes", FOUR_BITS),
    Broken("mlx-shape-of-biases", mlx(biases=(F16, (6, 1))), "layer.biases: has the shape", FOUR_BITS),
    Broken("mlx-groups-that-do-not-divide", mlx(scales=(F16, (6, 3))), "layer.scales: .*do not divide", FOUR_BITS),
    Broken("mlx-impossible-product", mlx(weight=(U32, (6, 14))), "layer.weight: has 224 bits per group", FOUR_BITS),
    Broken("mlx-ambiguous-without-config", mlx(), "layer.weight: may be 8 bits in groups of 32, 4 bits in groups"),
    Broken("mlx-contradicts-its-own-entry", mlx(), "layer.weight: has 256 bits per group",
           {"quantization": {"group_size": 64, "bits": 4, "layer": {"group_size": 32, "bits": 4}}}),
    Broken("mlx-mode-contradicts-its-own-entry", mlx(scales=(U8, (6, 4)), biases=None),
           "layer.weight: is mxfp4, .*the configuration says affine",
           {"quantization": {"group_size": 64, "bits": 4, "layer": {"group_size": 32, "bits": 4}}}),
    Broken("mlx-unquantized-by-config", mlx(), "layer.weight: is packed, but",
           {"quantization": {"group_size": 64, "bits": 4, "layer": False}}),
    Broken("mlx-global-scale-of-affine", mlx(global_scale=(F32, (1,))), "layer.global_scale: is no global scale",
           FOUR_BITS),
    Broken("mlx-scales-alone", mlx(weight=None, biases=None), "layer.scales: has no `layer.weight`", FOUR_BITS),
    Broken("mlx-integer-scales", mlx(scales=(I16, (6, 2))), "layer.weight: I16 scales are neither", FOUR_BITS),
]  # fmt: skip

BITNET_CONFIG = {"quantization_config": {"quant_method": "bitnet"}}


def bitnet(**changes) -> dict:
    group = {"weight": (U8, (3, 7)), "weight_scale": (F32, (1,))} | changes
    return {f"layer.{name}": content for name, content in group.items() if content is not None}


BITNET = [
    Broken("bitnet-no-scale", bitnet(weight_scale=None), "layer.weight: .*has no `layer.weight_scale`", BITNET_CONFIG),
    Broken("bitnet-no-weight", bitnet(weight=None), "layer.weight_scale: has no weight `layer.weight`", BITNET_CONFIG),
    Broken("bitnet-two-scales", bitnet(weight_scale=(F32, (2,))), "layer.weight_scale: .*not one scale", BITNET_CONFIG),
    Broken("bitnet-int8", bitnet(weight=(torch.int8, (3, 7))), "layer.weight: I8 .*no BitNet weight", BITNET_CONFIG),
    Broken("bitnet-bias-too-long", bitnet(bias=(F32, (13,))), "layer.weight: has 3 rows .* for 13", BITNET_CONFIG),
    Broken("bitnet-unknown-class", bitnet(), "layer.weight: linear_class `x`",
           {"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}),
    Broken("bitnet-without-config", bitnet(), "layer.weight_scale: F32 .*no scheme claims"),
]  # fmt: skip

AQLM_CONFIG = {"quantization_config": {"quant_method": "aqlm", "num_codebooks": 2, "in_group_size": 8}}


def aqlm(**changes) -> dict:
    """A sound group of [6, 24]: two codebooks of 16 vectors of 8."""
    group = {"codes": (torch.int8, (6, 3, 2)), "codebooks": (F16, (2, 16, 1, 8)), "scales": (F16, (6, 1, 1, 1))}
    return {f"layer.{name}": content for name, content in (group | changes).items() if content is not None}


AQLM = [
    Broken("aqlm-no-codes", aqlm(codes=None), "layer.codebooks: has no `layer.codes`", AQLM_CONFIG),
    Broken("aqlm-no-codebooks", aqlm(codebooks=None), "layer.codes: has no `layer.codebooks`", AQLM_CONFIG),
    Broken("aqlm-no-scales", aqlm(scales=None), "layer.co.*: has no `layer.scales`", AQLM_CONFIG),
    Broken("aqlm-no-codebooks-no-config", aqlm(codebooks=None), "layer.codes: .*no scheme claims"),
    Broken("aqlm-scales-of-columns", aqlm(scales=(F16, (5, 1, 1, 1))), "layer.scales: .*each group of rows"),
    Broken("aqlm-one-codebook-too-few", aqlm(codes=(torch.int8, (6, 3, 1))), "layer.codes: .*no set of codes"),
    Broken("aqlm-entries-not-a-power", aqlm(codebooks=(F16, (2, 15, 1, 8))), "layer.codebooks: has 15 entries"),
    Broken("aqlm-entries-out-of-reach", aqlm(codebooks=(F16, (2, 512, 1, 8))), "layer.codebooks: has 512 entries"),
    Broken("aqlm-turned-but-not-256", aqlm(codes=(torch.int8, (3, 6, 2))), "layer.codes: .*does not start with 6"),
    Broken("aqlm-contradicts-config", aqlm(codebooks=(F16, (2, 16, 1, 4))), "layer.codebooks: has in_group_size 4",
           AQLM_CONFIG),
    Broken("aqlm-codebooks-of-vectors", aqlm(codebooks=(F16, (2, 16, 8))), "layer.codebooks: .*is no codebook"),
]  # fmt: skip

VPTQ_BLOCK = {
    "vector_lens": [-1, 4], "num_centroids": [-1, 16], "num_res_centroids": [-1, -1], "group_num": 1, "group_size": 20,
    "outlier_size": 0, "enable_norm": True, "enable_perm": True, "in_features": 20, "out_features": 24,
}  # fmt: skip


def vptq(**changes) -> dict:
    """A sound group of [24, 20]: 16 vectors of four."""
    group = {
        "indices": (I32, (1, 6, 3)), "centroids.weight": (F32, (1, 64)), "perm": (I16, (20,)),
        "weight_scale": (F32, (20,)), "weight_bias": (F32, (20,)),
    }  # fmt: skip
    return {f"layer.{name}": content for name, content in (group | changes).items() if content is not None}


def vptq_config(**changes) -> dict:
    block = {key: value for key, value in (VPTQ_BLOCK | changes).items() if value is not None}
    return {"quantization_config": {"quant_method": "vptq", "config_for_layers": {"layer": block}}}


VPTQ = [
    Broken("vptq-no-indices", vptq(indices=None), "layer.centroids.weight: .*has no `layer.indices`", vptq_config()),
    Broken("vptq-no-centroids", vptq(**{"centroids.weight": None}), "layer.indices: has no `layer.centroids.weight`",
           vptq_config()),
    Broken("vptq-no-perm", vptq(perm=None), "layer.indices: has no `layer.perm`", vptq_config()),
    Broken("vptq-no-scale", vptq(weight_scale=None), "layer.indices: has no `layer.weight_scale`", vptq_config()),
    Broken("vptq-no-residual", vptq(indices=(I32, (1, 6, 5))), "layer.indices: has no `layer.res_centroids",
           vptq_config(num_res_centroids=[-1, 8])),
    Broken("vptq-no-block", vptq(), "layer: has no block", {"quantization_config": {"quant_method": "vptq"}}),
    Broken("vptq-half-a-block", vptq(), "layer.indices: .*group_size", vptq_config(group_size=None)),
    Broken("vptq-perm-it-should-not-have", vptq(), "layer.perm: is there, but", vptq_config(enable_perm=False)),
    Broken("vptq-rows-against-config", vptq(), "layer.indices: has the shape", vptq_config(out_features=25)),
    Broken("vptq-columns-against-config", vptq(), "layer.weight: has 20 columns", vptq_config(in_features=21)),
    Broken("vptq-rows-that-nothing-says", vptq(), "layer.weight: has 21 to 24 rows", vptq_config(out_features=None)),
    Broken("vptq-entries-not-a-power", vptq(), "layer.indices: names 15 entries", vptq_config(num_centroids=[-1, 15])),
    Broken("vptq-indices-alone", {"layer.indices": (I32, (1, 6, 3))}, "layer.indices: I32 .*no scheme"),
]  # fmt: skip

METAL_CONFIG = {"quantization_config": {"quant_method": "metal", "bits": 4, "group_size": 32}}


def metal(**changes) -> dict:
    group = {"weight": (U32, (6, 8)), "scales": (F16, (6, 2)), "qbiases": (F16, (6, 2))} | changes
    return {f"layer.{name}": content for name, content in group.items() if content is not None}


METAL = [
    Broken("metal-no-qbiases", metal(qbiases=None), "layer.scales: has no `layer.qbiases`", METAL_CONFIG),
    Broken("metal-no-scales", metal(scales=None), "layer.qbiases: has no `layer.scales`", METAL_CONFIG),
    Broken("metal-no-weight", metal(weight=None), "layer.(scales|qbiases): has no `layer.weight`", METAL_CONFIG),
    Broken("metal-groups", metal(scales=(F16, (6, 3))), "layer.scales: .*does not match 6 x 64", METAL_CONFIG),
    Broken("metal-three-bits", metal(), "layer.weight: has 3 bits",
           {"quantization_config": {"quant_method": "metal", "bits": 3}}),
    Broken("metal-without-config", metal(), "layer.weight: has `qbiases`, and no configuration"),
]  # fmt: skip


def gemma_config(**changes) -> dict:
    return {"quantization_config": {"quant_method": "gemma", "num_bits": 4} | changes}


def gemma(**changes) -> dict:
    group = {"weight": (U8, (6, 4)), "weight_scale": (F32, (6, 1))} | changes
    return {f"layer.{name}": content for name, content in group.items() if content is not None}


GEMMA = [
    Broken("gemma-no-weight", gemma(weight=None), "layer.weight_scale: has no `layer.weight`", gemma_config()),
    Broken("gemma-no-scale", gemma(weight_scale=None), "layer.weight: U8 .*has no scale", gemma_config()),
    Broken("gemma-rows-of-scales", gemma(weight_scale=(F32, (5, 1))), "layer.weight_scale: .*does not divide",
           gemma_config()),
    Broken("gemma-blocks", gemma(weight_scale=(F32, (6, 3))), "layer.weight_scale: .*does not divide", gemma_config()),
    Broken("gemma-bytes-of-8-bits", gemma(), "layer.weight: is U8 with 8 bits", gemma_config(num_bits=8)),
    Broken("gemma-three-bits", gemma(), "layer.weight: is U8 with 3 bits", gemma_config(num_bits=3)),
    Broken("gemma-two-possible-widths", gemma(), r"layer.weight: has \[7, 8\] columns",
           gemma_config() | {"hidden_size": 7, "head_dim": 8}),
    Broken("gemma-endless-pattern", gemma(), "layer.weight: pattern .* is too complex",
           gemma_config(module_quant_configs={"(a+)+$": {"num_bits": 2}})),
    Broken("gemma-activation-scale-alone", {"layer.input_activation_scale": (F32, ())},
           "layer.input_activation_scale: belongs to", gemma_config()),
]  # fmt: skip


def spqr(**changes) -> dict:
    """A sound group of [32, 38]."""
    group = {
        "dense_weights": (I64, (96,)), "row_offsets": (I32, (33,)), "col_vals": (I32, (5,)), "in_perm": (I32, (19,)),
    }  # fmt: skip
    return {f"layer.{name}": content for name, content in (group | changes).items() if content is not None}


def spqr_config(**changes) -> dict:
    return {"quantization_config": {"quant_method": "spqr"} | changes}


SPQR = [
    Broken("spqr-no-offsets", spqr(row_offsets=None), "layer.dense_weights: has no `layer.row_offsets`"),
    Broken("spqr-no-outliers", spqr(col_vals=None), "layer.dense_weights: has no `layer.col_vals`"),
    Broken("spqr-no-codes", spqr(dense_weights=None), "layer.(row_offsets|col_vals): has no `layer.dense_weights`",
           spqr_config()),
    Broken("spqr-no-codes-no-config", spqr(dense_weights=None), "layer.(row_offsets|col_vals): .*no scheme claims"),
    Broken("spqr-tiles", spqr(dense_weights=(I64, (80,))), "layer.dense_weights: has 80 words, which is not 32 or 512"),
    Broken("spqr-nothing-says-k", spqr(in_perm=None), "layer.weight: .*leave its shape open"),
    Broken("spqr-shapes", spqr(), "layer.col_vals: has 5 values, its `shapes` say 6",
           spqr_config(shapes={"layer.col_vals.shape": 6})),
    Broken("spqr-four-bits", spqr(), "layer: has bits 4", spqr_config(bits=4)),
    Broken("spqr-int32-words", spqr(dense_weights=(I32, (96,))), "layer.dense_weights: I32 .*is no `dense_weights`"),
]  # fmt: skip

EETQ_CONFIG = {"quantization_config": {"quant_method": "eetq"}}


def eetq(**changes) -> dict:
    group = {"weight": (torch.int8, (64, 128)), "weight_scales": (F16, (128,))} | changes
    return {f"layer.{name}": content for name, content in group.items() if content is not None}


EETQ = [
    Broken("eetq-no-scales", eetq(weight_scales=None), "layer.weight: I8 .*no `layer.weight_scales`", EETQ_CONFIG),
    Broken("eetq-no-weight", eetq(weight=None), "layer.weight_scales: has no `layer.weight`", EETQ_CONFIG),
    Broken("eetq-scales-of-inputs", eetq(weight_scales=(F16, (64,))), "layer.weight_scales: .*each of 128 outputs"),
    Broken("eetq-floats", eetq(weight=(F16, (64, 128))), "layer.weight: F16 .*is not I8", EETQ_CONFIG),
]  # fmt: skip

HIGGS_CONFIG = {"quantization_config": {"quant_method": "higgs", "bits": 4, "group_size": 64, "hadamard_size": 128}}


def higgs(**changes) -> dict:
    """A sound group of [32, 128]."""
    group = {
        "weight": (I16, (8, 128)), "scales": (F16, (32, 2)), "tables": (F16, (16,)), "tables2": (F16, (16, 16, 4)),
    }  # fmt: skip
    return {f"layer.{name}": content for name, content in (group | changes).items() if content is not None}


HIGGS = [
    Broken("higgs-no-scales", higgs(scales=None), "layer.tables2?: has no `layer.scales`", HIGGS_CONFIG),
    Broken("higgs-no-weight", higgs(weight=None), "layer.tables2?: has no `layer.weight`", HIGGS_CONFIG),
    Broken("higgs-no-tables", higgs(tables=None, tables2=None), "layer.(weight|scales): is part of", HIGGS_CONFIG),
    Broken("higgs-bits", higgs(weight=(I16, (6, 128))), "layer.weight: has 6 rows .*not 4 bits of 32", HIGGS_CONFIG),
    Broken("higgs-tables-of-3-bits", higgs(tables=(F16, (8,))), "layer.tables: has tables of", HIGGS_CONFIG),
    Broken("higgs-groups", higgs(scales=(F16, (32, 3))), "layer.scales: has 3 groups of 64", HIGGS_CONFIG),
]  # fmt: skip

BROKEN = [*MLX, *BITNET, *AQLM, *VPTQ, *METAL, *GEMMA, *SPQR, *EETQ, *HIGGS]


def stored(content) -> torch.Tensor:
    if isinstance(content, torch.Tensor):
        return content
    dtype, shape = content
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("row", BROKEN, ids=[row.id for row in BROKEN])
def test_is_refused(row, tmp_path):
    tensors = {name: stored(content) for name, content in row.tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(row.config))
    with pytest.raises(FormatError, match=row.error) as raised:
        inspect(tmp_path)
    assert "\n" not in str(raised.value)


def test_metal_layer_that_is_not_quantized_yet_counts_its_plain_weight():
    from transformers.integrations.metal_quantization import MetalLinear

    model = torch.nn.Module()
    model.layer = MetalLinear(64, 6, dtype=None, group_size=32)  # on its way to being quantized while it loads
    artifact = inspect(model)
    assert (artifact.tensor("layer.weight").scheme, artifact.logical_params) == ("plain", 6 * 64)
