"""Tensors of an ONNX model that nothing names are matched with a reference by their values."""

from __future__ import annotations

import pytest
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.checks.alignment import by_content
from pytest_quantcheck.checks.fidelity import compare
from tests import smollm2

onnx = pytest.importorskip("onnx", reason="the onnx package makes and parses these models")
pytest.importorskip("onnxruntime", reason="onnxruntime quantizes these models")

from onnx import numpy_helper  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SIZES = smollm2.Sizes(vocab=301, hidden=96, intermediate=160, layers=2, heads=3, kv_heads=1, positions=16)
LINEARS = 2 * 7 + 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The weights as transformers keeps them, [out, in]."""
    model = smollm2.fp32(SIZES)
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    (path.parent / "m.onnx").write_bytes(model.SerializeToString())
    found = inspect(path.parent / "m.onnx")
    tensors = {t.name: t.decode().view(t.shape) for t in found.parameters}
    turned = {t.name: tensors[t.name].t().contiguous() for t in found.parameters if t.transposed}
    save_file(tensors | turned, path)
    return inspect(path)


def unnamed(change=lambda tensors: None):
    """The model in four bits, and nothing in it that says which linear is which."""
    model = smollm2.fp32(SIZES)
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    model = smollm2.four_bits(model)
    change({tensor.name: tensor for tensor in model.graph.initializer})
    return model


def written(path, model):
    path.write_bytes(model.SerializeToString())
    return inspect(path)


def test_every_linear_finds_its_original_and_a_note_says_so(tmp_path, reference):
    artifact = written(tmp_path / "m.onnx", unnamed())
    comparison = compare(artifact, reference)
    assert comparison.passed, comparison.findings
    quantized = [row for row in comparison.tensors if row.scheme != "plain"]
    assert len(quantized) == LINEARS
    assert all(row.sqnr_db > 17 for row in quantized)
    notes = {found.tensor: found.message for found in comparison.findings if found.check == "matched-by-content"}
    assert len(notes) == LINEARS - 1  # the head is known by the embedding
    assert {found.check for found in comparison.findings} == {"matched-by-content"}
    first = next(t for t in artifact.tensors if t.shape == (96, 96))
    assert "`model.layers.0.self_attn.q_proj.weight` (correlation 0.99" in notes[first.name]


def test_a_weight_with_a_wrong_scale_finds_its_original_and_fails(tmp_path, reference):
    def double(tensors):
        scales = next(tensor for name, tensor in tensors.items() if "scales" in name)
        scales.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(scales), scales.name))

    comparison = compare(written(tmp_path / "m.onnx", unnamed(double)), reference)
    (name,) = {found.tensor for found in comparison.findings if found.severity == "error"}
    said = [found.message for found in comparison.findings if found.tensor == name]
    assert any("gain 1.49" in message or "gain 1.50" in message for message in said), said


def test_a_weight_that_the_reference_has_not_is_an_error(tmp_path, reference):
    def shuffle(tensors):
        codes = next(tensor for name, tensor in tensors.items() if name.endswith("_Q4"))
        raw = numpy_helper.to_array(codes)
        codes.CopyFrom(numpy_helper.from_array(raw[::-1].copy(), codes.name))

    comparison = compare(written(tmp_path / "m.onnx", unnamed(shuffle)), reference)
    checks = [(found.check, found.severity) for found in comparison.findings if found.check == "not-compared"]
    assert sorted(checks) == [("not-compared", "error"), ("not-compared", "warning")]


def test_a_tied_head_that_was_quantized_is_compared_too(tmp_path, reference):
    artifact = written(tmp_path / "m.onnx", smollm2.four_bits(smollm2.fp32(SIZES)))
    rows = {row.name: row for row in compare(artifact, reference).tensors}
    assert artifact.tensor("lm_head.weight").role == "tied"
    assert rows["lm_head.weight"].sqnr_db == pytest.approx(20, abs=2)


def plain(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return inspect(folder / "model.safetensors").parameters


# id, the shapes of two tensors, how the first is written in the artifact, matched and turned
SHAPES = [
    ("a-matrix", (40, 24), lambda w: w, (True, False)),
    ("a-turned-matrix", (40, 24), lambda w: w.t(), (True, True)),
    ("a-square-matrix", (33, 33), lambda w: w, (True, False)),
    ("a-turned-square-matrix", (33, 33), lambda w: w.t(), (True, True)),
    ("longer-than-its-sample", (200, 120), lambda w: w.t(), (True, True)),
    ("filters", (6, 5, 3, 3), lambda w: w, (True, False)),
    ("a-vector", (120,), lambda w: w, (True, False)),
    ("in-16-bit", (40, 24), lambda w: w.half(), (True, False)),
    ("with-noise-of-its-own-size", (40, 24), lambda w: w + 0.9 * torch.randn(w.shape), (True, False)),
    ("of-the-other-sign", (40, 24), lambda w: -w, None),
    ("another", (40, 24), lambda w: torch.randn(w.shape), None),
    ("constant", (40, 24), torch.ones_like, None),
    ("too-short-to-tell", (16,), lambda w: w, None),
]


@pytest.mark.parametrize(("shape", "change", "expected"), [row[1:] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_what_is_matched(tmp_path, shape, change, expected):
    torch.manual_seed(len(shape))
    weights = {name: torch.randn(shape) for name in ("one.weight", "two.weight")}
    (tmp_path / "reference").mkdir()
    candidates = plain(tmp_path / "reference", weights)
    (ours,) = plain(tmp_path, {"onnx::MatMul_1": change(weights["two.weight"]).contiguous()})
    matches = by_content([ours], candidates)
    assert [(match.original.name, match.turned) for match in matches] == (
        [("two.weight", expected[1])] if expected else []
    )
