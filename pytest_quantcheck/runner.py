"""From a configuration to the result record: each artifact is opened once, and what fails does not stop the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

from pytest_quantcheck import lock
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks.baseline import Record
from pytest_quantcheck.checks.fidelity import Limits
from pytest_quantcheck.checks.tree import DEPTH, tree
from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.config import Config, Entry
from pytest_quantcheck.containers.remote import shown
from pytest_quantcheck.errors import printable
from pytest_quantcheck.keys import CHECKS, Opened, said
from pytest_quantcheck.report import json as json_report
from pytest_quantcheck.report.run import ArtifactRun, Checked, Document, Run

CHANGES = 1000  # tensors of a difference that a report lists
_RUN = {check.key: check.run for check in CHECKS}


class Outcome(NamedTuple):
    """What one check said, the documents it made on the way, and why the artifact cannot be read at all."""

    checked: Checked
    compare: Document | None = None
    baseline: Document | None = None
    error: str | None = None


Outcomes = Mapping[tuple[str, str], Outcome]  # by name of the artifact and key


class Plan(NamedTuple):
    """A configuration, the records of its lock, and how it is checked; `documents` are what only reports show."""

    config: Config
    records: Mapping[str, Record]
    device: str = "cpu"
    worker: int | None = None  # of xdist, for a GPU of its own
    update: bool = False
    documents: bool = True

    def opened(self, entry: Entry) -> Opened:
        """Return the artifact of an entry, not yet read."""
        limits = entry.settings.get("fidelity", Limits())
        record = self.records.get(entry.name)
        return Opened(entry.path, entry.reference, limits, record, self.config.lock, self.device, self.worker)

    def entries(self) -> list[Entry]:
        """Return what is checked: the artifacts, then the records that no artifact has any more."""
        names = {entry.name for entry in self.config.entries}
        ours = os.path.basename(self.config.path)
        stale = sorted(name for name, record in self.records.items() if record.by == ours and name not in names)
        return [*self.config.entries, *(_stale(name, self.config) for name in stale)]


def plan(config: Config, *, device: str = "cpu", update: bool = False, documents: bool = True) -> Plan:
    """Return what is to be done; a lock that cannot be read is a `FormatError`."""
    return Plan(config, lock.read(config.lock), device, update=update, documents=documents)


def run(planned: Plan, *, only: str = "", keys: Sequence[str] = ()) -> Run:
    """Make every check whose id contains `only`, of `keys` where they are given; Ctrl-C leaves a partial run."""
    found: list[ArtifactRun] = []
    partial = False
    try:
        for entry in planned.entries():
            chosen = [key for key in entry.settings if only in check_id(entry, key) and (not keys or key in keys)]
            if chosen:
                opened = planned.opened(entry)
                outcomes = {(entry.name, key): check(planned, entry, key, opened) for key in chosen}
                found.append(artifact_run(planned, entry, opened, outcomes))
    except KeyboardInterrupt:
        partial = True
    return record(planned.config.path, found, partial=partial)


def check_id(entry: Entry, key: str) -> str:
    """Return how a check is called: `minilm-nf4::size`."""
    return printable(f"{entry.name}::{key}")


def check(planned: Plan, entry: Entry, key: str, opened: Opened) -> Outcome:
    """Make one check; what cannot be checked is an outcome too."""
    failure = _unreadable(entry, opened)
    if failure is not None:
        return Outcome(_checked(entry, key, failure), error=failure)
    try:
        return _made(planned, entry, key, opened)
    except Exception as error:  # the other checks are made all the same
        return Outcome(_checked(entry, key, f"{key}: {said(error)}"))


def _made(planned: Plan, entry: Entry, key: str, opened: Opened) -> Outcome:
    verdict = _verdict(planned, entry, key, opened)
    compare = vars(opened).get("comparison") if key in ("fidelity", "baseline") else None
    change = opened.change if key == "baseline" and not entry.is_stale else None
    return Outcome(
        _checked(entry, key, verdict),
        json_report.of_comparison(compare) if compare else None,
        json_report.of_difference(change, CHANGES) if change else None,
    )


def _unreadable(entry: Entry, opened: Opened) -> str | None:
    """Return why there is nothing to check, and where it is named; None where there is."""
    if entry.error is not None or entry.is_stale:
        return entry.error
    return f"{opened.failure} ({entry.where['path']})" if opened.failure else None


def artifact_run(planned: Plan, entry: Entry, opened: Opened, outcomes: Outcomes) -> ArtifactRun:
    """Return the record of one artifact from the outcomes of its checks."""
    own = [outcomes[entry.name, key] for key in entry.settings if (entry.name, key) in outcomes]
    failure = next((outcome.error for outcome in own if outcome.error), None)
    inspected = explained = None
    if planned.documents and not failure and not entry.is_stale:
        try:
            inspected, explained = _documents(opened.artifact)
        except Exception as error:  # it changed since it was checked, or this is a bug
            failure = said(error)
    return {
        "name": entry.name,
        "path": shown(entry.path),
        "error": failure,
        "checks": [outcome.checked for outcome in own],
        "inspect": inspected,
        "why": explained,
        "compare": next((outcome.compare for outcome in own if outcome.compare), None),
        "baseline": next((outcome.baseline for outcome in own if outcome.baseline), None),
    }


def _documents(artifact: Artifact) -> tuple[Document, Document]:
    """What the reports show of an artifact, whatever its checks say: `inspect` and `why`."""
    explanation = json_report.of_explanation(explain(artifact), tree(artifact, DEPTH))
    return json_report.of_artifact(artifact), explanation


def record(config: str | None, artifacts: list[ArtifactRun], *, partial: bool) -> Run:
    """Return the whole run. Exit code 2: something was not checked, or nothing was; 1: all was, and a check failed."""
    statuses = {checked["status"] for artifact in artifacts for checked in artifact["checks"]}
    unread = partial or any(artifact["error"] for artifact in artifacts)
    return {
        "schema": 1,
        "version": version("pytest-quantcheck"),
        "config": config,
        "partial": partial,
        "exit_code": 2 if "error" in statuses or unread or not statuses else 1 if "failed" in statuses else 0,
        "artifacts": artifacts,
    }


def of_outcomes(planned: Plan, outcomes: Outcomes, lost: Collection[str] = ()) -> list[ArtifactRun]:
    """Return what outcomes of several processes make together, in the order of the configuration.

    `lost` are the ids of checks whose process died.
    """
    entries = {entry.name: entry for entry in planned.entries()}
    for name, _ in outcomes:
        entries.setdefault(name, _stale(name, planned.config))  # this run took its record out
    died = {
        (entry.name, key): Outcome(_checked(entry, key, f"{key}: the process that made this check died"))
        for entry in entries.values()
        for key in entry.settings
        if check_id(entry, key) in lost
    }
    every = {**died, **outcomes}
    chosen = [entry for entry in entries.values() if any((entry.name, key) in every for key in entry.settings)]
    return [artifact_run(planned, entry, planned.opened(entry), every) for entry in chosen]


def _verdict(planned: Plan, entry: Entry, key: str, opened: Opened) -> Verdict:
    if key == "baseline" and planned.update:
        return _updated(planned.config, entry, opened)
    if entry.is_stale:
        what = f"baseline: {planned.config.lock} has a record of `{entry.name}`, and no artifact has that name"
        return Verdict("baseline", False, what, ("give the artifact its name back, or take the record out (--update)",))
    return _RUN[key](opened, entry.settings[key])


def _updated(config: Config, entry: Entry, opened: Opened) -> Verdict:
    """Write the record anew; it passes only where nothing changed, so that no run both accepts and agrees."""
    if entry.is_stale:
        lock.store(config.lock, {entry.name: None})
        return Verdict("baseline", False, f"baseline: the record of `{entry.name}` is taken out of {config.lock}")
    new = Record(os.path.basename(config.path), version("pytest-quantcheck"), opened.outline)
    return lock.update(config.lock, entry.name, new)


def _stale(name: str, config: Config) -> Entry:
    """A record whose artifact is gone, as something to check: it fails until it is taken out."""
    return Entry(name, "", {"baseline": None}, {"baseline": config.lock})


def _checked(entry: Entry, key: str, found: Verdict | str) -> Checked:
    """Return the record of a check, or of why it could not be made."""
    verdict = Verdict(key, False, found) if isinstance(found, str) else found
    return {
        "check": key,
        "status": "error" if isinstance(found, str) else "passed" if verdict.passed else "failed",
        "headline": verdict.headline,
        "details": [] if verdict.passed else list(verdict.details),
        "measured": _finite(verdict.measured),
        "allowed": _finite(verdict.allowed),
        "unit": verdict.unit,
        "where": entry.where.get(key),
        "message": None if verdict.passed else entry.message,
        "findings": [finding._asdict() for finding in verdict.findings],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
