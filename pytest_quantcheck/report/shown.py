"""A run as it may be shown: every text that a checkpoint, a file name or a configuration brought is printable.

Each sink adds the escapes of its own syntax to that, and nothing else.
"""

from __future__ import annotations

from typing import Any

from pytest_quantcheck.errors import printable
from pytest_quantcheck.report.run import Checked, Run


def shown(run: Run) -> Run:
    """Return the run with all texts on one line and printable; only a project's own message keeps its lines."""
    copy: Run = _printable(run)
    for artifact, original in zip(copy["artifacts"], run["artifacts"], strict=True):
        artifact["checks"] = [checked_shown(checked) for checked in original["checks"]]
    return copy


def checked_shown(checked: Checked) -> Checked:
    """Return one check with all texts printable."""
    copy: Checked = _printable(checked)
    if checked["message"] is not None:
        copy["message"] = "\n".join(map(printable, checked["message"].strip().splitlines()))
    return copy


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_printable(child) for child in value]
    return value
