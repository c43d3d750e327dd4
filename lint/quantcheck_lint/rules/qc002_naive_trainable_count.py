from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class NaiveTrainableCount(Rule):
    """QC002: the sum of stored elements under a filter on `requires_grad`."""

    code = "QC002"
    name = "naive-trainable-count"
    severity = "error"
    fix = "unsafe"
    summary = "Trainable parameters are counted by adding up stored elements."
    what = """
The same as QC001 where every element passed a filter on `requires_grad`: a condition of the comprehension, an `if`
around the `+=`, `if not p.requires_grad: continue` before it, `filter(lambda p: p.requires_grad, ...)`, or a product
with the flag. A count of what is frozen (`if not p.requires_grad`) stays QC001."""
    why = """
Packed weights are frozen when a model is loaded in 4 bit, so "trainable" falls to embeddings and norms, or is wrong by
the packing factor where packed weights are trained."""
    instead = """
`count_params(model, trainable=True)` from `pytest_quantcheck`, or `logical_numel(p)` for one tensor. Projects that
train LoRA adapters on a packed base freeze that base on purpose: there the count is right, and `ignore = ["QC002"]`
turns this rule off without losing QC001."""
    fix_safety = "Unsafe, as for QC001: the value changes on packed models and an import is added."
    references = counting.REFERENCES
    valid = (
        "trainable = count_params(model, trainable=True)\n",
        "trainable = [p for p in model.parameters() if p.requires_grad]\n",
        "size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)\n",
    )
    invalid = (
        Invalid(
            "n = sum(p.numel() for p in model.parameters() if p.requires_grad)\n",
            "from pytest_quantcheck import logical_numel\n\n"
            "n = sum(logical_numel(p) for p in model.parameters() if p.requires_grad)\n",
        ),
        Invalid(
            """\
def trainable(model):
    params = filter(lambda p: p.requires_grad, model.parameters())
    return sum(np.prod(p.size()) for p in params)
""",
            """\
from pytest_quantcheck import logical_numel

def trainable(model):
    params = filter(lambda p: p.requires_grad, model.parameters())
    return sum(logical_numel(p) for p in params)
""",
        ),
        Invalid(
            """\
total = 0
for p in self.model.parameters():
    if not p.requires_grad:
        continue
    total += p.numel()
""",
            """\
from pytest_quantcheck import logical_numel

total = 0
for p in self.model.parameters():
    if not p.requires_grad:
        continue
    total += logical_numel(p)
""",
        ),
    )
    needles = counting.PARAMETER_NEEDLES
    hits = READS
    sources = counting.PARAMETER_SOURCES

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place, uses in counting.counted(analysis, "PARAMETERS"):
            count = counting.counts(uses)
            if count and all(use.trainable for use in count):
                what = (
                    "counts the stored elements of trainable tensors: packed 4-bit weights have half as many, or none"
                )
                yield counting.naive(place, analysis, what, trainable=True)
