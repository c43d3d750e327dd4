"""The table of rules, in the order of their codes."""

from __future__ import annotations

from quantcheck_lint.rules.qc001_naive_parameter_count import NaiveParameterCount
from quantcheck_lint.rules.qc002_naive_trainable_count import NaiveTrainableCount
from quantcheck_lint.rules.qc003_parameter_memory_estimate import ParameterMemoryEstimate
from quantcheck_lint.rules.qc004_naive_state_dict_count import NaiveStateDictCount
from quantcheck_lint.rules.qc005_hand_rolled_4bit_correction import HandRolledCorrection
from quantcheck_lint.rules.qc006_parameter_like_count import ParameterLikeCount
from quantcheck_lint.rules.qc007_quantized_num_parameters import QuantizedNumParameters
from quantcheck_lint.rules.qc008_packed_shape_or_dtype import PackedShapeOrDtype
from quantcheck_lint.rules.qc009_numel_of_named_tuple import NumelOfNamedTuple
from quantcheck_lint.rules.qc100_unused_suppression import UnusedSuppression
from quantcheck_lint.rules.qc900_cannot_parse import CannotParse
from quantcheck_lint.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    NaiveParameterCount(),
    NaiveTrainableCount(),
    ParameterMemoryEstimate(),
    NaiveStateDictCount(),
    HandRolledCorrection(),
    ParameterLikeCount(),
    QuantizedNumParameters(),
    PackedShapeOrDtype(),
    NumelOfNamedTuple(),
    UnusedSuppression(),
    CannotParse(),
)


def by_code(code: str) -> Rule | None:
    """The rule with the code or the name `code`, whatever its case."""
    return next((rule for rule in RULES if code.lower() in {rule.code.lower(), rule.name}), None)
