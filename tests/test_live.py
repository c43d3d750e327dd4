"""Live models: counted by what they are, not by how they are stored; the same live and on disk."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import QuantState
from torch import nn

from pytest_quantcheck import (
    FormatError,
    NotDecodable,
    UnknownEncoding,
    assert_dequant_fidelity,
    assert_logical_params,
    assert_quantized_fraction,
    assert_trainable_params,
    count_params,
    inspect,
    logical_numel,
)
from tests import models

KINDS = ["llama", "llama-tied", "mixtral", "gpt2"]
QUANTIZATIONS = {"nf4": models.NF4, "int8": models.INT8}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_count_unquantized_live_and_on_disk(kind, quantization, saved, tmp_path):
    truth = models.parameters(kind)
    assert count_params(saved(kind)) == truth
    model = models.load(saved(kind), **QUANTIZATIONS[quantization])
    assert count_params(model) == truth
    model.save_pretrained(tmp_path)
    assert count_params(tmp_path) == truth
    live, disk = inspect(model), inspect(tmp_path)
    assert live.schemes.keys() == disk.schemes.keys()
    assert live.quantized_params == disk.quantized_params > 0
    assert live.bytes["codes"] == disk.bytes["codes"]
    assert_dequant_fidelity(tmp_path, saved(kind))
    assert_dequant_fidelity(model, saved(kind))


def test_gpt2_keeps_its_matrices_the_other_way_round(saved):
    """Conv1D is [in, out]; bitsandbytes stores [out, in]. A square one decodes transposed without any error."""
    artifact = inspect(models.load(saved("gpt2"), **models.NF4))
    square = artifact.tensor("transformer.h.0.attn.c_proj.weight")
    assert square.shape == (64, 64)
    assert square.transposed
    assert artifact.tensor("transformer.h.0.mlp.c_fc.weight").shape == (96, 64)


def test_naive_counts_lie_and_ours_does_not(saved):
    model = models.load(saved("llama"), **models.NF4)
    naive = sum(parameter.numel() for parameter in model.parameters())
    assert naive == inspect(model).stored_elements < count_params(model) == models.parameters("llama")
    with pytest.raises(AssertionError, match="what numel\\(\\) over packed weights gives"):
        assert_logical_params(model, naive)


def test_a_missing_decoder_layer_fails_and_is_named(saved):
    model = models.load(saved("llama"), **models.NF4)
    expected = count_params(model)
    del model.model.layers[1]
    with pytest.raises(AssertionError) as caught:
        assert_logical_params(model, expected)
    assert "exactly 1 layer of `model.layers`" in str(caught.value)
    assert "has 2 layers, config.json says 3" in str(caught.value)


def test_21_weights_where_transformers_says_22():
    layer = bnb.nn.Linear4bit(3, 7, bias=False, quant_type="nf4").to("cpu")
    assert 2 * layer.weight.numel() * layer.weight.element_size() == 22  # the rule of num_parameters() and of PEFT
    assert count_params(layer) == logical_numel(layer.weight) == 21


def test_experts_that_bitsandbytes_skipped_are_seen(saved):
    model = models.load(saved("mixtral"), **models.NF4)
    assert_logical_params(model, models.parameters("mixtral"))
    with pytest.raises(AssertionError) as caught:
        assert_quantized_fraction(model, min=0.9)
    message = str(caught.value)
    assert "largest tensors left unquantized" in message
    assert message.splitlines()[2].strip().startswith("model.layers.")
    assert "experts" in message.splitlines()[2]


def test_a_model_that_was_not_quantized_at_all_is_seen(saved):
    """transformers 5.17 replaces `nn.Linear` itself only, so Falcon's own subclass is passed over without a word."""
    model = models.load(saved("falcon"), **models.NF4)
    assert_logical_params(model, models.parameters("falcon"))
    with pytest.raises(AssertionError, match="quantized fraction: 0"):
        assert_quantized_fraction(model, min=0.5)


# Falcon-7B itself, on the meta device, with the classes bitsandbytes makes and no byte of weights.


def to_nf4_on_meta(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child).__name__ not in ("Linear", "FalconLinear") or name == "lm_head":
            to_nf4_on_meta(child)
            continue
        rows, columns = child.weight.shape
        state = QuantState(
            torch.empty(rows * columns // 64, device="meta"),
            torch.Size((rows, columns)),
            torch.empty(16, device="meta"),
            64,
            "nf4",
            torch.bfloat16,
        )
        layer = bnb.nn.Linear4bit(columns, rows, bias=child.bias is not None, quant_type="nf4", device="meta")
        codes = torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device="meta")
        layer.weight = bnb.nn.Params4bit(
            codes, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
        )
        setattr(module, name, layer)


@pytest.fixture(scope="module")
def falcon():
    config = transformers.FalconConfig(vocab_size=65025, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71)
    with torch.device("meta"):
        model = transformers.FalconForCausalLM(config)
    before = sum(parameter.numel() for parameter in model.parameters())
    to_nf4_on_meta(model)
    return model, before


def test_falcon_live_counts_the_same_before_and_after(falcon):
    model, before = falcon
    assert before == count_params(model) == 6_921_725_248
    assert inspect(model).tied_params == 65025 * 4544
    assert sum(parameter.numel() for parameter in model.parameters()) == inspect(model).stored_elements == 3_608_749_376


def test_frozen_because_packed_is_told_from_frozen_by_choice(falcon):
    model, _ = falcon
    embedding = 65025 * 4544
    assert_trainable_params(model, 6_921_725_248 - 32 * 207_060_992)
    model.transformer.word_embeddings.weight.requires_grad_(False)
    try:
        with pytest.raises(AssertionError) as caught:
            assert_trainable_params(model, 6_921_725_248)
    finally:
        model.transformer.word_embeddings.weight.requires_grad_(True)
    message = str(caught.value)
    assert f"frozen because packed: {32 * 207_060_992:,}" in message
    assert f"frozen by choice: {embedding:,}" in message
    assert count_params(model, trainable=True) + count_params(model, trainable=False) == 6_921_725_248


def test_meta_tensors_count_and_do_not_decode(falcon):
    model, _ = falcon
    with pytest.raises(FormatError, match="meta device"):
        inspect(model).tensor("transformer.h.0.mlp.dense_h_to_4h.weight").decode(0, 1)


# PEFT: base and adapters told apart.


@pytest.fixture
def llama(saved):
    return models.load(saved("llama"), **models.NF4)


def test_lora_adapters_are_told_from_the_base(llama):
    base = count_params(llama)
    model = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    artifact = inspect(model)
    adapters = 3 * 4 * ((64 + 64) + (64 + 96))
    assert artifact.adapter_params == adapters == artifact.trainable_params
    assert artifact.logical_params == base + adapters
    assert_trainable_params(model, adapters)
    assert artifact.tensor("model.layers.0.self_attn.q_proj.weight").role == "parameter"
    with pytest.raises(AssertionError, match="leaves out the adapters"):
        assert_logical_params(model, base)


def test_a_copy_made_by_modules_to_save_counts_once(llama):
    base = count_params(llama)
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    artifact = inspect(model)
    assert artifact.logical_params - artifact.adapter_params == base
    assert artifact.tensor("lm_head.weight").trainable
    assert artifact.bytes["dead"] == 131 * 64 * 2


def test_two_adapters_and_prompts_count_as_adapters(llama):
    base = count_params(llama)
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    assert inspect(model).adapter_params == 3 * 128 * (2 + 3)
    assert count_params(model) - inspect(model).adapter_params == base


def test_merging_an_adapter_leaves_the_base(saved):
    model = models.load(saved("llama"))
    base = count_params(model)
    merged = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    assert (count_params(merged), inspect(merged).adapter_params) == (base, 0)


# Ties and odd modules.


def tied_modules() -> nn.Module:
    shared = nn.Linear(5, 7, bias=False)
    return nn.ModuleDict({"a": shared, "b": shared})


def tied_parameters() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(5, 7, bias=False), "b": nn.Linear(5, 7, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def tied_storage() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(5, 7, bias=False), "b": nn.Linear(5, 7, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    return model


def tied_to_a_buffer() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Linear(5, 7, bias=False)})
    model["a"].register_buffer("view", model["b"].weight.detach())
    return model


def tied_quantized() -> nn.Module:
    layer = bnb.nn.Linear4bit(5, 7, bias=False).to("cpu")
    other = bnb.nn.Linear4bit(5, 7, bias=False)
    other.weight = layer.weight
    return nn.ModuleDict({"a": layer, "b": other, "c": layer})


@pytest.mark.parametrize("make", [tied_modules, tied_parameters, tied_storage, tied_to_a_buffer, tied_quantized])
def test_tied_weights_count_once(make):
    artifact = inspect(make())
    assert artifact.logical_params == 35
    assert artifact.tied_params in (35, 70) or make is tied_to_a_buffer
    assert artifact.tensor("b.weight").params == 35


def test_buffers_never_count():
    model = nn.BatchNorm1d(6)
    model.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool), persistent=False)
    artifact = inspect(model)
    assert (artifact.logical_params, artifact.buffers) == (12, 6 + 6 + 1 + 9)


def test_a_weight_that_lost_its_state_for_good_is_counted_and_not_decoded():
    layer = bnb.nn.Linear4bit(64, 24, bias=False).to("cpu")
    layer.weight, layer.quant_state = nn.Parameter(layer.weight.data, requires_grad=False), None
    artifact = inspect(layer)
    assert artifact.logical_params == 24 * 64
    with pytest.raises(NotDecodable, match="lost its quant_state"):
        artifact.tensors[0].decode()


def test_a_meta_weight_still_to_be_quantized_is_not_doubled():
    layer = bnb.nn.Linear4bit(64, 24, bias=False, device="meta")
    layer.weight = bnb.nn.Params4bit(torch.empty(24, 64, dtype=torch.uint8, device="meta"), requires_grad=False)
    assert count_params(layer) == 24 * 64


def test_int8_without_its_scale_is_counted_and_not_decoded():
    layer = bnb.nn.Linear8bitLt(33, 12, bias=False, has_fp16_weights=False).to("cpu")
    layer.weight.SCB = None
    assert count_params(layer) == 33 * 12
    with pytest.raises(NotDecodable, match="the scale is gone"):
        inspect(layer).tensors[0].decode()


def test_what_nobody_knows_is_an_error_that_names_it():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnknownEncoding, match=r"weight: U8 \[8, 1\] is an encoding that no scheme claims"):
        inspect(model)
    with pytest.raises(TypeError, match="neither a path nor a torch"):
        inspect(42)


def test_trainable_is_unknown_for_files(saved):
    with pytest.raises(ValueError, match="live models only"):
        count_params(saved("llama"), trainable=True)
    with pytest.raises(ValueError, match="live models only"):
        assert_trainable_params(saved("llama"), 1)
