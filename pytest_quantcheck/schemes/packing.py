"""Bit arithmetic that several schemes share, on torch, windowed, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pytest_quantcheck.tensor import StoredTensor

# Four bits: sign, two of exponent, one of mantissa. OCP Microscaling Formats 1.0, table 5.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


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
    raw = stored.load_bytes(first, last, device).to(torch.int32)
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

    byte = torch.arange(256, device=table.device)
    low, high = table[byte & 15], table[byte >> 4]
    return torch.stack((high, low) if high_first else (low, high), dim=1)


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return `table[codes]`, a row of the table for each code; faster than indexing, and parallel.

    codes  # (n,) uint8 or int32
    table  # (entries, width)
    ->     # (n, width)
    """
    import torch

    return torch.nn.functional.embedding(codes.to(torch.int32), table)


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
