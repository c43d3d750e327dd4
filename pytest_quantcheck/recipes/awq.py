"""AWQ as AutoAWQ writes it (`gemm`): `awq-4-gGROUP`, `awq-4-row` for one group a row.

Encoded: the linears of the layers and of single experts, no router and no head.
Parts: see the scheme `awq_gemm`. AutoAWQ loads float16, so all else is float16, too.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py: inputs are multiples of the group, outputs of 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, each, groups, in_layers, stored
from pytest_quantcheck.recipes.recipe import check_calibrated as check
from pytest_quantcheck.tensor import StoredTensor

BITS = 4


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors of a saved AWQ model."""
    group = int(options["group"] or -1)
    model = model._replace(dtype="F16")
    check(model, columns=max(group, 1), rows=32 // BITS)
    quantization = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    return Written(each(model, in_layers, lambda weight: _parts(weight, group)), quantization)


def _parts(weight: Weight, group: int) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    count, words = groups(columns, group), rows * BITS // 32
    yield stored(f"{weight.module}.qweight", "I32", columns, words)
    yield stored(f"{weight.module}.qzeros", "I32", count, words)
    yield stored(f"{weight.module}.scales", "F16", count, rows)


RECIPE = Recipe(
    re.compile(r"awq-4-(?:g(?P<group>[1-9][0-9]*)|row)"), ("awq-4-g128", "awq-4-g64"), "AWQ", "safetensors", write
)
