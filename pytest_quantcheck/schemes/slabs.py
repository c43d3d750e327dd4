"""Codes packed in slabs, as hqq does and sinq after it: the fields of one word are rows far apart.

Row r of [rows, columns] is in packed row r % P, in the field r // P from the top, with P = ceil(rows / fields).
Source: hqq 0.2.8.post1, core/bitpack.py; sinq 0.2.0, bitpack.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from pytest_quantcheck.tensor import StoredTensor


class Packing(NamedTuple):
    """How many fields a word has, how many bits a field, how many bytes the word; whether rows are rounded up."""

    fields: int
    bits: int
    width: int
    padded: bool = False

    def packed_rows(self, rows: int) -> int:
        """Return how many rows of words hold `rows` rows of codes."""
        return -(-rows // self.fields) if self.padded else rows // self.fields


PACKINGS = {
    "8bit_u8": Packing(1, 8, 1),
    "6bit_32": Packing(5, 6, 4, padded=True),
    "5bit_32": Packing(6, 5, 4, padded=True),
    "4bit_u8": Packing(2, 4, 1),
    "3bit_32": Packing(10, 3, 4, padded=True),
    "2bit_u8": Packing(4, 2, 1),
    "1bit_u8": Packing(8, 1, 1),
}


def unpack(stored: StoredTensor, packing: Packing, *, shape: tuple[int, int], rows: range, device: str) -> torch.Tensor:
    """Return some rows of a packed matrix of codes of `shape`, as uint8; only the words that hold them are read."""
    import torch

    columns, packed = shape[1], packing.packed_rows(shape[0])
    found = [torch.empty((0, columns), dtype=torch.uint8, device=device)]
    for field in range(packing.fields):
        first, last = max(rows.start - field * packed, 0), min(rows.stop - field * packed, packed)
        if first < last:
            raw = stored.load_bytes(first * columns * packing.width, last * columns * packing.width, device)
            words = raw.view(torch.int32) if packing.width == 4 else raw
            codes = (words >> packing.bits * (packing.fields - 1 - field)) & (2**packing.bits - 1)
            found.append(codes.to(torch.uint8).view(last - first, columns))
    return torch.cat(found)
