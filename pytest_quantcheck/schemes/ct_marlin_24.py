"""compressed-tensors `marlin-24`: 2:4 sparse integers of 4 or 8 bits in the tiles of the Marlin24 kernel.

    part           dtype  stored shape          packing
    weight_packed  I32    [K/32, N*b/2]         the two of every four that are kept, [K/2, N], permuted
    meta           I16    [K/32, 2*N]           which two: 2 + 2 bits for every four columns, CUTLASS order
    scale_packed   F16    [K/128, N] or [1, N]  columns permuted in 64s where there are groups and K > 256

Codes: [K/2, N] is cut in 16 x 16 tiles, four tiles along N make a block of 1024, block[j] = tiles[PERM[j]], then words
hold 32/b codes each, lowest bits first. Where the kept values stand, `meta` says: word (row, quad of quads) of the
matrix [N, K/16] lies at the place that CUTLASS' InterleavedColumnMajor gives it.
Formula: w[n, k] = (code - 2**(b-1)) * scale[n, k // 128], 0 where nothing is kept.
Source: compressed-tensors 0.10.2, sparse_quantized_compressors/marlin_24.py, utils/permutations_24.py,
utils/semi_structured_conversions.py (removed from the library since; it never could decompress this).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

GROUP = 128  # the only one the kernel has
TILE, BLOCK = 16, 64  # a block is one tile along K and four along N
INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `scale_packed` belongs to."""
    prefix = anchor.name.removesuffix("scale_packed")
    packed, meta = namespace.tensors.get(f"{prefix}weight_packed"), namespace.tensors.get(f"{prefix}meta")
    if packed is None or meta is None:
        raise FormatError(f"has no `{prefix}{'meta' if packed else 'weight_packed'}`", tensor=anchor.name)
    shape, bits = _shape(packed, meta, anchor)
    return LogicalTensor(
        f"{prefix}weight",
        shape,
        f"ct-marlin24-int{bits}",
        "parameter",
        (Part("weight_packed", "codes", packed), Part("scale_packed", "scales", anchor), Part("meta", "index", meta)),
        decode,
        bits,
        block=shape[1] if anchor.shape[0] == 1 else GROUP,
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    columns = tensor.columns
    kept = _kept(tensor, start, stop, device).to(torch.float32)  # (rows, K/2)
    places = _places(tensor, start, stop, device)  # (rows, K/2)
    values = torch.zeros((stop - start, columns), device=device).scatter_(1, places, kept)
    groups = tensor.part("scale_packed").shape[0]
    return packing.scale_groups(values, _scales(tensor, start, stop, device), columns // groups)


def _kept(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """The integers that are kept, in the order of columns; only the blocks of 64 rows that the window touches."""
    import torch

    bits = tensor.layout
    assert isinstance(bits, int)
    low, high = start // BLOCK, -(-stop // BLOCK)
    tiles, words = tensor.stored.shape  # (K/32, N*b/2)
    width = TILE * BLOCK * bits // 32
    loaded = tensor.stored.load(device=device).view(tiles, words // width, width)[:, low:high]
    raw = loaded.reshape(-1, width).view(torch.uint8)
    permuted = packing.row_codes(raw, bits, TILE * BLOCK)
    codes = torch.empty_like(permuted)
    codes[:, _permutation(bits, device)] = permuted
    codes = codes.view(tiles, high - low, BLOCK // TILE, TILE, TILE)  # (tile along K, block, tile along N, k, n)
    codes = codes.permute(1, 2, 4, 0, 3).reshape((high - low) * BLOCK, tiles * TILE)
    return codes[start - low * BLOCK : stop - low * BLOCK] - (1 << bits - 1)


def _permutation(bits: int, device: str) -> torch.Tensor:
    """Where each code of a block of 1024 stood in its tiles."""
    import torch

    order = [
        16 * row + (lane // 8) * 256 + 8 * (lane // 4 % 2) + 4 * half + step
        for lane in range(32)
        for step in range(4)
        for half in (0, 1)
        for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1)
    ]
    interleave = torch.tensor(INTERLEAVE[bits], device=device)
    return torch.tensor(order, device=device).view(-1, len(interleave))[:, interleave].reshape(-1)


def _places(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """The column of each kept value."""
    import torch

    rows, columns = tensor.shape
    row = torch.arange(start, stop, device=device).view(-1, 1)
    column = torch.arange(columns // 16, device=device).view(1, -1)
    row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = ((row % 2 == 0) & (column % 2 == 1)).long() - ((row % 2 == 1) & (column % 2 == 0)).long()
    row, column = row + swap, column - swap
    at = column // 2 * rows * 2 + row * 2 + column % 2
    meta = tensor.part("meta").load(device=device).to(torch.int32)[at]  # (rows, K/16)
    pairs = (meta.unsqueeze(-1) >> torch.arange(0, 16, 2, device=device, dtype=torch.int32)) & 3  # (rows, K/16, 8)
    quads = torch.arange(columns // 4, device=device).repeat_interleave(2) * 4
    return pairs.view(stop - start, columns // 2) + quads


def _scales(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """The scale of each row and group."""
    import torch

    stored = tensor.part("scale_packed")
    groups, rows = stored.shape
    scales = stored.load(device=device).to(torch.float32).view(groups, -1, 8)
    if groups > 1 and tensor.columns // 2 > GROUP:
        plain = torch.empty_like(scales)
        plain[..., torch.tensor(SCALE_ORDER, device=device)] = scales
        scales = plain
    return scales.reshape(groups, rows).t()[start:stop]


def _shape(packed: StoredTensor, meta: StoredTensor, scale: StoredTensor) -> tuple[tuple[int, int], int]:
    """The unquantized shape and the bits of a code, from sizes that must agree."""
    if (packed.dtype, meta.dtype, scale.dtype) != ("I32", "I16", "F16"):
        found = f"{packed.dtype} words, {meta.dtype} meta and {scale.dtype} scales"
        raise FormatError(f"{found} are not marlin-24 (I32, I16, F16)", tensor=packed.name)
    if not len(packed.shape) == len(scale.shape) == len(meta.shape) == 2:
        raise FormatError(f"{list(packed.shape)} is no matrix of words", tensor=packed.name)
    rows, columns = scale.shape[1], packed.shape[0] * 32
    if rows == 0 or rows % BLOCK or packed.shape[1] not in (2 * rows, 4 * rows):
        rule = "N is a multiple of 64, a code has 4 or 8 bits"
        raise FormatError(f"{list(packed.shape)} words do not fit {rows:,} rows ({rule})", tensor=packed.name)
    if meta.shape != (columns // 32, 2 * rows):
        raise FormatError(f"{list(meta.shape)} does not fit [{rows}, {columns}]", tensor=meta.name)
    if scale.shape[0] not in (1, -(-columns // GROUP)):
        raise FormatError(f"{list(scale.shape)} does not fit [{rows}, {columns}] in groups of 128", tensor=scale.name)
    return (rows, columns), packed.shape[1] * 2 // rows


SCHEME = Scheme(
    name="ct-marlin-24",
    title="compressed-tensors, Marlin 2:4",
    variants=("ct-marlin24-int4", "ct-marlin24-int8"),
    claim=claim,
    anchors=("scale_packed",),
    methods=("compressed-tensors", "compressed_tensors"),
    source="compressed-tensors 0.10.2, sparse_quantized_compressors/marlin_24.py",
    verified="compressed-tensors 0.10.2",
)
