from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import Detection, Invalid, Rule

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis

_COUNT = re.compile(r"param|numel|nelement|count|total", re.IGNORECASE)
# Code that asks for the width of the storage corrects by the right factor.
_ASKS = re.compile(r"quant_storage|quant_state|element_size|itemsize|byte|bits")
_PACKED = re.compile(r"Params4bit|load(?:ed)?_in_4bit")


class HandRolledCorrection(Rule):
    """QC005: a factor of two for 4-bit weights that forgets how they are stored."""

    code = "QC005"
    name = "hand-rolled-4bit-correction"
    severity = "warning"
    fix = "unsafe"
    summary = "A count is doubled or halved for 4-bit weights, whatever the storage type is."
    what = """
Finds counts that are multiplied or divided by 2 where the code just found out that weights are 4-bit: a branch on
`Params4bit`, `load_in_4bit` or `bits == 4`. Branches that ask for `quant_storage`, `element_size` or `itemsize` are
left alone."""
    why = """
Two weights per element holds for `quant_storage=uint8` only: with bfloat16 storage, as FSDP-QLoRA needs it, an element
holds four. Halving a count (`trainable_params /= 2` under `bits == 4`) goes in the wrong direction altogether."""
    instead = "`count_params(model)` or `logical_numel(p)` from `pytest_quantcheck`, which ask the weight itself."
    fix_safety = """
Unsafe: the value changes for every storage type but uint8. Only a product with a size (`2 * p.numel()`) has a fix;
where a count is corrected later, there is none."""
    references = (
        "https://github.com/artidoro/qlora/issues/260",
        "https://github.com/huggingface/peft/issues/1594",
    )
    valid = (
        """\
for p in model.parameters():
    n = p.numel()
    if p.__class__.__name__ == "Params4bit":
        n = n * 2 * p.quant_storage.itemsize
    total += n
""",
        "batch = batch_size * 2 if args.load_in_4bit else batch_size\n",
        "lr /= 2\n",
    )
    invalid = (
        Invalid("if args.bits == 4:\n    trainable_params /= 2\n"),
        Invalid(
            """\
for p in model.parameters():
    n_params = p.numel()
    if isinstance(p, bnb.nn.Params4bit):
        n_params = n_params * 2
    total += n_params
"""
        ),
        Invalid(
            "total = sum(2 * p.numel() if isinstance(p, Params4bit) else p.numel() for p in model.parameters())\n",
            "from pytest_quantcheck import logical_numel\n\n"
            "total = sum(logical_numel(p) if isinstance(p, Params4bit) else p.numel() for p in model.parameters())\n",
        ),
    )
    needles = (
        (b"Params4bit", b"load_in_4bit", b"loaded_in_4bit", b"bits == 4", b"bits==4"),
        (b"2",),
        (b"param", b"numel", b"nelement"),
    )
    hits = re.compile(r"Params4bit\b|load_in_4bit|loaded_in_4bit|bits\s*==\s*4")
    sources = re.compile(r"\*=?\s*2\b|/=?\s*2\b|2\s*\*(?!\*)")

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        from quantcheck_lint.trees import walk

        seen: set[int] = set()
        for node in walk(analysis.module):
            for found in _corrections(node):
                if id(found) not in seen:
                    seen.add(id(found))
                    yield _detection(found, analysis)


def _corrections(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Factors of two in the branch of a condition about 4-bit weights."""
    import libcst as cst

    from quantcheck_lint.trees import walk, words

    if not isinstance(node, (cst.If, cst.IfExp)) or not _is_about_4bit(node.test):
        return
    if any(_ASKS.search(word) for word in words(node.body)):
        return
    for below in walk(node.body):
        if _is_factor(below) and any(_COUNT.search(word) for word in words(below)):
            yield below


def _is_about_4bit(test: cst.BaseExpression) -> bool:
    import libcst as cst

    from quantcheck_lint.trees import dotted, number, walk, words

    if isinstance(test, cst.UnaryOperation):
        return False
    if any(_PACKED.search(word) for word in words(test)):
        return True
    return any(
        isinstance(below, cst.Comparison)
        and (dotted(below.left) or "").rpartition(".")[2] == "bits"
        and isinstance(below.comparisons[0].operator, cst.Equal)
        and number(below.comparisons[0].comparator) == 4
        for below in walk(test)
    )


def _is_factor(node: cst.CSTNode) -> bool:
    import libcst as cst

    from quantcheck_lint.trees import number

    match node:
        case cst.AugAssign(operator=cst.MultiplyAssign() | cst.DivideAssign() | cst.FloorDivideAssign()):
            return number(node.value) == 2
        case cst.BinaryOperation(operator=cst.Multiply()):
            return number(node.left) == 2 or number(node.right) == 2
        case cst.BinaryOperation(operator=cst.Divide() | cst.FloorDivide()):
            return number(node.right) == 2
    return False


def _detection(found: cst.CSTNode, analysis: Analysis) -> Detection:
    import libcst as cst

    from quantcheck_lint.calls import size_read
    from quantcheck_lint.rules.counting import bare

    message = f"`{analysis.code(found)}` corrects for 4-bit weights by a factor that depends on how they are stored"
    suggestion = "use `count_params(model)` or `logical_numel(p)` of pytest_quantcheck"
    if isinstance(found, cst.BinaryOperation) and isinstance(found.operator, cst.Multiply):
        read = size_read(found.left) or size_read(found.right)
        if read is not None:
            new = cst.Call(cst.Name("logical_numel"), [cst.Arg(bare(read.subject))])
            return Detection(found, message, suggestion, replace=((found, new),), imports=("logical_numel",))
    return Detection(found, message, suggestion)
