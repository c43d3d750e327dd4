"""Workflow commands of GitHub Actions: findings become annotations of the pull request."""

from __future__ import annotations

from quantcheck_lint.finding import Finding
from quantcheck_lint.formats import Report
from quantcheck_lint.formats.escape import visible

LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def render(report: Report) -> str:
    """One command per finding."""
    return "".join(f"{_command(finding)}\n" for finding in report.findings)


def _command(finding: Finding) -> str:
    where = f"cell {finding.cell}: " if finding.cell is not None else ""
    properties = {
        "title": f"{finding.code} {finding.name}",
        "file": finding.path,
        # A line of a notebook is a line of a cell, which an annotation cannot point at.
        "line": 1 if finding.cell is not None else finding.line,
        "col": finding.column,
        "endLine": 1 if finding.cell is not None else finding.end_line,
        "endColumn": finding.end_column,
    }
    listed = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items())
    message = f"{where}{finding.message}" + (f"; {finding.suggestion}" if finding.suggestion else "")
    return f"::{LEVELS[finding.severity]} {listed}::{_data(message)}"


def _data(text: str) -> str:
    """As the runner undoes it: `%`, CR and LF. `##[` starts a command of the older syntax anywhere in a line."""
    return visible(text).replace("%", "%25").replace("##[", "# #[")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
