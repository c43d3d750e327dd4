"""Bytes against a budget, and where they go."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.quantities import format_shape, format_size, parse_size
from pytest_quantcheck.tensor import BYTE_CLASSES

WHERE = "where the bytes go:"


def check_size_budget(
    artifact: Artifact,
    budget: str | int | None = None,
    *,
    per_class: Mapping[str, str | int] | None = None,
    bits_per_weight: float | None = None,
) -> Verdict:
    """Require the size of all files (of the tensors, live) to fit: in total, per byte class, or per logical weight."""
    if budget is None and not per_class and bits_per_weight is None:
        raise ValueError("a budget is needed: a total size, per_class, or bits_per_weight")
    over = [] if budget is None else _over("file size", artifact.file_bytes, parse_size(budget))
    for name, limit in (per_class or {}).items():
        if name not in BYTE_CLASSES:
            raise ValueError(f"byte class `{name}` is not one of {', '.join(BYTE_CLASSES)}")
        over += _over(name, artifact.bytes[name], parse_size(limit))
    if bits_per_weight is not None:
        over += _over_bits(artifact, bits_per_weight)
    total = f"{format_size(artifact.file_bytes)} ({artifact.file_bytes:,} bytes)"
    if not artifact.file_bytes:
        return Verdict("size-budget", False, f"size: `{artifact.source}` has no bytes at all")
    if not over:
        return Verdict("size-budget", True, f"size: {total}, within the budget")
    return Verdict("size-budget", False, over[0], (*over[1:], *where_the_bytes_go(artifact)))


def where_the_bytes_go(artifact: Artifact) -> list[str]:
    """Return the bytes by class and the largest tensors, as lines."""
    total = artifact.file_bytes or 1
    classes = sorted(((size, kind) for kind, size in artifact.bytes.items() if size), reverse=True)
    lines = [f"  {size / total:6.1%}  {format_size(size):>10}  {kind}" for size, kind in classes]
    largest = sorted(artifact.tensors, key=lambda tensor: -tensor.nbytes)
    tensors = [
        f"{t.nbytes / total:6.1%}  {format_size(t.nbytes):>10}  {t.name}  {format_shape(t.shape)}  "
        f"{t.scheme} at {t.bits_per_weight:.2f} bits"
        for t in largest
    ]
    return [WHERE, *lines, "largest tensors:", *(f"  {line}" for line in worst(tensors))]


def _over(what: str, measured: int, limit: int) -> list[str]:
    if measured <= limit:
        return []
    excess = measured - limit
    share = f" ({excess / limit:.1%})" if limit else ""
    return [
        f"{what}: {format_size(measured)} ({measured:,} bytes) exceeds the budget of {format_size(limit)} "
        f"({limit:,} bytes) by {format_size(excess)}{share}"
    ]


def _over_bits(artifact: Artifact, limit: float) -> list[str]:
    measured = 8 * artifact.file_bytes / artifact.logical_params if artifact.logical_params else float("nan")
    if measured <= limit:
        return []
    return [f"file size per logical weight: {measured:.3f} bits exceed the budget of {limit:g} bits"]
