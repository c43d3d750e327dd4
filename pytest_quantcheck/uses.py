"""Which records of a lock the tests of a run ask for, noted in a file that the environment names.

One JSON list a line, from whatever process: the path of the lock and the name of the record. A name of null says that
a test was deselected, so that not all could ask.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

FILE = "QUANTCHECK_USES"


class Uses(NamedTuple):
    """The names asked for, by path of the lock, and whether all tests could ask."""

    names: dict[str, set[str]]
    complete: bool


def note(lock: str, name: str | None) -> None:
    """Note that a record is asked for, where somebody wants to know."""
    path = os.environ.get(FILE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([os.path.realpath(lock), name]) + "\n")


def read(path: str) -> Uses:
    """Return what was noted."""
    names: dict[str, set[str]] = {}
    complete = True
    with open(path, encoding="utf-8") as file:
        for lock, name in map(json.loads, file):
            if name is None:
                complete = False
            else:
                names.setdefault(lock, set()).add(name)
    return Uses(names, complete)
