"""Where in a TOML file each key stands, which `tomllib` does not tell.

A statement (a table header or `key = value`) is the shortest run of lines that is TOML by itself: a value that goes on
in the next line leaves an array or a string open, and that is no TOML. So `tomllib` reads every statement, and nothing
of its grammar is repeated here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

ENDS = ("]", '"""', "'''")  # one of them closes what a line before left open
Path = tuple[str | int, ...]  # `("artifact", 0, "size")`: the index counts the tables of an array


def key_lines(text: str) -> dict[Path, int]:
    r"""Return the line, from 1, on which each key of valid TOML stands, those of inline tables included.

    >>> key_lines('[[artifact]]\npath = "a"\n[artifact.bits]\nmax = 4')[("artifact", 0, "bits", "max")]
    4
    """
    found: dict[Path, int] = {}
    table: Path = ()
    lengths: dict[Path, int] = {}
    for line, statement in _statements(text):
        document = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _header(document, lengths)
            found.setdefault(table, line)
        else:
            for path in _paths(document):
                found.setdefault((*table, *path), line)
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    start, held = 1, ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        held += line + "\n"
        if start < number and not any(end in line for end in ENDS):
            continue
        try:
            tomllib.loads(held)
        except tomllib.TOMLDecodeError:
            continue
        yield start, held
        start, held = number + 1, ""


def _header(document: dict[str, Any], lengths: dict[Path, int]) -> Path:
    """The table that a header opens; `lengths` are those of the arrays so far, and grow with `[[...]]`."""
    path: Path = ()
    value: Any = document
    while isinstance(value, dict) and value:
        ((key, value),) = value.items()
        path = (*path, key)
        if isinstance(value, list):
            lengths[path] = lengths.get(path, 0) + 1
            (value,) = value
        if path in lengths:
            path = (*path, lengths[path] - 1)
    return path


def _paths(value: object) -> Iterator[Path]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield (key,)
            yield from ((key, *path) for path in _paths(child))
