"""ONNX MatMulNBits (com.microsoft) and its fusions: the weight of a linear in blocks along its inputs.

    part         dtype           stored shape                       packing
    codes        UINT8           [N, blocks, block * bits / 8]      each block a bit stream, lowest bits first
    scales       F32, F16, BF16  [N, blocks], also flat             none
    zero_points  UINT8           [N, ceil(blocks * bits / 8)]       each row a bit stream, lowest bits first
                 as scales       [N, blocks]                        none
    g_idx        I32             [K]                                none

Formula: w[n, k] = (q[n, k] - zero_point) * scale of block k // block; without zero points 2**(bits - 1).
blocks = ceil(K / block): the codes behind K in the last block of each row are padding. The float weight was [K, N].
Source: onnxruntime 1.31, docs/ContribOperators.md; contrib_ops/cpu/quantization/matmul_nbits.cc.

MatMulNBitsMlp has two weights of N rows, MatMulNBitsQkv one of `Nq` and two of `Nkv`; their scales follow each.
Where `weight_prepacked` is set the codes are in the order of a GPU kernel: counted, not decoded. So with g_idx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import onnx_record, packing, rounding
from pytest_quantcheck.schemes.onnx_record import Node
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

OPERATORS = ("MatMulNBits", "MatMulNBitsMlp", "MatMulNBitsQkv")
ROWS = {("MatMulNBitsQkv", 3): "Nq", ("MatMulNBitsQkv", 6): "Nkv", ("MatMulNBitsQkv", 9): "Nkv"}  # operator, input
BITS = (2, 4, 8)
FLOORS_DB = ((8, 128, 39.0), (4, 32, 17.0), (4, 128, 14.0))  # bits, largest block


class Layout(NamedTuple):
    """Bits of a code, values and number of the blocks of a row, whether the zero points are packed like codes."""

    bits: int
    block: int
    blocks: int
    packed_zeros: bool

    @property
    def row(self) -> int:
        """The bytes of the codes of one row."""
        return self.blocks * self.block * self.bits // 8

    @property
    def zero_row(self) -> int:
        """The bytes of the packed zero points of one row."""
        return -(-self.blocks * self.bits // 8)


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that the record of a MatMulNBits belongs to."""
    node = onnx_record.find(anchor, OPERATORS, namespace)
    if node is None:
        return None
    shape = rows, columns = node.integer(ROWS.get((node.operator, node.input), "N")), node.integer("K")
    layout = _layout(node, columns)
    _check(node, layout, rows)
    padding = rows * ((layout.blocks * layout.block - columns) * layout.bits // 8)
    reachable = not node.attributes.get("weight_prepacked") and "g_idx" not in node.stored
    return LogicalTensor(
        node.name,
        shape,
        f"onnx-matmulnbits-{layout.bits}",
        "parameter",
        node.parts(padding),
        decode if reachable else None,
        layout,
        layout.block,
        floor_db=next((db for bits, block, db in FLOORS_DB if layout.bits == bits and layout.block <= block), None),
        rounding=_rounding(layout, symmetric="zero_points" not in node.stored),
        cells=cells if reachable else None,
    )


def _rounding(layout: Layout, *, symmetric: bool) -> Rounding:
    """Olive and others also write what GPTQ found."""
    to_code = rounding.extreme(layout.bits, scale="float32") if symmetric else rounding.affine(layout.bits)
    return rounding.grouped(to_code, layout.block, margin_db=rounding.COMPENSATED_DB)


def _layout(node: Node, columns: int) -> Layout:
    bits, block = node.integer("bits", 4), node.integer("block_size")
    if bits not in BITS:
        raise UnknownEncoding(f"MatMulNBits with {bits} bits (2, 4 or 8)", tensor=node.name)
    if block < 16 or block & (block - 1) or columns < 1:
        raise FormatError(
            f"MatMulNBits of {columns} columns in blocks of {block} (a power of 2 from 16)", tensor=node.name
        )
    packed = "zero_points" in node.stored and node.type_of("zero_points") == "UINT8"
    return Layout(bits, block, -(-columns // block), packed)


def _check(node: Node, layout: Layout, rows: int) -> None:
    wanted = {"": rows * layout.row, "scales": rows * layout.blocks}
    if "zero_points" in node.stored:
        wanted["zero_points"] = rows * (layout.zero_row if layout.packed_zeros else layout.blocks)
        if not layout.packed_zeros and node.type_of("zero_points") != node.type_of("scales"):
            raise FormatError(
                f"zero points are {node.type_of('zero_points')}, neither UINT8 nor like the scales", tensor=node.name
            )
    if node.type != "UINT8" or node.type_of("scales") not in ("FLOAT", "FLOAT16", "BFLOAT16") or rows < 1:
        raise FormatError(f"MatMulNBits of {rows} rows of {node.type} with scales", tensor=node.name)
    for part, elements in wanted.items():
        found = node.part(part)
        if found.elements != elements:
            blocks = f"{rows:,} rows of {layout.blocks:,} blocks of {layout.block}"
            what = f"{list(found.shape)} is not the {elements:,} of {blocks}"
            raise FormatError(what, tensor=found.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    return packing.expand(coded(tensor, start, stop, device))


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    """Return rows `start` up to `stop` as codes."""
    import torch

    layout, count = tensor.layout, stop - start
    assert isinstance(layout, Layout)
    raw = tensor.stored.load_bytes(start * layout.row, stop * layout.row, device).view(count, layout.row)
    grid = slice(start * layout.blocks, stop * layout.blocks)
    scales = tensor.part("scales").load(grid.start, grid.stop, device).to(torch.float32).view(count, layout.blocks)
    zeros = _zeros(tensor, layout, grid, device).view(count, layout.blocks)
    return Coded(*packing.integers(raw, layout.bits, tensor.columns), scales, layout.block, zeros)


def cells(tensor: LogicalTensor, row: int, start: int, stop: int) -> list[float]:
    """Return columns `start` up to `stop` of a row, without torch."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    first, last = start // layout.block, -(-stop // layout.block)
    grid = row * layout.blocks
    scales = packing.floats(tensor.part("scales"), grid + first, grid + last)
    zeros = _zero_cells(tensor, layout, row, first, last)
    size = layout.block * layout.bits // 8  # bytes of the codes of a block
    at = tensor.stored.offset + row * layout.row
    raw = tensor.stored.source.read(at + first * size, at + last * size)
    codes = packing.small_codes(raw, layout.bits, start - first * layout.block, stop - first * layout.block)
    blocks = (column // layout.block - first for column in range(start, stop))
    return [(code - zeros[block]) * scales[block] for code, block in zip(codes, blocks, strict=True)]


def _zero_cells(tensor: LogicalTensor, layout: Layout, row: int, first: int, last: int) -> list[float]:
    """The zero points of some blocks of a row, without torch."""
    if not tensor.has("zero_points"):
        return [2.0 ** (layout.bits - 1)] * (last - first)
    stored = tensor.part("zero_points")
    if not layout.packed_zeros:
        return packing.floats(stored, row * layout.blocks + first, row * layout.blocks + last)
    at = stored.offset + row * layout.zero_row
    return [*map(float, packing.small_codes(stored.source.read(at, at + layout.zero_row), layout.bits, first, last))]


def _zeros(tensor: LogicalTensor, layout: Layout, grid: slice, device: str) -> torch.Tensor:
    """The zero point of each block of some rows, flat."""
    import torch

    if not tensor.has("zero_points"):
        return torch.full((grid.stop - grid.start,), 2.0 ** (layout.bits - 1), device=device)
    stored = tensor.part("zero_points")
    if not layout.packed_zeros:
        return stored.load(grid.start, grid.stop, device).to(torch.float32)
    first, last = (at // layout.blocks * layout.zero_row for at in (grid.start, grid.stop))
    raw = stored.load_bytes(first, last, device).view(-1, layout.zero_row)
    return packing.unpack_words(raw, layout.bits, layout.blocks).to(torch.float32).reshape(-1)


SCHEME = Scheme(
    name="onnx-matmulnbits",
    title="ONNX MatMulNBits",
    variants=tuple(f"onnx-matmulnbits-{bits}" for bits in (4, 8, 2)),
    claim=claim,
    anchors=(onnx_record.RECORD,),
    coders={decode: coded},
    source="onnxruntime 1.31, contrib_ops/cpu/quantization/matmul_nbits.cc",
    verified="onnxruntime 1.31.1",
)
