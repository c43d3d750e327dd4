"""ONNX tensors that an operator decodes with scales and zero points: per tensor, per axis, or in blocks of one.

    part         type                            shape in the graph                      packing
    codes        INT8 to INT32, UINT8, UINT16    logical shape                           none
                 INT4, UINT4, INT2, UINT2        logical shape                           flat, lowest bits first
                 FLOAT8*, FLOAT4E2M1             logical shape                           FLOAT4 flat, low nibble first
                 UINT8 of GatherBlockQuantized   [..., columns * bits / 8]               lowest bits first
    scales       FLOAT, FLOAT16, BFLOAT16        [], [axis], or the shape with           none
                                                 ceil(axis / block) on the axis
    zero_points  as codes                        as scales                               as codes

Formula: w = (q - zero_point) * scale; without zero points 0, and 2**(bits - 1) for UINT8 of GatherBlockQuantized.

    operator                              axis of scales that are no scalar
    DequantizeLinear                      `axis` (1); with `block_size` in blocks of it
    GatherBlockQuantized                  `quantize_axis` (1), in blocks of `block_size` (128)
    MatMulInteger, QLinearMatMul and kin  the last
    QGemm                                 the last; the first with `transB`
    QLinearConv, ConvInteger, biases      the first
    DynamicQuantizeLSTM                   the first, or the first and the last: [directions, inputs, 4 * hidden]
    MatMulBlockQuantizedFp8Weight         the last, in blocks of `block_size` (128)

The bias of QLinearConv and QGemm is INT32 in steps of the scale of the input times that of the weight.
Source: onnx 1.23, defs/quantization, defs/math, defs/nn; onnxruntime 1.31, docs/ContribOperators.md.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import onnx_record, packing, rounding
from pytest_quantcheck.schemes.onnx_record import Node
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

OPERATORS = (
    "DequantizeLinear", "GatherBlockQuantized", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QGemm", "QAttention", "QEmbedLayerNormalization",
    "DynamicQuantizeLSTM", "GemmFloat8", "MatMulBlockQuantizedFp8Weight",
)  # fmt: skip
SMALL = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}
WHOLE = ("INT8", "UINT8", "INT16", "UINT16", "INT32", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
SCALES = ("FLOAT", "FLOAT16", "BFLOAT16")
CHANNEL_FLOORS_DB = {"INT8": 28.0, "UINT8": 28.0}
BLOCK_FLOORS_DB = ((8, 128, 39.0), (4, 32, 17.0), (4, 128, 14.0))  # bits, largest block
FLOAT_FLOORS_DB = {"FLOAT8E4M3FN": 29.5, "FLOAT8E4M3FNUZ": 29.5, "FLOAT8E5M2": 24.5, "FLOAT8E5M2FNUZ": 24.5}


INTEGERS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}


class Axis(NamedTuple):
    """The axis that has scales, and how many of its indices share one; blocks lie in every other index too."""

    at: int
    block: int | None = None


class Layout(NamedTuple):
    """The type of the codes, the grid of scales and of zero points over the shape, and the zero point without any.

    `padded`: packed zero points start a new byte with every row of their grid.
    """

    type: str
    axis: Axis
    grid: tuple[int, ...]
    zero_grid: tuple[int, ...] | None
    zero: int
    padded: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the tensor that the record of such an operator belongs to."""
    node = onnx_record.find(anchor, OPERATORS, namespace)
    if node is None:
        return None
    kind, shape = _logical(node)
    axis = _axis(node, shape)
    _check_types(node, kind)
    layout = Layout(
        kind,
        axis,
        _grid(node, "scales", shape, axis),
        _zero_grid(node, kind, shape, axis),
        _default_zero(node, kind),
        _is_packed(node),
    )
    return LogicalTensor(
        node.name,
        shape,
        f"onnx-{kind.lower()}",
        "parameter",
        node.parts(),
        decode,
        layout,
        axis.block,
        floor_db=_floor_db(layout),
        rounding=_rounding(kind, shape, layout, node),
    )


def _rounding(kind: str, shape: tuple[int, ...], layout: Layout, node: Node) -> Rounding | None:
    """Codes of four bits and fewer may have been calibrated."""
    if kind.startswith("FLOAT8E4M3FN") or kind == "FLOAT8E5M2":
        dtype = "float8_e5m2" if kind == "FLOAT8E5M2" else "float8_e4m3fn"
        return rounding.placed_floats(dtype, shape, 1, shape[-1]) if shape else None
    bits = INTEGERS.get(kind)
    if bits is None or not shape or "x_scale" in node.stored:
        return None
    symmetric = layout.zero_grid is None or not kind.startswith("UINT")
    to_code = rounding.symmetric(bits) if symmetric else rounding.affine(bits)
    return rounding.on_grid(to_code, shape, layout.grid, margin_db=rounding.COMPENSATED_DB)


def _floor_db(layout: Layout) -> float | None:
    if layout.type in FLOAT_FLOORS_DB:
        return FLOAT_FLOORS_DB[layout.type]
    width, block = INTEGERS.get(layout.type), layout.axis.block
    if block is not None:
        return next((floor for bits, size, floor in BLOCK_FLOORS_DB if bits == width and block <= size), None)
    return CHANNEL_FLOORS_DB.get(layout.type) if prod(layout.grid) > 1 else None


def _is_packed(node: Node) -> bool:
    """Whether several codes share what the graph calls a UINT8."""
    return node.operator == "GatherBlockQuantized" and node.type == "UINT8"


def _logical(node: Node) -> tuple[str, tuple[int, ...]]:
    """The type of the codes and the shape of their values."""
    if not _is_packed(node):
        if node.type not in SMALL and node.type not in WHOLE:
            raise UnknownEncoding(f"{node.operator} of {node.type}", tensor=node.name)
        return node.type, node.shape
    bits = node.integer("bits", 4)
    if bits not in (2, 4, 8) or not node.shape:
        raise UnknownEncoding(f"GatherBlockQuantized of {list(node.shape)} with {bits} bits", tensor=node.name)
    return f"UINT{bits}", (*node.shape[:-1], node.shape[-1] * 8 // bits)


def _default_zero(node: Node, kind: str) -> int:
    return 1 << (int(kind.removeprefix("UINT")) - 1) if _is_packed(node) else 0


def _axis(node: Node, shape: tuple[int, ...]) -> Axis:
    """Where the scales are that are no scalar."""
    if node.operator == "DequantizeLinear":
        block = node.integer("block_size", 0)
        if block < 0:
            raise FormatError(f"DequantizeLinear in blocks of {block}", tensor=node.name)
        at, block_size = node.integer("axis", 1), block or None
    elif node.operator == "GatherBlockQuantized":
        at, block_size = node.integer("quantize_axis", 1), node.integer("block_size", 128)
        if block_size < 16 or block_size & (block_size - 1):
            raise FormatError(
                f"GatherBlockQuantized in blocks of {block_size} (a power of 2 from 16)", tensor=node.name
            )
    elif node.operator == "MatMulBlockQuantizedFp8Weight":
        at, block_size = -1, node.integer("block_size", 128)
        if block_size < 1:
            raise FormatError(f"{node.operator} in blocks of {block_size}", tensor=node.name)
    elif node.operator in ("QLinearConv", "ConvInteger") or node.type == "INT32" or node.attributes.get("transB"):
        at, block_size = 0, None
    else:
        at, block_size = -1, None
    return Axis(at + len(shape) if at < 0 else at, block_size)


def _grid(node: Node, part: str, shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """How many scales lie along each dimension of the shape."""
    stored, found = node.part(part), node.shape_of(part)
    if stored.elements == 1 and axis.block is None:
        return (1,) * len(shape)
    if node.operator == "DynamicQuantizeLSTM":
        return _recurrent_grid(node, found, shape)
    if not 0 <= axis.at < len(shape):
        raise FormatError(f"{node.operator} has scales along dimension {axis.at} of {list(shape)}", tensor=node.name)
    if node.through:
        raise UnknownEncoding(f"{node.operator} behind {node.through} has scales along a dimension", tensor=node.name)
    if axis.block is not None:
        wanted = tuple(-(-size // axis.block) if at == axis.at else size for at, size in enumerate(shape))
        fits = found == wanted
    else:
        wanted = tuple(size if at == axis.at else 1 for at, size in enumerate(shape))
        fits = prod(found) == prod(wanted)
    if not fits:
        raise FormatError(f"{list(found)} is not {list(wanted)}, for {list(shape)}", tensor=stored.name)
    return wanted


def _recurrent_grid(node: Node, found: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scale for each direction, or for each of its columns."""
    if len(shape) != 3 or found not in ((shape[0],), (shape[0], shape[2])):
        raise FormatError(f"{list(found)} are no scales of {list(shape)}", tensor=node.name)
    return (shape[0], 1, shape[2] if len(found) > 1 else 1)


def _zero_grid(node: Node, kind: str, shape: tuple[int, ...], axis: Axis) -> tuple[int, ...] | None:
    if "zero_points" not in node.stored:
        return None
    if node.type_of("zero_points") != node.type:
        raise FormatError(f"{node.type} with zero points of {node.type_of('zero_points')}", tensor=node.name)
    if not _is_packed(node):
        return _grid(node, "zero_points", shape, axis)
    grid = _grid(node, "scales", shape, axis)
    wanted = (*grid[:-1], -(-grid[-1] * int(kind.removeprefix("UINT")) // 8))
    if node.shape_of("zero_points") != wanted:
        raise FormatError(
            f"{list(node.shape_of('zero_points'))} is not {list(wanted)}", tensor=f"{node.name}.zero_points"
        )
    return grid


def _check_types(node: Node, kind: str) -> None:
    node.part("scales")
    if node.type_of("scales") not in SCALES:
        raise UnknownEncoding(f"{kind} with scales of {node.type_of('scales')}", tensor=node.name)
    if "x_scale" in node.stored and (node.part("x_scale").elements != 1 or node.type_of("x_scale") not in SCALES):
        raise FormatError("the scale of the input is no scalar", tensor=node.name)
    if node.type == "INT32" and node.operator in ("QLinearConv", "QGemm") and "x_scale" not in node.stored:
        raise UnknownEncoding(f"{node.operator} computes the scale of its bias", tensor=node.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if stop <= start:
        return torch.empty((0, tensor.columns), device=device)
    found = coded(tensor, start, stop, device)
    if found is not None:
        return packing.expand(found)
    codes = _codes(tensor.stored, layout.type, start * tensor.columns, stop * tensor.columns, device)
    values = codes.view(stop - start, tensor.columns)
    if layout.zero_grid is not None:
        values = values - _spread(tensor, "zero_points", layout.zero_grid, start, stop, device)
    elif layout.zero:
        values = values - layout.zero
    scaled = values * _spread(tensor, "scales", layout.grid, start, stop, device)
    return scaled * tensor.part("x_scale").load(device=device).float() if tensor.has("x_scale") else scaled


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where those are bytes and the scales of a row are of blocks."""
    import torch

    layout, rows = tensor.layout, stop - start
    assert isinstance(layout, Layout)
    bits, size = _coded_bits(tensor, layout), _coded_size(tensor, layout)
    if bits is None or size is None or tensor.has("x_scale"):
        return None
    if bits == 8:
        codes, table = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device), None
    else:
        width = tensor.columns * bits // 8
        raw = tensor.stored.load_bytes(start * width, stop * width, device).view(rows, width)
        codes, table = packing.integers(raw, bits, tensor.columns, _numbers(layout.type))
    scales = _rows_of_grid(tensor, "scales", layout.grid, start, stop, device)
    zeros = torch.full_like(scales, layout.zero) if layout.zero else None
    if layout.zero_grid is not None:
        zeros = _rows_of_grid(tensor, "zero_points", layout.zero_grid, start, stop, device).expand(scales.shape)
    return Coded(codes, table, scales, size, zeros)


def _coded_bits(tensor: LogicalTensor, layout: Layout) -> int | None:
    """The bits of a code; None where codes are wider than a byte, or rows not whole bytes."""
    bits = SMALL.get(layout.type, 8)
    wider = layout.type in ("INT16", "UINT16", "INT32")
    return None if wider or not tensor.columns or tensor.columns * bits % 8 else bits


def _coded_size(tensor: LogicalTensor, layout: Layout) -> int | None:
    """How many columns share a scale; None where that is not so for blocks of a row."""
    columns, zeros = (grid[-1] if grid else 1 for grid in (layout.grid, layout.zero_grid or ()))
    if columns == 1:
        return tensor.columns if zeros == 1 else None
    return layout.axis.block if layout.axis.at == len(layout.grid) - 1 and zeros in (1, columns) else None


def _numbers(kind: str) -> tuple[float, ...]:
    """What small codes stand for."""
    if kind == "FLOAT4E2M1":
        return packing.E2M1
    count = 1 << SMALL[kind]
    least = count // 2 if kind.startswith("I") else count
    return tuple(float(code if code < least else code - count) for code in range(count))


def _codes(stored: StoredTensor, kind: str, first: int, last: int, device: str) -> torch.Tensor:
    """Codes as float32, flat."""
    import torch

    if kind not in SMALL:
        return stored.load(first, last, device).to(torch.float32)
    codes = packing.bit_stream(stored, first, last, SMALL[kind], device)
    if kind == "FLOAT4E2M1":
        return torch.tensor(packing.E2M1, device=device)[codes]
    signed = kind.startswith("I")
    return (codes - ((codes >> (SMALL[kind] - 1)) << SMALL[kind]) if signed else codes).to(torch.float32)


def _spread(
    tensor: LogicalTensor, part: str, grid: tuple[int, ...], start: int, stop: int, device: str
) -> torch.Tensor:
    """The scale of each element of some rows, ready to be broadcast."""
    import torch

    found, layout = _rows_of_grid(tensor, part, grid, start, stop, device), tensor.layout
    assert isinstance(layout, Layout)
    if found.shape[1] == 1:
        return found
    return found[:, torch.arange(tensor.columns, device=device) // _span(layout, len(grid) - 1)]


def _rows_of_grid(
    tensor: LogicalTensor, part: str, grid: tuple[int, ...], start: int, stop: int, device: str
) -> torch.Tensor:
    """The row of the grid that each of some rows has."""
    import torch

    layout, stored = tensor.layout, tensor.part(part)
    assert isinstance(layout, Layout)
    rest, stride = torch.arange(start, stop, device=device), 1
    row = torch.zeros_like(rest)
    for at in reversed(range(len(grid) - 1)):
        index = rest % tensor.shape[at]
        rest = rest // tensor.shape[at]
        if grid[at] > 1:
            row += index // _span(layout, at) * stride
        stride *= grid[at]
    width = grid[-1] if grid else 1
    low, high = int(row.min()), int(row.max()) + 1
    return _grid_rows(stored, layout, part, width, (low, high), device)[row - low]  # (rows, width)


def _span(layout: Layout, dimension: int) -> int:
    return layout.axis.block or 1 if dimension == layout.axis.at else 1


def _grid_rows(
    stored: StoredTensor, layout: Layout, part: str, width: int, rows: tuple[int, int], device: str
) -> torch.Tensor:
    """Some rows of a grid as float32."""
    import torch

    low, high = rows
    if part == "scales" or layout.type not in SMALL:
        return stored.load(low * width, high * width, device).to(torch.float32).view(-1, width)
    if not layout.padded:
        return _codes(stored, layout.type, low * width, high * width, device).view(-1, width)
    bits = SMALL[layout.type]
    row = -(-width * bits // 8)
    raw = stored.load_bytes(low * row, high * row, device).view(-1, row)
    return packing.unpack_words(raw, bits, width).to(torch.float32)


SCHEME = Scheme(
    name="onnx-affine",
    title="ONNX integers and small floats with scales",
    variants=tuple(f"onnx-{kind.lower()}" for kind in (*SMALL, *WHOLE)),
    claim=claim,
    anchors=(onnx_record.RECORD,),
    coders={decode: coded},
    source="onnx 1.23, defs/quantization; onnxruntime 1.31, docs/ContribOperators.md",
    verified="onnxruntime 1.31.1",
)
