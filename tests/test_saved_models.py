"""Whole transformers models, quantized, saved and read back: live and on disk the same count, bytes and values."""

from __future__ import annotations

import pytest
import torch

from pytest_quantcheck import inspect

SIZES = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 96, "num_hidden_layers": 1}
LOGICAL = 2 * 96 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 3 * 64


@pytest.fixture
def source(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def assert_same(live, folder) -> None:
    saved = inspect(folder)
    assert live.logical_params == saved.logical_params == LOGICAL
    kinds = ("codes", "scales", "zero_points", "unquantized")
    assert {kind: live.bytes[kind] for kind in kinds} == {kind: saved.bytes[kind] for kind in kinds}
    for tensor in saved.parameters:
        assert torch.equal(live.tensor(tensor.name).decode(), tensor.decode())
        assert live.tensor(tensor.name).scheme == tensor.scheme


def int8(library):
    return library.Int8WeightOnlyConfig(version=2)


def intx(library):
    return library.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=library.PerGroup(32))


def float8(library):
    return library.Float8WeightOnlyConfig()


@pytest.mark.parametrize("configuration", [int8, intx, float8])
def test_torchao_through_transformers(configuration, source, tmp_path):
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = TorchAoConfig(configuration(library))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    live = inspect(model)
    assert live.quantized_fraction > 0.7
    assert_same(live, tmp_path / "saved")


@pytest.mark.parametrize("qtype", ["qint8", "qint4", "qint2", "qfloat8"])
def test_quanto_through_its_own_format(qtype, source, tmp_path):
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantized = library.QuantizedModelForCausalLM.quantize(model, weights=qtype, exclude="lm_head")
    quantized.save_pretrained(tmp_path / "saved")
    live = inspect(model)
    assert live.quantized_fraction > 0.7
    assert_same(live, tmp_path / "saved")
