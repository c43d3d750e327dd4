"""The labelled places: every size read of the corpus is found under its code, or left alone, as its label says.

A snippet begins with `=== form`; a line that ends in `#> QC001` must be found, `#> ok` must not, `#> miss QC001` is a
naive count that the linter is known not to find. Labels say what is true, not what the linter does.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantcheck_lint import engine
from quantcheck_lint.rules import RULES
from quantcheck_lint.source import Source

CORPUS = Path(__file__).parent / "corpus"
ON = tuple(rule for rule in RULES if not rule.preview)
LABEL = re.compile(r"#> (?P<miss>miss )?(?P<codes>.+)$")


@dataclass(frozen=True)
class Snippet:
    group: str
    form: str
    code: str

    def labels(self) -> Counter[tuple[int, str]]:
        """Line and code of everything that must be found, known misses left out."""
        found: Counter[tuple[int, str]] = Counter()
        for number, line in enumerate(self.code.splitlines(), 1):
            match = LABEL.search(line)
            if match and not match["miss"]:
                found.update((number, code) for code in match["codes"].split() if code != "ok")
        return found

    def findings(self) -> Counter[tuple[int, str]]:
        source = Source("case.py", self.code)
        return Counter((found.line, found.code) for found in engine.lint(source, ON, ON, timeout=10).findings)


def snippets() -> list[Snippet]:
    found = []
    for path in sorted(CORPUS.glob("*.txt")):
        for part in path.read_text().split("=== ")[1:]:
            form, _, code = part.partition("\n")
            found.append(Snippet(path.stem, form, code))
    return found


SNIPPETS = snippets()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda one: f"{one.group}: {one.form}")
def test_labelled_places(snippet):
    assert snippet.findings() == snippet.labels()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda one: f"{one.group}: {one.form}")
def test_what_is_cut_away_before_parsing_changes_nothing(snippet, monkeypatch):
    monkeypatch.setattr(engine, "select", lambda structure, rules: structure.excerpt(structure.units))
    assert snippet.findings() == snippet.labels()


def test_the_corpus_is_large_enough_to_say_something():
    places = [
        code
        for one in SNIPPETS
        for line in one.code.splitlines()
        if (m := LABEL.search(line))
        for code in m["codes"].split()
    ]
    assert len(places) >= 200
    assert places.count("ok") >= 60


def test_known_misses_are_few():
    """Recall over everything that is labelled as naive, known misses included."""
    found = sum(sum(one.labels().values()) for one in SNIPPETS)
    missed = sum("#> miss" in line for one in SNIPPETS for line in one.code.splitlines())
    assert found / (found + missed) >= 0.94
