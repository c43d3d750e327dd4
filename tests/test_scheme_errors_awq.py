"""AWQ and Marlin checkpoints that cannot be read exactly: an error that names the tensor, never a guess."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError, NotDecodable
from tests.cases.awq import NOTHING, golden, marlin_of_gptq
from tests.cases.buffer_linear import live_layer


def saved(tmp_path, made, change=None):
    tensors = dict(made.tensors)
    if change:
        change(tensors)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                                tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    return tmp_path


def without(part):
    return lambda tensors: tensors.pop(f"layer.{part}")


def put(part, tensor):
    return lambda tensors: tensors.__setitem__(f"layer.{part}", tensor)


I32, F16 = torch.int32, torch.float16

# gemm: 40 outputs, 48 inputs in 3 groups; gemv: 40 and 96 in 3, padded to 32; gemv_fast: 24 and 192 in 3, padded to 16.
BROKEN = [
    ("gemm-no-scales", golden("gemm-4bit"), without("scales"), r"layer.qweight: has no `layer.scales` beside it"),
    ("gemm-no-qzeros", golden("gemm-4bit"), without("qzeros"), r"layer.qweight: has no `layer.qzeros` beside it"),
    ("gemm-no-qweight", golden("gemm-4bit"), without("qweight"), r"layer.qzeros: has no `layer.qweight` beside it"),
    ("gemm-scales-alone", golden("gemm-4bit"),
     lambda tensors: [tensors.pop("layer.qweight"), tensors.pop("layer.qzeros")],
     r"layer.scales: has no `layer.qweight` beside it"),
    ("gemm-zeros-of-other-width", golden("gemm-4bit"), put("qzeros", torch.ones(3, 4, dtype=I32)),
     r"layer.qweight: fits no layout of quant_method `awq`"),
    ("gemm-scales-of-other-width", golden("gemm-4bit"), put("scales", torch.ones(3, 41, dtype=F16)),
     r"layer.qweight: I32 \[48, 5\] with 41 outputs is not 4-bit AWQ"),
    ("gemm-other-bits", golden("gemm-4bit", bits=3), None, r"with 40 outputs is not 3-bit AWQ"),
    ("gemm-other-group", golden("gemm-4bit", group_size=24), None,
     r"layer.scales: has 3 rows \(not groups of 24 over 48 inputs\)"),
    ("gemm-unequal-groups", golden("gemm-4bit"),
     lambda tensors: [put("qzeros", torch.ones(5, 5, dtype=I32))(tensors),
                      put("scales", torch.ones(5, 40, dtype=F16))(tensors)],
     r"layer.scales: has 5 rows \(not groups of 16 over 48 inputs\)"),
    ("gemm-labelled-gptq", golden("gemm-4bit", quant_method="gptq", version=None), None,
     r"layer.scales: .* is not float scales, one for each of the 5 columns"),
    ("gemv-other-group", golden("gemv", group_size=128), None,
     r"layer.scales: \[40, 32\] holds 32 groups \(not groups of 128 over 96 inputs, padded\)"),
    ("gemv-fast-no-scales", golden("gemv-fast"), without("scales"), r"layer.qweight: has no `layer.scales` beside it"),
    ("gemv-fast-no-zeros", golden("gemv-fast"), without("qzeros"), r"layer.qweight: has no `layer.qzeros`"),
    ("gemv-fast-other-group", golden("gemv-fast", group_size=128), None, r"holds 16 groups \(not groups of 128"),
    ("gemv-fast-other-zeros", golden("gemv-fast"), put("qzeros", torch.ones(8, 24, dtype=F16)),
     r"layer.qzeros: \[8, 24\] is not \[16, 24\], the shape of `scales`"),
    ("gemv-fast-other-scales", golden("gemv-fast"), put("scales", torch.ones(16, 20, dtype=F16)),
     r"layer.scales: F16 \[16, 20\] is not float scales, a column for each of 24 outputs"),
    ("marlin-other-width", marlin_of_gptq, put("B", torch.ones(3, 64, dtype=I32)), r"layer.B: I32 \[3, 64\] is not"),
    ("marlin-unequal-groups", marlin_of_gptq, put("s", torch.ones(5, 64, dtype=F16)),
     r"layer.s: has 5 rows \(not equal groups of 48 inputs\)"),
    ("marlin-no-scales", marlin_of_gptq, without("s"), r"layer.B: I32 \[3, 128\] is an encoding that no scheme claims"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_weight_is_an_error_that_names_it(tmp_path, make, change, message):
    with pytest.raises(FormatError, match=message):
        inspect(saved(tmp_path, make(), change))


def test_an_interleave_that_nothing_says_is_not_decoded(tmp_path):
    tensor = inspect(saved(tmp_path, golden("gemm-6bit", **NOTHING)())).tensor("layer.weight")
    assert tensor.shape == (40, 48)
    with pytest.raises(NotDecodable, match="6-bit codes may be interleaved or not, and no config says which"):
        tensor.decode()


def test_a_kernel_that_repacks_its_codes_is_counted_and_not_decoded():
    tensors = {"qweight": torch.zeros(6, 64, dtype=I32), "qzeros": torch.zeros(3, 4, dtype=I32),
               "scales": torch.ones(3, 32, dtype=F16)}  # fmt: skip
    module = "gptqmodel.nn_modules.qlinear.marlin_awq"
    model = live_layer(tensors, "AwqMarlinLinear", module, bits=4, group_size=32, in_features=96)
    tensor = inspect(model).tensor("layer.weight")
    assert (tensor.scheme, tensor.shape) == ("awq", (32, 96))
    with pytest.raises(NotDecodable, match="may be repacked for `AwqMarlinLinear`"):
        tensor.decode()


def test_scales_of_an_activation_are_weighed_and_never_count(tmp_path):
    made = golden("gemm-4bit")()
    made.tensors["act.scales"] = torch.ones(48, dtype=F16)
    artifact = inspect(saved(tmp_path, made))
    assert artifact.logical_params == 40 * 48
    assert artifact.tensor("act.scales").role == "part"
    assert sum(artifact.bytes.values()) == artifact.file_bytes
