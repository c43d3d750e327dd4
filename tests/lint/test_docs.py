"""Pages are written from the rules, so what they say is what the tests hold."""

from __future__ import annotations

import pytest

from quantcheck_lint.docs import rule_markdown, write_pages
from quantcheck_lint.finding import CannotCheck
from quantcheck_lint.rules import RULES

SECTIONS = ("## What it does", "## Why is this bad", "## Example", "## Use instead", "## Fix safety")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_page_has_every_section_and_every_example(rule):
    page = rule_markdown(rule.code)
    assert page.startswith(f"# {rule.code} {rule.name}\n")
    assert all(section in page for section in SECTIONS)
    assert page.count("```") == 2 * (len(rule.valid) + len(rule.invalid))


def test_all_pages_are_written_and_listed(tmp_path):
    write_pages(str(tmp_path / "rules"))
    written = {path.stem for path in (tmp_path / "rules").iterdir()}
    assert written == {"index", *(rule.code.lower() for rule in RULES)}
    index = (tmp_path / "rules" / "index.md").read_text()
    assert all(f"[{rule.code}]({rule.code.lower()}.md)" in index for rule in RULES)


def test_an_unknown_rule_is_an_error():
    with pytest.raises(CannotCheck, match="unknown rule"):
        rule_markdown("QC999")
