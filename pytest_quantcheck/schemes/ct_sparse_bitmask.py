"""compressed-tensors `sparse-bitmask` and `sparse-24-bitmask`: what is not zero, and a bit for each place.

    part          dtype                        stored shape      packing
    compressed    F32, F16, BF16, F8_E4M3, I8  [nonzero]         in row-major order
    compressed    as above                     [N, K/2]          2:4: two of every four
    bitmask       U8                           [N, ceil(K/8)]    lowest bit first, each row anew
    row_offsets   I64                          [N]               where each row starts; not with 2:4
    shape         I64                          [2] or [2, 1]     N, K
    weight_scale  F32, BF16, F16               [1] or [N, 1]     where the values are quantized, too

Formula: w[n, k] = compressed[row_offsets[n] + bits set before k in row n] where bit k of row n is set, else 0; times
weight_scale where there is one.
Source: compressed-tensors 0.10.2, compressors/sparse_compressors/ (removed from the library since).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "bitmask": "index",
    "row_offsets": "index",
    "shape": "bookkeeping",
    "weight_scale": "scales",
    "input_scale": "scales",
}


class Layout(NamedTuple):
    """Whether every row holds K/2 values, and the grid of scales where the values are quantized."""

    two_of_four: bool
    grid: packing.Grid | None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `bitmask` belongs to."""
    prefix = anchor.name.removesuffix("bitmask")
    values, sizes = namespace.tensors.get(f"{prefix}compressed"), namespace.tensors.get(f"{prefix}shape")
    if values is None and sizes is None:
        return None
    if values is None or sizes is None:
        raise FormatError(f"has no `{prefix}{'shape' if values else 'compressed'}`", tensor=anchor.name)
    shape = packing.read_integers(sizes)
    if len(shape) != 2 or min(shape) < 1 or anchor.dtype != "U8" or anchor.shape != (shape[0], -(-shape[1] // 8)):
        raise FormatError(
            f"{anchor.dtype} {list(anchor.shape)} is no bit for each of {list(shape)}", tensor=anchor.name
        )
    others = ((name, kind, namespace.tensors.get(f"{prefix}{name}")) for name, kind in PARTS.items())
    parts = [Part(name, kind, stored) for name, kind, stored in others if stored is not None]
    scale, offsets = namespace.tensors.get(f"{prefix}weight_scale"), namespace.tensors.get(f"{prefix}row_offsets")
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        "ct-sparse-bitmask" if offsets else "ct-sparse-24-bitmask",
        "parameter",
        (Part("compressed", "codes", values), *parts),
        decode,
        _layout(values, scale, offsets, shape),
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout, columns = tensor.layout, tensor.columns
    assert isinstance(layout, Layout)
    row = tensor.part("bitmask").shape[1]
    raw = tensor.part("bitmask").load_bytes(start * row, stop * row, device).view(stop - start, row)
    mask = packing.row_codes(raw, 1, columns).bool()
    first, last = _span(tensor, layout, start, stop)
    if int(mask.sum()) != last - first:
        what = f"marks {int(mask.sum()):,} values in rows {start} to {stop}, where {last - first:,} are stored"
        raise FormatError(what, tensor=tensor.part("bitmask").name)
    values = torch.zeros((stop - start, columns), device=device)
    values[mask] = tensor.stored.load(first, last, device).to(torch.float32)
    if layout.grid is not None:
        scales = packing.grid_rows(tensor.part("weight_scale"), layout.grid, slice(start, stop), device)
        values.mul_(scales.to(torch.float32))
    return values


def _span(tensor: LogicalTensor, layout: Layout, start: int, stop: int) -> tuple[int, int]:
    """The range of stored values that belongs to a window of rows."""
    if layout.two_of_four:
        return start * tensor.columns // 2, stop * tensor.columns // 2
    if start == stop:
        return 0, 0
    offsets = tensor.part("row_offsets")
    first = int(offsets.load(start, start + 1))
    last = int(offsets.load(stop, stop + 1)) if stop < tensor.rows else tensor.stored.elements
    if not 0 <= first <= last <= tensor.stored.elements:
        what = f"puts rows {start} to {stop} at {first:,} to {last:,} of {tensor.stored.elements:,} values"
        raise FormatError(what, tensor=offsets.name)
    return first, last


def _layout(
    values: StoredTensor, scale: StoredTensor | None, offsets: StoredTensor | None, shape: tuple[int, ...]
) -> Layout:
    rows, columns = shape
    if offsets is None and values.elements != rows * columns // 2:
        what = f"has {values.elements:,} values and no `row_offsets` ({rows * columns // 2:,} for {list(shape)} in 2:4)"
        raise FormatError(what, tensor=values.name)
    if offsets is not None and (offsets.shape != (rows,) or offsets.dtype != "I64"):
        what = f"{offsets.dtype} {list(offsets.shape)} is not one offset for each of {rows:,} rows"
        raise FormatError(what, tensor=offsets.name)
    if scale is None:
        if DTYPES[values.dtype].kind != "float" or DTYPES[values.dtype].bits < 16:
            raise FormatError(f"{values.dtype} values have no `weight_scale`", tensor=values.name)
        return Layout(offsets is None, None)
    if scale.elements != 1 and scale.shape != (rows, 1):
        rule = "one for the tensor or one for each row"
        raise FormatError(f"{list(scale.shape)} is no grid over {list(shape)} ({rule})", tensor=scale.name)
    grid = packing.Grid(1, 1, rows, rows) if scale.elements == 1 else packing.Grid(rows, 1, rows, 1)
    return Layout(offsets is None, grid)


SCHEME = Scheme(
    name="ct-sparse-bitmask",
    title="compressed-tensors, sparse with a bitmask (also 2:4)",
    variants=("ct-sparse-bitmask", "ct-sparse-24-bitmask"),
    claim=claim,
    anchors=("bitmask",),
    methods=("compressed-tensors", "compressed_tensors"),
    source="compressed-tensors 0.10.2, compressors/sparse_compressors",
    verified="compressed-tensors 0.10.2",
)
