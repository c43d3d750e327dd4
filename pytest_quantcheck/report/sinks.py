"""Where a run goes: one module per kind of report, each with `render(run) -> str`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module

from pytest_quantcheck.report.atomic import write_text
from pytest_quantcheck.report.run import Run

KINDS = ("json", "html", "markdown", "junit")


def shows_documents(paths: Mapping[str, str | None]) -> bool:
    """Return whether a run goes anywhere that shows more of it than its verdicts."""
    return any(paths.values()) or bool(os.environ.get("GITHUB_STEP_SUMMARY"))


def render(run: Run, kind: str) -> str:
    """Return a run as one of `KINDS`, or as the `annotations` of a GitHub workflow."""
    text: str = import_module(f"pytest_quantcheck.report.{kind}").render(run)
    return text


def write(run: Run, paths: Mapping[str, str | None]) -> None:
    """Write the reports that are asked for, by kind, each whole or not at all."""
    for kind, path in paths.items():
        if path is not None:
            write_text(path, render(run, kind))


def tell_github(run: Run, write: Callable[[str], object]) -> None:
    """Annotate the lines of the limits and fill the job summary, where this is a GitHub workflow."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        write(render(run, "annotations"))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a", encoding="utf-8") as file:  # other steps write to it too
            file.write(render(run, "markdown"))
