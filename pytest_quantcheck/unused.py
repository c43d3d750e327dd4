"""Records of a lock that no test asks for any more, named at the end of a green run of all tests.

`assert_matches_baseline` knows nothing of pytest. It notes what it asks for (`uses.py`), so that the process that
reports learns of it from all workers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

import pytest

from pytest_quantcheck import uses


def watch(config: pytest.Config) -> None:
    """Report unused records at the end of this run, where it is one of all tests."""
    if not _is_of_all_tests(config):
        return
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="quantcheck-uses-")
        os.close(descriptor)
        before = os.environ.get(uses.FILE)
        os.environ[uses.FILE] = path
        config.pluginmanager.register(Unused(config, path), "quantcheck-unused")
        config.add_cleanup(lambda: _forget(path, before))


class Unused:
    """What the tests of a run did with the records of locks."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.path = path
        self.skipped = False
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember that a test was skipped, which might have asked for a record."""
        self.skipped = self.skipped or report.skipped

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Find the records that no test asked for, and take them out where baselines are recorded anew."""
        noted = uses.read(self.path)
        if exitstatus == pytest.ExitCode.OK and noted.complete:
            try:
                self.lines = [line for path, names in noted.names.items() for line in self._unused(path, names)]
            except (ValueError, OSError) as error:
                self.lines = [f"quantcheck: error: {error}"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name them, nothing where there are none."""
        if self.lines:
            from pytest_quantcheck.errors import printable

            terminalreporter.section("quantcheck: baselines")
            for line in self.lines:
                terminalreporter.write_line(printable(line))

    def _unused(self, path: str, used: set[str]) -> list[str]:
        from pytest_quantcheck import lock

        records = lock.read(path)
        stale = sorted(name for name, record in records.items() if record.by == "test" and name not in used)
        shown = os.path.relpath(path)
        if stale and self.config.getoption("quantcheck_update") and not self.skipped:
            lock.store(path, dict.fromkeys(stale))
            return [f"the record of `{name}` is taken out of {shown}: no test asks for it" for name in stale]
        but = ", but some were skipped" if self.skipped else " (--quantcheck-update takes it out)"
        return [f"{shown} has a record of `{name}`, and no test asked for it{but}" for name in stale]


def _is_of_all_tests(config: pytest.Config) -> bool:
    if config.getoption("collectonly") or config.getoption("lf", default=False) or config.getoption("deselect"):
        return False
    source, all_of_it = config.args_source, pytest.Config.ArgsSource
    at_root = source is all_of_it.INVOCATION_DIR and config.invocation_params.dir == config.rootpath
    return source is all_of_it.TESTPATHS or at_root


def _forget(path: str, before: str | None) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.environ.pop(uses.FILE, None)
    if before is not None:
        os.environ[uses.FILE] = before
