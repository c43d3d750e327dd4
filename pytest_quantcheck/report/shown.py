"""A run as it may be shown: every text that a checkpoint, a file name or a configuration brought is printable.

Each sink adds the escapes of its own syntax to that, and nothing else.
"""

from __future__ import annotations

from typing import Any

from pytest_quantcheck.errors import printable
from pytest_quantcheck.report.run import Run


def shown(run: Run) -> Run:
    """Return the run with all texts on one line and printable; only a project's own message keeps its lines."""
    copy: Run = _printable(run)
    for artifact, original in zip(copy["artifacts"], run["artifacts"], strict=True):
        for checked, first in zip(artifact["checks"], original["checks"], strict=True):
            if first["message"] is not None:
                checked["message"] = "\n".join(map(printable, first["message"].strip().splitlines()))
    return copy


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_printable(child) for child in value]
    return value
