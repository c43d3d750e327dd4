"""TFLite: equal to the schema's own reader, worked by hand, strict; what we do not read says what it is."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_quantcheck import FormatError, inspect
from pytest_quantcheck.containers import OTHERS, open_path

flatbuffers = pytest.importorskip("flatbuffers", reason="flatbuffers writes the files of these tests")
tflite = pytest.importorskip("tflite", reason="tflite has the schema that these tests hold us to")


class Row(NamedTuple):
    """One tensor; `content` None is one that the graph computes, an integer shares the buffer of that row."""

    name: str
    kind: str
    shape: tuple[int, ...]
    content: bytes | int | None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    dimension: int = 0


def numbers(builder, values, width: str) -> int:
    builder.StartVector(struct.calcsize(width), len(values), struct.calcsize(width))
    for value in reversed(values):
        builder.PrependFloat32(value) if width == "f" else builder.Prepend(
            {"i": flatbuffers.number_types.Int32Flags, "q": flatbuffers.number_types.Int64Flags}[width], value
        )
    return builder.EndVector()


def offsets(builder, values) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependUOffsetTRelative(value)
    return builder.EndVector()


def buffer_of(builder, content: bytes) -> int:
    data = builder.CreateByteVector(content) if content else None
    tflite.BufferStart(builder)
    if data is not None:
        tflite.BufferAddData(builder, data)
    return tflite.BufferEnd(builder)


def quantization_of(builder, row: Row) -> int | None:
    if not row.scale:
        return None
    scale, zero = numbers(builder, row.scale, "f"), numbers(builder, row.zero_point, "q") if row.zero_point else None
    tflite.QuantizationParametersStart(builder)
    tflite.QuantizationParametersAddScale(builder, scale)
    if zero is not None:
        tflite.QuantizationParametersAddZeroPoint(builder, zero)
    tflite.QuantizationParametersAddQuantizedDimension(builder, row.dimension)
    return tflite.QuantizationParametersEnd(builder)


def tensor_of(builder, row: Row, buffer: int) -> int:
    name, shape = builder.CreateString(row.name), numbers(builder, row.shape, "i")
    quantization = quantization_of(builder, row)
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, 19 if row.kind == "INT2" else getattr(tflite.TensorType, row.kind))
    tflite.TensorAddBuffer(builder, buffer)
    tflite.TensorAddName(builder, name)
    if quantization is not None:
        tflite.TensorAddQuantization(builder, quantization)
    return tflite.TensorEnd(builder)


def write(path: Path, rows: list[Row], *, version: int = 3, extra: tuple[bytes, ...] = (), subgraphs: int = 1) -> Path:
    builder = flatbuffers.Builder(1024)
    contents, places = [b""], {}
    for at, row in enumerate(rows):
        if isinstance(row.content, bytes):
            places[at] = len(contents)
            contents.append(row.content)
        else:
            places[at] = 0 if row.content is None else places[row.content]
    buffers = offsets(builder, [buffer_of(builder, content) for content in (*contents, *extra)])
    graphs = []
    for _ in range(subgraphs):
        tensors = offsets(builder, [tensor_of(builder, row, places[at]) for at, row in enumerate(rows)])
        tflite.SubGraphStart(builder)
        tflite.SubGraphAddTensors(builder, tensors)
        graphs.append(tflite.SubGraphEnd(builder))
    subgraph_vector = offsets(builder, graphs)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, version)
    tflite.ModelAddSubgraphs(builder, subgraph_vector)
    tflite.ModelAddBuffers(builder, buffers)
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


GRAPH = [
    Row("input", "INT8", (1, 3), None, (0.5,), (-1,)),
    Row("dense", "INT8", (2, 3), bytes([1, 2, 3, 0xFF, 0xFE, 0x80]), (0.5, 2.0), (0, 0), 0),
    Row("dense/bias", "INT32", (2,), struct.pack("<2i", 7, -7), (0.25,)),
    Row("conv", "UINT8", (1, 2, 1, 2), bytes([128, 130, 0, 255]), (0.1,), (128,)),
    Row("depthwise", "INT8", (1, 1, 2, 3), bytes([1, 2, 3, 4, 5, 6]), (1.0, 10.0, 100.0), (0, 0, 1), 3),
    Row("int4", "INT4", (3, 3), bytes([0x21, 0x43, 0x65, 0xF7, 0x08]), (1.0, 2.0, 3.0), (), 0),
    Row("int2", "INT2", (5,), bytes([0b11100100, 0b00000010]), (1.0,)),
    Row("norm", "FLOAT32", (3,), floats(1, 2, 3)),
    Row("half", "FLOAT16", (2, 2), struct.pack("<4e", 1, 2, 3, 4)),
    Row("shape", "INT32", (2,), struct.pack("<2i", 1, -1)),
    Row("eps", "FLOAT32", (), floats(1e-6)),
    Row("dense_again", "INT8", (2, 3), 1, (0.5, 2.0), (0, 0), 0),
]
PARAMETERS = 6 + 2 + 4 + 6 + 9 + 5 + 3 + 4
VALUES = {
    "dense": [[0.5, 1, 1.5], [-2, -4, -256]],
    "dense/bias": [[1.75, -1.75]],
    "conv": [[0, 0.2], [-12.8, 12.7]],
    "depthwise": [[1, 20, 200], [4, 50, 500]],
    "int4": [[1, 2, 3], [8, 10, 12], [21, -3, -24]],
    "int2": [[0, 1, -2, -1, -2]],
    "norm": [[1, 2, 3]],
    "half": [[1, 2], [3, 4]],
}


def test_counts_bytes_and_values_worked_by_hand(tmp_path):
    artifact = inspect(write(tmp_path / "m.tflite", GRAPH))
    assert artifact.logical_params == PARAMETERS
    assert artifact.tied_params == 6
    assert artifact.buffers == 3
    for name, values in VALUES.items():
        tensor = artifact.tensor(name)
        assert torch.allclose(tensor.decode(), torch.tensor(values, dtype=torch.float32)), name
        for row in range(tensor.rows):
            assert torch.equal(tensor.decode(row, row + 1), tensor.decode()[row : row + 1])
    assert artifact.bytes["codes"] == 6 + 8 + 4 + 6 + 5 + 2
    assert artifact.bytes["scales"] == 4 * (2 + 1 + 1 + 3 + 3 + 1)
    assert artifact.bytes["zero_points"] == 8 * (2 + 1 + 3)
    assert artifact.bytes["unquantized"] == 12 + 8
    assert artifact.bytes["buffers"] == 8 + 4
    assert sum(artifact.bytes.values()) == artifact.file_bytes == (tmp_path / "m.tflite").stat().st_size


def test_reads_what_the_schemas_own_reader_reads(tmp_path):
    """Differential: every constant, its bytes, scales and zero points."""
    raw = write(tmp_path / "m.tflite", GRAPH).read_bytes()
    model = tflite.Model.GetRootAsModel(raw, 0)
    graph = model.Subgraphs(0)
    ours = open_path(tmp_path / "m.tflite")
    for at in range(graph.TensorsLength()):
        tensor = graph.Tensors(at)
        name, buffer = tensor.Name().decode(), model.Buffers(tensor.Buffer())
        if not buffer.DataLength():
            assert name not in ours.tensors
            continue
        stored = ours.tensors[ours.aliases.get(name, name)]
        assert bytes(stored.read(limit=1000)) == buffer.DataAsNumpy().tobytes()
        quantization = tensor.Quantization()
        for part, length in (("scale", "ScaleLength"), ("zero_point", "ZeroPointLength")):
            there = f"{stored.name}.quantization.{part}" in ours.tensors
            assert there == bool(quantization and getattr(quantization, length)())
        if quantization is not None:
            scale = ours.tensors[f"{stored.name}.quantization.scale"]
            assert numpy.array_equal(scale.load().numpy(), quantization.ScaleAsNumpy())


def test_names_that_come_twice_and_subgraphs_are_told_apart(tmp_path):
    rows = [Row("w", "FLOAT32", (2,), floats(1, 2)), Row("w", "FLOAT32", (3,), floats(1, 2, 3))]
    assert [t.name for t in inspect(write(tmp_path / "a.tflite", rows)).tensors] == ["w#0", "w#1"]
    artifact = inspect(write(tmp_path / "b.tflite", rows[:1], subgraphs=2))
    assert (artifact.logical_params, artifact.tied_params) == (2, 2)


def test_a_buffer_that_no_tensor_uses_is_dead(tmp_path):
    artifact = inspect(write(tmp_path / "a.tflite", GRAPH, extra=(b"x" * 100,)))
    assert artifact.bytes["dead"] == 100
    assert [finding.check for finding in artifact.findings] == ["dead-buffer"]


def patched(make, at: int, new: bytes):
    def change(path: Path) -> None:
        raw = bytearray(make(path).read_bytes())
        raw[at : at + len(new)] = new
        path.write_bytes(raw)

    return change


def graph(path: Path) -> Path:
    return write(path, GRAPH)


ONE = Row("w", "INT8", (2, 3), bytes(6), (0.5, 1.0), (), 0)
BAD = [
    ("not-a-flatbuffer", lambda p: p.write_bytes(b"hello"), "TFL3"),
    ("other-identifier", patched(graph, 4, b"ORTM"), "TFL3"),
    ("root-outside", patched(graph, 0, b"\xff\xff\xff\x7f"), "points to bytes"),
    ("truncated", lambda p: p.write_bytes(graph(p).read_bytes()[:-40]), "the file has|truncated"),
    ("version-2", lambda p: write(p, [ONE], version=2), "schema version 2"),
    ("buffer-too-short", lambda p: write(p, [ONE._replace(content=bytes(5))]), "w: INT8 [2, 3] needs 6 bytes"),
    ("negative-shape", lambda p: write(p, [ONE._replace(shape=(-2, -3))]), "w: constant of the shape [-2, -3]"),
    ("three-scales-for-two-rows", lambda p: write(p, [ONE._replace(scale=(1.0, 1.0, 1.0))]), "w: has 3 scales"),
    ("dimension-out-of-range", lambda p: write(p, [ONE._replace(dimension=2)]), "dimension 2 of [2, 3]"),
    ("zero-points-that-do-not-fit", lambda p: write(p, [ONE._replace(zero_point=(1, 2, 3))]), "w: has 3 zero points"),
]


@pytest.mark.parametrize(("make", "what"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_broken_files_are_refused(make, what, tmp_path):
    path = tmp_path / "m.tflite"
    make(path)
    with pytest.raises(FormatError) as caught:
        inspect(path)
    assert any(part in str(caught.value) for part in what.split("|")), str(caught.value)
    assert str(caught.value).startswith(str(path))


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_byte_gives_an_error_or_adds_up(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.tflite"
    raw = bytearray(write(path, GRAPH).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(FormatError):
        artifact = inspect(path)
        assert sum(artifact.bytes.values()) == artifact.file_bytes


@pytest.mark.parametrize("ending", OTHERS)
def test_what_we_do_not_read_says_what_it_is(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"")
    with pytest.raises(FormatError, match=r"is an? "):
        inspect(path)
