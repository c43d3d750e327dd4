from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantcheck_lint.rules.rule import Detection, Invalid, Rule

if TYPE_CHECKING:
    import libcst as cst

    from quantcheck_lint.analysis import Analysis

_QUANTIZED = re.compile(r"gptq|awq", re.IGNORECASE)


class QuantizedNumParameters(Rule):
    """QC007: `num_parameters()` of a model whose weights are buffers."""

    code = "QC007"
    name = "quantized-num-parameters"
    severity = "note"
    preview = True
    summary = "`num_parameters()` is asked of a GPTQ or AWQ model."
    what = """
Finds `model.num_parameters()` where the same function or module loads `model` with `from_pretrained` and names GPTQ or
AWQ there: in the name of the checkpoint, the class, or the quantization config."""
    why = """
GPTQ and AWQ layers keep `qweight`, `qzeros` and `scales` in buffers. `num_parameters()` visits parameters only, so
every quantized layer counts as zero: a 72B model has 2B left."""
    instead = "`count_params(model)` from `pytest_quantcheck`."
    fix_safety = "There is no fix."
    references = ("https://github.com/huggingface/transformers/issues/34317",)
    valid = (
        'model = AutoModel.from_pretrained("mistralai/Mistral-7B-v0.1")\nprint(model.num_parameters())\n',
        'model = AutoModel.from_pretrained("TheBloke/Llama-2-7B-GPTQ")\nother.num_parameters()\n',
    )
    invalid = (
        Invalid('model = AutoModel.from_pretrained("TheBloke/Llama-2-7B-GPTQ")\nprint(model.num_parameters())\n'),
        Invalid(
            """\
config = AwqConfig(bits=4)
model = AutoModel.from_pretrained(name, quantization_config=config)
n = model.num_parameters()
"""
        ),
    )
    needles = ((b"num_parameters",), (b"from_pretrained",), (b"GPTQ", b"gptq", b"AWQ", b"awq", b"Awq"))
    hits = re.compile(r"num_parameters\s*\(")
    sources = re.compile(r"from_pretrained\b|gptq|awq", re.IGNORECASE)

    def check(self, analysis: Analysis) -> Iterator[Detection]:
        import libcst as cst

        from quantcheck_lint.trees import called, dotted, scopes

        for nodes in scopes(analysis.module):
            models = _quantized_models(nodes)
            for node in nodes:
                if called(node) == "num_parameters" and isinstance(node, cst.Call):
                    owner = dotted(node.func.value) if isinstance(node.func, cst.Attribute) else None
                    if owner in models:
                        yield Detection(
                            node,
                            f"`{analysis.code(node)}` leaves out every GPTQ and AWQ layer: their weights are buffers",
                            suggestion=f"use `count_params({owner})` of pytest_quantcheck",
                        )


def _quantized_models(nodes: list[cst.CSTNode]) -> set[str]:
    """Names that hold a model loaded with something that says GPTQ or AWQ, itself or through a name."""
    import libcst as cst

    from quantcheck_lint.trees import called, dotted, walk, words

    assigned = [node for node in nodes if isinstance(node, cst.Assign)]
    configs = {
        name
        for node in assigned
        for name in map(dotted, (target.target for target in node.targets))
        if name and any(_QUANTIZED.search(word) for word in words(node.value))
    }
    models: set[str] = set()
    for node in assigned:
        loads = any(called(below) == "from_pretrained" for below in walk(node.value))
        if loads and any(_QUANTIZED.search(word) or word in configs for word in words(node.value)):
            models.update(name for target in node.targets if (name := dotted(target.target)))
    return models
