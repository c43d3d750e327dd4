"""llama.cpp: the mixtures of `llama-quantize`, `q4_k_m` and the others.

    default     the type that gives the mixture its name
    tensor      type
    1-D, norms, routers, position tables, biases    as in the unquantized file (F32)
    output, or token_embd where that is the output  `OUTPUT`, else Q6_K
    token_embd                                      `TOKEN_EMBD`, else the default
    attn_v, attn_qkv, attn_kv_b                     `ATTN_V`; 70B: Q3_K and Q4_K become Q5_K; 8 experts: Q8_0
    attn_k, attn_q, attn_output, ffn_*              the table of that name, else the default
    columns that are no multiple of the block       `FALLBACK`, then F16

`more(i, n)`: the first and last eighth of the layers, and every third between. `-imat`: with an importance matrix,
which changes some mixtures and is required for others (`NEEDS_IMATRIX`: those always have one).
Source: llama.cpp, src/llama-quant.cpp (007dbbf3). Its branch for `attn_qkv` alone is never reached: it goes as attn_v.
Older files differ: in 2023 Q4_K_S took the first four ffn_down, not the first eighth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.recipes import ggml_names
from pytest_quantcheck.recipes.recipe import Recipe, Unquantized, Written, stored
from pytest_quantcheck.tensor import StoredTensor

DEFAULTS = {
    "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1", "q8_0": "Q8_0", "q1_0": "Q1_0", "q2_0": "Q2_0",
    "q2_k": "Q2_K", "q2_k_s": "Q2_K", "q3_k_s": "Q3_K", "q3_k_m": "Q3_K", "q3_k_l": "Q3_K", "q4_k_s": "Q4_K",
    "q4_k_m": "Q4_K", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K", "tq1_0": "TQ1_0", "tq2_0": "TQ2_0",
    "iq1_s": "IQ1_S", "iq1_m": "IQ1_M", "iq2_xxs": "IQ2_XXS", "iq2_xs": "IQ2_XS", "iq2_s": "IQ2_XS", "iq2_m": "IQ2_S",
    "iq3_xxs": "IQ3_XXS", "iq3_xs": "IQ3_S", "iq3_s": "IQ3_S", "iq3_m": "IQ3_S", "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS", "mxfp4_moe": "MXFP4",
}  # fmt: skip
SHOWN = (
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_xxs", "q2_k", "iq2_xxs", "iq1_s", "mxfp4_moe",
)  # fmt: skip
# Without names of their own in a row: types of under three bits that need to know which weights matter.
SMALLEST = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"})
NEEDS_IMATRIX = SMALLEST | {"iq3_xxs", "iq3_xs", "q2_k_s"}

FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # fmt: skip

# Parts of names that keep a tensor as it is, whatever its shape.
KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})

# Layers of the models that llama.cpp calls 70B; llama only where heads share keys.
SEVENTY = {"llama": 80, "qwen2": 80, "olmo": 80, "deci": 80, "jais2": 68}


class Sizes(NamedTuple):
    """What a file says of its model."""

    architecture: str
    layers: int
    experts: int
    heads: int
    shared_heads: int


class Facts(NamedTuple):
    """What the mixtures ask of a model. `gqa`: the query heads that share a key; `values`: its attn_v tensors."""

    falcon: bool
    seventy: bool
    layers: int
    experts: int
    gqa: int
    tied: bool
    values: int
    imatrix: bool


# The type of a tensor of a kind: layer `i` of `n`. None: the default of the mixture.
Choice = Callable[[Facts, int, int], str | None]


def more(i: int, n: int) -> bool:
    """Whether layer `i` of `n` gets more bits."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _always(name: str) -> Choice:
    return lambda facts, i, n: name


def _shared(name: str, otherwise: str | None = None) -> Choice:
    """Where four query heads share a key, values are few and may be large."""
    return lambda facts, i, n: name if facts.gqa >= 4 else otherwise


def _few(otherwise: str) -> Choice:
    """Values are few beside experts, too."""
    return lambda facts, i, n: "Q4_K" if facts.gqa >= 4 or facts.experts >= 4 else otherwise


def _first(share: int, name: str, otherwise: str | None = None) -> Choice:
    return lambda facts, i, n: name if i < n // share else otherwise


TOKEN_EMBD = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "Q2_K"),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "IQ3_S"),
    **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "Q4_K"),
}
OUTPUT = {**dict.fromkeys((*SMALLEST, "iq3_xxs"), "Q5_K"), "q8_0": "Q8_0"}

ATTN_V: Mapping[str, Choice] = {
    "q2_k": _shared("Q4_K", "Q3_K"),
    "q2_k_s": _shared("Q4_K"),
    "iq3_xxs": lambda facts, i, n: "Q4_K" if facts.gqa >= 4 else None if facts.imatrix else "IQ3_S",
    "iq3_xs": _shared("Q4_K"),
    "iq3_s": _shared("Q4_K"),
    "iq3_m": _always("Q4_K"),
    "q3_k_m": lambda facts, i, n: "Q5_K" if i < 2 else "Q4_K",
    "q3_k_l": _always("Q5_K"),
    "iq4_nl": _shared("Q5_K"),
    "iq4_xs": _shared("Q5_K"),
    "q4_k_m": lambda facts, i, n: "Q6_K" if more(i, n) else None,
    "q5_k_m": lambda facts, i, n: "Q6_K" if more(i, n) else None,
    "q4_k_s": lambda facts, i, n: "Q5_K" if i < 4 else None,
    **dict.fromkeys(("iq2_s", "iq2_m"), _few("IQ3_S")),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), _few("Q2_K")),
}
ATTN_K: Mapping[str, Choice] = {"iq3_xs": _always("IQ3_XXS"), "iq3_xxs": _always("IQ2_S")}
ATTN_Q = ATTN_K
FFN_DOWN: Mapping[str, Choice] = {
    "q2_k": _always("Q3_K"),
    "q2_k_s": _first(8, "Q4_K"),
    "iq3_xxs": lambda facts, i, n: None if facts.imatrix else "Q4_K" if i < n // 8 else "Q3_K",
    "q3_k_m": lambda facts, i, n: "Q5_K" if i < n // 16 else None if facts.falcon and not more(i, n) else "Q4_K",
    "iq3_m": lambda facts, i, n: "Q4_K" if i < n // 8 or (facts.experts == 8 and more(i, n)) else None,
    "q3_k_l": lambda facts, i, n: "Q4_K" if facts.falcon else "Q5_K",
    "q4_k_m": lambda facts, i, n: _falcon_down(i, n) if facts.falcon else "Q6_K" if more(i, n) else None,
    "iq4_nl": lambda facts, i, n: "Q5_K" if i < n // 8 and not facts.imatrix else None,
    "iq4_xs": lambda facts, i, n: "Q5_K" if i < n // 8 and not facts.imatrix else None,
    "q5_k_m": lambda facts, i, n: "Q6_K" if more(i, n) else None,
    "q4_k_s": lambda facts, i, n: "Q5_K" if i < n // 8 and not facts.falcon else None,
    "q4_0": lambda facts, i, n: "Q4_1" if i < n // 8 and facts.imatrix else None,
    "q5_0": lambda facts, i, n: "Q5_1" if i < n // 8 and facts.imatrix else None,
    **dict.fromkeys(("iq2_s", "iq2_m"), _first(8, "IQ3_S")),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), _first(8, "Q2_K")),
}
ATTN_OUTPUT: Mapping[str, Choice] = {
    "q2_k": _always("Q3_K"),
    "iq3_xxs": _always("IQ3_S"),
    "q3_k_m": _always("Q4_K"),
    "q3_k_l": _always("Q5_K"),
    "iq3_m": _always("Q4_K"),
    **dict.fromkeys(("iq1_s", "iq1_m"), _always("IQ2_XXS")),
    **dict.fromkeys(("iq2_s", "iq2_m"), _always("IQ3_S")),
}
OUTPUT_OF_8_EXPERTS = SMALLEST | {
    "q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs",
}  # fmt: skip
FFN_IN: Mapping[str, Choice] = {
    "iq3_xs": lambda facts, i, n: "IQ3_XXS" if n // 8 <= i < 7 * n // 8 else None,
}


def _falcon_down(i: int, n: int) -> str:
    return "Q6_K" if i < n // 16 else "Q5_K" if more(i, n) else "Q4_K"


# What a tensor is, by the first of these that its name holds.
CATEGORIES = (
    ("attn_qkv.weight", "values"),
    ("attn_kv_b.weight", "values"),
    ("attn_v.weight", "values"),
    ("attn_k.weight", "keys"),
    ("attn_q.weight", "queries"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
TOKEN_TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
TABLES: Mapping[str, Mapping[str, Choice]] = {
    "values": ATTN_V,
    "keys": ATTN_K,
    "queries": ATTN_Q,
    "attn_output": ATTN_OUTPUT,
    "ffn_up": FFN_IN,
    "ffn_gate": FFN_IN,
    "ffn_down": FFN_DOWN,
}


def write(model: Unquantized, options: Mapping[str, str]) -> Written:
    """Return the tensors that `llama-quantize` writes of the F16 file of the model."""
    mixture, sizes = options["mixture"], _sizes(model)
    tensors = list(model.ggml) or ggml_names.tensors(model, sizes.experts)
    tensors.sort(key=_order)
    facts = _facts(sizes, tensors, imatrix=bool(options["imatrix"]) or mixture in NEEDS_IMATRIX)
    seen: dict[str, int] = {}
    return Written([_quantized(tensor, mixture, facts, seen) for tensor in tensors])


def _facts(sizes: Sizes, tensors: list[StoredTensor], *, imatrix: bool) -> Facts:
    shared = sizes.heads != sizes.shared_heads and sizes.experts != 8
    return Facts(
        falcon=sizes.architecture == "falcon",
        seventy=SEVENTY.get(sizes.architecture) == sizes.layers and (shared or sizes.architecture != "llama"),
        layers=sizes.layers,
        experts=sizes.experts,
        gqa=sizes.heads // sizes.shared_heads if sizes.shared_heads else 0,
        tied=all(tensor.name != "output.weight" for tensor in tensors),
        values=sum(_category(tensor.name) == "values" for tensor in tensors),
        imatrix=imatrix,
    )


def _quantized(tensor: StoredTensor, mixture: str, facts: Facts, seen: dict[str, int]) -> StoredTensor:
    if not is_quantized(tensor):
        return tensor
    chosen = _fitting(_chosen(tensor, mixture, facts, seen), tensor)
    return stored(tensor.name, chosen, *tensor.shape, role=tensor.role)


def is_quantized(tensor: StoredTensor) -> bool:
    """Whether `llama-quantize` touches it: matrices and stacks, but for those that are small and matter."""
    name = tensor.name
    matrix = any(size > 1 for size in tensor.shape[:-1])
    return matrix and name.endswith("weight") and name not in KEPT_NAMES and not any(part in name for part in KEPT)


def _chosen(tensor: StoredTensor, mixture: str, facts: Facts, seen: dict[str, int]) -> str:
    category, default = _category(tensor.name), DEFAULTS[mixture]
    if category == "output" or (category == "token_embd" and facts.tied):
        return _of_output(tensor, mixture, facts)
    if mixture == "mxfp4_moe":
        return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"
    if category == "token_embd":
        return TOKEN_EMBD.get(mixture, default)
    if category not in TABLES:
        return default
    i, n = _place(tensor.name, category, mixture, facts, seen)
    return _of_experts(category, mixture, facts) or _of_layer(category, mixture, facts, i, n)


def _of_output(tensor: StoredTensor, mixture: str, facts: Facts) -> str:
    if mixture == "mxfp4_moe" or facts.falcon or tensor.shape[-1] % DTYPES[DEFAULTS[mixture]].block:
        return "Q8_0"
    return OUTPUT.get(mixture, "Q6_K")


def _of_experts(category: str, mixture: str, facts: Facts) -> str | None:
    """What is different in a mixture of exactly eight experts, whose attention is small beside them."""
    if facts.experts != 8:
        return None
    smallest = mixture in SMALLEST
    if category == "keys":
        return "Q4_K" if smallest else "Q8_0"
    if category == "values":
        return None if smallest else "Q8_0"
    if category == "attn_output" and not facts.falcon:
        return "Q5_K" if mixture in OUTPUT_OF_8_EXPERTS else DEFAULTS[mixture]
    return None


def _of_layer(category: str, mixture: str, facts: Facts, i: int, n: int) -> str:
    table = TABLES[category]
    if category == "attn_output" and facts.falcon and mixture not in SMALLEST:
        return "Q4_K" if mixture == "q3_k_l" else DEFAULTS[mixture]
    chosen = (table[mixture](facts, i, n) if mixture in table else None) or DEFAULTS[mixture]
    if category == "values" and facts.seventy and mixture not in SMALLEST and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _place(name: str, category: str, mixture: str, facts: Facts, seen: dict[str, int]) -> tuple[int, int]:
    """Which tensor of its category it is, and of how many; of a mixture of experts, its layer."""
    i = seen[category] = seen.get(category, -1) + 1
    if category == "values":
        return i, facts.values
    if facts.experts > 1 and mixture not in SMALLEST:
        return _layer(name), facts.layers
    return i, facts.layers


def _fitting(chosen: str, tensor: StoredTensor) -> str:
    columns = tensor.shape[-1]
    if columns % DTYPES[chosen].block == 0:
        return chosen
    smaller = FALLBACK.get(chosen, chosen)
    if smaller == chosen and DTYPES[chosen].block > 32:
        raise ValueError(
            f"`{tensor.name}` has {columns:,} columns, no multiple of the {DTYPES[chosen].block} of {chosen}"
        )
    return "F16" if columns % DTYPES[smaller].block else smaller


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in TOKEN_TABLES:
        return "token_embd"
    return next((category for part, category in CATEGORIES if part in name), "other")


def _layer(name: str) -> int:
    match = re.match(r"blk\.([0-9]+)\.", name)
    return int(match[1]) if match else -1


def _order(tensor: StoredTensor) -> tuple[int, str]:
    return _layer(tensor.name), tensor.name


def _sizes(model: Unquantized) -> Sizes:
    return _sizes_of_file(model.keys) if model.ggml else _sizes_of_config(model.config)


def _sizes_of_file(keys: Mapping[str, str]) -> Sizes:
    name = keys.get("general.architecture", "")
    heads = _first_number(keys, f"{name}.attention.head_count")
    return Sizes(
        name,
        _first_number(keys, f"{name}.block_count"),
        _first_number(keys, f"{name}.expert_count"),
        heads,
        _first_number(keys, f"{name}.attention.head_count_kv", heads),
    )


def _first_number(keys: Mapping[str, str], key: str, otherwise: int = 0) -> int:
    """The number of a key, the first layer's where it has a list."""
    match = re.match(r"\(?([0-9]+)", keys.get(key, ""))
    return int(match[1]) if match else otherwise


def _sizes_of_config(config: Mapping[str, object]) -> Sizes:
    heads = _named(config, "num_attention_heads", "n_head")
    return Sizes(
        ggml_names.architecture(config),
        _named(config, "num_hidden_layers", "n_layer"),
        _named(config, "num_local_experts", "num_experts"),
        heads,
        _named(config, "num_key_value_heads") or heads,
    )


def _named(config: Mapping[str, object], *keys: str) -> int:
    return next((value for key in keys if isinstance(value := config.get(key), int)), 0)


RECIPE = Recipe(
    re.compile(rf"(?P<mixture>{'|'.join(DEFAULTS)})(?P<imatrix>-imat)?"),
    SHOWN,
    "llama.cpp",
    "gguf",
    write,
)
