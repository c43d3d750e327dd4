"""ONNX files: where every byte goes, names, what several nodes share, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_quantcheck import inspect
from pytest_quantcheck.checks.integrity import repeated
from pytest_quantcheck.containers import onnx_names, onnx_sparse, onnx_tensors, onnx_wire
from pytest_quantcheck.containers.files import File, open_file
from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding

onnx = pytest.importorskip("onnx", reason="the onnx package makes and parses these models")
np = pytest.importorskip("numpy")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tests.cases.onnx import model_of, run  # noqa: E402

MICROSOFT = {"domain": "com.microsoft"}


def tensor(name: str, values, dtype: str = "float32"):
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def node(operator: str, inputs: list[str], output: str, name: str = "", **attributes):
    return helper.make_node(operator, inputs, [output], name, **attributes)


def save(path: Path, model) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def packed(rows: int = 4, columns: int = 32, prefix: str = "w"):
    """Initializers of a MatMulNBits."""
    return [
        tensor(prefix, np.full((rows, columns // 32, 16), 0x98), "uint8"),
        tensor(f"{prefix}_s", np.arange(1, rows + 1).reshape(rows, columns // 32)),
    ]


def nbits(inputs: list[str], output: str, name: str = "n", rows: int = 4, columns: int = 32, **attributes):
    sizes = {"K": columns, "N": rows, "bits": 4, "block_size": 32} | attributes
    return node("MatMulNBits", inputs, output, name, **MICROSOFT, **sizes)


def external(name: str, location: str, *, shape=(2,), **entries):
    found = TensorProto(name=name, data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        found.external_data.add(key=key, value=str(value))
    return found


def outside(location: str, **entries):
    return model_of([], [external("w", location, **entries)], [], [])


def two_at(offset: int, *shapes):
    tensors = [external(name, "w.data", offset=offset, shape=shape) for name, shape in zip("ab", shapes, strict=True)]
    return model_of([], tensors, [], [])


def of_nodes(*nodes, initializers=()):
    return model_of(nodes, initializers, [("x", 1, [1, 32])], [("y", 1, None)])


def filled(shape, operator="MatMul", value=None, dtype="int64"):
    attributes = {} if value is None else {"value": value}
    made = node("ConstantOfShape", ["shape"], "w", **attributes)
    return of_nodes(made, node(operator, ["x", "w"], "y"), initializers=[tensor("shape", shape, dtype)])


def small():
    """A float matrix, an encoded one, a shape, a scalar, statistics."""
    initializers = [
        tensor("dense", np.ones((32, 3))),
        *packed(),
        tensor("shape", [1, -1], "int64"),
        tensor("eps", 1e-6),
        tensor("mean", [0.0, 1.0, 2.0]),
        tensor("var", [1.0, 1.0, 1.0]),
        tensor("gain", [1.0, 1.0, 1.0]),
    ]
    nodes = [
        node("MatMul", ["x", "dense"], "a"),
        nbits(["x", "w", "w_s"], "b"),
        node("BatchNormalization", ["a", "gain", "gain", "mean", "var"], "c"),
        node("Reshape", ["b", "shape"], "d"),
        node("Add", ["c", "eps"], "e"),
    ]
    return model_of(nodes, initializers, [("x", 1, ["n", 32])], [("e", 1, None)])


def test_every_byte_has_a_class(tmp_path):
    artifact = inspect(save(tmp_path / "m.onnx", small()))
    assert artifact.logical_params == 96 + 128 + 3
    assert artifact.buffers == 2 + 1 + 3 + 3
    found = artifact.bytes
    assert sum(found.values()) == artifact.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert (found["codes"], found["scales"], found["unquantized"], found["buffers"]) == (64, 16, 396, 44)
    assert artifact.tensor("dense").transposed
    assert torch.equal(artifact.tensor("w").decode()[2], torch.tensor([0.0, 3.0] * 16))


def test_files_beside_the_graph_are_weighed_with_it(tmp_path):
    onnx.save_model(small(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    with open(tmp_path / "m.data", "ab") as file:
        file.write(bytes(70_000))
    artifact = inspect(tmp_path / "m.onnx")
    assert artifact.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    assert artifact.bytes["dead"] == 70_000
    assert [finding.check for finding in artifact.findings] == ["dead-bytes"]
    assert artifact.logical_params == 227
    assert inspect(tmp_path).logical_params == 227


def test_a_terabyte_beside_the_graph_is_counted_without_being_read(tmp_path):
    model = model_of([], [external("w", "w.data", shape=(1 << 19, 1 << 19))], [], [])
    with open(tmp_path / "w.data", "wb") as file:
        file.truncate(1 << 40)
    assert inspect(save(tmp_path / "m.onnx", model)).logical_params == 1 << 38


def test_numbers_that_are_attributes_are_listed(tmp_path):
    """Four bytes for a float; an integer is a varint, of ten bytes where it is negative."""
    values = {"value_floats": [0.5, 1.5, -2.0], "value_float": 3.0, "value_ints": [1, -1, 300], "value_int": 7,
              "value_string": b"words"}  # fmt: skip
    nodes = [helper.make_node("Constant", [], [name], **{name: value}) for name, value in values.items()]
    nodes += [node("Mul", ["x", name], f"y{name}") for name in values]
    nodes.append(node("Resize", ["x", "", "value_floats"], "z"))
    artifact = inspect(save(tmp_path / "m.onnx", of_nodes(*nodes)))
    found = {t.name: (t.role, t.shape, t.nbytes, t.decode().flatten().tolist()) for t in artifact.tensors}
    assert found == {
        "value_floats": ("parameter", (3,), 12, [0.5, 1.5, -2.0]),
        "value_float": ("buffer", (), 4, [3.0]),
        "value_ints": ("buffer", (3,), 13, [1.0, -1.0, 300.0]),
        "value_int": ("buffer", (), 1, [7.0]),
    }
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def square(kind: str = "float32"):
    return tensor("c", np.tril(np.ones((1, 1, 32, 32))), kind)


# id, nodes between the constant `c` and its end, the constant, what it is
WAYS = [
    ("frequencies", [("Unsqueeze", ["c", "axes"]), ("Expand", ["0", "shape"]), ("MatMul", ["0", "x"]), ("Cos", ["0"]),
                     ("Sin", ["2"])], tensor("c", np.ones(32)), "buffer"),
    ("frequencies-times-positions", [("Mul", ["x", "c"]), ("Cos", ["0"]), ("Sin", ["0"])], tensor("c", np.ones(32)),
     "buffer"),
    ("a-layer-with-sines", [("MatMul", ["x", "c"]), ("Sin", ["0"])], tensor("c", np.ones((32, 32))), "parameter"),
    ("a-bias-before-a-sine", [("Add", ["x", "c"]), ("Sin", ["0"]), ("Cos", ["0"])], tensor("c", np.ones(32)),
     "parameter"),
    ("a-gain-before-a-sine", [("Mul", ["x", "c"]), ("Sin", ["0"])], tensor("c", np.ones(32)), "parameter"),
    ("a-mask-that-is-added", [("Slice", ["c", "axes", "axes"]), ("Add", ["x", "0"]), ("Softmax", ["1"])], square(),
     "buffer"),
    ("a-mask-of-bytes", [("Slice", ["c", "axes", "axes"]), ("Cast", ["0"]), ("Where", ["1", "x", "x"])],
     square("uint8"), "buffer"),
    ("a-square-filter", [("Conv", ["x", "c"]), ("Softmax", ["0"])], square(), "parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("ways", "constant", "role"), [row[1:] for row in WAYS], ids=[row[0] for row in WAYS])
def test_buffers_without_a_name_are_told_by_where_they_go(tmp_path, ways, constant, role):
    nodes = [node(operator, inputs, str(at)) for at, (operator, inputs) in enumerate(ways)]
    initializers = [constant, tensor("axes", [0], "int64"), tensor("shape", [1, 32, 1], "int64")]
    artifact = inspect(save(tmp_path / "m.onnx", of_nodes(*nodes, initializers=initializers)))
    assert artifact.tensor("c").role == role


BUFFER_NAMES = ["cos_cache", "model.rotary_emb.cos_cached", "/model/layers.0/rotary_emb/Constant_1_output_0",
                "layers.0.attn.causal_mask", "inv_freq", "h.0.attn.masked_bias"]  # fmt: skip


@pytest.mark.parametrize("name", [*BUFFER_NAMES, "model.cosine.weight", "mask_head.weight", "rope_proj"])
def test_names_of_buffers(tmp_path, name):
    model = of_nodes(node("Mul", ["x", name], "y"), initializers=[tensor(name, np.ones((4, 32)))])
    (found,) = inspect(save(tmp_path / "m.onnx", model)).tensors
    assert found.role == ("buffer" if name in BUFFER_NAMES else "parameter")


FILLED = [
    ("a-weight", filled([32, 3], value=tensor("", [0.5])), "parameter", 0.5),
    ("zeros-by-default", filled([32, 3]), "parameter", 0.0),
    ("a-mask", filled([32, 3], "Add"), "buffer", 0.0),
    ("in-16-bit", filled([32, 3], value=tensor("", [0.5], "float16")), "parameter", 0.5),
]


@pytest.mark.parametrize(("model", "role", "value"), [row[1:] for row in FILLED], ids=[row[0] for row in FILLED])
def test_weights_that_the_graph_generates_are_listed_and_weigh_nothing(tmp_path, model, role, value):
    artifact = inspect(save(tmp_path / "m.onnx", model))
    weight = artifact.tensor("w")
    assert (weight.role, weight.shape, weight.nbytes) == (role, (32, 3), 0)
    assert weight.decode(5, 9).tolist() == [[value] * 3] * 4
    assert artifact.logical_params == (96 if role == "parameter" else 0)
    assert sum(artifact.bytes.values()) == artifact.file_bytes


QONNX = {"domain": "qonnx.custom_op.general"}
ROWS = np.ones((1, 3))
# a graph that rounds a weight [32, 3] and keeps it in floats: nodes, constants, how many values are no parameters
FAKE = [
    ("QDQ-per-tensor", [node("QuantizeLinear", ["w", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "d")],
     [tensor("s", 0.5), tensor("z", 0, "int8")], 2),
    ("QDQ-per-axis", [node("QuantizeLinear", ["w", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "d")],
     [tensor("s", [0.5, 0.25, 1.0]), tensor("z", [0, 1, 2], "int8")], 6),
    ("Quant", [node("Quant", ["w", "s", "z", "bits"], "d", signed=1, narrow=0, **QONNX)],
     [tensor("s", ROWS), tensor("z", ROWS), tensor("bits", [4.0])], 7),
    ("IntQuant", [node("IntQuant", ["w", "s", "z", "bits"], "d", **QONNX)],
     [tensor("s", ROWS), tensor("z", ROWS), tensor("bits", [4.0])], 7),
    ("BipolarQuant", [node("BipolarQuant", ["w", "s"], "d", **QONNX)], [tensor("s", ROWS)], 3),
    ("FloatQuant", [node("FloatQuant", ["w", "s", "e", "m", "bias", "max"], "d", **QONNX)],
     [tensor("s", ROWS), *(tensor(name, [4.0]) for name in ("e", "m", "bias", "max"))], 7),
    ("Trunc", [node("Trunc", ["w", "s", "z", "from", "to"], "d", **QONNX)],
     [tensor("s", ROWS), tensor("z", ROWS), tensor("from", [8.0]), tensor("to", [4.0])], 8),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "constants", "buffers"), [row[1:] for row in FAKE], ids=[row[0] for row in FAKE])
def test_a_weight_that_is_rounded_in_the_graph_is_plain_and_the_rest_does_not_count(
    tmp_path, nodes, constants, buffers
):
    model = of_nodes(*nodes, node("MatMul", ["x", "d"], "y"), initializers=[tensor("w", np.ones((32, 3))), *constants])
    artifact = inspect(save(tmp_path / "m.onnx", model))
    assert (artifact.logical_params, artifact.quantized_params, artifact.buffers) == (96, 0, buffers)


def test_two_tensors_at_one_place_are_tied(tmp_path):
    (tmp_path / "w.data").write_bytes(np.arange(6, dtype="float32").tobytes())
    artifact = inspect(save(tmp_path / "m.onnx", two_at(0, (2, 3), (2, 3))))
    assert [(t.name, t.role, t.nbytes) for t in artifact.tensors] == [("a", "parameter", 24), ("b", "tied", 0)]
    assert (artifact.logical_params, artifact.tied_params) == (6, 6)
    assert artifact.tensor("b").decode().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_a_packed_weight_at_one_place_is_tied_with_its_scales(tmp_path):
    (tmp_path / "w.data").write_bytes(bytes(range(64)) + np.ones(8, dtype="float32").tobytes())

    def beside(name, kind, shape, offset):
        found = external(name, "w.data", shape=shape, offset=offset)
        found.data_type = kind
        return found

    def model(second):
        tensors = [beside(f"{w}", 2, (4, 1, 16), 0) for w in "ab"]
        tensors += [beside("a_s", 1, (4, 1), 64), beside("b_s", 1, (4, 1), second)]
        return of_nodes(nbits(["x", "a", "a_s"], "y"), nbits(["x", "b", "b_s"], "z"), initializers=tensors)

    tied = inspect(save(tmp_path / "tied.onnx", model(64)))
    assert [(t.role, t.nbytes) for t in tied.tensors] == [("parameter", 80), ("tied", 0)]
    scaled = inspect(save(tmp_path / "scaled.onnx", model(80)))
    assert [(t.role, t.nbytes) for t in scaled.tensors] == [("parameter", 80), ("parameter", 16)]
    assert (tied.logical_params, scaled.logical_params) == (128, 256)


def test_files_of_a_folder_weigh_with_its_model(tmp_path):
    model = model_of([], [external("w", "m.onnx_data")], [], [])
    for name, size in {
        "m.onnx_data": 8,
        "tokenizer.json": 100,
        "m.onnx_data_1": 30,
        "model.safetensors.bak": 5,
    }.items():
        (tmp_path / name).write_bytes(bytes(size))
    save(tmp_path / "m.onnx", model)
    artifact = inspect(tmp_path)
    assert artifact.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {file.name: file.kind for file in artifact.beside} == {
        "tokenizer.json": "metadata", "m.onnx_data_1": "dead", "model.safetensors.bak": "metadata"}  # fmt: skip
    assert artifact.bytes["dead"] == 30
    assert [finding.check for finding in artifact.findings] == ["orphan-file"]
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    save(tmp_path / "m_q4.onnx", small())
    with pytest.raises(FormatError, match=r"holds 2 ONNX models \(m.onnx, m_q4.onnx\): name one"):
        inspect(tmp_path)
    assert inspect(tmp_path / "m_q4.onnx").logical_params == 227


def test_the_checksum_of_what_lies_beside_is_verified(tmp_path, monkeypatch):
    (tmp_path / "w.data").write_bytes(bytes(8))
    path = save(tmp_path / "m.onnx", outside("w.data", checksum=hashlib.sha1(bytes(8)).hexdigest().upper()))
    assert inspect(path).findings == ()
    monkeypatch.setattr(onnx_tensors, "CHECKSUM_LIMIT", 7)
    (finding,) = inspect(path).findings
    assert (finding.check, finding.severity) == ("external-checksum", "note")


def test_hard_links_within_the_folder_are_read(tmp_path):
    (tmp_path / "w.data").write_bytes(bytes(8))
    os.link(tmp_path / "w.data", tmp_path / "same.data")
    assert inspect(save(tmp_path / "m.onnx", outside("same.data"))).logical_params == 2


def test_numbers_in_typed_fields_are_read_in_windows(tmp_path):
    values = np.random.default_rng(0).integers(-9, 9, 100_000)
    typed = helper.make_tensor("w", TensorProto.INT8, [1000, 100], values)
    nodes = [node("DequantizeLinear", ["w", "s"], "y")]
    path = save(tmp_path / "m.onnx", model_of(nodes, [typed, tensor("s", 1.0)], [], [("y", 1, None)]))
    weight = inspect(path).tensor("w")
    assert path.stat().st_size > 4 * onnx_tensors.PIECE
    for start, stop in ((0, 3), (1, 2), (499, 502), (997, 1000), (0, 1000)):
        assert weight.decode(start, stop).flatten().tolist() == values[start * 100 : stop * 100].tolist()


def test_the_graph_is_kept_without_its_weights(tmp_path):
    model = model_of([], [tensor("w", np.zeros((1000, 1000)))], [], [])
    assert len(onnx_wire.skeleton(open_file(save(tmp_path / "m.onnx", model)))) < 200


def test_negative_numbers_in_typed_fields_weigh_ten_bytes(tmp_path):
    """onnx.proto: a varint of a negative int32 has ten bytes."""
    codes = helper.make_tensor("w", TensorProto.INT8, [1000], [-1] * 1000)
    nodes = [node("DequantizeLinear", ["w", "s"], "y")]
    artifact = inspect(save(tmp_path / "m.onnx", model_of(nodes, [codes, tensor("s", 0.5)], [], [("y", 1, None)])))
    assert artifact.tensor("w").bytes == {"codes": 1_000, "metadata": 9_000, "scales": 4}
    assert artifact.tensor("w").decode().tolist() == [[-0.5] * 1000]
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_weights_in_constants_branches_and_functions_are_found(tmp_path):
    """In each place a matrix of 2 x 2."""
    matrix = tensor("", np.ones((2, 2)))
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=matrix), node("Add", ["k", "outer"], "o")],
        "then", [], [helper.make_tensor_value_info("o", 1, [2, 2])], [tensor("i", np.ones((2, 2)))],
    )  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["main"], value=matrix),
        node("If", ["condition"], "chosen", then_branch=inner, else_branch=inner),
        node("Own", ["main"], "z", domain="mine"),
    ]
    model = model_of(nodes, [tensor("outer", np.ones((2, 2)))], [("condition", 9, [])], [("chosen", 1, None)])
    body = [helper.make_node("Constant", [], ["k"], value=matrix), node("Add", ["p", "k"], "q")]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("mine", "Own", ["p"], ["q"], body, opsets))
    artifact = inspect(save(tmp_path / "m.onnx", model))
    branches = [f"chosen/{branch}_branch/{name}" for branch in ("then", "else") for name in "ik"]
    assert {t.name for t in artifact.tensors} == {"outer", "main", "mine:Own/k", *branches}
    assert artifact.logical_params == 4 * 7
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_a_table_that_is_looked_up_and_multiplied_counts_once(tmp_path):
    """onnxruntime-genai ties the embedding and the head so."""
    table = tensor("w", np.full((4, 16), 0x98), "uint8")
    head = tensor("w_s", np.ones((4, 1)))
    nodes = [
        node("GatherBlockQuantized", ["w", "rows", "w_s"], "a", **MICROSOFT, bits=4, block_size=32),
        nbits(["x", "w", "w_s"], "b"),
    ]
    inputs = [("x", 1, [1, 32]), ("rows", 7, [2])]
    artifact = inspect(save(tmp_path / "m.onnx", model_of(nodes, [table, head], inputs, [("b", 1, None)])))
    assert artifact.logical_params == 128


def test_scales_that_two_weights_share_weigh_once(tmp_path):
    initializers = [*packed(), tensor("v", np.full((4, 1, 16), 0x98), "uint8")]
    nodes = [nbits(["x", "w", "w_s"], "a"), nbits(["x", "v", "w_s"], "b")]
    artifact = inspect(save(tmp_path / "m.onnx", model_of(nodes, initializers, [("x", 1, [1, 32])], [("a", 1, None)])))
    assert (artifact.logical_params, artifact.bytes["scales"]) == (256, 16)
    assert sum(artifact.bytes.values()) == artifact.file_bytes
    assert torch.equal(artifact.tensor("v").decode(), artifact.tensor("w").decode())


def test_dynamic_quantization_by_onnxruntime(tmp_path):
    """The table is gathered before it is decoded; the scale of the matrix is two nodes behind its product."""
    pytest.importorskip("onnxruntime", reason="onnxruntime quantizes")
    from onnxruntime.quantization import quantize_dynamic

    random = np.random.default_rng(0)
    weights = {"emb.weight": random.standard_normal((11, 8)), "onnx::MatMul_7": random.standard_normal((8, 5))}
    nodes = [
        node("Gather", ["emb.weight", "rows"], "e", "/emb/Gather"),
        node("MatMul", ["e", "onnx::MatMul_7"], "y", "/layers.0/up/MatMul"),
    ]
    initializers = [tensor(name, values) for name, values in weights.items()]
    save(tmp_path / "f.onnx", model_of(nodes, initializers, [("rows", 7, ["n"])], [("y", 1, ["n", 5])]))
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    artifact = inspect(tmp_path / "q.onnx")
    assert {t.name: t.shape for t in artifact.parameters} == {"emb.weight": (11, 8), "layers.0.up.weight": (8, 5)}
    for name, exported in (("emb.weight", "emb.weight"), ("layers.0.up.weight", "onnx::MatMul_7")):
        assert np.abs(artifact.tensor(name).decode().numpy() - weights[exported]).max() < 0.03
    assert artifact.tensor("layers.0.up.weight").transposed
    assert sum(artifact.bytes.values()) == artifact.file_bytes


@pytest.mark.parametrize("scales", [(), (1,), (2, 20)], ids=["one", "by-direction", "by-column"])
def test_a_recurrent_layer_computes_what_its_decoded_weights_compute(tmp_path, scales):
    """DynamicQuantizeLSTM against LSTM; the activations have eight bits, which costs 1 %."""
    pytest.importorskip("onnxruntime", reason="onnxruntime computes both")
    directions = 2 if scales == (2, 20) else 1
    random = np.random.default_rng(3)
    arrays = {}
    for name, rows in (("W", 7), ("R", 5)):
        arrays[name] = random.integers(-90, 91, (directions, rows, 20)).astype("int8")
        arrays[f"{name}_s"] = (0.004 + 0.01 * random.random(scales or (1,))).astype("float32")
        zero = 0 if directions == 2 else random.integers(-20, 21)  # onnxruntime: none where columns have scales
        arrays[f"{name}_z"] = np.full(scales or (1,), zero).astype("int8")
    parts = ["W_s", "W_z", "R_s", "R_z"]
    options = {"hidden_size": 5, "direction": "bidirectional" if directions == 2 else "forward"}
    steps = node("DynamicQuantizeLSTM", ["x", "W", "R", "", "", "", "", "", *parts], "y", **MICROSOFT, **options)
    given = [("x", 1, [3, 2, 7])]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = model_of([steps], tensors, given, [("y", 1, None)])
    artifact = inspect(save(tmp_path / "m.onnx", model))
    decoded = [artifact.tensor(name) for name in "WR"]
    assert [t.scheme for t in decoded] == ["onnx-int8", "onnx-int8"]
    floats = [tensor(t.name, t.decode().view(t.shape).transpose(1, 2).numpy()) for t in decoded]
    plain = model_of([node("LSTM", ["x", "W", "R"], "y", **options)], floats, given, [("y", 1, None)])
    feeds = {"x": random.standard_normal((3, 2, 7)).astype("float32")}
    assert (run(model, feeds) - run(plain, feeds)).abs().max() < 0.02


def test_a_fused_embedding_computes_what_its_decoded_tables_compute(tmp_path):
    """QEmbedLayerNormalization: five tensors, each with one scale and one zero point."""
    pytest.importorskip("onnxruntime", reason="onnxruntime computes it")
    random = np.random.default_rng(4)
    shapes = {"word": (11, 8), "position": (6, 8), "segment": (2, 8), "gamma": (8,), "beta": (8,)}
    arrays = {name: random.integers(0, 256, shape).astype("uint8") for name, shape in shapes.items()}
    arrays |= {f"{name}_s": np.float32(random.random() + 0.1) for name in shapes}
    arrays |= {f"{name}_z": np.uint8(random.integers(0, 256)) for name in shapes}
    inputs = ["ids", "segments", *shapes, "", *(f"{name}_s" for name in shapes), *(f"{name}_z" for name in shapes)]
    fused = helper.make_node("QEmbedLayerNormalization", inputs, ["y", "mask"], **MICROSOFT, epsilon=1e-5)
    given = [("ids", 6, [2, 4]), ("segments", 6, [2, 4])]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    model = model_of([fused], tensors, given, [("y", 1, None)])
    artifact = inspect(save(tmp_path / "m.onnx", model))
    word, position, segment, gamma, beta = (artifact.tensor(n).decode().view(s) for n, s in shapes.items())
    ids, segments = random.integers(0, 11, (2, 4)), random.integers(0, 2, (2, 4))
    summed = word[ids] + position[:4] + segment[segments]
    expected = torch.nn.functional.layer_norm(summed, (8,), gamma[:], beta[:], 1e-5)
    found = run(model, {"ids": ids.astype("int32"), "segments": segments.astype("int32")})
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert artifact.logical_params == 8 * 21


@pytest.mark.parametrize(("block", "size"), [(32, 360), (64, 324), (128, 340)])
def test_blocks_that_576_columns_do_not_fill_are_padded(block, size, tmp_path):
    """5 blocks of 128 are 640 columns: more bytes than 9 blocks of 64."""
    count = -(-576 // block)
    initializers = [tensor("w", np.zeros((1, count, block // 2)), "uint8"), tensor("s", np.ones((1, count)))]
    model = of_nodes(nbits(["x", "w", "s"], "y", rows=1, columns=576, block_size=block), initializers=initializers)
    weight = inspect(save(tmp_path / "m.onnx", model)).tensor("w")
    assert (weight.nbytes, weight.params) == (size, 576)
    assert weight.bytes.get("padding", 0) == size - 288 - 4 * count


def test_what_a_kernel_has_reordered_is_counted_and_not_decoded(tmp_path):
    model = of_nodes(nbits(["x", "w", "w_s"], "y", weight_prepacked=1), initializers=packed())
    weight = inspect(save(tmp_path / "m.onnx", model)).tensor("w")
    assert (weight.params, weight.bytes) == (128, {"codes": 64, "scales": 16})
    with pytest.raises(NotDecodable, match="w: onnx-matmulnbits-4"):
        weight.decode()


def test_scattered_groups_are_counted_and_not_decoded(tmp_path):
    order = tensor("order", np.zeros(32), "int32")
    model = of_nodes(nbits(["x", "w", "w_s", "", "order"], "y"), initializers=[*packed(), order])
    weight = inspect(save(tmp_path / "m.onnx", model)).tensor("w")
    assert (weight.params, weight.bytes) == (128, {"codes": 64, "scales": 16, "index": 128})
    with pytest.raises(NotDecodable):
        weight.decode()


NAMES = [
    ("model.layers.0.up.weight", "MatMul", "/x/MatMul", "model.layers.0.up.weight"),
    ("model.layers.0.up.weight_Q4", "MatMul", "", "model.layers.0.up.weight"),
    ("model.layers.0.up.MatMul.weight_Q8", "MatMul", "", "model.layers.0.up.weight"),
    ("model.layers.0.up.MatMul.qweight", "MatMul", "", "model.layers.0.up.weight"),
    ("onnx::MatMul_12_Q4", "MatMul", "/model/layers.0/up/MatMul_Q4", "model.layers.0.up.weight"),
    ("onnx::MatMul_12_quantized", "MatMul", "/model/up/MatMul_1", "model.up.weight"),
    ("onnx::MatMul_12", "MatMul", "node_12", "onnx::MatMul_12"),
    ("val_7", "MatMul", "/up/MatMul", "up.weight"),
]


@pytest.mark.parametrize(("name", "operator", "path", "expected"), NAMES, ids=[row[0] for row in NAMES])
def test_names_of_parameters(name, operator, path, expected):
    from pytest_quantcheck.containers.onnx_graph import Scope, Use

    use = Use(node(operator, ["x", name], "y", path), 1, Scope("", None))
    assert onnx_names.origin(name, 2, use).name == expected


def test_two_weights_of_one_path_keep_their_names(tmp_path):
    nodes = [node("MatMul", ["x", f"onnx::MatMul_{at}"], f"y{at}", "/up/MatMul") for at in (1, 2)]
    initializers = [tensor(f"onnx::MatMul_{at}", np.ones((2, 2))) for at in (1, 2)]
    model = model_of(nodes, initializers, [("x", 1, [1, 2])], [("y1", 1, None)])
    assert [t.name for t in inspect(save(tmp_path / "m.onnx", model)).tensors] == ["onnx::MatMul_1", "onnx::MatMul_2"]


def test_without_the_onnx_package_the_extra_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "m.onnx", small())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FormatError, match=r"pytest-quantcheck\[onnx\]"):
        inspect(path)


def pair(first: int, second: int):
    return model_of([], [external("a", "w.data", offset=first), external("b", "w.data", offset=second)], [], [])


def two_checksums():
    return model_of([], [external(n, "w.data", offset=8 * i, checksum=n * 40) for i, n in enumerate("ab")], [], [])


def training():
    model = small()
    model.training_info.add().algorithm.name = "step"
    return model


def changed(change):
    found = tensor("w", [1.0, 2.0])
    change(found)
    return model_of([], [found], [], [])


def sparse(indices=None, dims=(4, 6), values=(1.0, 2.0, 3.0), *, kind="float32", places="int64", operator="MatMul"):
    """A graph with one sparse initializer, `w`; no indices where there are none to give."""
    model = of_nodes(node(operator, ["x", "w"], "y"))
    made = model.graph.sparse_initializer.add(dims=dims)
    made.values.CopyFrom(tensor("w", values, kind))
    if indices is not None:
        made.indices.CopyFrom(tensor("w_indices", indices, places))
    return model


def sparse_text():
    model = sparse([1])
    model.graph.sparse_initializer[0].values.CopyFrom(helper.make_tensor("w", TensorProto.STRING, [1], [b"a"]))
    return model


def sparse_nibbles():
    model = sparse([1, 5, 7])
    nibbles = helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3])
    model.graph.sparse_initializer[0].values.CopyFrom(nibbles)
    return model


def sparse_without_values():
    model = sparse([1, 5, 7])
    model.graph.sparse_initializer[0].ClearField("values")
    return model


def sparse_scales():
    model = of_nodes(nbits(["x", "w", "w_s"], "y"), initializers=packed()[:1])
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(tensor("w_s", [1.0]), tensor("w_s_indices", [2], "int64"), [4, 1])
    )
    return model


def sparse_nbits():
    model = of_nodes(nbits(["x", "w", "w_s"], "y"), initializers=packed()[1:])
    made = helper.make_sparse_tensor(tensor("w", [7], "uint8"), tensor("w_indices", [2], "int64"), [4, 1, 16])
    model.graph.sparse_initializer.append(made)
    return model


def sparse_beside(*, twice: bool):
    """Values and indices in `w.data`; a dense tensor of the values' type and shape names the same bytes."""
    model = sparse()
    made = model.graph.sparse_initializer[0]
    made.values.CopyFrom(external("w", "w.data", shape=(3,)))
    made.indices.CopyFrom(external("w_indices", "w.data", shape=(3,), offset=16))
    made.indices.data_type = TensorProto.INT64
    if twice:
        model.graph.initializer.append(external("v", "w.data", shape=(3,)))
    return model


SPARSE = [
    ("sparse-without-indices", sparse(), "3 values and no indices"),
    ("sparse-without-values", sparse_without_values(), "has no values"),
    ("sparse-scalar", sparse([0], dims=(), values=[1.0]), "is sparse with the shape []"),
    ("sparse-of-no-rows", sparse([0], dims=(0, 6), values=[1.0]), "is sparse with the shape [0, 6]"),
    ("sparse-negative-shape", sparse([0], dims=(-4, 6), values=[1.0]), "is sparse with the shape [-4, 6]"),
    ("sparse-without-end", sparse([1, 2, 3], dims=(1 << 40, 1 << 40)), "limit"),
    ("sparse-matrix-of-values", sparse([[1, 2]], values=[[1.0, 2.0]]), "values of the shape [1, 2]"),
    ("sparse-fewer-indices", sparse([1, 2]), "w.indices: [2] are no indices of 3 values"),
    ("sparse-other-rank", sparse(np.zeros((3, 3))), "w.indices: [3, 3] are no indices of 3 values"),
    ("sparse-cube-of-indices", sparse(np.zeros((3, 2, 1))), "[3, 2, 1] are no indices"),
    ("sparse-int32-indices", sparse([1, 2, 3], places="int32"), "are INT32, the indices"),
    ("sparse-float-indices", sparse([1, 2, 3], places="float64"), "are DOUBLE, the indices"),
    ("sparse-unsorted", sparse([1, 7, 5]), "w.indices: do not ascend among indices 0 to 3"),
    ("sparse-twice", sparse([1, 5, 5]), "do not ascend"),
    ("sparse-negative", sparse([-1, 5, 7]), "out of range"),
    ("sparse-behind-the-end", sparse([1, 5, 24]), "are 1 to 24 along 24"),
    ("sparse-column-out-of-range", sparse([[0, 1], [0, 6], [3, 0]]), "are 0 to 6 along 6 of [4, 6]"),
    ("sparse-row-negative", sparse([[-1, 1], [0, 5], [3, 0]]), "are -1 to 3 along 4 of [4, 6]"),
    ("sparse-columns-unsorted", sparse([[0, 5], [0, 1], [3, 0]]), "do not ascend"),
]  # fmt: skip


def dequantized(shape=(4, 6), scale=(), axis=1, **attributes):
    initializers = [tensor("w", np.zeros(shape), "int8"), tensor("s", np.ones(scale))]
    return of_nodes(node("DequantizeLinear", ["w", "s"], "y", axis=axis, **attributes), initializers=initializers)


def both_ways():
    nodes = [nbits(["x", "w", "w_s"], "y", "one"), nbits(["x", "w", "v_s"], "z", "two")]
    return of_nodes(*nodes, initializers=[*packed(), packed(prefix="v")[1]])


def ordered(operator: str = "QOrderedMatMul"):
    weight = tensor("w", np.zeros((2, 8, 16)), "uint8")
    return of_nodes(node(operator, ["x", "x", "w", "x"], "y", "experts", **MICROSOFT), initializers=[weight])


def foreign():
    weight = tensor("w", np.zeros((4, 4)), "int32")
    return of_nodes(node("QLinear", ["x", "w"], "y", "q", domain="mine"), initializers=[weight])


REFUSED = [
    ("up-and-out", outside("../secret"), "only files beneath the folder"),
    ("absolute", outside("/etc/passwd"), "only files beneath the folder"),
    ("nul", outside("w.data\0.txt"), "only files beneath the folder"),
    ("link-out", outside("link"), "outside its folder"),
    ("folder", outside("folder"), "not a regular file"),
    ("missing", outside("none.data"), "no such file"),
    ("itself", outside("m.onnx"), "is said to be in"),
    ("offset-behind-the-end", outside("w.data", offset=97), "which has 100"),
    ("offset-that-wraps", outside("w.data", offset=2**64 - 4), "no number of bytes|which has 100"),
    ("offset-negative", outside("w.data", offset=-8), "no number of bytes"),
    ("length-that-differs", outside("w.data", length=12), "needs 8 bytes"),
    ("location-missing", outside(""), "without a location"),
    ("overlap", pair(0, 4), "no overlaps"),
    ("one-place-two-shapes", two_at(0, (2,), (1, 2)), "no overlaps"),
    ("hard-link-out", outside("hard"), "hard links are not read"),
    ("wrong-checksum", outside("w.data", checksum="ab" * 20), "the graph says `abab"),
    ("two-checksums", two_checksums(), "another checksum"),
    ("filled-to-a-negative-shape", filled([32, -3]), "is filled to the shape [32, -3]"),
    ("filled-without-end", filled([32, 1 << 40]), "values)"),
    ("filled-to-a-shape-in-32-bit", filled([32, 3], dtype="int32"), "not INT64"),
    ("filled-with-two-values", filled([32, 3], value=tensor("", [1.0, 2.0])), "is not one number"),
    ("training", training(), "training_info"),
    ("negative-dimension", changed(lambda t: t.dims.__setitem__(0, -2)), "has the shape [-2]"),
    ("too-few-bytes", changed(lambda t: setattr(t, "raw_data", b"1234")), "8 bytes has 4"),
    ("two-fields", changed(lambda t: t.float_data.append(1.0)), "twice"),
    ("other-field", changed(lambda t: (t.ClearField("raw_data"), t.int32_data.extend([1, 2]))), "`int32_data`"),
    ("unknown-type", changed(lambda t: setattr(t, "data_type", 99)), "data type 99"),
    ("segment", changed(lambda t: setattr(t.segment, "begin", 1)), "segment"),
    ("same-name", model_of([], [tensor("w", [1.0]), tensor("w", [2.0])], [], []), "names two constants"),
    ("no-name", model_of([], [tensor("", [1.0])], [], []), "without a name"),
    *SPARSE,
    ("sparse-of-many-dimensions", sparse([0], dims=[1] * 65, values=[1.0]), "65 dimensions"),
    ("sparse-text", sparse_text(), "is sparse STRING, not read"),
    ("sparse-nibbles", sparse_nibbles(), "is sparse INT4, not read"),
    ("sparse-scales", sparse_scales(), "sparse scales for MatMulNBits (node `n`)"),
    ("sparse-packed-codes", sparse_nbits(), "sparse codes for MatMulNBits (node `n`)"),
    ("sparse-integers-for-nobody", sparse([1, 5, 7], kind="int8"), "feeds MatMul (node ``): not decoded"),
    ("computed-scales", of_nodes(nbits(["x", "w", "x"], "y"), initializers=packed()[:1]), "scales that are computed"),
    ("no-scales", of_nodes(nbits(["x", "w"], "y"), initializers=packed()[:1]), "has no scales"),
    ("three-bits", of_nodes(nbits(["x", "w", "w_s"], "y", bits=3), initializers=packed()), "3 bits"),
    ("block-24", of_nodes(nbits(["x", "w", "w_s"], "y", block_size=24), initializers=packed()), "blocks of 24"),
    ("more-rows", of_nodes(nbits(["x", "w", "w_s"], "y", rows=5), initializers=packed()), "is not the 80"),
    ("decoded-in-two-ways", both_ways(), "decoded in two ways, by MatMulNBits (node `one`)"),
    ("scales-of-another-axis", dequantized(scale=(4,)), "[4] is not [1, 6]"),
    ("axis-out-of-range", dequantized(scale=(4,), axis=2), "dimension 2 of [4, 6]"),
    ("blocks-that-do-not-fit", dequantized(scale=(4, 2), block_size=2), "is not [4, 3]"),
    ("unknown-operator", ordered(), "feeds QOrderedMatMul (node `experts`)"),
    ("words-for-a-foreign-operator", foreign(), "feeds QLinear (node `q`): may hold packed codes"),
    ("integers-for-nobody", of_nodes(initializers=[tensor("w", [1, 2], "int8")]), "feeds no node"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "what"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_read_exactly_is_refused(model, what, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(100))
    (folder / "w.data").write_bytes(bytes(100))
    (folder / "folder").mkdir()
    os.symlink(tmp_path / "secret", folder / "link")
    os.link(tmp_path / "secret", folder / "hard")
    with pytest.raises(FormatError) as caught:
        inspect(save(folder / "m.onnx", model))
    assert any(part in str(caught.value) for part in what.split("|")), str(caught.value)
    assert "\n" not in str(caught.value)


RAW = [
    ("empty", b"", "not an ONNX model"),
    ("text", b"hello world, this is no protobuf", "truncated or no ONNX|wire type"),
    ("truncated", None, "truncated"),
    ("two-graphs", bytes([8, 10, 58, 0, 58, 0]), "twice"),
    ("endless-number", b"\xff" * 20, "more than 10 bytes"),
    ("group", bytes([0x0B]), "wire type 3"),
]


@pytest.mark.parametrize(("raw", "what"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_what_is_no_onnx_is_refused(raw, what, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(small().SerializeToString()[:-40] if raw is None else raw)
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert any(part in str(caught.value) for part in what.split("|")), str(caught.value)


def test_graphs_nested_too_deep_are_refused(tmp_path):
    raw = b""
    for _ in range(100):  # attribute.g of a node of a graph
        for number in (6, 5, 1):
            raw = onnx_wire._prefixed(number, raw)
    (tmp_path / "m.onnx").write_bytes(bytes([8, 10]) + onnx_wire._prefixed(7, raw))
    with pytest.raises(FormatError, match="nested deeper"):
        inspect(tmp_path / "m.onnx")


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_gives_an_error_or_adds_up(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.onnx"
    raw = bytearray(small().SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(FormatError):
        artifact = inspect(path)
        assert sum(artifact.bytes.values()) == artifact.file_bytes


REFUSED_BY_THE_CHECKER = [row for row in SPARSE if row[0] != "sparse-without-end"]


@pytest.mark.parametrize(
    "model", [row[1] for row in REFUSED_BY_THE_CHECKER], ids=[row[0] for row in REFUSED_BY_THE_CHECKER]
)
def test_what_is_refused_of_a_sparse_tensor_the_checker_refuses(model):
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_sparse_tensor(model.graph.sparse_initializer[0])


def scattered(shape, stored: int, *, by_dimension: bool = False):
    """Random values in a few places, and the graph that has only those."""
    random = np.random.default_rng(stored)
    places = np.sort(random.choice(np.prod(shape), stored, replace=False))
    dense = np.zeros(shape, "float32")
    dense.flat[places] = random.standard_normal(stored)
    indices = np.stack(np.unravel_index(places, shape), axis=1) if by_dimension else places
    return dense, sparse(indices, shape, dense.flat[places])


@pytest.mark.parametrize("by_dimension", [False, True])
@pytest.mark.parametrize("piece", [1, 3, 1 << 13])
def test_sparse_windows_are_cut_from_any_piece_of_indices(tmp_path, monkeypatch, piece, by_dimension):
    monkeypatch.setattr(onnx_sparse, "PIECE", piece)
    monkeypatch.setattr(onnx_sparse, "PIECES", 1 << 13)
    dense, model = scattered((23, 3, 7), 101, by_dimension=by_dimension)
    weight = inspect(save(tmp_path / "m.onnx", model)).tensor("w")
    for start, stop in ((0, 69), (0, 1), (68, 69), (11, 12), (30, 55)):
        expected = torch.from_numpy(dense.reshape(69, 7)[start:stop])
        assert torch.equal(weight.decode(start, stop), expected)
        assert [weight.cells(weight, row, 2, 5) for row in range(start, stop)] == expected[:, 2:5].tolist()
    raw = dense.tobytes()
    assert all(weight.stored.source.read(at, at + 9) == raw[at : at + 9] for at in range(len(raw) - 9))
    assert weight.stored.load_bytes(5, 50).numpy().tobytes() == raw[5:50]


def test_a_window_of_a_sparse_tensor_reads_a_piece_of_its_indices(tmp_path, monkeypatch):
    """Ten thousand rows, of which two are wanted."""
    dense, model = scattered((10_000, 9), 50_000)
    weight = inspect(save(tmp_path / "m.onnx", model)).tensor("w")
    read, plain_read = [], File.read
    monkeypatch.setattr(
        File, "read", lambda self, start, stop: read.append(stop - start) or plain_read(self, start, stop)
    )
    assert torch.equal(weight.decode(5_000, 5_002), torch.from_numpy(dense[5_000:5_002]))
    assert 0 < sum(read) <= 2 * 8 * onnx_sparse.PIECE + 18 * 4


def test_sparse_tensors_are_found_in_branches_attributes_and_functions(tmp_path):
    """In each place a matrix of 2 x 3 of which one value is stored."""

    def made(name=""):
        return helper.make_sparse_tensor(tensor(name, [1.0]), tensor("", [4], "int64"), [2, 3])

    result = helper.make_tensor_value_info("o", 1, [2, 3])
    branch = helper.make_graph([node("Add", ["i", "i"], "o")], "then", [], [result], sparse_initializer=[made("i")])
    nodes = [
        node("If", ["condition"], "chosen", then_branch=branch, else_branch=branch),
        node("Own", [], "z", domain="mine"),
        node("Other", [], "u", domain="mine", table=made(), tables=[made(), made()]),
    ]
    model = model_of(nodes, [], [("condition", 9, [])], [("chosen", 1, None)])
    body = [helper.make_node("Constant", [], ["k"], sparse_value=made()), node("Add", ["k", "k"], "q")]
    model.functions.append(helper.make_function("mine", "Own", [], ["q"], body, [helper.make_opsetid("", 21)]))
    artifact = inspect(save(tmp_path / "m.onnx", model))
    branches = {f"chosen/{branch}_branch/i" for branch in ("then", "else")}
    assert {t.name for t in artifact.tensors} == {*branches, "mine:Own/k", "u.table", "u.tables", "u.tables.1"}
    assert (artifact.logical_params, artifact.bytes["unquantized"], artifact.bytes["index"]) == (36, 24, 48)
    assert all(t.decode().tolist() == [[0, 0, 0], [0, 1, 0]] for t in artifact.tensors)
    assert sum(artifact.bytes.values()) == artifact.file_bytes


def test_sparse_values_and_indices_may_lie_beside_the_graph(tmp_path):
    content = np.float32([0.5, 1.5, -2.0]).tobytes() + bytes(4) + np.int64([1, 5, 23]).tobytes()
    (tmp_path / "w.data").write_bytes(content)
    with pytest.raises(FormatError, match="no overlaps"):
        inspect(save(tmp_path / "m.onnx", sparse_beside(twice=True)))
    artifact = inspect(save(tmp_path / "m.onnx", sparse_beside(twice=False)))
    assert artifact.tensor("w").bytes == {"unquantized": 12, "index": 24}
    assert artifact.tensor("w").decode().flatten().nonzero().flatten().tolist() == [1, 5, 23]
    assert sum(artifact.bytes.values()) == artifact.file_bytes == (tmp_path / "m.onnx").stat().st_size + len(content)


@pytest.mark.parametrize(
    ("model", "role"),
    [(sparse([1, 5, 7]), "parameter"), (sparse([1, 5, 7], kind="int64", operator="Reshape"), "buffer"),
     (sparse([1, 5, 7], operator="Clip"), "buffer"), (sparse([], values=[]), "parameter")],
    ids=["a-factor", "integers", "a-bound", "a-factor-of-zeros"],
)  # fmt: skip
def test_a_sparse_tensor_is_what_its_use_says(tmp_path, model, role):
    artifact = inspect(save(tmp_path / "m.onnx", model))
    assert (artifact.tensor("w").role, artifact.tensor("w").shape) == (role, (4, 6))
    assert artifact.logical_params == (24 if role == "parameter" else 0)
    assert not artifact.quantized_params


def test_sparse_tensors_that_begin_alike_are_no_duplicates(tmp_path):
    """Their first bytes and their indices are equal, their last values are not."""
    random = np.random.default_rng(0)
    values = random.standard_normal(20_000).astype("float32")
    places = np.concatenate([np.arange(10), 60_000 + np.arange(19_990)])
    model = of_nodes(*(node("MatMul", ["x", name], f"y{name}") for name in "uvw"))
    for name, last in (("u", 1.0), ("v", 2.0), ("w", 1.0)):
        values[-1] = last
        made = helper.make_sparse_tensor(tensor(name, values), tensor("", places, "int64"), [32, 50, 50])
        model.graph.sparse_initializer.append(made)
    artifact = inspect(save(tmp_path / "m.onnx", model))
    assert [(first.name, copy.name) for first, copy in repeated(artifact)] == [("u", "w")]


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_of_a_sparse_tensor_gives_an_error_or_adds_up(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.onnx"
    raw = bytearray(scattered((5, 7), 9, by_dimension=data.draw(st.booleans()))[1].SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(FormatError):
        artifact = inspect(path)
        assert sum(artifact.bytes.values()) == artifact.file_bytes
        for weight in artifact.tensors:
            stop = min(weight.rows, 3)
            assert weight.decode(0, stop).shape == (stop, weight.columns)


def test_an_unknown_encoding_is_told_from_a_broken_file(tmp_path):
    with pytest.raises(UnknownEncoding):
        inspect(save(tmp_path / "m.onnx", ordered()))
