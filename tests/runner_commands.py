"""How the runner of GitHub Actions finds commands in a line of output.

After actions/runner, src/Runner.Common/ActionCommand.cs (`TryParseV2`, then `TryParse`) and the commands registered in
src/Runner.Worker/ActionCommandManager.cs.
"""

from __future__ import annotations

from typing import NamedTuple

REGISTERED = [
    "add-mask",
    "add-matcher",
    "add-path",
    "debug",
    "echo",
    "endgroup",
    "error",
    "group",
    "notice",
    "remove-matcher",
    "save-state",
    "set-env",
    "set-output",
    "stop-commands",
    "warning",
]
# In the order in which the runner undoes them.
IN_DATA = (("%0D", "\r"), ("%0A", "\n"), ("%25", "%"))
IN_PROPERTY = (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%"))
IN_OLD = (("%3B", ";"), ("%0D", "\r"), ("%0A", "\n"), ("%5D", "]"), ("%25", "%"))


class Command(NamedTuple):
    name: str
    properties: dict[str, str]
    text: str


def parse(line: str) -> Command | None:
    """Return the command that the runner would carry out, if any."""
    return _parse_v2(line) or _parse_v1(line)


def _parse_v2(line: str) -> Command | None:
    line = line.lstrip()
    end = line.find("::", 2)
    if not line.startswith("::") or end < 0:
        return None
    return _command(line[2:end], line[end + 2 :], ",", IN_PROPERTY, IN_DATA)


def _parse_v1(line: str) -> Command | None:
    start = line.find("##[")
    end = line.find("]", start)
    if start < 0 or end < 0:
        return None
    return _command(line[start + 3 : end], line[end + 1 :], ";", IN_OLD, IN_OLD)


def _command(head: str, text: str, separator: str, in_property, in_text) -> Command | None:
    name, _, listed = head.partition(" ")
    if name not in REGISTERED:
        return None
    pairs = [part.split("=", 1) for part in listed.strip().split(separator) if part]
    properties = {pair[0].lower(): _undone(pair[1], in_property) for pair in pairs if len(pair) == 2 and pair[1]}
    return Command(name, properties, _undone(text, in_text))


def _undone(text: str, escapes) -> str:
    for written, meant in escapes:
        text = text.replace(written, meant)
    return text
