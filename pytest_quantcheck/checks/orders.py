"""The same decoded values in other places: rows, columns, the two sides of a square.

An order is not guessed: each row of the reference is looked for among the decoded ones, by the angle between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_quantcheck.checks.sample import Attempt, Pair, Sample
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

SHARED = 16  # values of a row or column: fewer do not tell them apart
MIN_MATCH = 0.7  # cosine of a row with the row of the reference that it is
MAX_COLUMNS = 2048
ORDERED_DB = 10.0  # whoever is above has no row out of place


def transposed(sample: Sample) -> Iterator[Attempt]:
    """A square matrix, or each of a stack, the other way round."""
    shape = sample.tensor.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return
    size = shape[-1]

    def pairs() -> Iterator[Pair]:
        for window in sample.windows:
            first = window.start % size
            last = min(first + window.stop - window.start, size)
            corner = slice(0, last - first), slice(first, last)
            yield window.decoded[corner].t(), window.reference[corner]

    yield Attempt("transposed", "the square matrix transposed", pairs, "a converter turned it, or forgot to")


def row_order(sample: Sample) -> Iterator[Attempt]:
    """Rows in another order: the pairs and halves of rotary embeddings among them."""
    if sample.stored_db > ORDERED_DB:
        return
    head = sample.head
    order = _matched(head.decoded, head.reference)
    if order is None:
        return
    name, words, advice = _describe_rows(order, sample.tensor)

    def pairs() -> Iterator[Pair]:
        found = order >= 0
        yield head.decoded[order[found]], head.reference[found]

    yield Attempt(name, words, pairs, advice)


def column_order(sample: Sample) -> Iterator[Attempt]:
    """Columns in another order: packing orders that were not undone, activation order."""
    head = sample.head
    if sample.stored_db > ORDERED_DB or len(head.decoded) < SHARED:
        return
    decoded, reference = head.decoded[:, :MAX_COLUMNS], head.reference[:, :MAX_COLUMNS]
    order = _matched(decoded.t(), reference.t())
    if order is None:
        return

    def pairs() -> Iterator[Pair]:
        found = order >= 0
        yield decoded[:, order[found]], reference[:, found]

    period = _period(order)
    where = f"in each {period}" if period else "throughout"
    words = f"columns reordered {where} ({_excerpt(order)})"
    advice = "the order of packing was not undone" if period else "activation order was not undone"
    yield Attempt("columns-permuted", words, pairs, advice)


def _matched(decoded: torch.Tensor, reference: torch.Tensor) -> torch.Tensor | None:
    """For each row of the reference the decoded row that it is, -1 where there is none; None where no order shows."""
    import torch

    left, right = (torch.nn.functional.normalize(values) for values in (reference, decoded))
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()) or decoded.shape[1] < SHARED:
        return None
    cosine, order = (left @ right.t()).max(dim=1)
    order = torch.where(cosine > MIN_MATCH, order, -1)
    found = order[order >= 0]
    unmoved = torch.equal(found, torch.arange(len(order), device=order.device)[order >= 0])
    if unmoved or len(found) < len(order) // 4 or len(set(found.tolist())) < len(found):
        return None
    return order


def _describe_rows(order: torch.Tensor, tensor: LogicalTensor) -> tuple[str, str, str]:
    """The name, the words and the advice for an order of rows."""
    import torch

    for size in range(4, len(order) + 1, 2):
        if tensor.rows % size:
            continue
        whole = order[: len(order) // size * size].view(-1, size)
        local = whole - size * torch.arange(len(whole), device=order.device).view(-1, 1)
        halves = torch.arange(size, device=order.device).view(2, size // 2)
        pairs = halves.t().reshape(-1)
        if (local == pairs.argsort()).all():
            words = f"the rows of each head of {size} taken out of their pairs"
            return "rotary-pairs", words, "q and k of rotary embeddings were permuted, and it was not undone"
        if (local == pairs).all():
            words = f"the rows of each head of {size} put into pairs"
            return "rotary-pairs", words, "q and k of rotary embeddings were permuted back once too often"
    period = _period(order)
    where = f"in each {period}" if period else "throughout"
    return "rows-permuted", f"rows reordered {where} ({_excerpt(order)})", "the order of packing was not undone"


def _period(order: torch.Tensor) -> int | None:
    """The length after which a permutation repeats, or None."""
    import torch

    for size in range(2, len(order) // 2 + 1):
        whole = order[: len(order) // size * size].view(-1, size)
        local = whole - size * torch.arange(len(whole), device=order.device).view(-1, 1)
        if (local == local[0]).all() and int(local[0].min()) == 0 and int(local[0].max()) == size - 1:
            return size
    return None


def _excerpt(order: torch.Tensor) -> str:
    """A few of an order, from where it first leaves its place."""
    found = order.tolist()
    first = max(0, next(at for at, place in enumerate(found) if place != at) - 1)
    shown = ", ".join("?" if place < 0 else str(place) for place in found[first : first + 6])
    return f"{shown}, ..." if not first else f"from {first}: {shown}, ..."
