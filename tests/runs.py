"""Runs of real artifacts, as `quantcheck check` makes them: the documents are those of `report.json`."""

from __future__ import annotations

from pathlib import Path

from pytest_quantcheck.artifact import Subject, inspect
from pytest_quantcheck.checks import diff, fidelity, size
from pytest_quantcheck.checks.tree import tree
from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.checks.why import explain
from pytest_quantcheck.report import json
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run


def run(*artifacts: ArtifactRun, partial: bool = False) -> Run:
    """The result of a configuration that lists these artifacts."""
    statuses = {checked["status"] for artifact in artifacts for checked in artifact["checks"]}
    unread = any(artifact["error"] for artifact in artifacts)
    code = 2 if unread or "error" in statuses else int("failed" in statuses)
    return Run(
        schema=1,
        version="0.1.0",
        config="quantcheck.toml",
        partial=partial,
        exit_code=code,
        artifacts=list(artifacts),
    )


def checked(verdict: Verdict, *, line: int = 1, message: str | None = None) -> Checked:
    """The record of a check that was made."""
    return Checked(
        check=verdict.check,
        status="passed" if verdict.passed else "failed",
        headline=verdict.headline,
        details=list(verdict.details),
        measured=None,
        allowed=None,
        unit=None,
        where=f"quantcheck.toml:{line}",
        message=message,
        findings=[finding._asdict() for finding in verdict.findings],
    )


def unreadable(path: str, error: str) -> ArtifactRun:
    """An artifact that could not be opened, and its check that could not be made."""
    check = checked(Verdict("size", False, error), line=10) | {"status": "error"}
    return ArtifactRun(
        name=path, path=path, error=error, checks=[check], inspect=None, why=None, compare=None, baseline=None
    )


def artifact(
    path: Subject,
    *,
    name: str | None = None,
    budget: int | None = None,
    reference: Subject | None = None,
    baseline: Subject | None = None,
    message: str | None = None,
) -> ArtifactRun:
    """An artifact with its size checked, compared with a reference and with a baseline where they are given."""
    found = inspect(path)
    limit = budget or found.file_bytes
    checks = [checked(size.check_size_budget(found, limit), line=4, message=message)]
    comparison = fidelity.compare(found, inspect(reference)) if reference is not None else None
    if comparison is not None:
        checks.append(checked(fidelity.check_fidelity(comparison), line=7, message=message))
    return ArtifactRun(
        name=name or Path(str(path)).name,
        path=str(path),
        error=None,
        checks=checks,
        inspect=json.of_artifact(found),
        why=json.of_explanation(explain(found), tree(found)),
        compare=json.of_comparison(comparison) if comparison is not None else None,
        baseline=json.of_difference(diff.difference(inspect(baseline), found), 20) if baseline is not None else None,
    )
