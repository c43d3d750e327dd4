"""GPTQ checkpoints that cannot be read exactly: an error that names the tensor and what was expected, never a guess."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding
from pytest_quantcheck.schemes import gptq
from tests.cases.buffer_linear import live_layer
from tests.cases.gptq import MODULE, NOTHING, golden


def saved(tmp_path, case="act-order", change=None, **config):
    made = golden(case, **config)()
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

# The weight has 32 outputs and 96 inputs in 3 groups: qweight [12, 32], qzeros [3, 4], scales [3, 32], g_idx [96].
BROKEN = [
    ("no-scales", without("scales"), {}, r"layer.*has no `layer.scales` beside it"),
    ("no-qzeros", without("qzeros"), {}, r"layer.qweight: has no `layer.qzeros` beside it"),
    ("no-qweight", without("qweight"), {}, r"layer.qzeros: has no `layer.qweight` beside it"),
    ("scales-alone", lambda tensors: [tensors.pop(f"layer.{part}") for part in ("qweight", "qzeros", "g_idx")], {},
     r"layer.scales: has no `layer.qweight` beside it"),
    ("scales-of-other-width", put("scales", torch.ones(3, 40, dtype=F16)), {},
     r"layer.scales: F16 \[3, 40\] is not float scales, one for each of the 32 columns"),
    ("scales-of-integers", put("scales", torch.ones(3, 32, dtype=I32)), {}, r"layer.scales: I32"),
    ("zeros-of-other-groups", put("qzeros", torch.ones(2, 4, dtype=I32)), {},
     r"layer.qzeros: I32 \[2, 4\] is not I32 with 3 rows"),
    ("zeros-of-other-bits", put("qzeros", torch.ones(3, 3, dtype=I32)), {}, r"is not 4-bit GPTQ"),
    ("three-dimensions", put("qweight", torch.ones(12, 32, 1, dtype=I32)), {}, r"is not a matrix"),
    ("short-g-idx", put("g_idx", torch.zeros(80, dtype=I32)), {}, r"with qzeros \[3, 4\], g_idx \[80\] is not 4-bit"),
    ("float-g-idx", put("g_idx", torch.zeros(96)), {}, r"layer.g_idx: F32 \[96\] is not one group for each input"),
    ("config-of-other-bits", None, {"bits": 3}, r"I32 \[12, 32\] with .* is not 3-bit GPTQ"),
    ("config-of-other-group", None, {"group_size": 64}, r"has 3 groups \(not group_size 64 over 96 inputs\)"),
    ("config-of-other-format", None, {"checkpoint_format": "marlin"}, r"checkpoint_format is `marlin`"),
    ("auto-round-of-other-format", None, {"quant_method": "auto-round", "packing_format": "auto_round:fp8"},
     r"packing_format is `auto_round:fp8`"),
    ("config-of-other-method", None, {"quant_method": "awq"}, r"quant_method"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "config", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_weight_is_an_error_that_names_it(tmp_path, change, config, message):
    with pytest.raises(FormatError, match=message):
        inspect(saved(tmp_path, change=change, **config))


UNDECIDED = [
    ("zero-points", "v1-4bit", None, NOTHING, r"layer.weight: zero points may be stored as they are or less one"),
    ("old-auto-round-backend", "v1-4bit", None,
     {"quant_method": "intel/auto-round", "backend": "autoround:exllamav2", "checkpoint_format": None},
     r"layer.weight: zero points may be stored as they are or less one"),
    ("planes", "planes-6bit", None, NOTHING, r"layer.weight: 6-bit codes may run on as a stream or lie in planes"),
    ("group-size", "act-order", without("g_idx"), {"sym": True} | dict.fromkeys(("group_size",)), None),
    ("group-out-of-range", "act-order", put("g_idx", torch.full((96,), 3, dtype=I32)), {},
     r"layer.g_idx: names groups 3 to 3 \(0 to 2 have scales\)"),
    ("negative-group", "act-order", put("g_idx", torch.full((96,), -1, dtype=I32)), {}, r"names groups -1 to -1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change", "config", "message"), [row[1:] for row in UNDECIDED], ids=[row[0] for row in UNDECIDED]
)
def test_what_nothing_decides_is_counted_and_not_decoded(tmp_path, case, change, config, message):
    tensor = inspect(saved(tmp_path, case, change, **config)).tensor("layer.weight")
    assert tensor.params == 32 * (96 if case == "act-order" else 64)
    if message is None:
        assert tensor.block == 32  # three groups of 96 inputs: only 32 is a power of two
        return
    with pytest.raises(FormatError, match=message):
        tensor.decode()


def test_both_readings_of_asymmetric_zero_points_are_offered(tmp_path):
    made = golden("v1-4bit")()
    tensor = inspect(saved(tmp_path, "v1-4bit")).tensor("layer.weight")
    assert (tensor.layout.decided_by, tensor.layout.zero_offset) == ("label", 1)
    best, other = gptq.readings(tensor)
    assert torch.equal(best.decode(), made.values.float())
    assert (best.layout.zero_offset, other.layout.zero_offset) == (1, 0)
    assert not torch.equal(other.decode(), best.decode())


def test_the_data_outvotes_a_label_that_lies(tmp_path):
    tensor = inspect(saved(tmp_path, "v2-under-v1-label")).tensor("layer.weight")
    assert (tensor.layout.decided_by, tensor.layout.zero_offset) == ("data", 0)
    assert gptq.readings(tensor) == (tensor,)


def test_a_kernel_that_repacks_its_codes_is_counted_and_not_decoded():
    tensors = {"qweight": torch.zeros(6, 64, dtype=I32), "qzeros": torch.zeros(0, dtype=I32),
               "scales": torch.ones(3, 32, dtype=F16)}  # fmt: skip
    model = live_layer(tensors, "MarlinLinear", MODULE, bits=4, group_size=32, in_features=96)
    tensor = inspect(model).tensor("layer.weight")
    assert tensor.shape == (32, 96)
    with pytest.raises(NotDecodable, match="may be repacked for `MarlinLinear`"):
        tensor.decode()


def test_the_conv1d_of_gpt2_is_known_to_be_transposed(tmp_path):
    made = golden("v1-4bit", name="c_attn")()
    safetensors.torch.save_file(made.tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(made.config | {"model_type": "gpt2"}))
    tensor = inspect(tmp_path).tensor("c_attn.weight")
    assert (tensor.shape, tensor.transposed) == ((32, 64), True)


@pytest.mark.parametrize(("kernel", "tensors"), [("TorchInt8Linear", {}), ("TorchFusedLinear", {"qweight": None})])
def test_a_kernel_that_replaced_its_codes_is_an_error_and_not_a_zero(kernel, tensors):
    model = live_layer(tensors, kernel, MODULE, in_features=96, out_features=32)
    with pytest.raises(UnknownEncoding, match=f"`{kernel}` has replaced its `qweight`"):
        inspect(model)


def test_a_model_on_meta_is_counted():
    made = golden("v2-under-v1-label")()
    tensor = inspect(made.live.to("meta")).tensor("layer.weight")
    assert tensor.shape == (32, 64)
    with pytest.raises(FormatError, match="meta"):
        tensor.decode()
