"""Tensors that no name brings together, matched by their values: exporters call weights `onnx::MatMul_123`.

    sample        where windows of rows and of columns cross: first, middle and last (`content`)
    correlation   Pearson's, of the sample of one with that of the other, which is turned where the shapes say so
    match         each is the other's best, above 0.6 and above what chance gives so many values

Correlation does not see scales, so a weight with wrong ones still finds its original, and the comparison tells.
Constant tensors (norms that were never trained) correlate with nothing and stay unmatched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import content
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.pairing import Pair, Pairing
from pytest_quantcheck.checks.views import Piece, assembled, outputs
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

MIN_CORRELATION = 0.6  # of two bits with their original: 0.87
CHANCE = 5.0  # standard deviations of the correlation of unrelated values


class Match(NamedTuple):
    """A tensor, the one that holds its values, whether that has to be turned, and how well they correlate."""

    tensor: LogicalTensor
    original: LogicalTensor
    turned: bool
    correlation: float


class _Sample(NamedTuple):
    """A tensor and sampled values of it, less their mean and of length 1."""

    tensor: LogicalTensor
    values: torch.Tensor  # (rows, columns) float32


def align(pairing: Pairing, artifact: Artifact, reference: Artifact, device: str = "cpu") -> Pairing:
    """Return the pairs with those that only the values of an ONNX model give, each with a note that says so."""
    if "onnx" not in (artifact.container, reference.container):
        return pairing
    missing = {finding.tensor for finding in pairing.findings if finding.check == "not-compared"}
    ours = [tensor for tensor in artifact.parameters if tensor.name in missing and tensor.decoder]
    theirs = [tensor for tensor in reference.parameters if tensor.name in missing and tensor.decoder]
    matches = by_content(ours, theirs, device)
    named = {tensor.name for match in matches for tensor in (match.tensor, match.original)}
    kept = [found for found in pairing.findings if not (found.check == "not-compared" and found.tensor in named)]
    return Pairing((*pairing.pairs, *map(_pair, matches)), (*kept, *map(_note, matches)))


def by_content(
    tensors: Sequence[LogicalTensor], candidates: Sequence[LogicalTensor], device: str = "cpu"
) -> list[Match]:
    """Return which candidate holds the values of each tensor, in the order of the tensors; some match none."""
    found = {
        match.tensor.name: match
        for ours, theirs in _of_one_shape(tensors, candidates)
        for match in _best(_samples(ours, device), _samples(theirs, device))
    }
    return [found[tensor.name] for tensor in tensors if tensor.name in found]


def _pair(match: Match) -> Pair:
    tensor, original = match.tensor, match.original
    piece = Piece(original, 0, outputs(original))
    if match.turned:
        piece = Piece(original, 0, original.columns, turned=original.rows)
    return Pair(tensor, assembled(tensor.name, tensor.shape, (piece,)))


def _note(match: Match) -> Finding:
    turned = ", turned" if match.turned else ""
    how = f"matched by its values with `{match.original.name}`{turned} (correlation {match.correlation:.4f})"
    return Finding("matched-by-content", "note", match.tensor.name, how)


def _of_one_shape(
    tensors: Iterable[LogicalTensor], candidates: Iterable[LogicalTensor]
) -> Iterator[tuple[list[LogicalTensor], list[LogicalTensor]]]:
    """Tensors and candidates of one shape, matrices that have to be turned among them."""
    groups: dict[tuple[int, ...], tuple[list[LogicalTensor], list[LogicalTensor]]] = {}
    for side, group in enumerate((tensors, candidates)):
        for tensor in group:
            shape = tuple(sorted(tensor.shape)) if len(tensor.shape) == 2 else tensor.shape
            groups.setdefault(shape, ([], []))[side].append(tensor)
    return (group for group in groups.values() if all(group))


def _samples(tensors: Iterable[LogicalTensor], device: str) -> list[_Sample]:
    """The samples of those that are not constant."""
    found = []
    for tensor in tensors:
        values = content.decoded_sample(tensor, *content.windows_of(tensor), device)
        values = values - values.mean()
        length = float(values.norm())
        if math.isfinite(length) and length > 0:
            found.append(_Sample(tensor, values / length))
    return found


def _best(ours: list[_Sample], theirs: list[_Sample]) -> Iterator[Match]:
    """Those that are each other's best."""
    rows = [[_match(one, other) for other in theirs] for one in ours]
    if not rows or not theirs:
        return
    best_of = [max(column, key=_correlation) for column in zip(*rows, strict=True)]
    for one, row in zip(ours, rows, strict=True):
        match = max(row, key=_correlation)
        limit = max(MIN_CORRELATION, CHANCE / math.sqrt(one.values.numel()))
        if match.correlation > limit and any(match is best for best in best_of):
            yield match


def _match(one: _Sample, other: _Sample) -> Match:
    """The better of the two ways round, where both fit."""
    ways = []
    if one.tensor.shape == other.tensor.shape:
        ways.append((float((one.values * other.values).sum()), False))
    if len(one.tensor.shape) == 2 and one.tensor.shape == other.tensor.shape[::-1]:
        ways.append((float((one.values * other.values.t()).sum()), True))
    correlation, turned = max(ways)
    return Match(one.tensor, other.tensor, turned, correlation)


def _correlation(match: Match) -> float:
    return match.correlation
