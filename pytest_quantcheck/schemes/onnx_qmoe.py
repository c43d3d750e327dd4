"""ONNX QMoE (com.microsoft): the matrices of all experts in one tensor, in blocks along their inputs or by row.

    part          dtype           stored shape                                        packing
    codes         UINT8           [experts, N, K * bits / 8]                          lowest bits first
                  FLOAT8E4M3FN    [experts, N, K]                                     none
    scales        F32, F16, BF16  [experts, N], or [experts, N, K / block]            none
                  F8 types        of the small floats, as their kernels want them     none
    zero_points   UINT8           [experts, ceil(N * bits / 8)], or                   lowest bits first, each row
                                  [experts, N, ceil(K / block * bits / 8)]            of its own bytes
    global_scale  F32             [experts], of the small floats                      none

Formula: w[e, n, k] = (q - zero_point) * scale; without zero points 2**(bits - 1). Bits are `expert_weight_bits` (4) or
those of the matrix (`fc1_expert_weight_bits` ...). Integers are decoded where `weights_prepacked` is 0. With 1, and
with -1, which is the default, the order of the codes is up to the device that runs them: counted, as the small floats.
Source: onnxruntime 1.31, docs/ContribOperators.md; contrib_ops/cpu/moe/moe_quantization_cpu.cc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import onnx_record, packing
from pytest_quantcheck.schemes.onnx_record import Node
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch

MATRICES = {2: "fc1", 5: "fc2", 8: "fc3"}  # by input
BITS = (2, 4, 8)
SMALL_FLOATS = {"fp4": 4, "nvfp4": 4, "wfp4afp8": 4, "fp8": 8}
SCALES = ("FLOAT", "FLOAT16", "BFLOAT16")
FLOORS_DB = ((8, 128, 39.0), (4, 32, 17.0), (4, 128, 14.0))  # bits, largest block


class Layout(NamedTuple):
    """Bits of a code, values and number of the blocks of a row; `zero_row` is how many codes a row of zeros has."""

    bits: int
    block: int
    blocks: int
    zero_row: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the matrices of all experts that the record of a QMoE belongs to."""
    node = onnx_record.find(anchor, ("QMoE",), namespace)
    if node is None:
        return None
    kind = node.attributes.get("quant_type", "int")
    if kind != "int":
        return _small_floats(node, str(kind))
    bits = node.integer(f"{MATRICES[node.input]}_expert_weight_bits", node.integer("expert_weight_bits", 4))
    if node.type != "UINT8" or len(node.shape) != 3 or bits not in BITS:
        raise UnknownEncoding(f"QMoE of {node.type} {list(node.shape)} with {bits} bits", tensor=node.name)
    experts, rows, width = node.shape
    shape = (experts, rows, width * 8 // bits)
    layout = _layout(node, shape, bits)
    return LogicalTensor(
        node.name,
        shape,
        f"onnx-qmoe-{bits}",
        "parameter",
        node.parts(),
        decode if node.integer("weights_prepacked", -1) == 0 else None,
        layout,
        layout.block,
        floor_db=next((db for each, block, db in FLOORS_DB if bits == each and layout.block <= block), None),
    )


def _small_floats(node: Node, kind: str) -> LogicalTensor:
    bits = SMALL_FLOATS.get(kind)
    if bits is None or len(node.shape) != 3:
        raise UnknownEncoding(f"QMoE of {node.type} {list(node.shape)} with quant_type `{kind}`", tensor=node.name)
    per_element = 2 if bits == 4 and node.type == "UINT8" else 1
    shape = (*node.shape[:-1], node.shape[-1] * per_element)
    return LogicalTensor(node.name, shape, f"onnx-qmoe-{kind}", "parameter", node.parts(), None)


def _layout(node: Node, shape: tuple[int, int, int], bits: int) -> Layout:
    experts, rows, columns = shape
    blocked = node.integer("block_size", 0) > 0
    block = node.integer("block_size") if blocked else columns
    if not columns or columns % block:
        raise FormatError(f"QMoE of {columns} columns in blocks of {block}", tensor=node.name)
    blocks = columns // block
    grid = (experts, rows, blocks) if blocked else (experts, rows)
    if node.type_of("scales") not in SCALES or node.shape_of("scales") != grid:
        found = f"{node.type_of('scales')} {list(node.shape_of('scales'))}"
        raise FormatError(f"has scales of {found} for {list(shape)} (wanted {list(grid)})", tensor=node.name)
    zero_grid = (*grid[:-1], -(-grid[-1] * bits // 8))
    if "zero_points" in node.stored and (node.type_of("zero_points"), node.shape_of("zero_points")) != (
        "UINT8",
        zero_grid,
    ):
        what = f"has zero points of {list(node.shape_of('zero_points'))} (wanted {list(zero_grid)})"
        raise FormatError(what, tensor=node.name)
    return Layout(bits, block, blocks, grid[-1])


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop`, those of all experts one below the other, as float32."""
    import torch

    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    return packing.expand(coded(tensor, start, stop, device))


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return the same rows as codes."""
    import torch

    layout, count = tensor.layout, stop - start
    assert isinstance(layout, Layout)
    width = tensor.columns * layout.bits // 8
    raw = tensor.stored.load_bytes(start * width, stop * width, device).view(count, width)
    scales = tensor.part("scales").load(start * layout.blocks, stop * layout.blocks, device).to(torch.float32)
    codes, table = packing.integers(raw, layout.bits, tensor.columns)
    zeros = _zeros(tensor, layout, start, stop, device)
    return Coded(codes, table, scales.view(count, layout.blocks), layout.block, zeros)


def _zeros(tensor: LogicalTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The zero point of each block of some rows, `[rows, blocks]`."""
    import torch

    first, last = start * layout.blocks, stop * layout.blocks
    if not tensor.has("zero_points"):
        return torch.full((stop - start, layout.blocks), 2.0 ** (layout.bits - 1), device=device)
    width = -(-layout.zero_row * layout.bits // 8)
    low, high = first // layout.zero_row, -(-last // layout.zero_row)
    raw = tensor.part("zero_points").load_bytes(low * width, high * width, device).view(-1, width)
    flat = packing.unpack_words(raw, layout.bits, layout.zero_row).to(torch.float32).reshape(-1)
    skipped = low * layout.zero_row
    return flat[first - skipped : last - skipped].view(stop - start, layout.blocks)


SCHEME = Scheme(
    name="onnx-qmoe",
    title="ONNX QMoE",
    variants=(*(f"onnx-qmoe-{bits}" for bits in (4, 8, 2)), *(f"onnx-qmoe-{kind}" for kind in SMALL_FLOATS)),
    claim=claim,
    anchors=(onnx_record.RECORD,),
    coders={decode: coded},
    source="onnxruntime 1.31, contrib_ops/cpu/moe/moe_quantization_cpu.cc",
    verified="onnxruntime 1.31.1",
)
