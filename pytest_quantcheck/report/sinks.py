"""Where a run goes: one module per kind of report, each with `render(run) -> str`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module

from pytest_quantcheck.report.atomic import write_text
from pytest_quantcheck.report.run import Run

KINDS = ("json", "html", "markdown", "junit")


def render(run: Run, kind: str) -> str:
    """Return a run as one of `KINDS`, or as the `annotations` of a GitHub workflow."""
    text: str = import_module(f"pytest_quantcheck.report.{kind}").render(run)
    return text


def write(run: Run, paths: Mapping[str, str | None]) -> None:
    """Write the reports that are asked for, by kind, each whole or not at all."""
    for kind, path in paths.items():
        if path is not None:
            write_text(path, render(run, kind))


def tell_github(run: Run, environment: Mapping[str, str] = os.environ) -> None:
    """Annotate the lines of the limits and fill the job summary, where this is a GitHub workflow."""
    if environment.get("GITHUB_ACTIONS") == "true":
        print(render(run, "annotations"), file=sys.stderr, flush=True)
    summary = environment.get("GITHUB_STEP_SUMMARY")
    if summary:
        with open(summary, "a", encoding="utf-8") as file:  # other steps write to it too
            file.write(render(run, "markdown"))
