"""GPTQ as GPTQModel writes it: `gptq-BITS-gGROUP[-sym|-asym]`, `gptq-BITS-row...` for one group a row.

Encoded: the linears of the layers and of single experts, no router and no head. `sym` and `asym` have the same bytes.
Parts: see the scheme `gptq`; `g_idx` is always written, scales have 16 bits.
Source: GPTQModel 7.6.0, nn_modules/qlinear/__init__.py: inputs and outputs are multiples of 32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, each, groups, in_layers, stored
from pytest_quantcheck.recipes.recipe import check_calibrated as check
from pytest_quantcheck.tensor import StoredTensor

MULTIPLE = 32


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors of a saved GPTQ model."""
    bits, group = int(options["bits"]), int(options["group"] or -1)
    check(model, columns=MULTIPLE, rows=MULTIPLE)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": options["zero"] != "asym",
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    return Written(each(model, in_layers, lambda weight: _parts(weight, bits, group)), quantization)


def _parts(weight: Weight, bits: int, group: int) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    count = groups(columns, group)
    yield stored(f"{weight.module}.qweight", "I32", columns * bits // 32, rows)
    yield stored(f"{weight.module}.qzeros", "I32", count, rows * bits // 32)
    yield stored(f"{weight.module}.scales", "F16", count, rows)
    yield stored(f"{weight.module}.g_idx", "I32", columns)


RECIPE = Recipe(
    re.compile(r"gptq-(?P<bits>[2348])-(?:g(?P<group>[1-9][0-9]*)|row)(?:-(?P<zero>sym|asym))?"),
    ("gptq-8-g128-sym", "gptq-4-g128-sym", "gptq-4-g32-sym", "gptq-3-g128-sym"),
    "GPTQ",
    "safetensors",
    write,
)
