from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules import counting
from quantcheck_lint.rules.rule import READS, Detection, Invalid, Rule

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis
    from quantcheck_lint.values import Items


class NumelOfNamedTuple(Rule):
    """QC009: `numel()` of a tuple, which has none."""

    code = "QC009"
    name = "numel-of-named-parameters-tuple"
    severity = "error"
    fix = "safe"
    summary = "`named_parameters()` gives tuples, and a tuple has no `numel`."
    what = """
Finds loops and comprehensions over `named_parameters()` that do not unpack the pair of name and parameter, and ask the
pair for its size."""
    why = "It raises `AttributeError: 'tuple' object has no attribute 'numel'` for every model, quantized or not."
    instead = "`for _, p in model.named_parameters()`, or `model.parameters()`. Then QC001 has its say about the sum."
    fix_safety = """
Safe: the code raises as it is. There is no fix where the pair is used as a pair as well."""
    valid = (
        "names = [n for n, p in model.named_parameters() if p.numel() > 0]\n",
        "sizes = [p[1].numel() for p in model.named_parameters()]\n",
    )
    invalid = (
        Invalid(
            "total = sum(p.numel() for p in model.named_parameters())\n",
            "total = sum(p.numel() for _, p in model.named_parameters())\n",
        ),
        Invalid(
            "for p in model.named_parameters():\n    print(p.numel())\n",
            "for _, p in model.named_parameters():\n    print(p.numel())\n",
        ),
        Invalid("for p in model.named_parameters():\n    print(p[0], p.numel())\n"),
    )
    needles = (*counting.PARAMETER_NEEDLES, (b"named_parameters",))
    hits = READS
    sources = counting.PARAMETER_SOURCES

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        for place in analysis.flow.places.values():
            if place.packed is not None:
                yield Detection(
                    place.node,
                    f"`{analysis.code(place.node)}` raises: an element of `named_parameters()` is a tuple",
                    suggestion="unpack it: `for _, p in model.named_parameters()`",
                    replace=_unpacked(place.packed),
                )


def _unpacked(pair: Items) -> tuple[tuple[cst.CSTNode, cst.CSTNode], ...]:
    """`p` as `_, p` in the head of the loop, if nothing else is done with the pair."""
    import libcst as cst

    from quantcheck_lint.trees import names

    if pair.target is None or pair.loop is None or _is_used_as_pair(pair.loop, pair.target):
        return ()
    ignored = "_name" if names(pair.loop, "_") else "_"
    parts = [cst.Element(cst.Name(ignored), cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))]
    return ((pair.target, cst.Tuple([*parts, cst.Element(cst.Name(pair.target.value))], lpar=(), rpar=())),)


def _is_used_as_pair(loop: cst.CSTNode, target: cst.Name) -> bool:
    """Whether the variable appears without an attribute asked of it."""
    import libcst as cst

    from quantcheck_lint.calls import size_read
    from quantcheck_lint.trees import walk

    asked: set[int] = set()
    for node in walk(loop):
        if isinstance(node, cst.Attribute):
            asked.add(id(node.value))
        elif (read := size_read(node)) is not None:
            asked.add(id(read.subject))
    found = [node for node in walk(loop) if isinstance(node, cst.Name) and node.value == target.value]
    return any(node is not target and id(node) not in asked for node in found)
