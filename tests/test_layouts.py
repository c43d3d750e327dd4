"""The models people know, in their exact layout: what we count, what the naive loop counts, and what the CLI prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pytest_quantcheck import assert_logical_params, inspect
from tests import layouts

MISTRAL = 7_241_732_096
NAIVE = 3_752_071_168


def quantcheck(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest_quantcheck", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_mistral_as_json(mistral):
    done = quantcheck("inspect", mistral, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (document["logical_params"], document["stored_elements"]) == (MISTRAL, NAIVE)
    assert document["schemes"]["bnb-nf4"]["tensors"] == 224
    assert document["schemes"]["bnb-nf4"]["params"] == 6_979_321_856
    assert sum(document["bytes"].values()) == document["file_bytes"]
    assert document["file_bytes"] == sum(file.stat().st_size for file in mistral.iterdir())


def test_mistral_rows_are_those_of_the_table_people_know(mistral):
    done = quantcheck("inspect", mistral)
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("model.layers.0.")}
    row = rows["model.layers.0.self_attn.q_proj.weight"]
    assert "4,096 x 4,096  " in row
    assert "16,777,216  " in row
    assert "U8 8,388,608 x 1  " in row
    assert "bnb-nf4" in row
    assert f"naive numel()       {NAIVE:,}" in done.stdout


@pytest.mark.parametrize("expected", [MISTRAL, 7.24e9, "7.24B", "7.2B", "7242M"])
def test_mistral_has_what_it_claims(mistral, expected):
    assert_logical_params(mistral, expected)


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        (MISTRAL - 1, "7,241,732,095 exactly: 1 more"),
        (NAIVE, "what numel() over packed weights gives"),
        (3.75e9, "what numel() over packed weights gives"),
        ("3.75B", "what numel() over packed weights gives"),
        ("7.25B", "rounded as written"),
        (float("nan"), "not comparable"),
        (MISTRAL - 2 * 218_112_000, "exactly 2 layers of `model.layers`"),
    ],
)
def test_mistral_fails_what_it_is_not(mistral, expected, why):
    with pytest.raises(AssertionError) as caught:
        assert_logical_params(mistral, expected)
    assert why in str(caught.value)
    assert "7,241,732,096" in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([*range(31)], ["`model.layers` has 31 layers, config.json says 32", "exactly 1 layer of `model.layers`"]),
        ([*range(5), *range(6, 32)], ["`model.layers` has no layer 5", "exactly 1 layer"]),
    ],
    ids=["last-layer", "layer-5"],
)
def test_a_missing_layer_is_named(tmp_path, layers, why):
    folder = layouts.write_folder(tmp_path / "m", layouts.mistral_7b(layers=layers), layouts.MISTRAL_CONFIG)
    with pytest.raises(AssertionError) as caught:
        assert_logical_params(folder, MISTRAL)
    for reason in why:
        assert reason in str(caught.value)


def test_a_layer_that_lost_a_tensor_is_named(tmp_path):
    entries = [e for e in layouts.mistral_7b() if not e.name.startswith("model.layers.7.mlp.up_proj")]
    folder = layouts.write_folder(tmp_path / "m", entries, layouts.MISTRAL_CONFIG)
    with pytest.raises(
        AssertionError, match=r"`model\.layers\.7` has 159,391,744 parameters, its siblings 218,112,000"
    ):
        assert_logical_params(folder, MISTRAL)


@pytest.mark.parametrize("quantized", [True, False])
def test_falcon_counts_the_same_before_and_after(tmp_path, quantized):
    config = layouts.FALCON_CONFIG | ({"quantization_config": layouts.BNB_CONFIG} if quantized else {})
    artifact = inspect(layouts.write_folder(tmp_path / "f", layouts.falcon_7b(quantized=quantized), config))
    assert artifact.logical_params == 6_921_725_248
    assert artifact.stored_elements == (3_608_749_376 if quantized else 6_921_725_248)


def test_a_terabyte_is_counted_without_reading_it(tmp_path):
    entries = [layouts.Entry(f"model.layers.{at}.weight", "BF16", (1 << 16, 1 << 15)) for at in range(256)]
    artifact = inspect(layouts.write_folder(tmp_path / "big", entries, {}, shards=64))
    assert artifact.file_bytes > 1 << 40
    assert artifact.logical_params == 256 << 31
