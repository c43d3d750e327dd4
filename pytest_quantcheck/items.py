"""The checks of a configuration as tests of pytest: a file, its artifacts, their checks.

    quantcheck.toml::minilm-nf4::size

Under xdist the workers make the checks, and what they found travels as JSON on the reports of the tests; the
controller alone merges and writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_quantcheck.fixtures import worker_index

if TYPE_CHECKING:
    from pytest_quantcheck.config import Entry
    from pytest_quantcheck.keys import Opened
    from pytest_quantcheck.report.run import ArtifactRun, Checked, Run
    from pytest_quantcheck.runner import Plan

MARK = "quantcheck"
WORST = 3  # details of a check in the summary
REPORTS = {"json": "quantcheck_json", "html": "quantcheck_html", "markdown": "quantcheck_markdown"}


class CheckFailed(Exception):
    """A check that did not pass, which pytest shows as its lines and not as a traceback."""


class ConfigFile(pytest.File):
    """A configuration."""

    def collect(self) -> Iterator[pytest.Collector]:
        """Yield its artifacts; a configuration that makes no sense is an error of the collection."""
        from pytest_quantcheck import config, runner
        from pytest_quantcheck.errors import printable

        try:
            loaded = config.load(_shown(self.path))
            planned = runner.plan(loaded, update=self.config.getoption("quantcheck_update"))
        except (ValueError, OSError) as error:
            raise self.CollectError(f"quantcheck: error: {printable(str(error))}") from None
        for entry in planned.entries():
            yield ArtifactNode.from_parent(self, name=printable(entry.name), planned=planned, entry=entry)


class ArtifactNode(pytest.Collector):
    """An artifact; its checks share what they read of it."""

    def __init__(self, *, planned: Plan, entry: Entry, **node: Any) -> None:
        super().__init__(**node)
        self.planned = planned
        self.entry = entry

    @cached_property
    def opened(self) -> Opened:
        """The artifact, read when the first of its checks is made."""
        wanted = self.config.getoption("quantcheck_device") or self.config.getini("quantcheck_device") or "cpu"
        planned = self.planned._replace(device=str(wanted), worker=worker_index(self.config))
        return planned.opened(self.entry)

    def collect(self) -> Iterator[pytest.Item]:
        """Yield its checks."""
        for key in self.entry.settings:
            item = CheckItem.from_parent(self, name=key)
            for mark in (MARK, *self.entry.marks):
                item.add_marker(mark)
            if self.config.pluginmanager.hasplugin("xdist"):
                item.add_marker(pytest.mark.xdist_group(self.entry.name))  # --dist loadgroup reads it once
            yield item


class CheckItem(pytest.Item):
    """One check of one artifact."""

    found: str | None = None  # the outcome, as JSON

    def runtest(self) -> None:
        """Make the check."""
        from pytest_quantcheck import runner

        node = self.getparent(ArtifactNode)
        assert node is not None
        outcome = runner.check(node.planned, node.entry, self.name, node.opened)
        self.found = json.dumps([node.planned.config.path, node.entry.name, self.name, *outcome])
        for name in ("measured", "allowed", "unit"):
            if outcome.checked[name] is not None:
                self.user_properties.append((f"quantcheck_{name}", outcome.checked[name]))
        if outcome.checked["status"] != "passed":
            raise CheckFailed(outcome.checked)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the lines of a check that did not pass."""
        if not isinstance(excinfo.value, CheckFailed):
            return super().repr_failure(excinfo, style)
        from pytest_quantcheck.report.check_terminal import check_lines

        checked: Checked = excinfo.value.args[0]
        return "\n".join(check_lines(checked))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return where the limit is written."""
        node = self.getparent(ArtifactNode)
        assert node is not None
        line = node.entry.where.get(self.name, "").rpartition(":")[2]
        return self.path, int(line) - 1 if line.isdigit() else None, f"{node.name}::{self.name}"


class Merger:
    """Collects what was found, in the process that reports it, and writes the reports at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: dict[str, dict[tuple[str, str], list[Any]]] = {}  # by configuration; artifact and key
        self.lost: dict[str, set[str]] = {}  # by configuration: ids
        self.run: Run | None = None
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a check found; a worker that died left a report without it."""
        found = getattr(report, MARK, None)
        if found is not None:
            path, name, key, *fields = json.loads(found)
            self.found.setdefault(path, {})[name, key] = fields
        elif report.when not in ("setup", "call", "teardown") and ".toml::" in report.nodeid:
            file, _, name = report.nodeid.partition("::")
            self.lost.setdefault(_shown(self.config.rootpath / file), set()).add(name)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Merge and write; a report that cannot be written fails the run."""
        wanted = {kind: self.config.getoption(option) for kind, option in REPORTS.items()}
        if not (self.found or self.lost or any(wanted.values())):
            return
        from pytest_quantcheck.report import sinks

        try:
            artifacts = self._artifacts(documents=sinks.shows_documents(wanted))
            self.run = self._merged(session, artifacts, interrupted=exitstatus == pytest.ExitCode.INTERRUPTED)
            self.lines = list(_verdicts(self.run))
            sinks.write(self.run, wanted)
        except (ValueError, OSError, ImportError) as error:
            self.lines.append(f"quantcheck: error: {error}")
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name what did not pass, nothing when all did."""
        if self.lines:
            from pytest_quantcheck.errors import printable

            terminalreporter.section("quantcheck")
            for line in self.lines:
                terminalreporter.write_line(printable(line))
        if self.run is not None:
            from pytest_quantcheck.report import sinks

            sinks.tell_github(self.run, terminalreporter.write_line)

    def _artifacts(self, *, documents: bool) -> list[ArtifactRun]:
        from pytest_quantcheck import config, runner

        artifacts = []
        for path in self._paths():
            planned = runner.plan(config.load(path), documents=documents)
            outcomes = {key: runner.Outcome(*fields) for key, fields in self.found.get(path, {}).items()}
            artifacts += runner.of_outcomes(planned, outcomes, self.lost.get(path, set()))
        return artifacts

    def _merged(self, session: pytest.Session, artifacts: list[ArtifactRun], *, interrupted: bool) -> Run:
        from pytest_quantcheck import runner

        expected = sum(isinstance(item, CheckItem) for item in session.items)
        found = sum(map(len, self.found.values()))
        stopped = interrupted or bool(session.shouldstop or session.shouldfail)
        partial = found < expected if session.items else stopped  # the items of a controller are elsewhere
        paths = self._paths()
        return runner.record(paths[0] if len(paths) == 1 else None, artifacts, partial=partial)

    def _paths(self) -> list[str]:
        return list({**self.found, **self.lost})


def add_outcome(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what a check found on its report, which xdist carries to the controller."""
    if isinstance(item, CheckItem) and report.when == "call" and item.found is not None:
        setattr(report, MARK, item.found)


def _verdicts(run: Run) -> Iterator[str]:
    """Yield each check that did not pass with the worst of its details, those that could not be made first."""
    from pytest_quantcheck.report.verdicts import own_details

    for status in ("error", "failed"):
        for artifact in run["artifacts"]:
            for checked in artifact["checks"]:
                if checked["status"] == status:
                    yield f"{artifact['name']}::{checked['check']}  {checked['headline']}"
                    yield from (f"  {line}" for line in own_details(checked)[:WORST])


def _shown(path: Path) -> str:
    """A path from the working directory, as reports have it."""
    return os.path.relpath(path)
