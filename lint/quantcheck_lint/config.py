"""Settings: what the command line says, over `[tool.quantcheck.lint]` of the nearest `pyproject.toml` that has it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from quantcheck_lint import gitignore
from quantcheck_lint.finding import CannotCheck
from quantcheck_lint.rules import RULES
from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.source import MAX_BYTES

EXCLUDED = (
    ".bzr .direnv .eggs .git .hg .ipynb_checkpoints .mypy_cache .nox .pytest_cache .ruff_cache .svn .tox .venv "
    "__pypackages__ __pycache__ _build buck-out dist node_modules site-packages venv"
)


@dataclass(frozen=True)
class Settings:
    """What holds for a root. `root` is the folder that patterns are relative to."""

    root: str = "/"
    select: tuple[str, ...] = ("QC",)
    extend_select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_file_ignores: tuple[tuple[str, tuple[str, ...]], ...] = ()
    preview: bool = False
    exclude: tuple[str, ...] = tuple(EXCLUDED.split())
    extend_exclude: tuple[str, ...] = ()
    force_exclude: bool = False
    respect_gitignore: bool = True
    baseline: str | None = None
    max_file_size: int = MAX_BYTES
    timeout: float = 10.0

    @cached_property
    def excludes(self) -> tuple[re.Pattern[str], ...]:
        """The patterns of files and folders that are left out."""
        globs = (gitignore.compiled(glob.rstrip("/")) for glob in (*self.exclude, *self.extend_exclude))
        return tuple(glob for glob in globs if glob is not None)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are on."""
        return tuple(rule for rule in RULES if self._is_on(rule))

    def _is_on(self, rule: Rule) -> bool:
        """The longest prefix decides, `ignore` on a tie; preview rules need `preview` as well."""
        chosen = _longest(rule.code, (*self.select, *self.extend_select))
        return chosen > _longest(rule.code, self.ignore) and (self.preview or not rule.preview)

    def rules_for(self, path: str) -> tuple[Rule, ...]:
        """The rules that are on for one file."""
        off = [codes for glob, codes in self._per_file if glob.fullmatch(self._relative(path))]
        if not off:
            return self.rules
        return tuple(rule for rule in self.rules if not any(_longest(rule.code, codes) for codes in off))

    @cached_property
    def _per_file(self) -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
        pairs = ((gitignore.compiled(glob.rstrip("/")), codes) for glob, codes in self.per_file_ignores)
        return tuple((glob, codes) for glob, codes in pairs if glob is not None)

    def _relative(self, path: str) -> str:
        return path[len(self.root) :].lstrip("/") if path.startswith(self.root) else path.lstrip("/")


def _longest(code: str, prefixes: Sequence[str]) -> int:
    return max(
        (2 if prefix == "ALL" else len(prefix) for prefix in prefixes if prefix == "ALL" or code.startswith(prefix)),
        default=0,
    )


def codes(where: str, values: Sequence[str]) -> tuple[str, ...]:
    """Rule codes, prefixes of them, or names, as codes. An unknown one is an error: it would turn nothing on or off."""
    found = []
    for value in (part.strip() for text in values for part in text.split(",")):
        by_name = next((rule.code for rule in RULES if rule.name == value), value.upper())
        if not value:
            continue
        if by_name != "ALL" and not any(rule.code.startswith(by_name) for rule in RULES):
            raise CannotCheck(where, f"unknown rule `{value}`", "see `quantcheck-lint rules`")
        found.append(by_name)
    return tuple(found)


def per_file_ignores(where: str, pairs: Sequence[tuple[str, Sequence[str]]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Globs and the codes that are off where they match; `dir/` stands for everything below it."""
    return tuple((glob + "**" if glob.endswith("/") else glob, codes(where, values)) for glob, values in pairs)


def settings_for(root: str, config: str | None, isolated: bool) -> Settings:
    """The settings that files say: `config`, or the nearest `pyproject.toml` from `root` upward with our table."""
    folder = os.path.abspath(root if os.path.isdir(root) else os.path.dirname(root) or ".")
    if isolated:
        return Settings(root=folder)
    if config is not None:
        return _from_file(os.path.abspath(config)) or Settings(root=os.path.dirname(os.path.abspath(config)))
    while True:
        found = _from_file(os.path.join(folder, "pyproject.toml"), missing_ok=True)
        if found is not None:
            return found
        if os.path.dirname(folder) == folder:
            return Settings(root=os.path.abspath("."))
        folder = os.path.dirname(folder)


@lru_cache(maxsize=256)
def _from_file(path: str, missing_ok: bool = False) -> Settings | None:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if missing_ok:
            return None
        raise CannotCheck(path, error.strerror or "cannot be opened", "configuration") from None
    except OSError as error:
        raise CannotCheck(path, error.strerror or "cannot be opened", "configuration") from None
    # Most files on the way up are none of ours: parsing them would cost more than the run.
    if b"quantcheck" not in data:
        return None
    table = _table(path, data)
    return None if table is None else _from_table(path, table)


def _table(path: str, data: bytes) -> dict[str, Any] | None:
    import tomllib

    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CannotCheck(path, f"not TOML: {' '.join(str(error).split())}", "configuration") from None
    section: Any = document
    for key in ("tool", "quantcheck", "lint"):
        section = section.get(key) if isinstance(section, dict) else None
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CannotCheck(path, "`tool.quantcheck.lint` is not a table", "configuration")
    return section


def _from_table(path: str, table: dict[str, Any]) -> Settings:
    settings = Settings(root=os.path.dirname(path))
    for key, value in table.items():
        reader = _KEYS.get(key)
        if reader is None:
            raise CannotCheck(path, f"unknown key `{key}` in [tool.quantcheck.lint]", "configuration")
        settings = replace(settings, **{key.replace("-", "_"): reader(path, key, value)})
    return settings


def _strings(path: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CannotCheck(path, f"`{key}` is not a list of strings", "configuration")
    return tuple(value)


def _codes(path: str, key: str, value: object) -> tuple[str, ...]:
    return codes(path, _strings(path, key, value))


def _ignores(path: str, key: str, value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(value, dict):
        raise CannotCheck(path, f"`{key}` is not a table", "configuration")
    return per_file_ignores(path, [(glob, _strings(path, key, listed)) for glob, listed in value.items()])


def _flag(path: str, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise CannotCheck(path, f"`{key}` is not true or false", "configuration")
    return value


def _size(path: str, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CannotCheck(path, f"`{key}` is not a positive number", "configuration")
    return value


def _file(path: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise CannotCheck(path, f"`{key}` is not a string", "configuration")
    return os.path.join(os.path.dirname(path), value)


# What a value may be depends on the key.
_KEYS: dict[str, Callable[[str, str, object], Any]] = {
    "select": _codes,
    "extend-select": _codes,
    "ignore": _codes,
    "per-file-ignores": _ignores,
    "preview": _flag,
    "exclude": _strings,
    "extend-exclude": _strings,
    "force-exclude": _flag,
    "respect-gitignore": _flag,
    "baseline": _file,
    "max-file-size": _size,
    "timeout": _size,
}
