"""Every rule is tested by its own examples, which are also its documentation."""

from __future__ import annotations

import pytest

from quantcheck_lint.config import Settings
from quantcheck_lint.discovery import Found
from quantcheck_lint.repair import repair
from quantcheck_lint.rules import RULES, by_code
from quantcheck_lint.runner import check_data

SETTINGS = Settings(preview=True)


def found(code: str, name: str = "case.py"):
    return check_data(Found(name, name, SETTINGS), code.encode()).findings


VALID = [pytest.param(rule, code, id=f"{rule.code}-valid-{i}") for rule in RULES for i, code in enumerate(rule.valid)]
INVALID = [
    pytest.param(rule, bad, id=f"{rule.code}-invalid-{i}") for rule in RULES for i, bad in enumerate(rule.invalid)
]


@pytest.mark.parametrize(("rule", "code"), VALID)
def test_valid_examples_pass(rule, code):
    assert [finding for finding in found(code) if finding.code == rule.code] == []


@pytest.mark.parametrize(("rule", "invalid"), INVALID)
def test_invalid_examples_are_found(rule, invalid):
    assert [finding.code for finding in found(invalid.code)].count(rule.code) == invalid.findings


@pytest.mark.parametrize(("rule", "invalid"), [row for row in INVALID if row.values[1].replacement is not None])
def test_fixes_give_the_documented_code_and_a_second_run_changes_nothing(rule, invalid):
    file = Found("case.py", "case.py", SETTINGS)
    unsafe = rule.fix == "unsafe"
    once = repair(file, invalid.code.encode(), unsafe).after
    assert once.decode() == invalid.replacement
    assert repair(file, once, unsafe).after == once


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_says_everything_a_page_needs(rule):
    texts = (rule.name, rule.summary, rule.what, rule.why, rule.instead, rule.fix_safety)
    assert all(text.strip() for text in texts)
    assert rule.valid
    assert rule.invalid
    assert (rule.fix != "none") == any(invalid.replacement is not None for invalid in rule.invalid)


def test_codes_and_names_are_unique_and_in_order():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert by_code("naive-parameter-count") is by_code("qc001") is RULES[0]
