from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class NaiveStateDictCount(Rule):
    """QC004: the sum of stored elements of a state dict or a file."""

    code = "QC004"
    name = "naive-state-dict-count"
    severity = "warning"
    summary = "The tensors of a state dict are counted by adding up stored elements."
    what = """
Finds sums over tensors that come from `state_dict()`, `load_file`, `safe_open` or `torch.load`: over `.values()`,
`.items()`, or by key."""
    why = """
A state dict of a quantized model holds packed codes beside scales, zero points, codebooks and index tensors. Their
elements are no parameters, tied weights appear twice, and buffers appear that never were parameters."""
    instead = """
`count_params(path)` or `count_params(model)` from `pytest_quantcheck`. One tensor of a state dict does not know how it
is packed, so there is nothing to call for a single one."""
    fix_safety = "There is no fix: the tensors alone do not say how they are packed."
    references = ("https://github.com/huggingface/transformers/issues/34317",)
    valid = (
        "size = sum(t.numel() * t.element_size() for t in model.state_dict().values())\n",
        "empty = [k for k, t in model.state_dict().items() if t.numel() == 0]\n",
        "data = torch.load('tokens.pt')\ntotal = sum(batch.numel() for batch in data)\n",
    )
    invalid = (
        Invalid("total = sum(t.numel() for t in model.state_dict().values())\n"),
        Invalid(
            """\
tensors = load_file(path)
total = 0
for name in tensors:
    total += tensors[name].numel()
"""
        ),
        Invalid(
            """\
with safe_open(path, framework="pt") as f:
    total = sum(f.get_tensor(key).numel() for key in f.keys())
"""
        ),
        Invalid('checkpoint = torch.load(path)\nn = sum(v.numel() for _, v in checkpoint["model"].items())\n'),
    )
    needles = counting.STATE_DICT_NEEDLES
    hits = READS
    sources = counting.STATE_DICT_SOURCES

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place, uses in counting.counted(analysis, "STATE_DICT"):
            if counting.counts(uses):
                yield Detection(
                    place.node,
                    f"`{analysis.code(place.node)}` counts packed codes, scales and buffers of a state dict alike",
                    suggestion="use `count_params(path)` or `count_params(model)` of pytest_quantcheck",
                )
