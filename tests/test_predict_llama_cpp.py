"""llama.cpp's mixtures: equal, tensor by tensor, to what its converter and `llama_model_quantize` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_quantcheck import architecture, unquantized_model
from pytest_quantcheck.checks.predict import predict
from tests.gguf_files import Tensor, key, write_sparse

GOLDEN = json.loads((Path(__file__).parent / "golden/llama_cpp.json").read_text())


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """transformers is imported here once; the process of its own has a test of its own."""

    def ask(source, config, shapes):
        return unquantized_model.described(unquantized_model.cleaned(config))

    monkeypatch.setattr(architecture, "_ask", ask)


def unquantized(case):
    """The tensors of the F16 file; `blk.*` stands for every layer."""
    layers = next(value for name, value in case["keys"].items() if name.endswith(".block_count"))
    rows = [(name, dtype, tuple(shape)) for name, dtype, shape in case["unquantized"]]
    outer = [row for row in rows if "*" not in row[0]]
    inner = [row for row in rows if "*" in row[0]]
    return [*outer, *((name.replace("*", str(at)), *rest) for at in range(layers) for name, *rest in inner)]


def written(case, recipe):
    types = case["quantized"]["types"]
    names = (row[0] for row in unquantized(case))
    return {name: types[ord(letter) - ord("A")] for name, letter in zip(names, case["quantized"][recipe], strict=True)}


def check(path, case):
    recipes = [name for name, types in case["quantized"].items() if name != "types" and types]
    shapes = {name: shape for name, _, shape in unquantized(case)}
    predicted = predict(path, recipes, dtype="bf16").predicted
    assert len(predicted) >= 2
    for row in predicted:
        stored = {tensor.stored.name: tensor.stored for tensor in row.tensors}
        assert {name: tensor.shape for name, tensor in stored.items()} == shapes
        assert {name: tensor.dtype for name, tensor in stored.items()} == written(case, row.recipe), row.recipe


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "falcon"])
def test_a_config_gives_the_tensors_that_llama_cpp_wrote(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    check(tmp_path, GOLDEN[name])


@pytest.mark.parametrize("name", GOLDEN)
def test_an_f16_gguf_gives_the_tensors_that_llama_cpp_wrote(tmp_path, name):
    case = GOLDEN[name]
    tensors = [Tensor(*row) for row in unquantized(case)]
    kinds = {str: "string", int: "u32", list: "[u32]"}
    keys = [key(name, kinds[type(value)], value) for name, value in case["keys"].items()]
    check(write_sparse(tmp_path / "f16.gguf", tensors, keys), case)


@pytest.mark.parametrize("name", [name for name, case in GOLDEN.items() if case["quantized"].get("q1_0") == ""])
def test_what_llama_cpp_refuses_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    with pytest.raises(ValueError, match=r"recipe `q1_0`: .* no multiple of the 128"):
        predict(tmp_path, ["q1_0"])
