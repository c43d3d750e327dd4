"""ONNX MatMulBnb4 (com.microsoft): bitsandbytes' NF4 and FP4 in blocks of the flattened [N, K].

    part    dtype           stored shape           packing
    codes   UINT8           [ceil(N * K / 2)]      two per byte, high nibble first
    absmax  F32, F16, BF16  [ceil(N * K / block)]  none

Formula: w = table[code] * absmax of element // block. `quant_type` 0 is FP4, 1 is NF4. The float weight was [K, N];
with `transB` 0 the codes are in its order and the logical shape is [K, N].
Source: onnxruntime 1.31, contrib_ops/cpu/quantization/blockwise_quant_block_bnb4.h, matmul_bnb4.cc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import onnx_record, packing, rounding, steps
from pytest_quantcheck.schemes.onnx_record import Node
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch

TABLES = {0: ("fp4", packing.FP4), 1: ("nf4", packing.NF4)}
UNITS = {"fp4": 0x33, "nf4": 0xFF}  # bytes full of the code of 1
FLOORS_DB = {"fp4": 15.0, "nf4": 18.5}  # blocks up to 64


class Layout(NamedTuple):
    """The values of the codes, and how many share an absmax."""

    table: tuple[float, ...]
    block: int


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that the record of a MatMulBnb4 belongs to."""
    node = onnx_record.find(anchor, ("MatMulBnb4",), namespace)
    if node is None:
        return None
    shape = (node.integer("N"), node.integer("K"))
    block, kind = node.integer("block_size"), node.integer("quant_type")
    if kind not in TABLES:
        raise UnknownEncoding(f"MatMulBnb4 of quant_type {kind} (0 is FP4, 1 is NF4)", tensor=node.name)
    _check(node, shape, block)
    name, table = TABLES[kind]
    straight = shape if node.integer("transB", 1) else shape[::-1]
    return LogicalTensor(
        node.name,
        straight,
        f"onnx-bnb-{name}",
        "parameter",
        node.parts(),
        decode,
        Layout(table, block),
        block,
        floor_db=FLOORS_DB[name] if block <= 64 else None,
        rounding=rounding.flat(
            rounding.codebook(table), block, straight[-1], steps=steps.levels(table, 1.0, UNITS[name])
        ),
        flat=True,
    )


def _check(node: Node, shape: tuple[int, int], block: int) -> None:
    elements = shape[0] * shape[1]
    if min(shape) < 1 or block < 16 or block & (block - 1):
        raise FormatError(f"MatMulBnb4 of {list(shape)} in blocks of {block} (a power of 2 from 16)", tensor=node.name)
    if node.type != "UINT8" or node.part("absmax").dtype not in ("F32", "F16", "BF16"):
        raise FormatError(f"MatMulBnb4 of {node.type} with {node.type_of('absmax')}", tensor=node.name)
    for part, wanted in (("", -(-elements // 2)), ("absmax", -(-elements // block))):
        stored = node.part(part)
        if stored.elements != wanted:
            what = f"{list(stored.shape)} is not {wanted:,} for {list(shape)} in blocks of {block}"
            raise FormatError(what, tensor=stored.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start * tensor.columns, stop * tensor.columns
    if last <= first:
        return torch.empty((0, tensor.columns), device=device)
    low, high = first // layout.block, -(-last // layout.block)
    values = packing.look_up(*_pairs(tensor, layout, first, last, device)).view(-1)[first % 2 :][: last - first]
    absmax = tensor.part("absmax").load(low, high, device).to(torch.float32)
    block = torch.arange(first, last, device=device) // layout.block - low
    return (values * absmax[block]).view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where every row is full blocks and full bytes."""
    import torch

    layout, columns = tensor.layout, tensor.columns
    assert isinstance(layout, Layout)
    if columns % layout.block or columns % 2:
        return None
    blocks = columns // layout.block
    absmax = tensor.part("absmax").load(start * blocks, stop * blocks, device).to(torch.float32)
    return Coded(
        *_pairs(tensor, layout, start * columns, stop * columns, device), absmax.view(-1, blocks), layout.block
    )


def _pairs(
    tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes that hold some values, and the two values of each byte."""
    import torch

    pairs = packing.nibble_pairs(torch.tensor(layout.table, device=device), high_first=True)
    return tensor.stored.load_bytes(first // 2, -(-last // 2), device), pairs


SCHEME = Scheme(
    name="onnx-bnb4",
    title="ONNX MatMulBnb4",
    variants=("onnx-bnb-nf4", "onnx-bnb-fp4"),
    claim=claim,
    anchors=(onnx_record.RECORD,),
    coders={decode: coded},
    source="onnxruntime 1.31, contrib_ops/cpu/quantization/matmul_bnb4.cc",
    verified="onnxruntime 1.31.1",
)
