"""Rows that belong together: the halves of a fused gate and up, q, k and v, or quarters of all rows.

A fault of one shard (one scale for both halves, a rank that was merged wrongly) is diluted in the whole tensor.

    gate_up_proj, w13 ...   period 2 I, in a stack of experts over and over       gate, up
    qkv_proj, Wqkv ...      columns rows of q, the rest halved                    q, k, v
    anything else           four equal runs of rows                               rows 0-1023 ...

Families that interleave q, k and v head by head (`query_key_value`) are cut into equal runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pytest_quantcheck.tensor import LogicalTensor

RUNS = 4
_GATE_UP = re.compile(r"\b(gate_up_proj|gate_up|up_gate_proj|w13|w1w3|gate_and_up_proj)(_weight|\b)")
_QKV = re.compile(r"\b(qkv_proj|qkv|Wqkv|wqkv|W_pack|in_proj_weight)\b")


class Cuts(NamedTuple):
    """Where the rows of a tensor are cut; the cuts repeat every `period` rows."""

    period: int
    starts: tuple[int, ...]
    names: tuple[str, ...]


def cuts(tensor: LogicalTensor) -> Cuts:
    """Return where the rows of a tensor are cut into shards."""
    rows = tensor.rows
    period = tensor.shape[-2] if len(tensor.shape) > 2 else rows
    if _GATE_UP.search(tensor.name) and period and period % 2 == 0:
        return Cuts(period, (0, period // 2), ("gate", "up"))
    heads, rest = tensor.columns, period - tensor.columns
    if _QKV.search(tensor.name) and 0 < rest <= 2 * heads and rest % 2 == 0:
        return Cuts(period, (0, heads, heads + rest // 2), ("q", "k", "v"))
    runs = max(1, min(RUNS, rows))
    starts = tuple(rows * at // runs for at in range(runs))
    stops = (*starts[1:], rows)
    return Cuts(
        rows, starts, tuple(f"rows {start:,} to {stop - 1:,}" for start, stop in zip(starts, stops, strict=True))
    )


def pieces(where: Cuts, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first row, row after the last) of each piece of a window.

    >>> list(pieces(Cuts(10, (0, 4), ("gate", "up")), 2, 15))
    [(0, 2, 4), (1, 4, 10), (0, 10, 14), (1, 14, 15)]
    """
    ends = (*where.starts[1:], where.period)
    while start < stop:
        base = start // where.period * where.period
        shard = next(at for at, end in enumerate(ends) if start - base < end)
        end = min(stop, base + ends[shard])
        yield shard, start, end
        start = end
