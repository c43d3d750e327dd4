"""The table of output formats: how a report is written, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from quantcheck_lint.finding import Finding


@dataclass(frozen=True, slots=True)
class Report:
    """What a run has to say. `errors` are the sources that could not be checked, by path."""

    findings: tuple[Finding, ...]
    files: int
    errors: tuple[str, ...] = field(default=())


# Each module has `render(report) -> str`. They are imported when they are asked for.
FORMATS = ("full", "concise", "json", "github", "gitlab", "sarif", "junit")


def renderer(name: str) -> Callable[[Report], str]:
    """The function that writes a report in the format `name`."""
    module = import_module(f"quantcheck_lint.formats.{name}")
    render: Callable[[Report], str] = module.render
    return render
