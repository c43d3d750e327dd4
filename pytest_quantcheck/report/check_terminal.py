"""A run in the terminal: one line where all is good, else what failed, on one screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_quantcheck.quantities import counted
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
from pytest_quantcheck.report.shown import checked_shown, shown
from pytest_quantcheck.report.verdicts import failures, headline, not_passed, said_once

if TYPE_CHECKING:
    from rich.console import Console

SCREEN = 40  # lines: what is cut is in every other report
LEAST = 3  # lines of one check: verdict, where the limit is, the first detail
STYLES = {"passed": "green", "failed": "red", "error": "yellow"}

Line = tuple[str, str]  # text and style
Block = tuple[str, list[str]]  # style of the first line, and the lines of one check


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
    sections = [_section(artifact) for artifact in wrong]
    left = max(1, (screen - 2) // (LEAST + 1))  # blocks that fit, each under the name of an artifact
    lengths = [len(lines) for section in sections for _, lines in section]
    most = _most(lengths[:left], screen - 2 - min(left, len(wrong)))
    rest = len(lengths) - left
    for artifact, section in zip(wrong, sections, strict=True):
        if left <= 0:
            break
        yield artifact["name"], "bold"
        for style, lines in section[:left]:
            yield from _cut(lines, style, most)
        left -= len(section)
    if rest > 0:
        yield f"... and {counted(rest, 'more check')} that did not pass", "dim"
    yield headline(run), "bold red" if run["exit_code"] else "green"


def check_lines(checked: Checked) -> Iterator[str]:
    """Yield a check that did not pass as printable lines: the verdict, where the limit is, the project's own words."""
    clean = checked_shown(checked)
    yield clean["headline"]
    if clean["where"]:
        yield f"  the limit is in {clean['where']}"
    for line in (clean["message"] or "").splitlines():
        yield f"  {line}"
    yield from (f"  {line}" for line in clean["details"])


def _section(artifact: ArtifactRun) -> list[Block]:
    """What is said of an artifact: why it could not be read, or its checks; the project's own words once."""
    if artifact["error"] is not None:
        return [(STYLES["error"], [artifact["error"]])]
    checks = said_once(not_passed(artifact))
    return [(STYLES[checked["status"]], list(check_lines(checked))) for checked in checks]


def _most(lengths: list[int], room: int) -> int:
    """The lines each block may have so that all fit; what short ones leave goes to the long ones."""
    fitting = (most for most in range(max(LEAST, room), LEAST, -1) if sum(min(most, n) for n in lengths) <= room)
    return next(fitting, LEAST)


def _cut(lines: list[str], style: str, most: int) -> Iterator[Line]:
    kept = lines if len(lines) <= most else lines[: most - 1]
    for number, line in enumerate(kept):
        yield f"  {line}", "" if number else style
    if len(kept) < len(lines):
        yield f"    ... and {counted(len(lines) - len(kept), 'more line')}", "dim"
