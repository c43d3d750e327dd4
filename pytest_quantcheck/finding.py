"""What a check or a container has to say about an artifact."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One thing found: which check says it, how bad it is, where, and what in one line."""

    check: str
    severity: Severity
    tensor: str | None
    message: str
