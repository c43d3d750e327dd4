"""An output head that repeats the embedding counts once, however it is written and whichever way round."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pytest_quantcheck import inspect
from pytest_quantcheck.containers import files
from tests import gguf_files

onnx = pytest.importorskip("onnx", reason="the onnx package makes and parses these models")
pytest.importorskip("onnxruntime", reason="onnxruntime quantizes these models")
np = pytest.importorskip("numpy")

from onnx import helper, numpy_helper  # noqa: E402

from tests.cases.onnx import model_of  # noqa: E402

VOCAB, HIDDEN = 211, 64
TABLE = VOCAB * HIDDEN
NAME = "model.embed_tokens.weight"


def noise(seed: int = 0):
    return np.random.default_rng(seed).standard_normal((VOCAB, HIDDEN)).astype(np.float32)


def language_model(table, head, operator: str = "MatMul"):
    """A lookup and an output head; the head as it is given."""
    cast = [helper.make_node("Cast", ["e"], ["c"], "/Cast", to=10)] if head.dtype == np.float16 else []
    transposed = {"transB": 1} if operator == "Gemm" else {}
    nodes = [
        helper.make_node("Gather", [NAME, "rows"], ["e"], "/model/embed_tokens/Gather"),
        *cast,
        helper.make_node(operator, ["c" if cast else "e", "onnx::MatMul_9"], ["y"], "/lm_head/MatMul", **transposed),
    ]
    tensors = [numpy_helper.from_array(table, NAME), numpy_helper.from_array(head, "onnx::MatMul_9")]
    return model_of(nodes, tensors, [("rows", 7, ["n"])], [("y", 10 if cast else 1, None)])


def turned(values):
    return np.ascontiguousarray(values.T)


def nbits(model, operators=("MatMul",), **options):
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    made = quantizer.MatMulNBitsQuantizer(model, block_size=32, op_types_to_quantize=operators, **options)
    made.process()
    return made.model.model


def in_steps(model):
    """Eight bits; the table is gathered before it is decoded."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "f.onnx").write_bytes(model.SerializeToString())
        quantize_dynamic(Path(folder) / "f.onnx", Path(folder) / "q.onnx")
        return onnx.load(Path(folder) / "q.onnx")


def tied(**change):
    table = noise()
    return language_model(table, turned(table), **change)


def of_its_own():
    return language_model(noise(), turned(noise(1)))


# id, the model, how many parameters are a copy
ONNX = [
    ("turned", lambda: tied(), TABLE),
    ("as-it-is", lambda: language_model(noise(), noise(), "Gemm"), TABLE),
    ("in-16-bit", lambda: language_model(noise(), turned(noise()).astype(np.float16)), TABLE),
    ("head-of-4-bits", lambda: nbits(tied(), is_symmetric=True), TABLE),
    ("head-of-4-bits-with-zero-points", lambda: nbits(tied(), is_symmetric=False), TABLE),
    ("both-of-4-bits", lambda: nbits(tied(), ("MatMul", "Gather"), is_symmetric=True), TABLE),
    ("embedding-of-4-bits", lambda: nbits(tied(), ("Gather",), is_symmetric=True), TABLE),
    ("both-of-8-bits-in-steps", lambda: in_steps(tied()), TABLE),
    ("a-head-of-its-own", lambda: of_its_own(), 0),
    ("a-head-of-its-own-of-4-bits", lambda: nbits(of_its_own(), is_symmetric=True), 0),
    ("rows-in-another-order", lambda: language_model(noise(), turned(np.roll(noise(), 1, 0))), 0),
    ("rows-in-another-order-of-4-bits", lambda: nbits(language_model(noise(), turned(np.roll(noise(), 1, 0)))), 0),
    ("the-other-sign", lambda: nbits(language_model(noise(), turned(-noise()))), 0),
    ("constants-are-nobody's-copy", lambda: language_model(np.ones_like(noise()), turned(np.ones_like(noise()))), 0),
    ("halves-the-scale", lambda: nbits(language_model(noise(), turned(noise() / 2))), 0),
]


@pytest.mark.parametrize(("model", "copied"), [row[1:] for row in ONNX], ids=[row[0] for row in ONNX])
def test_onnx_heads_are_told_by_their_values(tmp_path, model, copied):
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    artifact = inspect(tmp_path / "m.onnx")
    assert (artifact.logical_params, artifact.tied_params) == (2 * TABLE - copied, copied)
    head = artifact.tensor("lm_head.weight")
    assert (head.role, head.copy_of) == (("tied", NAME) if copied else ("parameter", None))
    assert [finding.check for finding in artifact.findings] == (["duplicate-tensor"] if copied else [])
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_copies_are_found_without_torch(tmp_path):
    """Plain ones, and heads in the four bits that everybody writes."""
    code = "import sys; from pytest_quantcheck import count_params;"
    for name, model, params in (
        ("tied", tied(), TABLE),
        ("own", of_its_own(), 2 * TABLE),
        ("tied-4", nbits(tied(), is_symmetric=False), TABLE),
        ("own-4", nbits(of_its_own(), is_symmetric=True), 2 * TABLE),
    ):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        code += f"assert count_params({str(path)!r}) == {params};"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_torch_an_encoded_head_is_counted_and_a_note_says_so(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(in_steps(tied()).SerializeToString())
    monkeypatch.setitem(sys.modules, "torch", None)
    artifact = inspect(tmp_path / "m.onnx")
    assert artifact.logical_params == 2 * TABLE
    (finding,) = artifact.findings
    assert (finding.severity, finding.tensor) == ("note", "lm_head.weight")
    assert "takes torch" in finding.message


def test_eight_gigabytes_are_compared_by_a_sample(tmp_path, monkeypatch):
    shape = (1 << 18, 4096)
    tensors = []
    for name, dims in ((NAME, shape), ("onnx::MatMul_9", shape[::-1])):
        found = onnx.TensorProto(name=name, data_type=1, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
        found.external_data.add(key="location", value=f"{name[-3:]}.data")
        tensors.append(found)
        with open(tmp_path / f"{name[-3:]}.data", "wb") as file:
            file.truncate(4 << 30)
    model = tied()
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    read = []
    each = files.File.read_each

    def counted(self, ranges):
        read.append(sum(stop - start for start, stop in ranges))
        return each(self, ranges)

    monkeypatch.setattr(files.File, "read_each", counted)
    assert inspect(tmp_path / "m.onnx").logical_params == 2 << 30
    assert sum(read) < 1 << 20


def gguf(path: Path, head: bytes, kind: str = "Q8_0") -> Path:
    content = np.random.default_rng(0).integers(0, 100, 64 * 2 * 34, dtype=np.uint8).tobytes()
    tensors = [
        gguf_files.Tensor("token_embd.weight", "Q8_0", (64, 64), content),
        gguf_files.Tensor("output.weight", kind, (64, 64), head or content),
        gguf_files.Tensor("output_norm.weight", "F32", (64,), bytes(256)),
    ]
    keys = gguf_files.architecture("llama", head_count=4, head_count_kv=2)
    path.write_bytes(gguf_files.gguf(tensors, keys))
    return path


@pytest.mark.parametrize(("head", "kind", "copied"), [(b"", "Q8_0", 4096), (bytes(range(1, 69)) * 64, "Q8_0", 0),
                                                      (bytes(16384), "F32", 0)])  # fmt: skip
def test_a_gguf_with_its_embedding_twice_counts_it_once(tmp_path, head, kind, copied):
    artifact = inspect(gguf(tmp_path / "m.gguf", head, kind))
    assert (artifact.logical_params, artifact.tied_params) == (2 * 4096 + 64 - copied, copied)
    assert [finding.check for finding in artifact.findings] == (["duplicate-tensor"] if copied else [])
    assert artifact.tensor("lm_head.weight").role == ("tied" if copied else "parameter")
