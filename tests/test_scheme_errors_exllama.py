"""EXL2, EXL3, QQQ and BitBLAS that cannot be read exactly: an error that names the tensor, never a guess."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError
from tests.golden import file

I16, I32, F16, F32 = torch.int16, torch.int32, torch.float16, torch.float32


def saved(tmp_path, tensors, config):
    tensors = {f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def exl2(**change):
    """96 inputs and 40 outputs: 64 inputs of 5 bits in 10 rows of words, then 32 of 3 bits in 3."""
    return {
        "q_weight": torch.zeros(13, 40, dtype=I32),
        "q_invperm": torch.arange(96, dtype=I16),
        "q_scale": torch.zeros(2, 5, dtype=I32),
        "q_scale_max": torch.ones(2, dtype=F16),
        "q_groups": torch.tensor([5, 0, 3, 10], dtype=I16),
    } | change


def exl3(**change):
    return {
        "trellis": torch.zeros(8, 8, 48, dtype=I16),
        "suh": torch.ones(128, dtype=F16),
        "svh": torch.ones(128, dtype=F16),
    } | change


def qqq(**change):
    return {
        name.removeprefix("layer."): tensor for name, tensor in file.read("exllama")["qqq"].tensors.items()
    } | change


def bitblas(**change):
    """24 outputs, 64 inputs of 4 bits in two groups."""
    return {
        "qweight": torch.zeros(24, 32, dtype=torch.int8),
        "scales": torch.ones(24, 2, dtype=F16),
        "qzeros": torch.zeros(2, 12, dtype=torch.int8),
    } | change


def method(name, **more):
    return {"quantization_config": {"quant_method": name} | more}


BITBLAS = method("gptq", checkpoint_format="bitblas", bits=4)


def test_the_padding_of_an_output_head_does_not_count(tmp_path):
    """EXL3 rounds outputs up to 128; the vocabulary says how many there are."""
    tensors = {f"lm_head.{name}": tensor for name, tensor in exl3().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100} | method("exl3")))
    head = inspect(tmp_path).tensor("lm_head.weight")
    assert head.shape == (100, 128)
    assert head.decode(98).shape == (2, 128)


BROKEN = [
    ("exl2-no-order", exl2(q_invperm=None), method("exl2"), r"layer.q_weight: has no `layer.q_invperm` beside it"),
    ("exl2-no-scales", exl2(q_scale=None), method("exl2"), r"layer.q_weight: has no `layer.q_scale` beside it"),
    ("exl2-fewer-inputs", exl2(q_invperm=torch.arange(95, dtype=I16)), method("exl2"),
     r"layer.q_groups: has groups that hold 96 inputs \(95 in `q_invperm`"),
    ("exl2-zero-bits", exl2(q_groups=torch.tensor([0, 0, 3, 10], dtype=I16)), method("exl2"), r"layer.q_groups"),
    ("exl2-odd-groups", exl2(q_groups=torch.tensor([5, 0, 3], dtype=I16)), method("exl2"), r"layer.q_weight: .*EXL2"),
    ("exl3-no-input-scales", exl3(suh=None), method("exl3"), r"layer.trellis: has no `layer.suh` beside it"),
    ("exl3-fewer-output-scales", exl3(svh=torch.ones(64, dtype=F16)), method("exl3"),
     r"layer.svh: F16 \[64\] is not F16 \[128\]"),
    ("exl3-flat-trellis", exl3(trellis=torch.zeros(8, 384, dtype=I16)), method("exl3"),
     r"layer.trellis: I16 \[8, 384\] is not I16 \[K/16, N/16, 16\*bits\]"),
    ("exl3-no-trellis", exl3(trellis=None, mcg=torch.zeros((2,), dtype=I32)), method("exl3"), r"layer.mcg"),
    ("qqq-fewer-channels", qqq(s_channel=torch.ones(1, 32)), method("qqq"),
     r"layer.s_channel: F32 \[1, 32\] is not one float for each of 64 outputs"),
    ("qqq-unequal-groups", qqq(s_group=torch.ones(3, 64, dtype=F16)), method("qqq"),
     r"layer.s_group: F16 \[3, 64\] is not \[groups, 64\] floats, two or more equal groups of 128 inputs"),
    ("qqq-no-channel-scales", qqq(s_channel=None), method("qqq"), r"layer.B: I32 \[8, 128\] is an encoding"),
    ("bitblas-no-scales", bitblas(scales=None), BITBLAS, r"layer.qweight: has no matrix `layer.scales` beside it"),
    ("bitblas-no-bits", bitblas(), method("bitblas"), r"layer.qweight: needs one number of bits"),
    ("bitblas-other-bits", bitblas(), method("bitblas", bits=7), r"has 768 bytes \(whole rows of 7 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_weight_is_an_error_that_names_it(tmp_path, tensors, config, message):
    with pytest.raises(FormatError, match=message):
        inspect(saved(tmp_path, tensors, config))
