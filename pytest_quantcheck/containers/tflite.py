"""TFLite (LiteRT): a flatbuffer that holds the graph, its tensors and their values.

    Model         version 3, subgraphs, buffers, metadata
    Subgraph      tensors
    Tensor        shape, type, buffer, name, quantization; one whose buffer is empty is computed, not stored
    Buffer        data, or offset and size of bytes behind the flatbuffer (files over 2 GB); buffer 0 is empty
    Quantization  scale [n] f32, zero_point [n] i64, quantized_dimension; n is 1 or the size of that dimension

Source: TensorFlow 2.20, tensorflow/compiler/mlir/lite/schema/schema.fbs (version 3).

Stored tensors are the constants, under their names in the graph, with `<name>.quantization.scale` and `.zero_point`
beside them where they have any; `metadata[name]` says as JSON what no stored tensor can: type, shape and dimension.
Integers without a scale are shapes, axes and indexes: buffers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from pytest_quantcheck.containers import files
from pytest_quantcheck.containers.flatbuffer import VECTOR_LIMIT, Flatbuffer, Table
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import ByteClass, Container, StoredTensor

IDENTIFIER = b"TFL3"

# TensorType -> name in the schema, bits, safetensors dtype; sub-byte numbers are stored as bytes, lowest bits first.
TYPES = {
    0: ("FLOAT32", 32, "F32"),
    1: ("FLOAT16", 16, "F16"),
    2: ("INT32", 32, "I32"),
    3: ("UINT8", 8, "U8"),
    4: ("INT64", 64, "I64"),
    5: ("STRING", 8, "U8"),
    6: ("BOOL", 8, "BOOL"),
    7: ("INT16", 16, "I16"),
    8: ("COMPLEX64", 64, "C64"),
    9: ("INT8", 8, "I8"),
    10: ("FLOAT64", 64, "F64"),
    12: ("UINT64", 64, "U64"),
    15: ("UINT32", 32, "U32"),
    16: ("UINT16", 16, "U16"),
    17: ("INT4", 4, "U8"),
    18: ("BFLOAT16", 16, "BF16"),
    19: ("INT2", 2, "U8"),
}


class Tensor(NamedTuple):
    """One constant of the graph: `start` and `size` are the bytes of its buffer."""

    name: str
    shape: tuple[int, ...]
    kind: int
    buffer: int
    start: int
    size: int
    quantization: Table | None


def accepts(path: str) -> bool:
    """Whether this container reads the path."""
    return path.endswith((".tflite", ".lite"))


def open_container(path: str) -> Container:
    """Return the constants of a `.tflite` file."""
    return read_file(files.open_file(path), path)


def read_file(file: files.Readable, path: str) -> Container:
    """Return the constants of one file, here or on a server; `path` is its name."""
    try:
        return _open(file, path)
    except FormatError as error:
        raise error.at(file=path) from None


def _open(file: files.Readable, path: str) -> Container:
    buffer = Flatbuffer(file)
    if file.size < 8 or buffer.read(4, 4) != IDENTIFIER:
        raise FormatError("not a TFLite file (`TFL3` belongs at byte 4)")
    model = buffer.root()
    if model.number(0, 4) != 3:
        raise FormatError(f"TFLite schema version {model.number(0, 4)} (3)")
    buffers = [_place(table) for table in model.tables(4)]
    stored: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    metadata: dict[str, str] = {}
    shared: dict[tuple[int, int], str] = {}  # writers may keep equal scales once
    weighed: dict[int, str] = {}  # buffer -> the tensor that weighs it
    for tensor in _constants(model, buffers):
        first = weighed.setdefault(tensor.buffer, tensor.name)
        codes = _stored(tensor, file)
        if first != tensor.name and (codes.dtype, codes.shape) == (stored[first].dtype, stored[first].shape):
            aliases[tensor.name] = first
            continue
        stored[tensor.name] = codes if first == tensor.name else codes._replace(nbytes=0, role="tied")
        for part in _parts(tensor, file):
            place = (part.offset, part.nbytes)
            stored[part.name] = part if shared.setdefault(place, part.name) == part.name else part._replace(nbytes=0)
        metadata[tensor.name] = json.dumps(_record(tensor))
    _check_apart(stored)
    dead = _unused(model, buffers, weighed)
    used = sum(tensor.nbytes for tensor in stored.values())
    overhead: dict[ByteClass, int] = {"metadata": file.size - used - dead, "dead": dead}
    return Container("tflite", path, stored, file.size, overhead, {}, aliases, tuple(_dead(dead)), metadata=metadata)


def _dead(size: int) -> Iterator[Finding]:
    if size:
        yield Finding("dead-buffer", "warning", None, f"{size:,} bytes of buffers belong to no tensor")


def _place(table: Table) -> tuple[int, int]:
    """The byte range of a buffer, as start and size."""
    start, size = table.vector(0, 1)
    offset, length = table.number(1, 8), table.number(2, 8)
    if offset > 1:  # 0 and 1 say that the bytes are in the flatbuffer itself
        if size or offset + length > table.buffer.file.size:
            raise FormatError(f"buffer at byte {offset:,} of {length:,} bytes reaches behind the end: truncated")
        return offset, length
    return start, size


def _constants(model: Table, buffers: list[tuple[int, int]]) -> Iterator[Tensor]:
    """The tensors that have values, under unique names."""
    subgraphs = model.tables(2)
    found: list[tuple[str, Table, int]] = []
    for number, subgraph in enumerate(subgraphs):
        prefix = f"{subgraph.text(4) or number}/" if len(subgraphs) > 1 else ""
        for table in subgraph.tables(0):
            index = table.number(2, 4)
            if index >= len(buffers):
                raise FormatError(f"names buffer {index:,} of {len(buffers):,}", tensor=table.text(3))
            if buffers[index][1]:
                found.append((prefix + table.text(3), table, index))
        if len(found) > VECTOR_LIMIT:
            raise FormatError(f"more than {VECTOR_LIMIT:,} tensors")
    names = Counter(name for name, _, _ in found)
    for at, (name, table, index) in enumerate(found):
        unique = name if names[name] == 1 and name else f"{name}#{at}"
        yield Tensor(
            unique, _shape(table, unique), table.number(1, 1), index, *buffers[index], _quantization(table, unique)
        )


def _shape(table: Table, name: str) -> tuple[int, ...]:
    shape = table.numbers(0, 4)
    if min(shape, default=0) < 0:
        raise FormatError(f"constant of the shape {list(shape)}", tensor=name)
    return shape


def _quantization(table: Table, name: str) -> Table | None:
    quantization = table.table(4)
    if table.table(6) is not None:
        raise UnknownEncoding("is sparse, which is not read", tensor=name)
    if quantization is not None and quantization.number(4, 1):
        raise UnknownEncoding("has a custom or blockwise quantization, which is not read", tensor=name)
    return quantization


def _stored(tensor: Tensor, file: files.Readable) -> StoredTensor:
    if tensor.kind not in TYPES:
        raise UnknownEncoding(f"TFLite type {tensor.kind} is none we know", tensor=tensor.name)
    kind, bits, dtype = TYPES[tensor.kind]
    wanted = -(-prod(tensor.shape) * bits // 8)
    if kind != "STRING" and wanted != tensor.size:
        raise FormatError(
            f"{kind} {list(tensor.shape)} needs {wanted:,} bytes, its buffer has {tensor.size:,}", tensor=tensor.name
        )
    shape = (tensor.size,) if BITS[dtype] != bits or kind == "STRING" else tensor.shape
    stored = StoredTensor(tensor.name, dtype, shape, tensor.size, file, tensor.start)
    return stored._replace(role="buffer") if _is_buffer(tensor, kind, dtype) else stored


def _is_buffer(tensor: Tensor, kind: str, dtype: str) -> bool:
    """Whether a constant is no weight: text, integers that stand for themselves, a number that an operator takes."""
    scaled = tensor.quantization is not None and tensor.quantization.vector(2, 4).length
    return kind == "STRING" or not tensor.shape or (not scaled and DTYPES[dtype].kind in ("int", "bool"))


def _parts(tensor: Tensor, file: files.Readable) -> Iterator[StoredTensor]:
    if tensor.quantization is None:
        return
    scale, zero = tensor.quantization.vector(2, 4), tensor.quantization.vector(3, 8)
    for part, dtype, (start, length), width in (("scale", "F32", scale, 4), ("zero_point", "I64", zero, 8)):
        if length and scale.length:
            name = f"{tensor.name}.quantization.{part}"
            yield StoredTensor(name, dtype, (length,), length * width, file, start)


def _record(tensor: Tensor) -> Mapping[str, object]:
    dimension = tensor.quantization.number(6, 4, signed=True) if tensor.quantization is not None else 0
    return {"type": TYPES[tensor.kind][0], "shape": list(tensor.shape), "quantized_dimension": dimension}


def _check_apart(stored: Mapping[str, StoredTensor]) -> None:
    """No two tensors have bytes in common, but for those that share a buffer."""
    stop, before = 0, ""
    for tensor in sorted((t for t in stored.values() if t.nbytes), key=lambda tensor: tensor.offset):
        if tensor.offset < stop:
            raise FormatError(f"shares bytes with `{before}` (no overlaps)", tensor=tensor.name)
        stop, before = tensor.offset + tensor.nbytes, tensor.name


def _unused(model: Table, buffers: list[tuple[int, int]], weighed: Mapping[int, str]) -> int:
    """The bytes of buffers that neither a tensor nor the model's metadata has."""
    named = {table.number(1, 4) for table in model.tables(6)}
    return sum(size for index, (_, size) in enumerate(buffers) if index not in weighed and index not in named)
