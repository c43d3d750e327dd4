"""Fine-grained FP8 of transformers: `fp8-block`, a float32 scale for each 128 x 128 values.

Encoded: the linears of the layers and of single experts, no router and no head, as DeepSeek publishes.
Parts: see the scheme `fp8_fine_grained`.
Source: transformers 5.17, integrations/finegrained_fp8.py: a side that is no multiple of 128 is left unquantized there
or not, as the module is built, so such a model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, each, in_layers, stored
from pytest_quantcheck.recipes.recipe import check_calibrated as check
from pytest_quantcheck.tensor import StoredTensor

BLOCK = 128


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors of `save_pretrained`."""
    check(model, columns=BLOCK, rows=BLOCK)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return Written(each(model, in_layers, _parts), quantization)


def _parts(weight: Weight) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    yield stored(weight.name, "F8_E4M3", rows, columns)
    yield stored(f"{weight.module}.weight_scale_inv", "F32", rows // BLOCK, columns // BLOCK)


RECIPE = Recipe(re.compile("fp8-block"), ("fp8-block",), "FP8 in blocks (transformers)", "safetensors", write)
