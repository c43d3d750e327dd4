"""A run in the terminal: one line where all is good, else what failed, on one screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_quantcheck.quantities import counted
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
from pytest_quantcheck.report.shown import checked_shown, shown
from pytest_quantcheck.report.verdicts import failures, headline, not_passed

if TYPE_CHECKING:
    from rich.console import Console

SCREEN = 40  # lines: what is cut is in every other report
LEAST = 3  # lines of one check: verdict, where the limit is, the first detail
STYLES = {"passed": "green", "failed": "red", "error": "yellow"}

Line = tuple[str, str]  # text and style


def print_run(run: Run, console: Console | None = None) -> None:
    """Print what did not pass, and one line for all."""
    for text, style in run_lines(run):
        if console is None:
            print(text)
        else:
            from rich.text import Text

            console.print(Text(text, style=style), soft_wrap=True)


def run_lines(run: Run, screen: int = SCREEN) -> Iterator[Line]:
    """Yield a run as printable lines, about a `screen` of them, each with the style it has where there are colours."""
    wrong = failures(shown(run))
    room = screen - 1 - len(wrong)
    blocks = sum(max(1, len(_listed(artifact))) for artifact in wrong)
    most = max(LEAST, room // max(1, blocks))
    fitting = max(1, room // most)  # blocks
    for artifact in wrong:
        if fitting <= 0:
            break
        yield artifact["name"], "bold"
        if artifact["error"]:
            yield f"  {artifact['error']}", STYLES["error"]
            fitting -= 1
        for checked in _listed(artifact)[:fitting]:
            yield from _block(checked, most)
        fitting -= len(_listed(artifact))
    if fitting < 0:
        yield f"... and {counted(-fitting, 'more check')} that did not pass", "dim"
    yield headline(run), "bold red" if run["exit_code"] else "green"


def check_lines(checked: Checked) -> Iterator[str]:
    """Yield a check that did not pass as printable lines: the verdict, where the limit is, the project's own words."""
    return _lines(checked_shown(checked))


def _listed(artifact: ArtifactRun) -> list[Checked]:
    """What is said of an artifact beside that it could not be read."""
    return [] if artifact["error"] else not_passed(artifact)


def _block(checked: Checked, most: int) -> Iterator[Line]:
    lines = list(_lines(checked))
    for number, line in enumerate(lines[:most] if len(lines) <= most else lines[: most - 1]):
        yield f"  {line}", "" if number else STYLES[checked["status"]]
    if len(lines) > most:
        yield f"    ... and {counted(len(lines) - most + 1, 'more line')}", "dim"


def _lines(checked: Checked) -> Iterator[str]:
    yield checked["headline"]
    if checked["where"]:
        yield f"  the limit is in {checked['where']}"
    for line in (checked["message"] or "").splitlines():
        yield f"  {line}"
    yield from (f"  {line}" for line in checked["details"])
