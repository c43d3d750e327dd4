from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import Detection, Invalid, Rule

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis


class PackedShapeOrDtype(Rule):
    """QC008: shape or dtype of storage, taken for shape or dtype of weights."""

    code = "QC008"
    name = "packed-shape-or-dtype"
    severity = "note"
    preview = True
    summary = "Shape or dtype of a weight is read where a model is loaded in 4 bit."
    what = """
Finds `.weight.shape`, `.weight.size()` and `next(model.parameters()).dtype` in a function or module that passes
`load_in_4bit=True`."""
    why = """
A packed weight has the shape `[n / 2, 1]` and the dtype uint8: neither is that of the layer. `next(parameters())` may
meet an embedding or a packed weight first, so the answer depends on the model."""
    instead = "`module.in_features`, `module.out_features`, `weight.quant_state.shape`, `model.dtype` or the config."
    fix_safety = "There is no fix."
    valid = (
        "shape = layer.weight.shape\n",
        "model = AutoModel.from_pretrained(name)\ndtype = next(model.parameters()).dtype\n",
    )
    invalid = (
        Invalid(
            """\
model = AutoModel.from_pretrained(name, load_in_4bit=True)
dtype = next(model.parameters()).dtype
"""
        ),
        Invalid(
            """\
def load(name):
    model = AutoModel.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    return model.lm_head.weight.shape
"""
        ),
    )
    needles = ((b"load_in_4bit",), (b".shape", b".dtype", b".size("))
    hits = re.compile(r"load_in_4bit\s*=\s*True")
    sources = re.compile(r"\.weight\s*\.\s*(?:shape|size)\b|\.dtype\b")

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        from quantcheck_lint.trees import scopes

        for nodes in scopes(analysis.module):
            if any(_loads_in_4bit(node) for node in nodes):
                for node in filter(_reads_storage, nodes):
                    yield Detection(
                        node,
                        f"`{analysis.code(node)}` is about packed storage when the model is loaded in 4 bit",
                        suggestion="ask the layer (`in_features`), `weight.quant_state` or the config",
                    )


def _loads_in_4bit(node: cst.CSTNode) -> bool:
    import libcst as cst

    match node:
        case cst.Arg(keyword=cst.Name(value="load_in_4bit"), value=cst.Name(value="True")):
            return True
    return False


def _reads_storage(node: cst.CSTNode) -> bool:
    import libcst as cst

    from quantcheck_lint.trees import called

    match node:
        case cst.Attribute(value=cst.Attribute(attr=cst.Name(value="weight")), attr=cst.Name(value="shape" | "size")):
            return True
        case cst.Attribute(value=cst.Call(args=[cst.Arg(value=inner)]) as first, attr=cst.Name(value="dtype")):
            return called(first) == "next" and called(inner) == "parameters"
    return False
