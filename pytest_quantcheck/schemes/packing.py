"""Bit arithmetic that several schemes share, on torch, windowed, on any device."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import compiled
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import Coded

if TYPE_CHECKING:
    import torch

    from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

# Four bits: sign, two of exponent, one of mantissa. OCP Microscaling Formats 1.0, table 5.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# bitsandbytes' tables, functional.py `get_4bit_type`: NF4 ascends, FP4 has the sign in the highest bit.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.00520833333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.00520833333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip


SMALL = 1 << 22  # bytes of a matrix that is read whole, whatever columns are wanted


def small_float_table(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Return the value of every code of a small float without infinities, sign in the highest bit.

    >>> small_float_table(2, 1) == E2M1
    True
    """
    bias = 2 ** (exponent_bits - 1) - 1
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        positive.append(2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction)
    return (*positive, *(-value for value in positive))


def bit_stream(stored: StoredTensor, start: int, stop: int, bits: int, device: str) -> torch.Tensor:
    """Return codes `start` up to `stop` of a stream of `bits`-bit codes, lowest bits first, as int32.

    Only the bytes that hold these codes are read. `bits` is at most 8.
    """
    import torch

    first = start * bits // 8
    last = -(-stop * bits // 8)
    loaded, loops = stored.load_bytes(first, last, device), compiled.loops("words")
    if loops is not None and start * bits == 8 * first:
        return loops.unpack(loaded.view(1, -1), bits, stop - start)[0].to(torch.int32)  # type: ignore[no-any-return]
    raw = loaded.to(torch.int32)
    at = torch.arange(start, stop, device=device, dtype=torch.int64) * bits - 8 * first
    low = at // 8
    pair = raw[low] | (raw[(low + 1).clamp_(max=max(0, len(raw) - 1))] << 8)
    return (pair >> (at % 8).to(torch.int32)) & ((1 << bits) - 1)


def nibble_pairs(table: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Return for every byte the two table values it holds, in element order.

    table  # (16,)
    ->     # (256, 2)
    """
    import torch

    low, high = table.expand(16, 16), table.view(16, 1).expand(16, 16)
    return torch.stack((high, low) if high_first else (low, high), dim=2).view(256, 2)


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return `table[codes]`, a row of the table for each code; several times faster than indexing.

    codes  # (n,) uint8 or int32
    table  # (entries, width)
    ->     # (n, width)
    """
    import torch

    loops, width = compiled.loops("windows"), table.shape[1]
    every_byte = codes.dtype == torch.uint8 and len(table) == 256
    if loops is not None and every_byte and width <= 2 and table.dtype == torch.float32:
        return loops.look_up(codes.reshape(-1), table).view(*codes.shape, width)  # type: ignore[no-any-return]
    indices = codes.to(torch.int32)
    if width == 1:
        return table.reshape(-1).index_select(0, indices.view(-1)).view(*codes.shape, 1)
    if width == 2 and table.dtype == torch.float32:  # two values travel as one of twice the width
        pairs = table.clone(memory_format=torch.contiguous_format).view(torch.float64).view(-1)
        return pairs.index_select(0, indices.view(-1)).view(torch.float32).view(*codes.shape, 2)
    return torch.nn.functional.embedding(indices, table)


def bit_rows(raw: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of every row, each row a stream of its own, lowest bits first, as int64.

    `bits` is at most 32.

    raw  # (rows, bytes) uint8
    ->   # (rows, count)

    >>> import torch
    >>> bit_rows(torch.tensor([[0b11_010_001, 0b0000_0001]], dtype=torch.uint8), 3, 3).tolist()
    [[1, 2, 7]]
    """
    import torch

    loops = compiled.loops("words")
    if loops is not None and bits <= 8:
        return loops.unpack(raw, bits, count).to(torch.int64)  # type: ignore[no-any-return]
    at = torch.arange(count, device=raw.device) * bits
    wide = torch.nn.functional.pad(raw, (0, 4)).to(torch.int64)
    codes = torch.zeros(len(raw), count, dtype=torch.int64, device=raw.device)
    for byte in range((bits + 14) // 8):  # as many bytes as one code can touch
        codes |= wide[:, at // 8 + byte] << 8 * byte
    return codes >> at % 8 & (1 << bits) - 1


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of each row of integer words, read as one stream, lowest bits first, as int32.

    `bits` is at most 8, and codes may straddle words of any width.

    words  # (..., n)
    ->     # (..., count)

    >>> import torch
    >>> unpack_words(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8)
    tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    """
    import torch

    raw = as_bytes(words)
    loops = compiled.loops("words")
    if loops is not None and bits <= 8:
        found = loops.unpack(raw.view(-1, raw.shape[-1]), bits, count)
        return found.view(*words.shape[:-1], count).to(torch.int32)  # type: ignore[no-any-return]
    if bits in (1, 2, 4, 8):
        shifts = torch.arange(0, 8, bits, device=raw.device, dtype=torch.uint8)
        codes = (raw.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return codes.flatten(-2)[..., :count].to(torch.int32)
    at = torch.arange(count, device=raw.device) * bits
    low = at // 8
    high = (low + 1).clamp_(max=raw.shape[-1] - 1)
    pair = raw[..., low].to(torch.int32) | (raw[..., high].to(torch.int32) << 8)
    return (pair >> (at % 8).to(torch.int32)) & ((1 << bits) - 1)


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each row of integer words, wherever they lie.

    words  # (..., n)
    ->     # (..., n * width) uint8
    """
    import torch

    flat = words.contiguous().view(-1).view(torch.uint8)
    return flat.view(*words.shape[:-1], words.shape[-1] * words.element_size())


def integers(
    words: torch.Tensor, bits: int, count: int, numbers: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the first `count` codes of each row of words as `Coded` has them, and its table.

    `numbers` are what the codes stand for, by default themselves.

    words  # (rows, n) integers; each row a stream of its own, lowest bits first
    ->     # (rows * count / width,) uint8; (256, width)
    """
    import torch

    raw, loops = as_bytes(words), compiled.loops("words")
    if bits == 4 and 2 * raw.shape[1] == count:
        of_nibbles = torch.tensor(numbers or range(16), dtype=torch.float32, device=raw.device)
        return raw.reshape(-1), nibble_pairs(of_nibbles, high_first=False)
    table = None
    if numbers is not None:
        table = torch.tensor((*numbers, *[0.0] * (256 - len(numbers))), device=raw.device).view(256, 1)
    if bits == 8:
        return raw[:, :count].reshape(-1), table
    codes = unpack_words(raw, bits, count).to(torch.uint8) if loops is None else loops.unpack(raw, bits, count)
    return codes.view(-1), table


def biased_rows(tensor: LogicalTensor, window: slice, bits: int, group: int, device: str, *, biases: str) -> Coded:
    """Return rows of codes that are streams of their own, with a scale and a bias for each group: q * scale + bias."""
    import torch

    rows, width, groups = window.stop - window.start, tensor.columns * bits // 8, tensor.columns // group
    raw = tensor.stored.load_bytes(window.start * width, window.stop * width, device).view(rows, width)
    scales, shifts = (
        tensor.part(part).load(window.start * groups, window.stop * groups, device).to(torch.float32).view(rows, groups)
        for part in ("scales", biases)
    )
    return Coded(*integers(raw, bits, tensor.columns), scales, group, shifts=shifts)


def turned(words: torch.Tensor) -> torch.Tensor:
    """Return a matrix of words turned, contiguous.

    words  # (rows, columns), any columns of a contiguous matrix
    ->     # (columns, rows)
    """
    loops = compiled.loops("words")
    if loops is not None and words.element_size() == 4:
        return loops.turn(words)  # type: ignore[no-any-return]
    return words.t().contiguous()


def fields(words: torch.Tensor, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Return the fields of words as rows: row `j * len(order) + i` has field `order[i]` of each word of row `j`.

    words  # (rows, columns) int32
    ->     # (rows * len(order), columns) uint8

    >>> import torch
    >>> fields(torch.tensor([[0x10, 0x32]], dtype=torch.int32), 4, (1, 0)).tolist()
    [[1, 3], [0, 2]]
    """
    import torch

    loops = compiled.loops("words")
    if loops is not None:
        return loops.fields(words, bits, order)  # type: ignore[no-any-return]
    shifts = torch.tensor(order, dtype=torch.int32, device=words.device).view(-1, 1) * bits
    return ((words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(0, 1)


def load_columns(stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return columns `start` up to `stop` of a stored matrix; row by row where the whole would be much more.

    stored  # (rows, columns)
    ->      # (rows, stop - start)
    """
    rows, columns = stored.shape
    if stored.nbytes < SMALL or 8 * (stop - start) > columns:
        return stored.load(device=device).view(rows, columns)[:, start:stop]
    ranges = [(row * columns + start, row * columns + stop) for row in range(rows)]
    return stored.load_each(ranges, device).view(rows, stop - start)


class Grid(NamedTuple):
    """How a grid of scales lies over a matrix, or over each matrix of a stack.

    `rows` x `columns` scales for `span` rows of values, each for `height` of them; the last block may be shorter.
    """

    rows: int
    columns: int
    span: int
    height: int


def grid_rows(stored: StoredTensor, grid: Grid, window: slice, device: str) -> torch.Tensor:
    """Return the row of a grid that scales each row of a window, in the stored dtype; only those are read.

    stored  # (..., grid.rows, grid.columns)
    ->      # (window, grid.columns)
    """
    import torch

    row = torch.arange(window.start, window.stop, device=device)
    if not len(row):
        return stored.load(0, 0, device).view(0, grid.columns)
    at = row // grid.span * grid.rows + row % grid.span // grid.height
    first, last = int(at[0]), int(at[-1]) + 1
    return stored.load(first * grid.columns, last * grid.columns, device).view(-1, grid.columns)[at - first]


def scale_groups(values: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """Return `values`, each group of columns multiplied in place by its scale; the last group may be shorter.

    values  # (rows, columns)
    scales  # (rows, ceil(columns / group))
    """
    import torch

    if not values.numel():
        return values
    group = min(group, values.shape[1])
    loops = compiled.loops("windows")
    if loops is not None and values.dtype == scales.dtype == torch.float32:
        loops.scale_blocks(values, scales, group)
        return values
    whole = values.shape[1] // group
    values[:, : whole * group].view(len(values), whole, group).mul_(scales[:, :whole].unsqueeze(-1))
    if whole < scales.shape[1]:
        values[:, whole * group :].mul_(scales[:, whole:])
    return values


def expand(coded: Coded, columns: int = -1) -> torch.Tensor:
    """Return the values that codes stand for, float32 `[rows, columns]`; of an odd row, the other half of a byte too.

    The last block may be shorter. Of no rows, nothing but `columns` says how long they are.
    """
    if not coded.codes.numel():
        return coded.scales.new_empty((len(coded.scales), max(0, columns)))
    loops = compiled.loops("windows")
    if loops is not None:
        return loops.decode(coded)  # type: ignore[no-any-return]
    values = _numbers(coded).view(len(coded.scales), -1)
    if coded.zeros is not None:
        shift_groups(values, coded.zeros, coded.size)
    scale_groups(values, coded.scales, coded.size)
    if coded.shifts is not None:
        shift_groups(values, -coded.shifts, coded.size)
    return values if coded.factor == 1.0 else values.mul_(coded.factor)


def _numbers(coded: Coded) -> torch.Tensor:
    """What codes stand for before they are scaled."""
    return as_float32(coded.codes) if coded.table is None else look_up(coded.codes, coded.table)


def as_float32(values: torch.Tensor) -> torch.Tensor:
    """Return stored numbers as float32: floats of one byte from a table where loops are in use, torch casts slowly."""
    import torch

    loops = compiled.loops("windows")
    if loops is None or not values.is_floating_point() or values.element_size() != 1:
        return values.to(torch.float32)
    return loops.small_floats(values)  # type: ignore[no-any-return]


def expand_scattered(coded: Coded, groups: torch.Tensor) -> torch.Tensor:
    """Return the values that codes stand for where activation order scattered the groups; shifts are not looked at.

    groups  # (columns,) int64, the group of each column
    ->      # (rows, columns) float32
    """
    import torch

    values = _numbers(coded).view(len(coded.scales), len(groups))
    zeros = torch.zeros_like(coded.scales) if coded.zeros is None else coded.zeros
    loops = compiled.loops("words")
    if loops is None:
        return values.sub_(zeros[:, groups]).mul_(coded.scales[:, groups])
    loops.place_scattered(values, zeros, coded.scales, groups)
    return values


def in_order(groups: torch.Tensor, size: int) -> bool:
    """Whether columns are in groups of `size` as they come.

    groups  # (columns,) int64
    """
    import torch

    return torch.equal(groups, torch.arange(len(groups), device=groups.device) // size)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of E8M0 scales, whether they come as `float8_e8m0fnu` or as bytes: 2**(e - 127)."""
    import torch

    return as_float32(exponents.view(torch.float8_e8m0fnu))


def byte_codes(stored: StoredTensor, start: int, stop: int, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return stored numbers of one byte as `Coded` has them, without a table."""
    return stored.load(start, stop, device), None


def e2m1_codes(stored: StoredTensor, start: int, stop: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of values `start` up to `stop`, E2M1 with the low nibble first, and the two values of each byte.

    ->  # ((stop - start) / 2,) uint8; (256, 2)
    """
    import torch

    table = torch.tensor(E2M1, device=device)
    return stored.load_bytes(start // 2, stop // 2, device), nibble_pairs(table, high_first=False)


def e2m1_values(codes: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Return the two E2M1 values of every byte, in element order, flat float32.

    codes  # (n,) uint8
    ->     # (2 * n,)
    """
    import torch

    pairs = nibble_pairs(torch.tensor(E2M1, device=codes.device), high_first=high_first)
    return look_up(codes.view(-1), pairs).view(-1)


def row_codes(raw: torch.Tensor, bits: int, count: int, skip: int = 0) -> torch.Tensor:
    """Return `count` codes of every row as int32: one stream per row, lowest bits first, after `skip` bits.

    raw  # (rows, bytes) uint8
    ->   # (rows, count)
    """
    import torch

    loops = compiled.loops("words")
    if loops is not None and not skip:
        return loops.unpack(raw, bits, count).to(torch.int32)  # type: ignore[no-any-return]
    at = torch.arange(count, device=raw.device) * bits + skip
    low = at // 8
    wide = raw.to(torch.int32)
    pair = wide[:, low] | (wide[:, (low + 1).clamp_(max=max(0, raw.shape[1] - 1))] << 8)
    return (pair >> (at % 8).to(torch.int32)) & ((1 << bits) - 1)


def word_codes(raw: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return `count` codes of every row as int32, where each 32-bit word holds `32 // bits` of them, lowest bits first.

    raw  # (rows, 4 * words) uint8
    ->   # (rows, count)
    """
    import torch

    words = raw.contiguous().view(torch.int32)
    shifts = torch.arange(32 // bits, device=raw.device, dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]


def read_integers(stored: StoredTensor, *, limit: int = 1 << 10) -> tuple[int, ...]:
    """Return the values of a small integer tensor: the shape or the sizes that a format keeps beside its codes."""
    width = BITS[stored.dtype] // 8
    if DTYPES[stored.dtype].kind != "int":
        raise FormatError(f"{stored.dtype} {list(stored.shape)} is no list of integers", tensor=stored.name)
    raw, signed = stored.read(limit=limit), stored.dtype.startswith("I")
    return tuple(int.from_bytes(raw[at : at + width], "little", signed=signed) for at in range(0, len(raw), width))


def shift_groups(values: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    """Return `values`, less the zero point of each group of columns, in place; the last group may be shorter.

    values  # (rows, columns)
    zeros   # (rows, ceil(columns / group))
    """
    if not values.numel():
        return values
    whole = values.shape[1] // group
    values[:, : whole * group].view(len(values), whole, group).sub_(zeros[:, :whole].unsqueeze(-1))
    if whole < zeros.shape[1]:
        values[:, whole * group :].sub_(zeros[:, whole:])
    return values


def matrix_windows(start: int, stop: int, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield which rows of which matrix of a stack the rows `start` up to `stop` are.

    >>> list(matrix_windows(3, 9, 4))
    [(0, slice(3, 4, None)), (1, slice(0, 4, None)), (2, slice(0, 1, None))]
    """
    for matrix in range(start // rows, -(-stop // rows)):
        yield matrix, slice(max(start - matrix * rows, 0), min(stop - matrix * rows, rows))


def block_values(
    stored: StoredTensor, shape: tuple[int, ...], grid: tuple[int, ...], rows: range, device: str
) -> torch.Tensor:
    """Return the values of a grid of equal blocks over a tensor, for some rows of it, as float32.

    shape   # (..., columns); all dimensions but the last are rows
    grid    # as many dimensions, each a divisor of the one in `shape`
    stored  # values of the grid, row-major
    ->      # (len(rows), grid[-1])
    """
    import torch

    rest = torch.arange(rows.start, rows.stop, device=device)
    row, stride = torch.zeros_like(rest), 1
    for size, blocks in zip(reversed(shape[:-1]), reversed(grid[:-1]), strict=True):
        row += rest % size // (size // blocks) * stride
        rest, stride = rest // size, stride * blocks
    if not rows:
        return torch.empty((0, grid[-1]), device=device)
    low, high = int(row.min()), int(row.max()) + 1
    values = stored.load(low * grid[-1], high * grid[-1], device).to(torch.float32)
    return values.view(high - low, grid[-1])[row - low]


def by_column_block(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return a view of rows of values beside their column blocks, ready to be combined in place.

    values   # (rows, columns)
    factors  # (rows, blocks)
    ->       # (rows, blocks, columns / blocks) and the factors take [..., None]
    """
    return values.view(*factors.shape, values.shape[-1] // factors.shape[-1])


def unswizzled_rows(
    stored: StoredTensor, columns: int, start: int, stop: int, device: str, *, offset: int = 0
) -> torch.Tensor:
    """Return rows `start` up to `stop` of block scales that lie in tiles of 128 x 4, in the stored dtype.

    A tile is stored as [32, 4, 4]: row 32 * j + i of the tile is [i, j]. Rows are padded to 128, columns to 4.
    Source: NVIDIA cuBLAS, 1D block scaling factors layout; torchao 0.18, mx_formats/utils.py `from_blocked`.
    """
    across = -(-columns // 4)
    low, high = start // 128, -(-stop // 128)
    tiles = stored.load(offset + low * across * 512, offset + high * across * 512, device)
    tiles = tiles.view(high - low, across, 32, 4, 4).permute(0, 3, 2, 1, 4)  # (down, j, i, across, 4)
    rows = tiles.reshape((high - low) * 128, across * 4)
    return rows[start - low * 128 : stop - low * 128, :columns]


def int4_rows_for_cpu(stored: StoredTensor, rows: int, columns: int, start: int, stop: int) -> torch.Tensor:
    """Return codes of rows `start` up to `stop` of what torch packed for its int4 kernel on this CPU, as uint8.

    The order of the nibbles depends on the CPU, so torch is asked: it packs the digits of every position as it packed
    the codes. Blocks of 64 rows lie one behind the other on all of them.
    Source: torch 2.13, aten/src/ATen/native/cpu/int4mm_kernel.cpp `weight_to_int4pack_kernel`.
    """
    import torch

    low, high = start // 64 * 64, min(-(-stop // 64) * 64, rows)
    count = (high - low) * columns
    position, at = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int64)
    for shift in range(0, max(4, count.bit_length()), 4):
        digit = ((position >> shift) & 15).view(high - low, columns)
        at |= _nibbles(torch._convert_weight_to_int4pack_for_cpu(digit, 1)).to(torch.int64) << shift
    codes = torch.empty(count, dtype=torch.uint8)
    codes[at] = _nibbles(stored.load_bytes(low * columns // 2, high * columns // 2))
    return codes.view(high - low, columns)[start - low : stop - low]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    import torch

    flat = packed.reshape(-1)
    return torch.cat((flat & 15, flat >> 4))


def hadamard(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return each block of `size` columns times the Hadamard matrix of that size over its square root.

    `size` is a power of two; the matrix is Sylvester's and symmetric. Sums are taken pair by pair, in the same order
    whatever the number of rows.

    >>> import torch
    >>> hadamard(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), 4)
    tensor([[ 1.5000, -0.5000, -0.5000,  1.5000]])
    """
    import torch

    width = 1
    while width < size:
        pairs = values.reshape(-1, 2, width)
        values = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1).view(values.shape)
        width *= 2
    return values.mul(size**-0.5)


def group_index(stored: StoredTensor, groups: int, device: str) -> torch.Tensor | None:
    """Return the group of each column where activation order scattered them; None where -1 says that it did not."""
    index = stored.load(device=device).long()
    if (index == -1).any():
        return None
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise FormatError(f"names the groups {int(index.min())} to {int(index.max())} of {groups}", tensor=stored.name)
    return index


def per_matrix(tensor: LogicalTensor, part: str, window: slice, device: str) -> torch.Tensor:
    """Return the one float32 scale above all others for each row of a window: of the tensor, or of its matrix.

    part  # () or (1,), or one for each matrix of a stack
    ->    # (1, 1) or (window, 1)
    """
    import torch

    values = tensor.part(part).load(device=device).to(torch.float32).view(-1, 1)
    if len(values) == 1:
        return values
    return values[torch.arange(window.start, window.stop, device=device) // tensor.shape[-2]]


# Four bits in two's complement.
INT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


def unblocked(tiles: torch.Tensor, columns: int) -> torch.Tensor:
    """Return scales in rows that were stored for Blackwell: tiles of 128 rows and 4 columns, 512 values each.

    tiles  # (rows * columns,), rows in full 128s, columns in full 4s
    ->     # (rows, columns)
    """
    across = max(1, columns // 4)
    cut = tiles.view(len(tiles) // (512 * across), across, 32, 4, 4)  # (down, across, row % 32, row // 32, column)
    return cut.permute(0, 3, 2, 1, 4).reshape(-1, columns)


def inverse(permutation: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """Return where each place of a permutation went; what is no permutation is a `FormatError` that names `stored`.

    permutation  # (n,) int64
    ->           # (n,)
    """
    import torch

    ordered, where = torch.sort(permutation)
    if not torch.equal(ordered, torch.arange(len(permutation), device=permutation.device)):
        raise FormatError(f"is no permutation of 0 to {len(permutation) - 1:,}", tensor=stored.name)
    return where


def halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at byte `at` (even) of each block, as float32.

    blocks  # (n, bytes) uint8
    ->      # (n, 1)
    """
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def shifted(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the `bits`-bit fields of each byte, lowest first, along a new last dimension.

    packed  # (...) uint8
    ->      # (..., 8 / bits) uint8

    >>> import torch
    >>> shifted(torch.tensor([0b11100100], dtype=torch.uint8), 2).tolist()
    [[0, 1, 2, 3]]
    """
    import torch

    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def little_endian(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return the unsigned integers of `width` bytes that are written one after the other, as int64.

    packed  # (n, bytes) uint8
    ->      # (n, bytes / width)
    """
    import torch

    places = 8 * torch.arange(width, device=packed.device)
    return (packed.reshape(len(packed), -1, width).to(torch.int64) << places).sum(dim=-1)


def look_up_halves(packed: torch.Tensor, table: Sequence[int], values: torch.Tensor) -> None:
    """Fill values from a table by the low nibbles of each run of bytes, then by the high ones.

    packed  # (runs, bytes) uint8
    table   # 16 entries
    values  # (runs, 2, bytes) float32
    """
    import torch

    entries = torch.tensor(table, dtype=torch.float32, device=packed.device)
    pairs = look_up(packed.reshape(-1), nibble_pairs(entries, high_first=False))
    values.copy_(pairs.view(len(packed), -1, 2).transpose(1, 2))


FLOATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}  # what `struct` calls them


def floats(stored: StoredTensor, start: int, stop: int) -> list[float]:
    """Return elements `start` up to `stop` of a stored tensor of floats, without torch."""
    width = BITS[stored.dtype] // 8
    raw = stored.source.read(stored.offset + start * width, stored.offset + stop * width)
    values = struct.unpack(f"<{stop - start}{FLOATS[stored.dtype]}", raw)
    if stored.dtype == "BF16":
        words = struct.pack(f"<{stop - start}I", *(value << 16 for value in values))
        values = struct.unpack(f"<{stop - start}f", words)
    return list(values)


def small_codes(raw: bytes | bytearray, bits: int, start: int, stop: int) -> list[int]:
    """Return codes `start` up to `stop` of a bit stream, lowest bits first, without torch.

    >>> small_codes(bytes([0x21, 0x43]), 4, 1, 4)
    [2, 3, 4]
    """
    stream = int.from_bytes(raw, "little")
    return [stream >> at * bits & (1 << bits) - 1 for at in range(start, stop)]


def stored_rows(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of values that are floats already, as they are stored."""
    stored = tensor.stored.load(start * tensor.columns, stop * tensor.columns, device)
    return stored.view(stop - start, tensor.columns)


def decode_floats(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` of values that are floats already, as float32."""
    import torch

    return stored_rows(tensor, start, stop, device).to(torch.float32)
