"""onnxruntime's MatMulNBits quantizer: `matmulnbits-BITS-bBLOCK[-sym|-asym][-f16]`.

Encoded: every linear and the output head, a tied one as a matrix of its own, since an export has it twice. Gather is
not quantized, so embeddings stay. Floats are F32, with `-f16` F16, scales included.
Parts: see the scheme `onnx_matmulnbits`. Rows are padded to whole blocks. Tables and constants that an exporter adds
(rotary caches, masks) are not predicted.
Source: onnxruntime 1.31, quantization/matmul_nbits_quantizer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, groups, plain, record, stored
from pytest_quantcheck.recipes.recipe import check_known as check
from pytest_quantcheck.tensor import Role, StoredTensor

FLOATS = {"F32": "FLOAT", "F16": "FLOAT16"}


class Layout(NamedTuple):
    """Bits of a code, values of a block, whether zero points are written, dtype of the scales."""

    bits: int
    block: int
    zero_points: bool
    dtype: str


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the initializers of the quantized graph that are weights."""
    block = int(options["block"])
    if block < 16 or block & (block - 1):
        raise ValueError(f"blocks of {block} (a power of 2 from 16)")
    check(model)
    if any(weight.kind in ("expert", "stack") for weight in model.weights):
        raise ValueError("exporters write the experts of a mixture in more than one way")
    if not model.config and not model.ggml and all(weight.kind != "head" for weight in model.weights):
        raise ValueError("whether its output head is tied is not known: a config.json says that")
    dtype = "F16" if options["half"] else "F32"
    return Written(_tensors(model, Layout(int(options["bits"]), block, options["zero"] == "asym", dtype)))


def _tensors(model: Unquantized, layout: Layout) -> Iterator[StoredTensor]:
    for weight in model.weights:
        if weight.kind in ("linear", "conv1d", "head"):
            yield from _parts(weight, layout, "parameter")
        elif weight.kind != "buffer":
            yield plain(weight._replace(wide=()), layout.dtype)
    if model.tied_head:
        table = next(weight for weight in model.weights if weight.kind == "embedding")
        yield from _parts(table._replace(name=model.tied_head, kind="head"), layout, "tied")


def _parts(weight: Weight, layout: Layout, role: Role) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    blocks = groups(columns, layout.block)
    shapes = {"": (rows, blocks, layout.block * layout.bits // 8), "scales": (rows, blocks)}
    if layout.zero_points:
        shapes["zero_points"] = (rows, -(-blocks * layout.bits // 8))
    types = {"": "UINT8", "scales": FLOATS[layout.dtype], "zero_points": "UINT8"}
    for part, shape in shapes.items():
        name = f"{weight.name}.{part}" if part else weight.name
        yield stored(name, layout.dtype if part == "scales" else "U8", *shape, role=None if part else role)
    described = {part: {"type": types[part], "shape": shape} for part, shape in shapes.items()}
    node = {
        "operator": "MatMulNBits",
        "node": weight.name,
        "input": 1,
        "through": None,
        **described.pop(""),
        "parts": described,
        "attributes": {"N": rows, "K": columns, "bits": layout.bits, "block_size": layout.block},
    }
    yield record(f"{weight.name}.onnx_node", json.dumps(node).encode(), weighed=False)


RECIPE = Recipe(
    re.compile(r"matmulnbits-(?P<bits>[248])-b(?P<block>[1-9][0-9]*)(?:-(?P<zero>sym|asym))?(?P<half>-f16)?"),
    ("matmulnbits-4-b32", "matmulnbits-4-b32-f16"),
    "ONNX MatMulNBits",
    "onnx",
    write,
)
