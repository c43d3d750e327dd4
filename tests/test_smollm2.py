"""A small SmolLM2 in the four files that people ask about: each byte of each is computed here beforehand."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime quantizes these models")
pytest.importorskip("onnx", reason="the onnx package makes and parses these models")

from pytest_quantcheck import inspect
from tests import smollm2
from tests.smollm2 import SMALL
from tests.test_cli import quantcheck

POSITIONS = 16  # two int64 of the graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    for name, model in smollm2.all_four(SMALL):
        (folder / f"model_{name}.onnx").write_bytes(model.SerializeToString())
    return folder


def expected(width: int, *, quantized: bool) -> dict[str, int]:
    """The bytes of tensors by class, floats of so many bytes."""
    kept = SMALL.table + SMALL.norms
    buffers = SMALL.rope * width + POSITIONS
    if not quantized:
        return {"unquantized": (kept + SMALL.linears) * width, "dead": SMALL.table * width, "buffers": buffers}
    scales = SMALL.linears // 32 * width
    dead = SMALL.table // 2 + SMALL.table // 32 * width
    return {
        "unquantized": kept * width,
        "codes": SMALL.linears // 2,
        "scales": scales,
        "dead": dead,
        "buffers": buffers,
    }


@pytest.mark.parametrize(("name", "width"), [("fp32", 4), ("fp16", 2), ("q4", 4), ("q4f16", 2)])
def test_every_file_counts_the_same_and_each_byte_is_expected(folder, name, width):
    artifact = inspect(folder / f"model_{name}.onnx")
    assert (artifact.logical_params, artifact.tied_params) == (SMALL.params, SMALL.table)
    found = {kind: size for kind, size in artifact.bytes.items() if size}
    metadata = found.pop("metadata")
    assert found == expected(width, quantized=name.startswith("q4"))
    assert artifact.file_bytes == metadata + sum(found.values()) == (folder / f"model_{name}.onnx").stat().st_size
    assert artifact.tensor("lm_head.weight").copy_of == "model.embed_tokens.weight"


def test_the_real_one_has_the_parameters_that_it_claims():
    real = smollm2.Sizes()
    assert (real.params, real.table) == (134_515_008, 28_311_552)


def test_why_says_in_its_first_lines_where_a_4_bit_file_goes(folder):
    done = quantcheck("why", folder / "model_q4.onnx", "--depth", 0)
    lines = done.stdout.splitlines()
    (codes,) = (line for line in lines[:10] if line.startswith("codes "))
    assert 30 < float(codes.split()[1].rstrip("%")) < 35
    (embedding,) = (line for line in lines[10:12] if "unquantized embedding, F32" in line)
    assert float(embedding.split("%")[0]) > 50
    at = lines.index("                                  lm_head.weight")
    assert "duplicated tied head" in lines[at - 1]
    assert lines[at + 1].split() == ["repeats", "model.embed_tokens.weight"]
