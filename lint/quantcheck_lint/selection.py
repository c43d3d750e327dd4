"""Which parts of a source the rules need parsed: those with something to look at, and what those refer to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.structure import Excerpt, Structure, Unit, identifiers

MOST_LINKS = 50
_FUNCTION = re.compile(r"def\s+(\w+)")
_KEEPS = re.compile(r"(?:self|cls)\.(\w+)\s*[:+]?=|^(\w+)(?:\s*:[^=\n]+)?\s*\+?=", re.MULTILINE)
_ITERATES = re.compile(r"^.*\b(?:for|in|map|filter|reduce|chain|sum)\b.*$", re.MULTILINE)


def wanted(data: bytes, rules: Sequence[Rule]) -> list[Rule]:
    """The rules that may have something to say about a file, by its bytes alone."""
    seen: dict[tuple[bytes, ...], bool] = {}
    chosen = []
    for rule in rules:
        for group in rule.needles:
            if group not in seen:
                seen[group] = any(needle in data for needle in group)
            if not seen[group]:
                break
        else:
            if rule.needles:
                chosen.append(rule)
    return chosen


def select(structure: Structure, rules: Sequence[Rule]) -> Excerpt | None:
    """What libcst has to see for `rules`, or `None` when a look at the text is enough to say that there is nothing."""
    chosen: dict[int, Unit] = {}
    for hits, sources in _filters(rules):
        for unit in _needed(structure, hits, sources):
            chosen[unit.first] = unit
    return structure.excerpt(chosen[first] for first in sorted(chosen)) if chosen else None


def promising(text: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules whose filters match somewhere in a text: cheaper than to find out where."""
    matching = {
        (hits, sources)
        for hits, sources in _filters(rules)
        if hits.search(text) and (sources is None or sources.search(text))
    }
    return [rule for rule in rules if (rule.hits, rule.sources) in matching]


def _filters(rules: Sequence[Rule]) -> dict[tuple[re.Pattern[str], re.Pattern[str] | None], None]:
    return {(rule.hits, rule.sources): None for rule in rules if rule.hits is not None}


def _needed(structure: Structure, hits: re.Pattern[str], sources: re.Pattern[str] | None) -> list[Unit]:
    hit = structure.units_of(match.start() for match in hits.finditer(structure.text))
    if not hit or sources is None:
        return hit
    feeding = structure.units_of(match.start() for match in sources.finditer(structure.text))
    kept = _linked(hit, feeding, _Names(structure, [*hit, *feeding]))
    # The code of a module is one scope, whatever its statements are: all of it or nothing.
    if any(map(_is_code_of_module, kept)) or (
        any(map(_is_code_of_module, hit)) and any(map(_is_code_of_module, feeding))
    ):
        kept += filter(_is_code_of_module, structure.units)
    return kept


def _is_code_of_module(unit: Unit) -> bool:
    return not (unit.is_function or unit.headers or unit.lines[0].word in {"import", "from"})


class _Names:
    """The names through which units are connected, each looked up once."""

    def __init__(self, structure: Structure, units: Iterable[Unit]) -> None:
        self._texts = {unit.first: structure.slice(unit.first, unit.last) for unit in units}
        self._looked_up: dict[tuple[int, str], set[str]] = {}
        functions = Counter(name for text in self._texts.values() for name in _FUNCTION.findall(text))
        # `forward` and `__init__` are everywhere and lead nowhere.
        self._functions = {name for name, count in functions.items() if count == 1 and not name.startswith("__")}

    def _look_up(self, unit: Unit, what: str, find: Callable[[str], set[str]]) -> set[str]:
        key = (unit.first, what)
        if key not in self._looked_up:
            self._looked_up[key] = find(self._texts[unit.first])
        return self._looked_up[key]

    def functions(self, unit: Unit) -> set[str]:
        """Functions that are defined here and nowhere else."""
        return self._look_up(unit, "functions", lambda text: self._functions & set(_FUNCTION.findall(text)))

    def kept(self, unit: Unit) -> set[str]:
        """Attributes and names of the module that are assigned here."""
        return self._look_up(
            unit, "kept", lambda text: {name for match in _KEEPS.findall(text) for name in match if name}
        )

    def iterated(self, unit: Unit) -> set[str]:
        """Everything named in a line that iterates."""
        return self._look_up(unit, "iterated", lambda text: identifiers("\n".join(_ITERATES.findall(text))))

    def used(self, unit: Unit) -> set[str]:
        """Everything named here."""
        return self._look_up(unit, "used", identifiers)


def _linked(hit: Sequence[Unit], feeding: Sequence[Unit], names: _Names) -> list[Unit]:
    """Hits that are fed, and what feeds them: in the same unit, by what they iterate over, or as their caller."""
    fed = {unit.first for unit in feeding}
    kept = {unit.first: unit for unit in hit if unit.first in fed}
    makers = _index(feeding, lambda unit: names.functions(unit) | names.kept(unit))
    callers = _index(feeding, names.used)
    for unit in hit:
        for source in (*_found(makers, names.iterated(unit)), *_found(callers, names.functions(unit))):
            if source.first != unit.first:
                kept[unit.first], kept[source.first] = unit, source
    pending = list(kept.values())
    while pending:
        for source in _found(makers, names.iterated(pending.pop())):
            if source.first not in kept:
                kept[source.first] = source
                pending.append(source)
    return list(kept.values())


def _index(units: Sequence[Unit], names: Callable[[Unit], set[str]]) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        for name in names(unit):
            found.setdefault(name, []).append(unit)
    return found


def _found(index: dict[str, list[Unit]], names: set[str]) -> Iterator[Unit]:
    """The units behind some names. A name that is everywhere says nothing, and would cost the square of the units."""
    for name in names & index.keys():
        if len(index[name]) <= MOST_LINKS:
            yield from index[name]
