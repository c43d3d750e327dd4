"""The tiles of Marlin's kernels: how codes and scales get back from the order in which a warp wants them.

A matrix [K, N] of 4-bit codes is stored as I32 [K/16, 2*N]: cut into tiles of 16x16, tile rows one after another; every
four tiles (1,024 codes) are permuted so that each thread of a warp finds its fragment in one load. Scales are permuted
within every 64 outputs, or within every 32 where one scale holds for a whole output.
Source: IST-DASLab/marlin `_get_perms`, as in GPTQModel 7.6.0, nn_modules/qlinear/marlin.py and qqq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.schemes import packing
from pytest_quantcheck.tensor import StoredTensor

if TYPE_CHECKING:
    import torch

SHOWN = ("B", "s", "s_channel", "s_group", "bias")


def fragment_order(step: int, rows: tuple[int, ...], interleave: tuple[int, ...]) -> tuple[int, ...]:
    """Return where each of 1,024 stored codes comes from in four tiles, read row by row.

    Thread t of a warp reads column t // 4 of a tile in `rows`, all of them moved down by `step` times t % 4, then the
    column eight to the right; `interleave` orders the eight codes of a word.
    """
    order: list[int] = []
    for thread in range(32):
        column, down = thread // 4, step * (thread % 4)
        fragment = [16 * (row + down) + column + 8 * half for half in (0, 1) for row in rows]
        for tile in range(4):
            order.extend(fragment[at] + 256 * tile for at in interleave)
    return tuple(order)


SCALES_BY_GROUP = tuple(at + 8 * row for at in range(8) for row in range(8))
SCALES_BY_OUTPUT = tuple(2 * thread + at for thread in range(4) for at in (0, 1, 8, 9, 16, 17, 24, 25))


def codes(stored: StoredTensor, order: tuple[int, ...], start: int, stop: int, device: str) -> torch.Tensor:
    """Return the codes of outputs `start` up to `stop`, multiples of 64, as int32.

    stored  # (K / 16, 2 * N)
    ->      # (K, stop - start)
    """
    tiles, columns = stored.shape[0], stop - start
    words = packing.load_columns(stored, 2 * start, 2 * stop, device)
    fragments = packing.unpack_words(words, 4, 16 * columns).reshape(-1, len(order))
    matrix = fragments[:, _inverse(order, device)].view(tiles, columns // 16, 16, 16)
    return matrix.transpose(1, 2).reshape(16 * tiles, columns)


def scales(stored: StoredTensor, order: tuple[int, ...], start: int, stop: int, device: str) -> torch.Tensor:
    """Return the scales of outputs `start` up to `stop`, multiples of 64, as float32.

    stored  # (groups, N)
    ->      # (groups, stop - start)
    """
    import torch

    loaded = packing.load_columns(stored, start, stop, device).to(torch.float32)
    return loaded.reshape(-1, len(order))[:, _inverse(order, device)].view(loaded.shape)


def _inverse(order: tuple[int, ...], device: str) -> torch.Tensor:
    import torch

    return torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the buffers of a Marlin or QQQ layer as they would be saved."""
    if name or not {"s", "s_channel"} & owner._buffers.keys():
        return None
    return {part: owner._buffers[part] for part in SHOWN if owner._buffers.get(part) is not None}
