"""Stored parts as another convention would have written them: what a hypothesis about a fault decodes.

    unit    the bytes that belong together: a byte of two codes, a word, a float, a block
    change  units as uint8 (n, bytes of a unit) -> as many, changed
    shift   unit i is taken from i + shift, round the end

Nothing is written and nothing is read beyond the window that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

Change = Callable[["torch.Tensor"], "torch.Tensor"]


class Rewritten(NamedTuple):
    """A `Source` over the bytes of another stored tensor, changed unit by unit as they are read."""

    original: StoredTensor
    unit: int
    change: Change | None = None
    shift: int = 0

    def read(self, start: int, stop: int) -> bytearray:
        """Return the changed bytes."""
        return bytearray(self._bytes(start, stop, "cpu").numpy().tobytes())

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return changed elements in the dtype of `stored`, which need not be the original one."""
        import torch

        width = BITS[stored.dtype] // 8
        raw = self._bytes(start * width, stop * width, device)
        return raw.view(getattr(torch, str(DTYPES[stored.dtype].torch)))

    def _bytes(self, start: int, stop: int, device: str) -> torch.Tensor:
        first, last = start // self.unit, -(-stop // self.unit)
        units = self._units(first, last, device)
        if self.change is not None:
            units = self.change(units)
        return units.reshape(-1)[start - first * self.unit : stop - first * self.unit].clone()

    def _units(self, first: int, last: int, device: str) -> torch.Tensor:
        import torch

        if not self.shift:
            return self._load(first, last, device)
        size, start, stop = self.original.nbytes // self.unit, first + self.shift, last + self.shift
        before, after = (size + start, size) if start < 0 else (0, 0), (0, max(0, stop - size))
        runs = before, (max(start, 0), min(stop, size)), after
        return torch.cat([self._load(*run, device) for run in runs])

    def _load(self, first: int, last: int, device: str) -> torch.Tensor:
        return self.original.load_bytes(first * self.unit, last * self.unit, device).view(-1, self.unit)


def part(
    tensor: LogicalTensor,
    name: str,
    change: Change | None = None,
    *,
    unit: int = 1,
    shift: int = 0,
    dtype: str | None = None,
) -> LogicalTensor:
    """Return the tensor with one part read in another way: changed, shifted by some units, or as another dtype."""

    def changed(old: Part) -> Part:
        source = Rewritten(old.stored, unit, change, shift)
        return old._replace(stored=old.stored._replace(source=source, offset=0, dtype=dtype or old.stored.dtype))

    return tensor._replace(parts=tuple(changed(old) if old.name == name else old for old in tensor.parts))


def without(tensor: LogicalTensor, name: str) -> LogicalTensor:
    """Return the tensor as it is read without one of its parts."""
    return tensor._replace(parts=tuple(each for each in tensor.parts if each.name != name))


def table(tensor: LogicalTensor, name: str, values: tuple[float, ...]) -> LogicalTensor:
    """Return the tensor with another float32 codebook in the place of one of its parts."""
    return part(tensor, name, partial(_constant, values=values), unit=4 * len(values), dtype="F32")


def _constant(units: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    import torch

    return torch.tensor(values, device=units.device).view(torch.uint8).expand_as(units)


def swap_nibbles(units: torch.Tensor) -> torch.Tensor:
    """Return bytes with their two halves exchanged."""
    return units << 4 | units >> 4


def reverse_bytes(units: torch.Tensor) -> torch.Tensor:
    """Return units with their last byte first: words of the other byte order."""
    return units.flip(-1)


def flip_signs(units: torch.Tensor, bits: int) -> torch.Tensor:
    """Return 2-, 4- or 8-bit codes with the highest bit turned over: two's complement for offset binary, and back.

    >>> import torch
    >>> flip_signs(torch.tensor([0x18], dtype=torch.uint8), 4).tolist() == [0x90]
    True
    """
    mask: int = sum(1 << shift for shift in range(bits - 1, 8, bits))
    return units ^ mask


def undo_borrows(units: torch.Tensor, bits: int) -> torch.Tensor:
    """Return words of codes as they were before half their range was taken off the whole word, and the sign turned.

    units  # (n, 1, 2, 4 or 8)
    """
    import torch

    word = getattr(torch, f"int{8 * units.shape[1]}")
    half = sum(1 << shift for shift in range(bits - 1, 8, bits))
    halves = torch.full_like(units, half).view(word)
    return ((units.contiguous().view(word) ^ halves) + halves).view(torch.uint8).view(units.shape)


def add(units: torch.Tensor, bits: int, number: int) -> torch.Tensor:
    """Return 2-, 4- or 8-bit fields with a number added to each, round the end; `bits` above 8 are whole words."""
    import torch

    if bits > 8:
        words = units.contiguous().view(getattr(torch, f"int{bits}"))
        return (words + number).view(torch.uint8).view(units.shape)
    fields = [(units >> shift) + number & (1 << bits) - 1 for shift in range(0, 8, bits)]
    packed = torch.zeros_like(units)
    for at, field in enumerate(fields):
        packed |= field << at * bits
    return packed


def fill(units: torch.Tensor, bits: int, number: int) -> torch.Tensor:
    """Return 2-, 4- or 8-bit fields that all hold one number."""
    return units.new_zeros(units.shape) + sum(number << shift for shift in range(0, 8, bits))


def put(units: torch.Tensor, number: int) -> torch.Tensor:
    """Return little-endian integers that are all one number below 256."""
    units = units.new_zeros(units.shape)
    units[:, 0] = number
    return units


def inverse(units: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return floats that are one over what was written."""
    import torch

    values = units.contiguous().view(getattr(torch, str(DTYPES[dtype].torch)))
    return values.to(torch.float32).reciprocal().to(values.dtype).view(torch.uint8).view(units.shape)


# Below this nothing is left of a weight; float16 has smaller ones only at zero. E8M0 scales of 2**-127 stand for zero.
VANISHING = 1e-30


def vanishing(values: torch.Tensor) -> torch.Tensor:
    """Return which scales are zero or might as well be."""
    import torch

    return values.to(torch.float32).abs() < VANISHING


def revive(units: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return scales with 1 in the place of those that vanish."""
    import torch

    values = units.contiguous().view(getattr(torch, str(DTYPES[dtype].torch)))
    alive = torch.where(vanishing(values), 1.0, values.to(torch.float32)).to(values.dtype)
    return alive.view(torch.uint8).view(units.shape)
