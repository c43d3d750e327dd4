"""Broken torchao checkpoints: each row says what the error must name."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError

U8 = torch.uint8
INT8 = {"layer._weight_qdata": torch.zeros(4, 6, dtype=torch.int8), "layer._weight_scale": torch.ones(4, 1)}
NVFP4 = {
    "layer._weight_qdata": torch.zeros(4, 16, dtype=U8),
    "layer._weight_scale": torch.zeros(4, 2).to(torch.float8_e4m3fn),
}
INT4 = {
    "layer._weight_qdata": torch.zeros(4, 16, dtype=torch.int8),
    "layer._weight_scale": torch.zeros(2, 4),
    "layer._weight_zero_point": torch.zeros(2, 4),
}


def entry(kind: str, parts: str = "qdata scale", **attributes) -> dict[str, str]:
    said = {"_type": kind, "_data": attributes, "_tensor_data_names": parts.split()}
    return {"layer.weight": json.dumps(said), "tensor_names": '["layer.weight"]'}


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


ROW, FP4 = entry("Int8Tensor", block_size=[1, 6]), entry("NVFP4Tensor", block_size=16)
TRIPLE = "qdata scale zero_point"
INT9 = entry("IntxUnpackedToInt8Tensor", block_size=[1, 6], target_dtype={"_data": "int9"})

ROWS = [
    ("no-metadata", INT8, {}, "layer.weight: .*no entry in `__metadata__`"),
    ("metadata-is-no-json", INT8, {"layer.weight": "{"}, "layer.weight: not JSON"),
    ("metadata-is-no-entry", INT8, {"layer.weight": "{}"}, "layer.weight: its torchao metadata has not `_type`"),
    ("no-scale", without(INT8, "layer._weight_scale"), ROW, "layer.weight: .*has no `layer._weight_scale`"),
    ("no-qdata", without(INT8, "layer._weight_qdata"), ROW, "layer._weight_scale: .*part of an encoded weight"),
    ("qdata-not-declared", INT8, entry("Int8Tensor", "scale", block_size=[1, 6]), "has no `layer._weight_qdata`"),
    ("unknown-class", INT8, entry("NoSuchTensor", block_size=[1, 6]), "part of an encoded weight"),
    ("int8-dtype", INT8 | {"layer._weight_qdata": torch.zeros(4, 6, dtype=U8)}, ROW, "U8 is no code of a Int8Tensor"),
    ("int8-block", INT8, entry("Int8Tensor", block_size=[1, 4]), "does not divide into blocks"),
    ("int8-block-is-no-size", INT8, entry("Int8Tensor", block_size="row"), "`block_size` is `row`, not sizes"),
    ("int8-scales", INT8 | {"layer._weight_scale": torch.ones(3, 1)}, ROW, "layer._weight_scale: .*one value for"),
    ("intx-target", INT8, INT9, "the target dtype `int9`"),
    ("nvfp4-scales", NVFP4 | {"layer._weight_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, FP4, "one value for"),
    ("nvfp4-scale-dtype", NVFP4 | {"layer._weight_scale": torch.zeros(4, 2)}, FP4, "F32 is not the F8_E4M3"),
    ("nvfp4-lies-about-swizzle", NVFP4, entry("NVFP4Tensor", block_size=16, is_swizzled_scales=True), r"\[128, 4\]"),
    ("nvfp4-block", NVFP4, entry("NVFP4Tensor", block_size=0), "block size `0`"),
    ("mx-element", NVFP4, entry("MXTensor", block_size=16, elem_dtype="fp5"), "element dtype `fp5`"),
    ("int4-shape", INT4, entry("Int4Tensor", TRIPLE, block_size=[1, 16], shape=[4, 30]), "declares the shape"),
    ("int4-group", INT4, entry("Int4Tensor", TRIPLE, block_size=[1, 12]), "does not divide into groups"),
    ("int4-zero-points", INT4, entry("Int4Tensor", block_size=[1, 16]), "no `layer._weight_zero_point`"),
]  # fmt: skip


def saved(tensors, metadata, folder):
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(copies, folder / "model.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize(("tensors", "metadata", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_names_the_fault(tensors, metadata, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        inspect(saved(tensors, metadata, tmp_path))


def test_sees_through_a_training_wrapper():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.quantized_training.int8_mixed_precision import Int8MixedPrecisionTrainingLinearWeight

    model = torch.nn.Module()
    weight = torch.randn(6, 40)
    model.weight = torch.nn.Parameter(Int8MixedPrecisionTrainingLinearWeight(weight, None))
    artifact = inspect(model)
    assert (artifact.tensor("weight").scheme, artifact.trainable_params) == ("plain", 240)
    assert torch.equal(artifact.tensor("weight").decode(), weight)
