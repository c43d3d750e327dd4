"""What a 4-bit release of all-MiniLM-L6-v2 has to keep."""

import pytest

from pytest_quantcheck import (
    assert_bits_per_weight,
    assert_checkpoint_intact,
    assert_dequant_fidelity,
    assert_logical_params,
    assert_not_quantized,
    assert_quantized,
    assert_size_budget,
)

pytestmark = pytest.mark.quantized(".demo/minilm-nf4")


def test_no_parameter_was_lost(quantized_model):
    assert_logical_params(quantized_model, 22_713_216)  # sum(p.numel() ...) says 17,331,072


def test_the_files_hold_the_same_model(quantized_checkpoint):
    assert_logical_params(quantized_checkpoint, "22.71M")
    assert_checkpoint_intact(quantized_checkpoint)


def test_linears_are_quantized_and_embeddings_are_not(quantized_model):
    assert_quantized(quantized_model, "encoder.*", "pooler.*")
    assert_not_quantized(quantized_model, "embeddings.*")


def test_weights_still_mean_what_they_meant(quantized_model):
    assert_dequant_fidelity(quantized_model, ".demo/minilm")


def test_the_release_fits(quantized_checkpoint):
    assert_size_budget(quantized_checkpoint, "54 MB")
    assert_bits_per_weight(quantized_checkpoint, max=4.2)
