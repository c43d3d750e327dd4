"""Patterns of `.gitignore` files and of `exclude`, as regular expressions.

Follows gitignore(5): last match wins, `!` takes back, a slash anchors, `**` crosses folders. Left out: the user's
global ignore file and files that are tracked although they are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line of a `.gitignore` in the folder `base`."""

    base: str
    regex: re.Pattern[str]
    negated: bool
    folders_only: bool


def parse(base: str, text: str) -> Iterator[Pattern]:
    """The patterns of a `.gitignore` that lies in `base`; lines that are no pattern are skipped, as git does."""
    for raw in text.splitlines():
        line = raw.rstrip() if not raw.rstrip().endswith("\\") else raw
        if not line or line.startswith("#"):
            continue
        negated = line.startswith("!")
        line = line[1:] if negated or line.startswith(("\\#", "\\!")) else line
        folders_only = line.endswith("/")
        regex = compiled(line.rstrip("/"))
        if regex is not None:
            yield Pattern(base, regex, negated, folders_only)


@lru_cache(maxsize=4096)
def compiled(glob: str) -> re.Pattern[str] | None:
    """A glob of gitignore as a regular expression over a path relative to the folder of the glob."""
    if not glob:
        return None
    anchored = "/" in glob
    body = _translate(glob.removeprefix("/"))
    try:
        return re.compile(body if anchored else f"(?:.*/)?{body}", re.DOTALL)
    except re.error:
        return None


def _translate(glob: str) -> str:
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i) and (i == 0 or glob[i - 1] == "/"):
            out, i = out + "(?:.*/)?", i + 3
        elif glob[i : i + 2] == "**" and i + 2 == len(glob):
            out, i = out + ".*", i + 2
        elif glob[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif glob[i] == "?":
            out, i = out + "[^/]", i + 1
        elif glob[i] == "[" and "]" in glob[i + 2 :]:
            end = glob.index("]", i + 2)
            inner = glob[i + 1 : end].replace("\\", "\\\\")
            out, i = out + "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]", end + 1
        elif glob[i] == "\\" and i + 1 < len(glob):
            out, i = out + re.escape(glob[i + 1]), i + 2
        else:
            out, i = out + re.escape(glob[i]), i + 1
    return out


def ignored(patterns: Sequence[Pattern], path: str, is_folder: bool) -> bool:
    """Whether the last pattern that matches the absolute `path` leaves it out."""
    for pattern in reversed(patterns):
        if pattern.folders_only and not is_folder:
            continue
        relative = path[len(pattern.base) :].lstrip("/") if path.startswith(pattern.base) else None
        if relative and pattern.regex.fullmatch(relative):
            return not pattern.negated
    return False


def above(folder: str) -> list[Pattern]:
    """The patterns that hold in `folder` from its repository: the folders above it, outermost first."""
    chain = []
    current = folder
    while True:
        chain.append(current)
        if os.path.exists(os.path.join(current, ".git")):
            break
        parent = os.path.dirname(current)
        if parent == current:
            # No repository: as git does, no file above counts. `folder` itself is read by the walk.
            return []
        current = parent
    exclude = os.path.join(chain[-1], ".git", "info", "exclude")
    patterns = list(read(chain[-1], exclude))
    for one in reversed(chain[1:]):
        patterns.extend(read(one, os.path.join(one, ".gitignore")))
    return patterns


def read(base: str, path: str) -> Iterator[Pattern]:
    """The patterns of one file, none when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return iter(())
    return parse(base, text)
