"""The result of checking artifacts: what `quantcheck check` and pytest hand to every report.

Plain data, so that a worker process can send it and a file can hold it. Nothing in it depends on the time, the machine
or the order in which checks ran: the same artifacts give the same record. `inspect`, `why`, `compare` and `baseline`
are the documents of `report.json` (`of_artifact`, `of_explanation`, `of_comparison`, `of_difference`).
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Status = Literal["passed", "failed", "error"]  # error: could not check
Document = dict[str, Any]


class Checked(TypedDict):
    """One check of one artifact."""

    check: str  # the key in quantcheck.toml: `size`, `logical_params`, `fidelity` ...
    status: Status
    headline: str  # the verdict in one line, with measured, expected and allowed
    details: list[str]  # where the difference sits, worst first
    measured: float | None
    allowed: float | None
    unit: str | None  # `bytes`, `parameters`, `bits`, `dB` ...
    where: str | None  # where the limit is written: `quantcheck.toml:12`
    message: str | None  # the project's own words for this failure
    findings: list[Document]


class ArtifactRun(TypedDict):
    """One artifact: its checks, and the documents that show it. A document is None where it could not be made."""

    name: str
    path: str
    error: str | None  # why the artifact could not be read at all, in one line
    checks: list[Checked]
    inspect: Document | None
    why: Document | None
    compare: Document | None
    baseline: Document | None  # the difference from the baseline, as `quantcheck diff --json` has it


class Run(TypedDict):
    """Everything that was checked, artifacts in the order of the configuration."""

    schema: Literal[1]
    version: str  # of pytest-quantcheck
    config: str | None  # the file the checks were written in
    partial: bool  # interrupted before every check was made
    exit_code: int
    artifacts: list[ArtifactRun]
