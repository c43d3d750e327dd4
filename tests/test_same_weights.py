"""Saved and live, copied and moved: every part bit-equal, and where it is not, which part and which byte."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
from torch import nn

from pytest_quantcheck import assert_same_weights, inspect
from pytest_quantcheck.checks import same_weights
from tests import models
from tests.cases import all_cases
from tests.scheme_table import saved as saved_row

# Rows whose live side was made with another activation scale than the saved one.
UNLIKE = {"fp8-per-tensor-static", "fp8-per-tensor-autofp8", "fbgemm-linear", "fbgemm-gate-up", "fbgemm-down"}
# aqlm compiles its kernel before the first forward, which takes longer than all other rows together.
CASES = [case for case in all_cases() if case.id not in UNLIKE and not case.id.endswith("-after-first-forward")]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_layout_is_the_same_live_and_on_disk(case, tmp_path):
    """A layout that has one form only is the same as itself."""
    made = case.make()
    forms = [] if made.live is None else [made.live]
    if made.tensors is not None or made.write is not None:
        forms.append(saved_row(made, tmp_path))
    assert_same_weights(forms[0], forms[-1])
    assert_same_weights(forms[-1], forms[0])


def nf4(rows: int = 33, columns: int = 100, *, seed: int = 0, nested: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight.data = torch.randn(rows, columns)
    return layer.to("cpu")


def int8(rows: int = 33, columns: int = 100) -> nn.Module:
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False).to("cpu")


# Whole models, through every way that weights go.


@pytest.mark.parametrize("quantization", [models.NF4, models.INT8, {}], ids=["nf4", "int8", "plain"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_models_survive_saving_loading_copying_and_moving(kind, quantization, saved, tmp_path):
    model = models.load(saved(kind), **quantization)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, tmp_path)
    assert_same_weights(tmp_path, models.load(tmp_path))
    assert_same_weights(model, models.load(tmp_path))
    assert_same_weights(copy.deepcopy(model), model)
    assert_same_weights(copy.deepcopy(model).to("cpu").to("cpu"), tmp_path)


def test_experts_that_transformers_fuses_in_memory_are_those_on_disk(saved, tmp_path):
    """transformers 5 keeps a stack of experts in memory and writes them one by one, under Mixtral's names."""
    model = models.load(saved("mixtral"), **models.NF4)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, models.load(tmp_path))
    assert_same_weights(model, tmp_path)
    assert_same_weights(tmp_path, model)
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.data[2, 100, 7] += 1
    different = r"layers.1.mlp.experts.gate_up_proj: 1 of 49,152 decoded values differ, by at most"
    with pytest.raises(AssertionError, match=different):
        assert_same_weights(model, tmp_path)
    with pytest.raises(AssertionError, match=r"experts.2.w3.weight: 1 of 6,144 decoded values differ"):
        assert_same_weights(tmp_path, model)
    experts.half()
    with pytest.raises(AssertionError, match=r"experts.down_proj: is fused on one side only \(4 parts there\)"):
        assert_same_weights(model, tmp_path)
    del experts.gate_up_proj
    with pytest.raises(AssertionError, match=r"experts.0.w1.weight: plain 96 x 64 is on the second side only"):
        assert_same_weights(model, tmp_path)


def test_int8_is_the_same_after_its_first_forward():
    layer = int8()
    before = copy.deepcopy(layer)
    layer(torch.randn(2, 100))
    assert layer.weight.SCB is None
    assert_same_weights(before, layer)


# What must be seen.


def state(layer):
    return layer.weight.quant_state


def flip_a_code(layer):
    layer.weight.data[17] ^= 0x0F


def raise_absmax(layer):
    state(layer).absmax[5] += 1


def raise_nested_absmax(layer):
    state(layer).state2.absmax[0] *= 2


def move_offset(layer):
    state(layer).offset = state(layer).offset.to(torch.bfloat16)


def change_table(layer):
    state(layer).code = state(layer).code.clone()
    state(layer).code[3] = 0.5


def cast_table(layer):
    state(layer).code = state(layer).code.to(torch.float16)


def stale_state(layer):
    """What bitsandbytes does with `strict=False`: the codes are loaded, the statistics stay those of before."""
    codes, layer.weight.data = layer.weight.data, nf4(seed=1).weight.data
    layer.load_state_dict(nf4(seed=1).state_dict(), strict=False)
    assert not torch.equal(layer.weight.data, codes)


FAULTS = [
    (flip_a_code, r"`weight`: 1 of 1,650 bytes differ, the first at byte 17 \(0x.. and 0x..\)"),
    (raise_absmax, r"`absmax`: 1 of 52 bytes differ, the first at byte 5 "),
    (raise_nested_absmax, r"`nested_absmax`: 2 of 4 bytes differ, the first at byte 2 "),
    (move_offset, r"is laid out differently \(nested_offset [\d.]+ and [\d.]+\), and [\d,]+ of 3,300 decoded values"),
    (change_table, r"`quant_map`: \d of 64 bytes differ, the first at byte 1"),
    (cast_table, r"`quant_map` is F32 \[16\] on one side, F16 \[16\] on the other"),
    (stale_state, r"`weight`: [\d,]+ of 1,650 bytes differ"),
]


@pytest.mark.parametrize("on_disk", [False, True], ids=["live", "saved"])
@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_each_part_that_changed_is_named(fault, message, on_disk, tmp_path):
    layer = nf4()
    before = copy.deepcopy(layer)
    if on_disk:
        safetensors.torch.save_file(layer.state_dict(), tmp_path / "model.safetensors")
        before = tmp_path / "model.safetensors"
    fault(layer)
    with pytest.raises(AssertionError, match=message) as caught:
        assert_same_weights(before, layer)
    assert str(caught.value).splitlines()[0].endswith("compared, 1 wrong")


def test_a_state_that_load_state_dict_leaves_behind_is_seen():
    """`strict=False` takes the codes of the other layer and keeps the statistics of this one, without a word."""
    trained, fresh = nf4(seed=1), nf4(seed=2)
    fresh.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(trained.weight.data, fresh.weight.data)
    with pytest.raises(AssertionError, match="`absmax`") as caught:
        assert_same_weights(trained, fresh)
    assert "`nested_absmax`" in str(caught.value)


def module(**tensors: torch.Tensor) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(name, nn.Parameter(tensor))
    return made


ONE_SIDED = [
    (module(a=torch.ones(3, 5), b=torch.ones(2)), module(a=torch.ones(3, 5)), "b: plain 2 is on the first side only"),
    (module(a=torch.ones(3, 5)), module(a=torch.ones(3, 5), b=torch.ones(2)), "b: plain 2 is on the second side only"),
    (module(a=torch.ones(3, 5)), module(a=torch.ones(5, 3)), "a: is 3 x 5 on one side, 5 x 3 on the other"),
    (module(a=torch.ones(3, 5)), module(a=torch.ones(3, 5).half()), r"`weight` is F32 \[3, 5\] on one side, F16"),
    (module(a=torch.zeros(3, 5)), module(a=-torch.zeros(3, 5)), "`weight`: 15 of 60 bytes differ, the first at byte 3"),
    (module(), module(), "no weight was compared"),
    (nf4(), module(weight=torch.ones(33, 100)), "is bnb-nf4 on one side, plain on the other"),
]


@pytest.mark.parametrize(("one", "other", "message"), ONE_SIDED, ids=[row[2][:40] for row in ONE_SIDED])
def test_what_is_on_one_side_only_fails(one, other, message):
    with pytest.raises(AssertionError, match=message):
        assert_same_weights(one, other)


def test_tensors_can_be_left_out():
    one, other = module(a=torch.ones(3), head=torch.ones(2)), module(a=torch.ones(3))
    assert_same_weights(one, other, skip=["head"])
    with pytest.raises(AssertionError, match="no weight was compared"):
        assert_same_weights(one, other, skip=["*"])


def test_nan_is_the_same_as_itself():
    one = module(a=torch.full((3, 5), float("nan")))
    assert_same_weights(one, copy.deepcopy(one))


def test_a_weight_without_values_is_not_the_same():
    with pytest.raises(AssertionError, match=r"cannot be compared: .*meta device"):
        assert_same_weights(module(a=torch.ones(3)), module(a=torch.ones(3, device="meta")))


def test_a_difference_behind_the_first_window_is_found(monkeypatch):
    monkeypatch.setattr(same_weights, "WINDOW", 64)
    values = torch.arange(1000, dtype=torch.int16).view(torch.bfloat16)
    other = values.clone().view(torch.int16)
    other[[700, 900]] ^= 1
    with pytest.raises(AssertionError, match="2 of 2,000 bytes differ, the first at byte 1,400 "):
        assert_same_weights(module(a=values), module(a=other.view(torch.bfloat16)))


def test_a_weight_repacked_by_its_first_forward_says_so():
    """AVX512-BF16: bitsandbytes rewrites the live weight, and its scales lose 16 bits."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    layer = nf4(64, 128, nested=False).eval()
    before = copy.deepcopy(layer)
    layer(torch.randn(2, 128))
    with pytest.raises(AssertionError) as caught:
        assert_same_weights(before, layer)
    message = str(caught.value)
    assert "is laid out differently (packed_for_cpu False and True), and " in message
    assert "`absmax` is F32 [128] on one side, BF16 [2, 64] on the other" in message
    assert inspect(layer).tensor("weight").decode().isfinite().all()
