"""SpQR: tiles of 16 x 16 three-bit codes with scales of scales, plus sparse outliers that are added.

    part           dtype  stored shape                       packing
    dense_weights  I64    [ceil(N/16) * ceil(K/16) * 16]     one word per row of a tile, lowest bits first:
                                                             scale 3, zero 3, sixteen codes of 3, fragment 8, unused 2
    row_offsets    I32    [N + 1] (CSR) or [N/16 + 1]        PTCSR: one offset per 16 rows, padded, rows interleaved
    col_vals       I32    [outliers]                         column in the low half, float16 in the high half
    in_perm        I32    [K/2] or [0]                       two unsigned 16-bit columns, low half first

Formula: the fragments of a tile, one byte for each pair of rows, are four float16: s_s, z_s, s_z, z_z. With q the
codes: scale = s_s * (scale_code - s_z), zero = z_s * (zero_code - z_z), w = scale * (q - zero), each step rounded to
float16; plus the outliers in float32; rounded to float16. Column j belongs at in_perm[j].
Source: spqr_quant 0.2.0, inference.py and inference_kernels/spqr_cuda.cpp (`dequantize_compressed`,
`tensor_compress_interleaved`), spqr_cuda_kernel.cu for `in_perm`.

The library's decoder loses its place in a last row of tiles with fewer than 16 rows, where its packer still writes 16
words per tile (and the fragments of the missing rows are gone): ours reads what was written.

N follows from the row offsets, K from the permutation; where there is none, from the model's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import architecture, packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme, joined
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

RECORD = "spqr_linear"  # live only: rows and columns
RECORD_LIMIT = 1 << 10
TILE, BITS = 16, 3
PARTS: dict[str, ByteClass] = {
    "dense_weights": "codes",
    "row_offsets": "index",
    "col_vals": "codes",
    "in_perm": "index",
}


class Layout(NamedTuple):
    """Whether one row offset stands for sixteen interleaved rows."""

    interleaved: bool


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `dense_weights` stand for."""
    prefix, _, last = anchor.name.rpartition(".")
    if last not in PARTS:
        return None
    found = {part: namespace.tensors.get(joined(prefix, part)) for part in PARTS}
    if found["dense_weights"] is None and namespace.quantization.get("quant_method") != "spqr":
        return None
    for part in ("dense_weights", "row_offsets", "col_vals"):
        if found[part] is None:
            raise FormatError(f"has no `{joined(prefix, part)}` beside it", tensor=anchor.name)
    _check_parts(prefix, found, namespace)
    parts = [Part(part, PARTS[part], stored) for part, stored in found.items() if stored is not None]
    record = namespace.tensors.get(joined(prefix, RECORD))
    if record is not None:
        parts.append(Part(RECORD, "bookkeeping", record))
    name = joined(prefix, "weight")
    tensor = LogicalTensor(name, (0, 0), "spqr", "parameter", tuple(parts), decode, block=TILE)
    shape = _shape(tensor, namespace)
    interleaved = tensor.part("row_offsets").elements != shape[0] + 1
    return tensor._replace(shape=shape, layout=Layout(interleaved))


def _check_parts(prefix: str, found: Mapping[str, StoredTensor | None], namespace: Namespace) -> None:
    shapes = namespace.quantization.get("shapes", {})
    for part, stored in found.items():
        if stored is None:
            continue
        if stored.dtype != ("I64" if part == "dense_weights" else "I32") or len(stored.shape) != 1:
            raise FormatError(f"{stored.dtype} {list(stored.shape)} is no `{part}` of SpQR", tensor=stored.name)
        announced = shapes.get(f"{prefix}.{part}.shape", stored.elements)
        if announced != stored.elements:
            raise FormatError(f"has {stored.elements:,} values, its `shapes` say {announced}", tensor=stored.name)
    for setting, value in (("bits", BITS), ("beta1", TILE), ("beta2", TILE)):
        if namespace.quantization.get(setting, value) != value:
            raise UnknownEncoding(
                f"has {setting} {namespace.quantization[setting]} (SpQR packs {value})", tensor=prefix
            )


def _shape(tensor: LogicalTensor, namespace: Namespace) -> tuple[int, int]:
    if tensor.has(RECORD):
        live = strict_json.parse_object(tensor.part(RECORD).read(limit=RECORD_LIMIT), limit=RECORD_LIMIT)
        shape = live["rows"], live["columns"]
        return shape if _fits(tensor, *shape) else _refuse_shape(tensor, f"{shape[0]} x {shape[1]}")
    offsets = tensor.part("row_offsets").elements - 1
    rows = [offsets, TILE * offsets]
    columns = 2 * tensor.part("in_perm").elements if tensor.has("in_perm") else 0
    if columns:
        fitting = [(count, columns) for count in rows if _fits(tensor, count, columns)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            return _refuse_shape(tensor, f"{rows[0]} or {rows[1]} x {columns}")
    known = architecture.fitting_shape(
        tensor.name, namespace.config, lambda n, k: n in rows and columns in (0, k) and _fits(tensor, n, k)
    )
    if known is None:
        what = "its row offsets, its tiles and the model's configuration leave its shape open"
        raise UnknownEncoding(what, tensor=tensor.name)
    return known


def _fits(tensor: LogicalTensor, rows: int, columns: int) -> bool:
    return -(-rows // TILE) * -(-columns // TILE) * TILE == tensor.stored.elements


def _refuse_shape(tensor: LogicalTensor, shape: str) -> tuple[int, int]:
    raise FormatError(f"has {tensor.stored.elements:,} words, which is not {shape} in tiles", tensor=tensor.stored.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    first, last = start // TILE, max(start // TILE, -(-stop // TILE))
    values = _dense(tensor, first, last, device)
    _add_outliers(tensor, values, first, last, device)
    values = values.to(torch.float16).to(torch.float32)
    if tensor.has("in_perm") and tensor.part("in_perm").elements:
        pairs = tensor.part("in_perm").load(device=device).to(torch.int64)
        perm = torch.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), dim=1).view(-1)
        values = values[:, packing.inverse(perm, tensor.part("in_perm"))]
    return values[start - first * TILE : stop - first * TILE]


def _dense(tensor: LogicalTensor, first: int, last: int, device: str) -> torch.Tensor:
    """The rows of some rows of tiles without outliers, float32 that holds float16 values."""
    import torch

    across = -(-tensor.columns // TILE)
    words = tensor.stored.load(first * across * TILE, last * across * TILE, device)
    words = words.view(last - first, across, TILE)
    fragments = (words >> BITS * 18 & 0xFF).to(torch.uint8).view(-1, across, TILE // 2, 2)
    halves = (fragments[..., 0] | fragments[..., 1]).contiguous().view(torch.float16)  # (tiles, tiles, 4)
    s_s, z_s, s_z, z_z = (half.view(-1, across, 1) for half in halves.unbind(-1))
    scale = s_s * (_codes(words, 0) - s_z)
    zero = z_s * (_codes(words, 1) - z_z)
    tile = torch.stack([scale * (_codes(words, 2 + column) - zero) for column in range(TILE)], dim=-1)
    rows = tile.transpose(1, 2).reshape((last - first) * TILE, across * TILE)
    return rows[:, : tensor.columns].to(torch.float32)


def _codes(words: torch.Tensor, index: int) -> torch.Tensor:
    import torch

    return (words >> BITS * index & 7).to(torch.float16)


def _add_outliers(tensor: LogicalTensor, values: torch.Tensor, first: int, last: int, device: str) -> None:
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    height = 1 if layout.interleaved else TILE
    stop = min(last * height, tensor.part("row_offsets").elements - 1)
    offsets = tensor.part("row_offsets").load(first * height, stop + 1, device).to(torch.int64)
    low, high = int(offsets[0]), int(offsets[-1])
    if low < 0 or high > tensor.part("col_vals").elements or bool((offsets.diff() < 0).any()):
        raise FormatError(
            f"does not count up to {tensor.part('col_vals').elements:,}", tensor=tensor.part("row_offsets").name
        )
    pairs = tensor.part("col_vals").load(low, high, device).to(torch.int64)
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=device), offsets.diff())
    if layout.interleaved:
        row = row * TILE + torch.arange(low, high, device=device) % TILE
    if bool(((pairs & 0xFFFF) >= tensor.columns).any()):
        raise FormatError(f"names columns beyond {tensor.columns:,}", tensor=tensor.part("col_vals").name)
    outliers = (pairs >> 16).to(torch.int16).view(torch.float16).to(torch.float32)
    values.index_put_((row, pairs & 0xFFFF), outliers, accumulate=True)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer with its rows and columns."""
    if name:
        return None
    record = {"rows": owner.m, "columns": owner.n}
    held = {part: owner._parameters[part] for part in PARTS if owner._parameters.get(part) is not None}
    return held | {RECORD: json.dumps(record).encode()}


SCHEME = Scheme(
    name="spqr",
    title="SpQR (3-bit tiles with sparse outliers)",
    variants=("spqr",),
    claim=claim,
    anchors=("dense_weights", "row_offsets", "col_vals"),
    methods=("spqr",),
    live={"spqr_quant.QuantizedLinear": expose},
    source="spqr_quant 0.2.0, inference_kernels/spqr_cuda.cpp",
    verified="spqr_quant 0.2.0 (its host functions, compiled)",
)
