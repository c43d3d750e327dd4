"""PEFT over every quantized base that can be built here: base and adapters told apart, names as without PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_quantcheck import inspect

peft = pytest.importorskip("peft")

HIDDEN, INNER, VOCABULARY = 32, 48, 64
ATTENTION, MLP = 4 * HIDDEN * HIDDEN, 3 * HIDDEN * INNER
BASE = VOCABULARY * HIDDEN * 2 + ATTENTION + MLP + 3 * HIDDEN
RANK = 4
Q_AND_DOWN = RANK * (HIDDEN + HIDDEN) + RANK * (INNER + HIDDEN)  # LoRA over q_proj and down_proj


def plain() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=VOCABULARY, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _replaced(make) -> nn.Module:
    model = plain()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def bnb_four_bit() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(linear):
        layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    model = _replaced(make)
    model.is_loaded_in_4bit = True
    return model


def bnb_eight_bit() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(linear):
        layer = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    model = _replaced(make)
    model.is_loaded_in_8bit = True
    return model


def quanto(qtype: str):
    def make() -> nn.Module:
        library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        model = plain()
        library.quantize(model, weights=qtype, exclude="lm_head")
        library.freeze(model)
        return model

    return make


def torchao(configuration: str, **options):
    def make() -> nn.Module:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model = plain()
        library.quantize_(
            model,
            getattr(library, configuration)(**options),
            lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name,
        )
        return model

    return make


BASES = {
    "plain": (plain, "plain"),
    "bnb-nf4": (bnb_four_bit, "bnb-nf4"),
    "bnb-int8": (bnb_eight_bit, "bnb-int8"),
    "quanto-qint8": (quanto("qint8"), "quanto-qint8"),
    "quanto-qint4": (quanto("qint4"), "quanto-qint4"),
    "torchao-int8": (torchao("Int8WeightOnlyConfig", version=2), "torchao-int8"),
    "torchao-float8": (torchao("Float8WeightOnlyConfig"), "torchao-float8"),
}
each_base = pytest.mark.parametrize(("make", "scheme"), BASES.values(), ids=BASES)


def lora(**options):
    return peft.LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"], **options)


def names(artifact, *roles: str) -> set[str]:
    return {tensor.name for tensor in artifact.tensors if tensor.role in roles}


@each_base
def test_lora_is_told_apart_from_its_base(make, scheme):
    base = make()
    before = inspect(base)
    assert before.logical_params == BASE
    artifact = inspect(peft.get_peft_model(base, lora()))
    assert names(artifact, "parameter") == names(before, "parameter")
    assert (artifact.logical_params - artifact.adapter_params, artifact.adapter_params) == (BASE, Q_AND_DOWN)
    assert artifact.trainable_params == Q_AND_DOWN
    weight = artifact.tensor("model.layers.0.mlp.down_proj.weight")
    assert (weight.scheme, weight.shape) == (scheme, (HIDDEN, INNER))
    assert torch.equal(weight.decode(), before.tensor(weight.name).decode())


@each_base
def test_several_adapters_and_none_active(make, scheme):
    model = peft.get_peft_model(make(), lora())
    model.add_adapter("other", peft.LoraConfig(r=2 * RANK, target_modules=["q_proj", "down_proj"]))
    artifact = inspect(model)
    assert (artifact.logical_params - artifact.adapter_params, artifact.adapter_params) == (BASE, 3 * Q_AND_DOWN)
    with model.disable_adapter():
        assert inspect(model).adapter_params == 3 * Q_AND_DOWN


@each_base
def test_modules_to_save_stand_where_the_original_stood(make, scheme):
    model = peft.get_peft_model(make(), lora(modules_to_save=["lm_head"]))
    artifact = inspect(model)
    assert artifact.logical_params - artifact.adapter_params == BASE
    assert artifact.tensor("lm_head.weight").trainable
    assert names(artifact, "shadow") == {"lm_head.original_module.weight"}
    with model.disable_adapter():
        disabled = inspect(model)
    assert not disabled.tensor("lm_head.weight").trainable
    assert disabled.logical_params - disabled.adapter_params == BASE


@each_base
def test_trainable_tokens_are_an_adapter(make, scheme):
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 5, 7])
    artifact = inspect(peft.get_peft_model(make(), config))
    assert (artifact.logical_params - artifact.adapter_params, artifact.adapter_params) == (BASE, 3 * HIDDEN)
    assert artifact.tensor("model.embed_tokens.weight").shape == (VOCABULARY, HIDDEN)


def test_lora_with_trainable_tokens():
    artifact = inspect(peft.get_peft_model(plain(), lora(trainable_token_indices={"embed_tokens": [1, 5, 7]})))
    assert artifact.logical_params - artifact.adapter_params == BASE
    assert artifact.adapter_params == Q_AND_DOWN + 3 * HIDDEN
    assert artifact.tensor("model.embed_tokens.weight").role == "parameter"


@each_base
def test_prompt_tuning_is_an_adapter(make, scheme):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    artifact = inspect(peft.get_peft_model(make(), config))
    assert (artifact.logical_params - artifact.adapter_params, artifact.adapter_params) == (BASE, 6 * HIDDEN)


METHODS = {
    "dora": (lora(use_dora=True), Q_AND_DOWN + 2 * HIDDEN),
    "ia3": (peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), HIDDEN + INNER),
    "vera": (peft.VeraConfig(r=RANK, target_modules=["q_proj", "k_proj"]), 2 * (HIDDEN + RANK)),
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6), 6 * 2 * HIDDEN),
    "adaption-prompt": (
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=6, adapter_layers=1), 6 * HIDDEN + 1,
    ),
    "layer-norm": (peft.LNTuningConfig(target_modules=["input_layernorm"]), HIDDEN),
}  # fmt: skip


@pytest.mark.parametrize(("config", "adapter"), METHODS.values(), ids=METHODS)
def test_other_methods(config, adapter):
    before = names(inspect(plain()), "parameter")
    artifact = inspect(peft.get_peft_model(plain(), config))
    assert names(artifact, "parameter") == before
    assert (artifact.logical_params - artifact.adapter_params, artifact.adapter_params) == (BASE, adapter)


def test_lora_over_a_bare_parameter():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, values):
            return values @ self.stack

    model = nn.Sequential(Experts())
    artifact = inspect(peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_parameters=["0.stack"])))
    assert names(artifact, "parameter") == {"0.stack"}
    assert (artifact.logical_params, artifact.adapter_params) == (384 + 3 * RANK * 24, 3 * RANK * 24)


def test_unloaded_adapters_leave_the_base():
    model = peft.get_peft_model(plain(), lora()).merge_and_unload()
    assert (inspect(model).logical_params, inspect(model).adapter_params) == (BASE, 0)
