from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    from quantcheck_lint.analysis import Analysis


class NaiveParameterCount(Rule):
    """QC001: the sum of stored elements, taken for the number of parameters."""

    code = "QC001"
    name = "naive-parameter-count"
    severity = "error"
    fix = "unsafe"
    summary = "Parameters are counted by adding up stored elements."
    what = """
Finds every place where the sizes of tensors that come from `.parameters()` or `.named_parameters()` are added up:
`sum`, `+=`, dict totals, nested sums, `reduce`, `map`, a list that is summed later. It follows the tensors through
wrappers (`list`, `enumerate`, `filter`, `chain`, slices), local names, generators, attributes and functions of the
same file. `numel()`, `nelement()`, `torch.numel`, `math.prod(p.shape)`, `np.prod(p.size())` and `p.shape.numel()` are
all the same to it."""
    why = """
A 4-bit weight is stored packed. `Linear4bit(4096, 4096).weight` has the shape `[8388608, 1]`, so the sum says that
Mistral-7B has 3.75 billion parameters instead of 7,241,732,096. GPTQ and AWQ keep their weights in buffers, which
`.parameters()` does not even visit: they count as zero."""
    instead = """
`count_params(model)` from `pytest_quantcheck` for a whole model; `logical_numel(p)` for one tensor, which keeps the
filters and the structure of the code. GPTQ and AWQ need `count_params(model)`."""
    fix_safety = """
Unsafe, always: the value changes on packed models (that is the point), and an import is added. The fix replaces the
element only, so what is counted stays the same."""
    references = counting.REFERENCES
    valid = (
        "total = count_params(model)\n",
        "empty = any(p.numel() == 0 for p in model.parameters())\n",
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n",
        "tokens = sum(batch.numel() for batch in batches)\n",
        "total = sum(p.ds_numel if hasattr(p, 'ds_numel') else p.numel() for p in model.parameters())\n",
        "flat = torch.zeros(sum(p.numel() for p in model.parameters()))\n",
        "norm = sum(p.grad.numel() for p in model.parameters())\n",
        """\
offset = 0
for p in model.parameters():
    p.data = flat[offset : offset + p.numel()].view_as(p)
    offset += p.numel()
""",
    )
    invalid = (
        Invalid(
            "total = sum(p.numel() for p in model.parameters())\n",
            "from pytest_quantcheck import logical_numel\n\n"
            "total = sum(logical_numel(p) for p in model.parameters())\n",
        ),
        Invalid(
            """\
import torch

def total_params(model):
    total = 0
    for name, param in model.named_parameters():
        total += param.numel()
    return total
""",
            """\
import torch
from pytest_quantcheck import logical_numel

def total_params(model):
    total = 0
    for name, param in model.named_parameters():
        total += logical_numel(param)
    return total
""",
        ),
        Invalid(
            "import numpy as np\nprint(sum([np.prod(p.size()) for p in list(model.parameters())[2:]]))\n",
            "import numpy as np\nfrom pytest_quantcheck import logical_numel\n"
            "print(sum([logical_numel(p) for p in list(model.parameters())[2:]]))\n",
        ),
        Invalid(
            "print(sum(map(torch.numel, model.parameters())))\n",
            "from pytest_quantcheck import logical_numel\n\nprint(sum(map(logical_numel, model.parameters())))\n",
        ),
        Invalid(
            "sizes = {}\nfor p in model.parameters():\n"
            "    sizes[p.dtype] = sizes.get(p.dtype, 0) + p.data.nelement()\n",
            "from pytest_quantcheck import logical_numel\n\nsizes = {}\nfor p in model.parameters():\n"
            "    sizes[p.dtype] = sizes.get(p.dtype, 0) + logical_numel(p)\n",
        ),
    )
    needles = counting.PARAMETER_NEEDLES
    hits = READS
    sources = counting.PARAMETER_SOURCES

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place, uses in counting.counted(analysis, "PARAMETERS"):
            if any(not use.trainable for use in counting.counts(uses)):
                what = "counts stored elements: a packed 4-bit weight has half as many as parameters, or fewer"
                yield counting.naive(place, analysis, what, trainable=False)
