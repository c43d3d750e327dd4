"""A run in the terminal: what failed, worst first, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_quantcheck.errors import printable
from pytest_quantcheck.quantities import counted
from pytest_quantcheck.report.run import ArtifactRun, Checked, Run

if TYPE_CHECKING:
    from rich.console import Console


def print_run(run: Run, console: Console | None = None) -> None:
    """Print what did not pass, and one line for all."""
    for line in run_lines(run):
        print(line) if console is None else console.print(line, markup=False, soft_wrap=True)


def run_lines(run: Run) -> Iterator[str]:
    """Yield a run as printable lines."""
    wrong = [artifact for artifact in run["artifacts"] if _failed(artifact)]
    for artifact in wrong:
        yield printable(f"{artifact['name']}: {artifact['error'] or ''}").rstrip(": ")
        for checked in () if artifact["error"] else _not_passed(artifact):
            yield from (f"  {line}" for line in check_lines(checked))
    checks = sum(len(artifact["checks"]) for artifact in run["artifacts"])
    total = f"{counted(len(run['artifacts']), 'artifact')}, {counted(checks, 'check')}"
    stopped = ", interrupted before every check was made" if run["partial"] else ""
    yield f"{total}: {f'{len(wrong):,} failed' if wrong else 'all good' if checks else 'nothing was checked'}{stopped}"


def check_lines(checked: Checked) -> Iterator[str]:
    """Yield a check that did not pass as printable lines: the verdict, where the limit is, the project's own words."""
    yield printable(checked["headline"])
    if checked["where"]:
        yield printable(f"  the limit is in {checked['where']}")
    if checked["message"]:
        yield printable(f"  {checked['message']}")
    yield from (printable(f"  {line}") for line in checked["details"])


def _failed(artifact: ArtifactRun) -> bool:
    return bool(artifact["error"]) or bool(_not_passed(artifact))


def _not_passed(artifact: ArtifactRun) -> list[Checked]:
    return [checked for checked in artifact["checks"] if checked["status"] != "passed"]
