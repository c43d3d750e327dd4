from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import COUNTS, READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class ParameterLikeCount(Rule):
    """QC006: a sum over something that is only called parameters."""

    code = "QC006"
    name = "parameter-like-count"
    severity = "note"
    preview = True
    summary = "Tensors with a parameter-like name are counted by adding up stored elements."
    what = """
Finds the sums of QC001 over names and arguments that sound like parameters (`params`, `trainable_params`,
`group["params"]`, `state_dict`) where the code of the file does not say what they hold."""
    why = """
As QC001 where the name tells the truth. In 4 of 10 cases of the labelled corpus it does not: optimizer buckets, flat
buffers and shapes go by the same names, which is why this rule is a preview and off by default."""
    instead = "`count_params(model)` where the model is at hand, `logical_numel(p)` for one tensor."
    fix_safety = "There is no fix: what the name holds is not known."
    valid = (
        "def length(tokens):\n    return sum(t.numel() for t in tokens)\n",
        "def ready(params):\n    return all(p.numel() > 0 for p in params)\n",
        "def flatten(params):\n    return torch.empty(sum(p.numel() for p in params))\n",
    )
    invalid = (
        Invalid("def count(params):\n    return sum(p.numel() for p in params)\n"),
        Invalid(
            """\
for group in optimizer.param_groups:
    for p in group["params"]:
        total += p.numel()
"""
        ),
    )
    needles = (COUNTS, (b"params", b"parameters", b"state_dict", b"weights", b"param_list", b"sd"))
    hits = READS
    sources = re.compile(r"params\b|parameters\b|state_dict\b|weights\b|param_list\b|sd\b")

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place, uses in counting.counted(analysis, "LOOKALIKE"):
            if counting.counts(uses):
                yield Detection(
                    place.node,
                    f"`{analysis.code(place.node)}` counts stored elements of what is called parameters",
                    suggestion="use `count_params(model)` or `logical_numel(p)` of pytest_quantcheck",
                )
