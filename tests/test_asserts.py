"""Coverage, bits, sizes and trainable totals: what passes, what fails, and that the message says where and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pytest_quantcheck as q
from pytest_quantcheck.quantities import parse_count, parse_size

PASSES = [
    ("fraction-within", lambda m: q.assert_quantized_fraction(m, min=0.96, max=0.97)),
    ("bits-of-the-quantized", lambda m: q.assert_bits_per_weight(m, max=4.6, min=4.4)),
    ("bits-of-the-model", lambda m: q.assert_bits_per_weight(m, max=5.0, min=4.9, of="model")),
    ("size", lambda m: q.assert_size_budget(m, "4.46 GB")),
    ("size-in-GiB", lambda m: q.assert_size_budget(m, "4.2 GiB")),
    ("size-per-class", lambda m: q.assert_size_budget(m, per_class={"scales": "450 MB", "padding": 0})),
    ("size-per-weight", lambda m: q.assert_size_budget(m, bits_per_weight=5.0)),
    ("modules-by-glob", lambda m: q.assert_quantized(m, "*.q_proj", "model.layers.*.mlp.*")),
    ("tensors-by-regex", lambda m: q.assert_quantized(m, r"re:layers\.\d+\.self_attn")),
    ("head-and-norms-left", lambda m: q.assert_not_quantized(m, "lm_head", "*norm*", "model.embed_tokens.weight")),
    ("intact-by-headers", lambda m: q.assert_checkpoint_intact(m, values=False)),
    ("params-with-abs", lambda m: q.assert_logical_params(m, 7_241_732_000, abs=100)),
    ("params-with-rel", lambda m: q.assert_logical_params(m, 7_300_000_000, rel=0.01)),
]

FAILS = [
    ("fraction-too-low", lambda m: q.assert_quantized_fraction(m, min=0.99),
     ["quantized fraction: 0.9638", "allowed min 0.99", "largest tensors left unquantized",
      "lm_head.weight  32,000 x 4,096"]),
    ("fraction-too-high", lambda m: q.assert_quantized_fraction(m, max=0.5), ["largest quantized tensors"]),
    ("bits", lambda m: q.assert_bits_per_weight(m, max=4.2),
     ["4.500 over the quantized tensors (4.917 over the whole model), allowed max 4.2", "what weighs most"]),
    ("size", lambda m: q.assert_size_budget(m, "4 GB"),
     ["file size: 4.45 GB", "exceeds the budget of 4.00 GB", "(11.3%)", "where the bytes go", "largest tensors"]),
    ("size-per-class", lambda m: q.assert_size_budget(m, per_class={"scales": "100 MB"}),
     ["scales: 436.21 MB", "exceeds the budget of 100.00 MB"]),
    ("size-per-weight", lambda m: q.assert_size_budget(m, bits_per_weight=4.5),
     ["4.917 bits exceed the budget of 4.5 bits"]),
    ("head-not-quantized", lambda m: q.assert_quantized(m, "lm_head"),
     ["0 of 1 tensor that `lm_head`", "lm_head.weight"]),
    ("linears-quantized", lambda m: q.assert_not_quantized(m, "*.q_proj"), ["0 of 32 tensors", "... and 22 more"]),
    ("pattern-matches-nothing", lambda m: q.assert_quantized(m, "*.qproj"), ["pattern `*.qproj` matches no parameter"]),
]  # fmt: skip

MISUSE = [
    ("no-limit-of-fraction", lambda m: q.assert_quantized_fraction(m), "one of min and max"),
    ("no-limit-of-bits", lambda m: q.assert_bits_per_weight(m), "one of min and max"),
    ("no-budget", lambda m: q.assert_size_budget(m), "a budget is needed"),
    ("unknown-class", lambda m: q.assert_size_budget(m, per_class={"scale": 1}), "is not one of codes, scales"),
    ("unknown-unit", lambda m: q.assert_size_budget(m, "4.3 gigs"), "not a number with a unit"),
    ("no-pattern", lambda m: q.assert_quantized(m), "at least one pattern"),
    ("count-of-nonsense", lambda m: q.assert_logical_params(m, "seven"), "not a number with an optional unit"),
    ("tolerance-on-text", lambda m: q.assert_logical_params(m, "7B", rel=0.1), "says its own precision"),
    ("bits-of-nonsense", lambda m: q.assert_bits_per_weight(m, max=1, of="all"), "neither `quantized` nor `model`"),
]


def rows(table):
    return pytest.mark.parametrize("row", [row[1:] for row in table], ids=[row[0] for row in table])


@rows(PASSES)
def test_what_holds_passes(row, mistral):
    row[0](q.inspect(mistral))


@rows(FAILS)
def test_what_does_not_hold_fails_with_numbers_and_reasons(row, mistral):
    check, said = row
    with pytest.raises(AssertionError) as caught:
        check(q.inspect(mistral))
    for words in said:
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) < 30


@rows(MISUSE)
def test_a_call_that_makes_no_sense_is_no_failed_check(row, mistral):
    with pytest.raises(ValueError, match=row[1]):
        row[0](q.inspect(mistral))


@pytest.mark.parametrize("expected", [True, None, [1]])
def test_a_count_is_a_number_or_text(expected):
    with pytest.raises(TypeError):
        q.assert_logical_params(nn.Linear(2, 2), expected)


def test_nothing_at_all_never_passes():
    empty = nn.ReLU()
    for check in (
        lambda: q.assert_logical_params(empty, 0),
        lambda: q.assert_size_budget(empty, "1 GB"),
        lambda: q.assert_bits_per_weight(empty, max=100),
        lambda: q.assert_checkpoint_intact(empty),
        lambda: q.assert_quantized_fraction(empty, min=0.1),
    ):
        with pytest.raises(AssertionError):
            check()


def test_trainable_parameters_of_a_plain_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    q.assert_trainable_params(model, 25)
    with pytest.raises(AssertionError) as caught:
        q.assert_trainable_params(model, 41)
    assert "frozen because packed: 0" in str(caught.value)
    assert "frozen by choice: 16" in str(caught.value)
    assert "counts weights that were frozen by choice" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1 KB", 1000), ("1 KiB", 1024), ("4.3 GB", 4_300_000_000), ("1_000 B", 1000), ("0.5mb", 500_000), (7, 7)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("7.24B", 7_235_000_000, 7_245_000_000), ("135M", 134_500_000, 135_500_000), ("21", 20.5, 21.5)],
)
def test_counts_as_written(text, low, high):
    value, half = parse_count(text)
    assert (value - half, value + half) == (low, high)


def test_logical_numel_of_one_parameter():
    assert q.logical_numel(nn.Parameter(torch.zeros(3, 4))) == 12
    with pytest.raises(q.UnknownEncoding):
        q.logical_numel(nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False))


def test_without_torch_it_is_said_what_to_install(monkeypatch, mistral):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    q.assert_checkpoint_intact(mistral, values=False)
    for check in (q.assert_checkpoint_intact, lambda path: q.assert_dequant_fidelity(path, path)):
        with pytest.raises(ImportError, match=r"needs torch: pip install pytest-quantcheck\[torch\]"):
            check(mistral)
