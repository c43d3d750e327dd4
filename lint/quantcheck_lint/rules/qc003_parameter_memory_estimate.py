from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class ParameterMemoryEstimate(Rule):
    """QC003: bytes, from stored elements and an assumed size of each."""

    code = "QC003"
    name = "parameter-memory-estimate"
    severity = "warning"
    summary = "Memory is estimated from stored elements and an assumed number of bytes for each."
    what = """
Finds the counts of QC001 and QC004 that are multiplied by a constant number of bytes (`* 4`, `* 2`, `* 0.5`) or by a
name that says bytes or bits, and counts that are added to such a name. `numel() * element_size()` is right on packed
storage, so nothing is said about it."""
    why = """
A packed weight has one byte per element whatever the assumed width is, and half as many elements as parameters: the
estimate is wrong twice. Scales, zero points and codebooks are not in it at all."""
    instead = """
`inspect(model).bytes` from `pytest_quantcheck`, which knows scales and zero points, or
`sum(p.numel() * p.element_size() for p in model.parameters())` for what the parameters take."""
    fix_safety = "There is no fix: what the number is for decides which of the two is meant."
    references = ("https://github.com/huggingface/transformers/issues/25978",)
    valid = (
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n",
        "size = sum(p.nelement() * p.dtype.itemsize for p in model.parameters())\n",
        "kv_cache = key.numel() * 2\n",
        "millions = sum(p.numel() for p in model.parameters()) / 1e6\n",
    )
    invalid = (
        Invalid("megabytes = sum(p.numel() for p in model.parameters()) * 4 / 1e6\n"),
        Invalid("size = sum(p.numel() * 2 for p in model.parameters())\n"),
        Invalid("size = sum(p.numel() * bytes_per_param for p in model.parameters()) / 1024**3\n"),
        Invalid("total_bytes = 0\nfor p in model.parameters():\n    total_bytes += 4 * p.numel()\n"),
    )
    needles = counting.STORED_NEEDLES
    hits = READS
    sources = counting.STORED_SOURCES

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place, uses in counting.counted(analysis, "PARAMETERS", "STATE_DICT"):
            if not counting.counts(uses):
                yield Detection(
                    place.node,
                    f"`{analysis.code(place.node)}` times an assumed size is not the memory of packed weights",
                    suggestion="use `p.numel() * p.element_size()`, or `inspect(model).bytes` of pytest_quantcheck",
                )
