"""Plain numbers: `fp32`, `fp16`, `bf16`.

Every tensor in one dtype, but for those that transformers keeps in F32 where it loads 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Written, each

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return every tensor as plain numbers."""
    return Written(each(model._replace(dtype=DTYPES[options["name"]])))


RECIPE = Recipe(re.compile(f"(?P<name>{'|'.join(DTYPES)})"), tuple(DTYPES), "plain numbers", "safetensors", write)
