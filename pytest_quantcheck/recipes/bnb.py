"""bitsandbytes through transformers: `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `int8`.

Encoded: every `nn.Linear` and `Conv1D` (turned to [out, in]) but the output head, a tied one included. transformers 5
keeps the experts of a mixture in one tensor, which is no `nn.Linear`: they stay as they are.
Parts: see the schemes `bnb_4bit` and `bnb_8bit`. Blocks of 64, of 256 blocks where quantized doubly (`-dq`).
Source: transformers 5.17, integrations/bitsandbytes.py; bitsandbytes 0.50.2, functional.py.

The record of a doubly quantized weight spells out `nested_offset`, so its length depends on the values: at most
`LONGEST` characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Weight, Written, each, record, stored
from pytest_quantcheck.tensor import StoredTensor

BLOCK, NESTED_BLOCK = 64, 256
LONGEST, SHORTEST = "2.2250738585072014e-38", "0.0"
LIVE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors of `save_pretrained`."""
    code, nested = options["code"], options["nested"] is not None
    if code == "int8":
        return Written(each(model, is_encoded, _int8), {"quant_method": "bitsandbytes", "load_in_8bit": True})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": code}
    tensors = each(model, is_encoded, lambda weight: _four_bit(weight, code, nested, model.dtype))
    spare = len(LONGEST) - len(SHORTEST) if nested else 0
    return Written(tensors, quantization, less=spare * sum(map(is_encoded, model.weights)))


def is_encoded(weight: Weight) -> bool:
    """Whether transformers replaces the layer."""
    return weight.kind in ("linear", "conv1d")


def _int8(weight: Weight) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    yield stored(weight.name, "I8", rows, columns)
    yield stored(f"{weight.module}.SCB", "F32", rows)
    yield stored(f"{weight.module}.weight_format", "U8")


def _four_bit(weight: Weight, code: str, nested: bool, dtype: str) -> Iterator[StoredTensor]:
    rows, columns = weight.linear_shape
    blocks = -(-rows * columns // BLOCK)
    yield stored(weight.name, "U8", -(-rows * columns // 2), 1)
    yield stored(f"{weight.name}.absmax", "U8" if nested else "F32", blocks)
    yield stored(f"{weight.name}.quant_map", "F32", 16)
    if nested:
        yield stored(f"{weight.name}.nested_absmax", "F32", -(-blocks // NESTED_BLOCK))
        yield stored(f"{weight.name}.nested_quant_map", "F32", 256)
    state = _state(code, dtype, (rows, columns), nested)
    yield record(f"{weight.name}.quant_state.bitsandbytes__{code}", state)


def _state(code: str, dtype: str, shape: tuple[int, int], nested: bool) -> bytes:
    state = {"quant_type": code, "blocksize": BLOCK, "dtype": LIVE_DTYPES[dtype], "shape": shape}
    text = json.dumps(state)
    if nested:
        tail = f', "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {LONGEST}}}'
        text = text.removesuffix("}") + tail
    return text.encode()


RECIPE = Recipe(
    re.compile(r"(?P<code>nf4|fp4|int8)(?P<nested>(?<=4)-dq)?"),
    ("nf4", "nf4-dq", "fp4", "int8"),
    "bitsandbytes",
    "safetensors",
    write,
)
