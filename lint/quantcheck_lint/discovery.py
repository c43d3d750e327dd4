"""Which files a run is about: roots are walked, ignored and excluded files left out, links to folders not followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantcheck_lint import gitignore
from quantcheck_lint.config import Settings
from quantcheck_lint.finding import CannotCheck

SUFFIXES = (".py", ".pyi", ".ipynb")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to check: where it is, how it is shown, and what holds for it."""

    path: str
    shown: str
    settings: Settings


def shown(path: str) -> str:
    """`path` relative to the current folder where it lies below it."""
    here = os.getcwd()
    absolute = os.path.abspath(path)
    return absolute[len(here) + 1 :] if absolute.startswith(here.rstrip("/") + "/") else absolute


def discover(roots: Sequence[tuple[str, Settings]]) -> Iterator[Found]:
    """The files below the roots, each once, in order. A root that is a file is taken as it is."""
    seen: set[str] = set()
    for root, settings in roots:
        path = os.path.abspath(root)
        for file in _files(root, path, settings):
            if file not in seen:
                seen.add(file)
                yield Found(file, shown(file), settings)


def _files(root: str, path: str, settings: Settings) -> Iterator[str]:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise CannotCheck(root, error.strerror or "cannot be opened", "path") from None
    except ValueError:
        raise CannotCheck(ascii(root), "not a path", "path") from None
    if stat.S_ISDIR(mode):
        yield from _walk(path, settings)
    elif not stat.S_ISREG(mode):
        raise CannotCheck(root, "not a regular file", "path")
    elif not (settings.force_exclude and excluded_by_name(path, settings)):
        yield path


def excluded_by_name(path: str, settings: Settings) -> bool:
    """Whether a file given by name, or a folder above it up to the configuration, is excluded."""
    root = settings.root
    while path.startswith(root) and path not in {root, "/"}:
        if excluded(path, settings):
            return True
        path = os.path.dirname(path)
    return False


def excluded(path: str, settings: Settings) -> bool:
    """Whether `path` matches `exclude` or `extend-exclude`: a glob on the name, or on the path below the root."""
    relative = path[len(settings.root) :].lstrip("/") if path.startswith(settings.root) else path.lstrip("/")
    return any(pattern.fullmatch(relative) for pattern in settings.excludes)


def _walk(top: str, settings: Settings) -> Iterator[str]:
    inherited = gitignore.above(top) if settings.respect_gitignore else []
    stack = [(top, inherited)]
    while stack:
        folder, patterns = stack.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        if settings.respect_gitignore and any(entry.name == ".gitignore" for entry in entries):
            patterns = [*patterns, *gitignore.read(folder, os.path.join(folder, ".gitignore"))]
        folders = []
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if not is_folder and not entry.name.endswith(SUFFIXES):
                continue
            if excluded(entry.path, settings) or (patterns and gitignore.ignored(patterns, entry.path, is_folder)):
                continue
            if is_folder:
                folders.append((entry.path, patterns))
            elif entry.is_file():
                yield entry.path
        stack.extend(reversed(folders))
