"""Decoded values against a reference: which tensors are compared, what is found, and the verdict.

The metrics are in `metrics`, how they are measured in `engine`, what is allowed in `limits`. Comparing nothing is a
failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Literal, NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.engine import Pair, measure, measure_each
from pytest_quantcheck.checks.limits import Limits, judge, outliers, require_matches
from pytest_quantcheck.checks.metrics import Fidelity, sqnr_db
from pytest_quantcheck.checks.verdict import Verdict, worst
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted, format_shape
from pytest_quantcheck.tensor import LogicalTensor

__all__ = ["Comparison", "Fidelity", "Limits", "check_fidelity", "compare", "measure", "sqnr_db"]


class Comparison(NamedTuple):
    """All tensors that were compared, worst first, and what could not be compared."""

    tensors: tuple[Fidelity, ...]
    findings: tuple[Finding, ...]
    sqnr_db: float | None  # over all values of the quantized tensors together

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing is wrong."""
        return not any(finding.severity == "error" for finding in self.findings)


def compare(
    artifact: Artifact,
    reference: Artifact,
    limits: Limits | None = None,
    *,
    device: str = "cpu",
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare every parameter of `artifact` with the tensor of the same name in `reference`.

    The work goes to any `executor` of concurrent.futures, or to `workers` threads; the result is the same to the last
    bit. `progress` is called with the values compared so far and those there are.
    """
    limits = limits or Limits()
    _require_files(artifact, reference, executor)
    pairs, findings = _pairs(artifact, reference)
    require_matches(limits, [tensor.name for tensor, _ in pairs])
    measured = measure_each(
        pairs, device=device, executor=executor, workers=workers, progress=_progress(pairs, progress)
    )
    rows = [judge(row, tensor, limits) for row, (tensor, _) in zip(measured, pairs, strict=True)]
    findings += [Finding("fidelity", "error", row.name, fault) for row in rows for fault in row.faults]
    findings += [*outliers(rows), *_vacuous(rows)]
    quantized = [row for row in rows if row.quantized]
    total = sqnr_db(sum(row.signal for row in quantized), sum(row.noise for row in quantized)) if quantized else None
    rows.sort(key=_margin)
    return Comparison(tuple(rows), tuple(findings), total)


def _require_files(artifact: Artifact, reference: Artifact, executor: Executor | None) -> None:
    """Live tensors stay in the process that has them."""
    live = [one for one in (artifact, reference) if one.container == "live"]
    if live and executor is not None and not isinstance(executor, ThreadPoolExecutor):
        raise ValueError(f"`{live[0].source}` is a live model: other processes cannot read it, give the path of a file")


def _progress(pairs: list[Pair], progress: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total, done = sum(tensor.params for tensor, _ in pairs), 0

    def tell(values: int) -> None:
        nonlocal done
        done += values
        progress(done, total)

    return tell


def _pairs(artifact: Artifact, reference: Artifact) -> tuple[list[Pair], list[Finding]]:
    """The tensors that can be compared, and what is left over on either side."""
    pairs: list[Pair] = []
    findings: list[Finding] = []
    names = _names(artifact, reference)
    for tensor in artifact.parameters:
        other = names.get(tensor.name)
        if other is None:
            findings += _unmatched(tensor)
        elif not _aligned(tensor, other):
            what = f"is {format_shape(tensor.shape)}, the reference has {format_shape(other.shape)}"
            findings.append(Finding("shape", "error", tensor.name, what))
        else:
            pairs.append((tensor, other))
    return pairs, [*findings, *_left_over(reference, names)]


def _vacuous(rows: list[Fidelity]) -> Iterator[Finding]:
    """What shows nothing: no row, none that is quantized, a reference of zeros."""
    quantized = [row for row in rows if row.quantized]
    blank = [row for row in quantized if not row.signal and not row.extremes.reference_non_finite]
    if not quantized or len(blank) == len(quantized):
        what = (
            "nothing was compared"
            if not rows
            else "no quantized tensor was compared"
            if not quantized
            else "every quantized tensor was compared with zeros"
        )
        yield Finding("vacuous", "error", None, f"{what} (a check that compared nothing has failed)")
    for row in blank:
        yield Finding("vacuous", "warning", row.name, "the reference is all zeros: nothing is shown by it")


def check_fidelity(comparison: Comparison) -> Verdict:
    """Turn a comparison into a verdict: worst tensors first."""
    errors = [finding for finding in comparison.findings if finding.severity == "error"]
    total = "" if comparison.sqnr_db is None else f", {comparison.sqnr_db:.2f} dB over the quantized values"
    wrong = {finding.tensor for finding in errors if finding.tensor}
    headline = f"fidelity: {counted(len(comparison.tensors), 'tensor')} compared{total}, {len(wrong):,} wrong"
    by_tensor: dict[str | None, list[str]] = {}
    for finding in errors:
        by_tensor.setdefault(finding.tensor, []).append(finding.message)
    order = {row.name: at for at, row in enumerate(comparison.tensors)}
    names = sorted(by_tensor, key=lambda name: order.get(name or "", -1))
    lines = [f"{name + ': ' if name else ''}{'; '.join(by_tensor[name])}" for name in names]
    return Verdict("dequant-fidelity", not errors, headline, tuple(worst(lines)), comparison.findings)


def _names(artifact: Artifact, reference: Artifact) -> Mapping[str, LogicalTensor]:
    """The reference tensor for each name; a prefix that only one side has (`model.`, `bert.`) is bridged."""
    theirs = {tensor.name: tensor for tensor in reference.tensors if tensor.role in ("parameter", "tied")}
    theirs |= {alias: theirs[first] for alias, first in reference.aliases.items() if first in theirs}
    ours = [tensor.name for tensor in artifact.parameters]
    found = {name: theirs[name] for name in ours if name in theirs}
    for prefix in dict.fromkeys(name.partition(".")[0] + "." for name in [*ours, *theirs]):
        for name in ours:
            bridged = theirs.get(prefix + name) or theirs.get(name.removeprefix(prefix))
            if bridged is not None:
                found.setdefault(name, bridged)
    return found


def _unmatched(tensor: LogicalTensor) -> list[Finding]:
    if tensor.role == "adapter":
        return [Finding("not-compared", "note", tensor.name, "is an adapter: the reference has none")]
    severity: Literal["error", "warning"] = "error" if tensor.quantized else "warning"
    return [Finding("not-compared", severity, tensor.name, "is not in the reference")]


def _left_over(reference: Artifact, names: Mapping[str, LogicalTensor]) -> list[Finding]:
    used = {tensor.name for tensor in names.values()}
    return [
        Finding("not-compared", "warning", tensor.name, "is in the reference only")
        for tensor in reference.parameters
        if tensor.name not in used
    ]


def _aligned(tensor: LogicalTensor, other: LogicalTensor) -> bool:
    """Whether the shapes agree, or are reversed where the unquantized model keeps the matrix the other way round."""
    return tensor.shape == other.shape or (tensor.transposed and tensor.shape == other.shape[::-1])


def _margin(row: Fidelity) -> tuple[bool, float]:
    """Faulty rows first, then by how little they are above what was expected."""
    distance = row.sqnr_db - (row.expected_sqnr_db or 0.0)
    return not row.faults, -math.inf if math.isnan(distance) else distance
