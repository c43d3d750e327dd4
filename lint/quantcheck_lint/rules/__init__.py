"""The table of rules, in the order of their codes."""

from __future__ import annotations

from quantcheck_lint.rules.qc001_naive_parameter_count import NaiveParameterCount
from quantcheck_lint.rules.qc002_naive_trainable_count import NaiveTrainableCount
from quantcheck_lint.rules.qc100_unused_suppression import UnusedSuppression
from quantcheck_lint.rules.qc900_cannot_parse import CannotParse
from quantcheck_lint.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    NaiveParameterCount(),
    NaiveTrainableCount(),
    UnusedSuppression(),
    CannotParse(),
)


def by_code(code: str) -> Rule | None:
    """The rule with the code or the name `code`, whatever its case."""
    return next((rule for rule in RULES if code.lower() in {rule.code.lower(), rule.name}), None)
