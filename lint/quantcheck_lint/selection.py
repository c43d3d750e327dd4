"""Which parts of a source the rules need parsed: those with something to look at, and what those refer to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantcheck_lint.rules.rule import Rule
from quantcheck_lint.structure import Excerpt, Structure, Unit, identifiers

# Names that a unit makes known to others: functions, attributes, and what is assigned at the top of the module.
_DEFINES = re.compile(r"\bdef\s+(\w+)|\b(?:self|cls)\.(\w+)\s*[:+]?=|^(\w+)(?:\s*:[^=\n]+)?\s*\+?=", re.MULTILINE)
_FUNCTION = re.compile(r"\bdef\s+(\w+)")


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
    units = structure.units()
    chosen: dict[int, Unit] = {}
    for hits, sources in {(rule.hits, rule.sources): None for rule in rules}:
        if hits is not None:
            for unit in _needed(structure, units, hits, sources):
                chosen[unit.first] = unit
    return structure.excerpt(chosen[first] for first in sorted(chosen)) if chosen else None


def _needed(
    structure: Structure, units: Sequence[Unit], hits: re.Pattern[str], sources: re.Pattern[str] | None
) -> list[Unit]:
    hit_lines = {structure.line_of(match.start()) for match in hits.finditer(structure.text)}
    if not hit_lines:
        return []
    hit = [unit for unit in units if any(line in hit_lines for line in range(unit.first, unit.last + 1))]
    if sources is None:
        return hit
    texts = {unit.first: structure.slice(unit.first, unit.last) for unit in units}
    feeding = [unit for unit in units if sources.search(texts[unit.first])]
    return _linked(hit, feeding, texts) if feeding else []


def _linked(hit: Sequence[Unit], feeding: Sequence[Unit], texts: dict[int, str]) -> list[Unit]:
    """Hits that are fed, and what feeds them: in the same unit, through a name that it defines, or as their caller."""
    kept: dict[int, Unit] = {}
    fed = {unit.first for unit in feeding}
    for unit in hit:
        if unit.first in fed:
            kept[unit.first] = unit
        used, functions = identifiers(texts[unit.first]), set(_FUNCTION.findall(texts[unit.first]))
        for source in feeding:
            text = texts[source.first]
            defined = {name for match in _DEFINES.findall(text) for name in match if name}
            if source.first != unit.first and (defined & used or functions & identifiers(text)):
                kept[unit.first], kept[source.first] = unit, source
    return list(kept.values())
