"""Decoded values against a reference: which tensors are compared, what is found, and the verdict.

The metrics are in `metrics`, how they are measured in `engine`, what is allowed in `limits`. Comparing nothing is a
failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import smoothing
from pytest_quantcheck.checks.alignment import align
from pytest_quantcheck.checks.diagnosis import diagnose
from pytest_quantcheck.checks.engine import measure, measure_each
from pytest_quantcheck.checks.limits import Limits, expects_rounding, judge, outliers, require_matches
from pytest_quantcheck.checks.metrics import Fidelity, sqnr_db
from pytest_quantcheck.checks.pairing import Pair
from pytest_quantcheck.checks.pairing import pair as pair_tensors
from pytest_quantcheck.checks.verdict import WORST, Verdict, worst
from pytest_quantcheck.finding import Finding
from pytest_quantcheck.quantities import counted

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

    Tensors of an ONNX model that no name matches are matched by their values, and a note says so.
    The work goes to any `executor` of concurrent.futures, or to `workers` threads; the result is the same to the last
    bit. `progress` is called with the values compared so far and those there are.
    """
    limits = limits or Limits()
    _require_files(artifact, reference, executor)
    pairing = smoothing.undo(align(pair_tensors(artifact, reference), artifact, reference, device), device)
    pairs, findings = pairing.pairs, list(pairing.findings)
    require_matches(limits, [tensor.name for tensor, _ in pairs])
    measured = partial(
        measure_each, device=device, in_steps=limits.max_steps is not None, executor=executor, workers=workers
    )
    rows = _judged(pairs, limits, measured, _progress(pairs, progress))
    findings += [Finding("fidelity", "error", row.name, fault) for row in rows for fault in row.faults]
    findings += [*outliers(rows), *_vacuous(rows)]
    quantized = [row for row in rows if row.quantized]
    total = sqnr_db(sum(row.signal for row in quantized), sum(row.noise for row in quantized)) if quantized else None
    rows.sort(key=_margin)
    findings += _diagnoses(rows, pairs, device)
    return Comparison(tuple(rows), tuple(findings), total)


def _judged(
    pairs: Sequence[Pair],
    limits: Limits,
    measured: Callable[..., Iterator[Fidelity]],
    progress: Callable[[int], None] | None,
) -> list[Fidelity]:
    """All pairs, judged; where one fails that was rounded in part, it is judged by what all of it rounds to."""
    wanted = [
        Pair(tensor if expects_rounding(tensor, limits) else tensor._replace(rounding=None), other)
        for tensor, other in pairs
    ]
    found = measured(wanted, sample=True, progress=progress)
    rows = [judge(row, tensor, limits) for row, (tensor, _) in zip(found, pairs, strict=True)]
    doubtful = [at for at, row in enumerate(rows) if row.faults and row.sampled]
    again = measured([wanted[at] for at in doubtful])
    for at, row in zip(doubtful, again, strict=True):
        rows[at] = judge(row, pairs[at].tensor, limits)
    return rows


def _diagnoses(rows: list[Fidelity], pairs: Sequence[Pair], device: str) -> Iterator[Finding]:
    """What is likely wrong with the worst tensors, as notes."""
    by_name = {tensor.name: (tensor, reference) for tensor, reference in pairs}
    for row in [row for row in rows if row.faults][:WORST]:
        found = diagnose(*by_name[row.name], device=device, near=row.extremes.lost_at or row.extremes.row)
        if found is not None:
            yield Finding("diagnosis", "note", row.name, f"likely {found}")


def _require_files(artifact: Artifact, reference: Artifact, executor: Executor | None) -> None:
    """Live tensors stay in the process that has them."""
    live = [one for one in (artifact, reference) if one.container == "live"]
    if live and executor is not None and not isinstance(executor, ThreadPoolExecutor):
        raise ValueError(f"`{live[0].source}` is a live model: other processes cannot read it, give the path of a file")


def _progress(pairs: Sequence[Pair], progress: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total, done = sum(tensor.params for tensor, _ in pairs), 0

    def tell(values: int) -> None:
        nonlocal done
        done += values
        progress(done, total)

    return tell


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
    likely = {finding.tensor: finding.message for finding in comparison.findings if finding.check == "diagnosis"}
    total = "" if comparison.sqnr_db is None else f", {comparison.sqnr_db:.2f} dB over the quantized values"
    wrong = {finding.tensor for finding in errors if finding.tensor}
    headline = f"fidelity: {counted(len(comparison.tensors), 'tensor')} compared{total}, {len(wrong):,} wrong"
    by_tensor: dict[str | None, list[str]] = {}
    for finding in errors:
        by_tensor.setdefault(finding.tensor, []).append(finding.message)
    order = {row.name: at for at, row in enumerate(comparison.tensors)}
    names = sorted(by_tensor, key=lambda name: order.get(name or "", -1))
    lines = [f"{name + ': ' if name else ''}{'; '.join(by_tensor[name])}" for name in names]
    return Verdict(
        "dequant-fidelity", not errors, headline, tuple(_explained(lines, names, likely)), comparison.findings
    )


def _explained(lines: list[str], names: list[str | None], likely: Mapping[str | None, str]) -> Iterator[str]:
    """Yield the worst lines, and under each what is likely wrong with its tensor."""
    for line, name in zip_longest(worst(lines), names[:WORST]):
        yield line
        if name in likely:
            yield f"  {likely[name]}"


def _margin(row: Fidelity) -> tuple[bool, float, float]:
    """Faulty rows first, then by how little they are above what was expected."""
    above = row.sqnr_db - (row.expected_sqnr_db or 0.0)
    return not row.faults, -math.inf if math.isnan(above) else round(above, 2), row.sqnr_db
