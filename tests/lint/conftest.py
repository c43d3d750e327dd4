"""What the tests of the linter share: a source in, findings out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import pytest

from quantcheck_lint import cli, engine
from quantcheck_lint.finding import Finding
from quantcheck_lint.rules import RULES
from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.source import Source


@pytest.fixture
def findings() -> Callable[..., list[Finding]]:
    """Findings in a dedented source, by all rules or some."""

    def check(code: str, rules: Sequence[Rule] = RULES) -> list[Finding]:
        source = Source("case.py", textwrap.dedent(code))
        return list(engine.lint(source, rules, rules, timeout=20).findings)

    return check


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """The command line, run in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        out, err = capfd.readouterr()
        return status, out, err

    return call
