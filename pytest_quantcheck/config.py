"""Which artifacts are checked for what: `quantcheck.toml`, or `[tool.quantcheck]` of pyproject.toml.

| key                        | what it is                                                              |
|----------------------------|-------------------------------------------------------------------------|
| `[[artifact]]`             | one table each; in pyproject.toml `[[tool.quantcheck.artifact]]`        |
| `path`                     | a path or glob, from the folder of the file, or a URL                   |
| `name`, `reference`        | what it is called, and its unquantized model                            |
| `message`, `marks`         | the project's own words for a failure, and marks of its tests in pytest |
| `size = "90 MB"` ...       | the checks, see `keys.CHECKS`                                           |
"""

from __future__ import annotations

import glob
import os
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pytest_quantcheck import lock
from pytest_quantcheck.checks.fidelity import Limits
from pytest_quantcheck.containers.remote import checked, is_url, shown
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.keys import CHECKS, ELSEWHERE, closest
from pytest_quantcheck.toml_lines import Path, key_lines

NAME = "quantcheck.toml"
LIMIT = 4 << 20
TEXTS = ("path", "name", "reference", "message")
OWN = (*TEXTS, "marks")
_READERS = {check.key: check.read for check in CHECKS}
_MAGIC = re.compile(r"[*?\[]")
_SHARDED = re.compile(r"\.index\.json$|-of-\d+\.\w+$")


class Entry(NamedTuple):
    """One artifact that is to be checked. `error` says why there is nothing to check."""

    name: str
    path: str
    settings: Mapping[str, Any]  # by key, in the order of CHECKS
    where: Mapping[str, str]  # `quantcheck.toml:12`, by key
    reference: str | None = None
    message: str | None = None
    marks: tuple[str, ...] = ()
    error: str | None = None

    @property
    def is_stale(self) -> bool:
        """Whether this is a record of the lock that no artifact has any more."""
        return not self.path


class Config(NamedTuple):
    """What a file says, globs resolved. Paths are from the working directory."""

    path: str
    entries: tuple[Entry, ...]

    @property
    def lock(self) -> str:
        """Where its baselines are."""
        return os.path.join(os.path.dirname(self.path), lock.NAME)


class _Table(NamedTuple):
    """One [[artifact]] as written, and the lines of its keys."""

    file: str
    values: dict[str, Any]
    lines: Mapping[str, int]

    def at(self, key: str) -> str:
        return f"{self.file}:{self.lines.get(key, self.lines[''])}"

    @property
    def folder(self) -> str:
        return os.path.dirname(self.file) or os.curdir

    def resolved(self, path: str) -> str:
        """A path of the file, from the working directory; a URL as it is."""
        if is_url(path):
            return path
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(path)))


def find(folder: str = "") -> str:
    """Return the configuration of a folder: `quantcheck.toml`, else a pyproject.toml that has the table."""
    for name in (NAME, "pyproject.toml"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and (name == NAME or has_table(path)):
            return path
    raise ValueError(f"no {NAME} here, and no [tool.quantcheck] with artifacts in pyproject.toml (see quantcheck init)")


def has_table(path: str) -> bool:
    """Return whether a pyproject.toml names artifacts."""
    document = _section(_parsed(path, _text(path)), path)[1]
    return isinstance(document, dict) and "artifact" in document


def load(path: str) -> Config:
    """Return what a file says; a `ValueError` names the file and line of what makes no sense."""
    text = _text(path)
    prefix, section = _section(_parsed(path, text), path)
    lines = key_lines(text)
    if not isinstance(section, dict):
        raise ValueError(f"{path}: has no [tool.quantcheck]")
    for key in section:
        if key != "artifact" and (not prefix or key != "lint"):
            raise ValueError(f"{_at(path, lines, (*prefix, key))}: {closest('key', key, ['artifact'])}")
    tables = section.get("artifact")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: has no [[{'.'.join([*map(str, prefix), 'artifact'])}]]")
    found = [
        entry
        for index, table in enumerate(tables)
        for entry in _entries(_Table(path, table, _own_lines(lines, (*prefix, "artifact", index))))
    ]
    return Config(path, tuple(_named(found, os.path.dirname(path) or os.curdir)))


def having(config: Config, paths: Iterable[str], keys: Collection[str]) -> Config:
    """Return a configuration with only the artifacts that have one of the keys and that one of the files belongs to."""
    real = {os.path.realpath(path) for path in paths}
    everything = os.path.realpath(config.path) in real
    chosen = [entry for entry in config.entries if any(key in entry.settings for key in keys)]
    return Config(config.path, tuple(entry for entry in chosen if everything or _holds(entry, real)))


def _holds(entry: Entry, real: set[str]) -> bool:
    """Whether one of the files is the artifact, lies in its folder, or may be a shard beside its first or its index."""
    path = os.path.realpath(entry.path)
    if _SHARDED.search(path):
        path = os.path.dirname(path)
    return any(file == path or file.startswith(path + os.sep) for file in real)


def _text(path: str) -> str:
    with open(path, "rb") as file:
        raw = file.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise ValueError(f"{path}: is over {LIMIT:,} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def _parsed(path: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not TOML: {error}") from None


def _section(document: dict[str, Any], path: str) -> tuple[Path, Any]:
    """The table of ours, and where it is."""
    if os.path.basename(path) != "pyproject.toml":
        return (), document
    tool = document.get("tool")
    return ("tool", "quantcheck"), tool.get("quantcheck") if isinstance(tool, dict) else None


def _own_lines(lines: Mapping[Path, int], prefix: Path) -> dict[str, int]:
    """The line of the table, and of each key in it; a table of `{ artifact = [...] }` has one line for all."""
    depth = len(prefix)
    own = {str(path[depth]): line for path, line in lines.items() if path[:depth] == prefix and len(path) == depth + 1}
    return {"": lines.get(prefix) or lines.get(prefix[:-1]) or 1} | own


def _at(path: str, lines: Mapping[Path, int], key: Path) -> str:
    line = lines.get(key) or lines.get((*key, 0))
    return f"{path}:{line}" if line else path


def _entries(table: _Table) -> Iterator[Entry]:
    """The artifacts that one table stands for."""
    _check_keys(table)
    settings = _settings(table)
    where = {key: table.at(key if key in table.values else "reference") for key in ("path", *settings)}
    blank = Entry(
        table.values.get("name", ""),
        "",
        settings,
        where,
        table.resolved(table.values["reference"]) if "reference" in table.values else None,
        table.values.get("message"),
        tuple(table.values.get("marks", ())),
    )
    paths = _paths(table)
    if blank.name and len(paths) > 1:
        raise ValueError(f"{table.at('name')}: `name` is for one artifact, and `path` matches {len(paths)}")
    if not paths:
        pattern = table.values["path"]
        yield blank._replace(path=table.resolved(pattern), error=f"`{pattern}` matches nothing ({table.at('path')})")
    for path in paths:
        yield blank._replace(path=path)


def _settings(table: _Table) -> dict[str, Any]:
    """The settings in the order of `CHECKS`; a reference alone is compared as well as its encoding allows."""
    found = {key: _setting(table, key) for key in _READERS if key in table.values}
    if "reference" in table.values:
        return {key: found.get(key, Limits()) for key in _READERS if key in {*found, "fidelity"}}
    if "fidelity" in found:
        raise ValueError(f"{table.at('fidelity')}: `fidelity` needs a `reference`: the path of the unquantized model")
    if not found:
        raise ValueError(f"{table.at('')}: checks nothing (give at least one of {', '.join(_READERS)})")
    return found


def _paths(table: _Table) -> list[str]:
    """What the path of a table names, which need not be there, or what it matches as a glob."""
    pattern = os.path.expanduser(table.values["path"])
    if is_url(pattern):
        return [pattern]
    if not _MAGIC.search(pattern) or os.path.lexists(table.resolved(pattern)):
        return [table.resolved(pattern)]
    return [table.resolved(found) for found in sorted(glob.glob(pattern, root_dir=table.folder, recursive=True))]


def _check_keys(table: _Table) -> None:
    for key, value in table.values.items():
        if key in ELSEWHERE:
            raise ValueError(f"{table.at(key)}: `{key}`: {ELSEWHERE[key]}")
        if key not in _READERS and key not in OWN:
            raise ValueError(f"{table.at(key)}: {closest('key', key, [*OWN, *_READERS])}")
        if key == "marks" and not (isinstance(value, list) and all(isinstance(mark, str) for mark in value)):
            raise ValueError(f"{table.at(key)}: `marks` is not a list of texts")
        if key in TEXTS and not (isinstance(value, str) and value):
            raise ValueError(f"{table.at(key)}: `{key}` is not a text")
        if key in ("path", "reference") and is_url(value):
            _check_url(table, key)
    if "path" not in table.values:
        raise ValueError(f"{table.at('')}: an artifact needs a `path`")


def _check_url(table: _Table, key: str) -> None:
    try:
        checked(table.values[key])
    except FormatError as error:
        raise ValueError(f"{table.at(key)}: `{key}`: {error}") from None


def _setting(table: _Table, key: str) -> Any:
    try:
        return _READERS[key](table.values[key])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{table.at(key)}: `{key}`: {error}") from None


def _named(entries: list[Entry], folder: str) -> Iterator[Entry]:
    """Entries with names of their own: the last part of the path, the path where several end alike."""
    last = Counter(os.path.basename(shown(entry.path)) for entry in entries if not entry.name)
    named = [entry._replace(name=entry.name or _name(entry.path, folder, last)) for entry in entries]
    counts = Counter(entry.name for entry in named)
    for entry in named:
        if counts[entry.name] > 1:
            what = f"{counts[entry.name]} artifacts are called `{entry.name}`: give one a `name`"
            raise ValueError(f"{entry.where['path']}: {what}")
        yield entry


def _name(path: str, folder: str, last: Counter[str]) -> str:
    name = os.path.basename(shown(path))
    if last[name] == 1 and not _MAGIC.search(name):
        return name
    return shown(path) if is_url(path) else os.path.relpath(path, folder)
