"""Workflow commands of GitHub Actions: what did not pass becomes an annotation of the line that holds the limit.

    ::error file=quantcheck.toml,line=12,title=NAME: CHECK::HEADLINE%0ADETAIL

The runner undoes %25 %0D %0A in the text, %3A and %2C too in the properties (actions/runner,
src/Runner.Common/ActionCommand.cs). GitHub shows ten errors of a step, so there is one for each artifact before there
is a second for any.
"""

from __future__ import annotations

import re
from itertools import chain, zip_longest

from pytest_quantcheck.report.run import ArtifactRun, Run
from pytest_quantcheck.report.shown import shown
from pytest_quantcheck.report.verdicts import failures, not_passed

DETAILS = 10  # lines
_WHERE = re.compile(r"(.+):(\d+)")


def render(run: Run) -> str:
    """Return one command a line."""
    rounds = zip_longest(*map(_commands, failures(shown(run))))
    return "".join(f"{command}\n" for command in chain.from_iterable(rounds) if command)


def _commands(artifact: ArtifactRun) -> list[str]:
    if artifact["error"]:
        first = next((checked["where"] for checked in artifact["checks"] if checked["where"]), None)
        return [_command(first, artifact["name"], [artifact["error"]])]
    return [
        _command(
            checked["where"],
            f"{artifact['name']}: {checked['check']}",
            [checked["headline"], *(checked["message"] or "").splitlines(), *_first(checked["details"])],
        )
        for checked in not_passed(artifact)
    ]


def _first(details: list[str]) -> list[str]:
    """As many as there is room for, none that announces what is cut."""
    cut = len(details) > DETAILS and details[DETAILS - 1].endswith(":")
    return details[: DETAILS - cut]


def _command(where: str | None, title: str, lines: list[str]) -> str:
    place = _WHERE.fullmatch(where or "")
    properties = {"file": place[1], "line": place[2]} if place else {"file": where} if where else {}
    listed = ",".join(f"{key}={_property(value)}" for key, value in {**properties, "title": title}.items())
    text = _text("\n".join(lines))
    return f"::error {listed}::{text}"


def _text(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _text(text).replace(":", "%3A").replace(",", "%2C")
