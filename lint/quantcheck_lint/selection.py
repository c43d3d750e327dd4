"""Which parts of a source the rules need parsed: those with something to look at, and what those refer to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.structure import Excerpt, Structure, Unit, identifiers

# Names that a unit makes known to others: functions, attributes, and what is assigned at the top of the module.
_DEFINES = re.compile(r"\bdef\s+(\w+)|\b(?:self|cls)\.(\w+)\s*[:+]?=|^(\w+)(?:\s*:[^=\n]+)?\s*\+?=", re.MULTILINE)


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
    return _linked(hit, feeding, _Names(structure))


class _Names:
    """The names in units, each looked up once."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._used: dict[int, set[str]] = {}
        self._defined: dict[int, set[str]] = {}

    def used(self, unit: Unit) -> set[str]:
        if unit.first not in self._used:
            self._used[unit.first] = identifiers(self._structure.slice(unit.first, unit.last))
        return self._used[unit.first]

    def defined(self, unit: Unit) -> set[str]:
        if unit.first not in self._defined:
            text = self._structure.slice(unit.first, unit.last)
            self._defined[unit.first] = {name for match in _DEFINES.findall(text) for name in match if name}
        return self._defined[unit.first]


def _linked(hit: Sequence[Unit], feeding: Sequence[Unit], names: _Names) -> list[Unit]:
    """Hits that are fed, and what feeds them: in the same unit, or through a name that one defines and another uses."""
    fed = {unit.first for unit in feeding}
    kept = {unit.first: unit for unit in hit if unit.first in fed}
    for unit in hit:
        for source in feeding:
            if source.first == unit.first:
                continue
            if names.defined(source) & names.used(unit) or names.defined(unit) & names.used(source):
                kept[unit.first], kept[source.first] = unit, source
    pending = list(kept.values())
    while pending:
        unit = pending.pop()
        for source in feeding:
            if source.first not in kept and names.defined(source) & names.used(unit):
                kept[source.first] = source
                pending.append(source)
    return list(kept.values())
