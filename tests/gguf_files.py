"""GGUF files written byte by byte, so that they can be wrong, sparse, split or big-endian."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from pytest_quantcheck.containers.gguf import TYPES

IDS = {name: number for number, name in TYPES.items()}
# name: (values of a block, bytes of a block); written down once more, so that a slip in the package shows
SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8), "I8": (1, 1), "I16": (1, 2), "I32": (1, 4),
    "I64": (1, 8), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54),
    "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip
CODES = {"u8": (0, "B"), "u16": (2, "H"), "i32": (5, "i"), "u32": (4, "I"), "f32": (6, "f"), "u64": (10, "Q")}


class Tensor(NamedTuple):
    """One tensor; without content it is a hole. `type` is a name or a number, `offset` is set where it is wrong."""

    name: str
    type: str | int
    shape: tuple[int, ...]  # as torch has it
    content: bytes | None = None
    offset: int | None = None

    @property
    def size(self) -> int:
        if isinstance(self.type, int):
            return len(self.content or b"")
        values, width = SIZES[self.type]
        return prod(self.shape) // values * width


def text(value: str | bytes, order: str = "<") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(f"{order}Q", len(raw)) + raw


def key(name: str, kind: str, value: object, order: str = "<") -> bytes:
    """Return one key-value pair: kind `string`, `[string]`, or a number of `CODES`, in brackets an array of it."""
    head = text(name, order)
    if kind == "string":
        return head + struct.pack(f"{order}I", 8) + text(value, order)
    if kind == "[string]":
        many = b"".join(text(item, order) for item in value)
        return head + struct.pack(f"{order}IIQ", 9, 8, len(value)) + many
    number, code = CODES[kind.strip("[]")]
    if kind.startswith("["):
        return head + struct.pack(f"{order}IIQ{len(value)}{code}", 9, number, len(value), *value)
    return head + struct.pack(f"{order}I{code}", number, value)


def info(tensor: Tensor, offset: int, order: str = "<") -> bytes:
    number = IDS[tensor.type] if isinstance(tensor.type, str) else tensor.type
    dims = struct.pack(f"{order}I{len(tensor.shape)}q", len(tensor.shape), *reversed(tensor.shape))
    at = offset if tensor.offset is None else tensor.offset
    return text(tensor.name, order) + dims + struct.pack(f"{order}IQ", number, at)


def header(
    tensors: Sequence[Tensor],
    keys: Iterable[bytes] = (),
    *,
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return everything before the data, padded where there are tensors."""
    keys = list(keys)
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    raw = b"GGUF" + struct.pack(f"{order}Iqq", version, n_tensors, n_keys) + b"".join(keys)
    at = 0
    for tensor in tensors:
        raw += info(tensor, at, order)
        at += -(-tensor.size // alignment) * alignment
    return raw + bytes(-len(raw) % alignment) if tensors else raw


def gguf(tensors: Sequence[Tensor], keys: Iterable[bytes] = (), *, alignment: int = 32, **options) -> bytes:
    """Return a whole file."""
    raw = header(tensors, keys, alignment=alignment, **options)
    for tensor in tensors:
        content = bytes(tensor.size) if tensor.content is None else tensor.content
        raw += content + bytes(-len(content) % alignment)
    return raw


def write_sparse(path: Path, tensors: Sequence[Tensor], keys: Iterable[bytes] = ()) -> Path:
    """Write the header and leave holes for the data."""
    raw = header(tensors, keys)
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + sum(-(-tensor.size // 32) * 32 for tensor in tensors))
    return path


def architecture(name: str, order: str = "<", **numbers: int) -> list[bytes]:
    """Return the keys that say what model it is: `architecture("llama", head_count=4)`."""
    found = [key("general.architecture", "string", name, order)]
    for last, value in numbers.items():
        group = "attention." if last.startswith("head_count") else ""
        found.append(key(f"{name}.{group}{last}", "u32", value, order))
    return found
