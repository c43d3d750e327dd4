"""What the rules about naive counts share: their filters, their edit, and which uses of a place are theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import COUNTS, Detection, Needles

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis
    from quantcheck_lint.values import Place, Use

PARAMETER_NEEDLES: Needles = (COUNTS, (b"parameters(", b"parameters (", b"_parameters"))
PARAMETER_SOURCES = re.compile(r"parameters\s*\(|_parameters\b")
STATE_DICT_NEEDLES: Needles = (COUNTS, (b"state_dict", b"load_file", b"safe_open", b"torch.load"))
STATE_DICT_SOURCES = re.compile(r"state_dict\s*\(|load_file\b|safe_open\b|torch\.load\b")
STORED_NEEDLES: Needles = (COUNTS, (*PARAMETER_NEEDLES[1], *STATE_DICT_NEEDLES[1]))
STORED_SOURCES = re.compile(f"{PARAMETER_SOURCES.pattern}|{STATE_DICT_SOURCES.pattern}")
REFERENCES = (
    "https://github.com/huggingface/transformers/issues/25978",
    "https://github.com/huggingface/peft/issues/1020",
    "https://github.com/artidoro/qlora/issues/260",
)


def counted(analysis: Analysis, *origins: str) -> Iterator[tuple[Place, list[Use]]]:
    """The unguarded places over tensors of some origin that are added up, with what they are added up to."""
    for place in analysis.flow.places.values():
        if place.origin.name not in origins or place.guarded or place.packed:
            continue
        uses = [use for use in place.uses.values() if not use.discarded]
        if uses:
            yield place, uses


def counts(uses: list[Use]) -> list[Use]:
    """The uses that are a number of parameters and not a number of bytes."""
    return [use for use in uses if not use.memory]


def naive(place: Place, analysis: Analysis, what: str, trainable: bool) -> Detection:
    """A detection that wraps the element: `p.numel()` becomes `logical_numel(p)`."""
    read = analysis.code(place.node)
    return Detection(
        place.node,
        f"`{read}` {what}",
        suggestion=_suggestion(place, analysis, trainable),
        replace=element_edit(place),
        imports=("logical_numel",),
    )


def _suggestion(place: Place, analysis: Analysis, trainable: bool) -> str:
    if place.model is not None:
        model = analysis.code(place.model)
        return f"use `count_params({model}{', trainable=True' if trainable else ''})` of pytest_quantcheck"
    subject = "p" if place.subject is None else analysis.code(bare(place.subject))
    return f"use `logical_numel({subject})` of pytest_quantcheck"


def bare(subject: cst.BaseExpression) -> cst.BaseExpression:
    """`p` for `p.data` and `p.detach()`, which lose what a packed weight knows about itself."""
    import libcst as cst

    from quantcheck_lint.trees import called

    while True:
        if isinstance(subject, cst.Attribute) and subject.attr.value == "data":
            subject = subject.value
        elif isinstance(subject, cst.Call) and called(subject) == "detach" and isinstance(subject.func, cst.Attribute):
            subject = subject.func.value
        else:
            return subject


def element_edit(place: Place) -> tuple[tuple[cst.CSTNode, cst.CSTNode], ...]:
    """The one edit that fits every form: what reads the size is replaced, what is added up stays as it is."""
    import libcst as cst

    logical = cst.Name("logical_numel")
    if place.subject is not None:
        return ((place.node, cst.Call(logical, [cst.Arg(bare(place.subject))])),)
    # `map(torch.numel, tensors)`: the function is what is replaced.
    assert isinstance(place.node, cst.Call)
    return ((place.node.args[0].value, logical),)
