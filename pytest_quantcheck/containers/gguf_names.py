"""What llama.cpp's converter made of a model: the transformers names of its tensors, and what it did to their values.

Only decoders that are common as GGUF are here; of an architecture that is not, the names of the file are kept. So are
those of tensors that have no counterpart of their own (a fused `attn_qkv` where the model has three).

What the converter did, by architecture (llama.cpp, conversion/*.py and convert_hf_to_gguf.py):
    q and k rows written as RoPE pairs    `PAIRED`: the transformers class turns halves, llama.cpp neighbours
    1 added to the weights of the norms   `SHIFTED`: the class multiplies by 1 + weight
    matrices turned                       `TURNED`: the class has Conv1D layers
Experts are one stack here and single matrices, or gate and up fused, there: a stack is named as the matrices are,
without a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.tensor import Origin, Role

_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
}
# A norm before and after each half of a layer.
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# StableLM 2 has a norm for each head, which the file stacks.
_STABLELM = {name: there for name, there in _DECODER.items() if name not in ("attn_q_norm", "attn_k_norm")}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

# By `general.architecture`: the prefix of a layer, and the names of the modules.
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    **dict.fromkeys(
        ("llama", "mistral3", "granite", "smollm3", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma",
         "command-r", "cohere2", "olmo", "arcee"),
        ("model.layers", _DECODER),
    ),
    **dict.fromkeys(("gemma2", "gemma3"), ("model.layers", _DECODER | _FOUR_NORMS)),
    "stablelm": ("model.layers", _STABLELM),
    "olmo2": ("model.layers", _DECODER | _POST_NORMS),
    "phi3": ("model.layers", _DECODER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": ("model.layers", _DECODER | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gpt-oss": (
        "model.layers",
        _DECODER
        | {
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
    ),
    "deepseek2": (
        "model.layers",
        _DECODER
        | _SHARED_EXPERTS
        | {
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
        },
    ),
    "gpt2": ("transformer.h", _GPT2),
}  # fmt: skip

PAIRED = frozenset({"llama", "mistral3", "granite", "smollm3", "olmo", "arcee"})
SHIFTED = frozenset({"gemma", "gemma2", "gemma3"})
TURNED = {"gpt2": frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"})}
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
# Modules there that are a single tensor.
_BARE = frozenset({"attn_sinks"})

# First components, or last modules, of what no optimizer would see.
_BUFFERS = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short", "exp_probs_b"})
_NO_MODEL = frozenset({"imatrix", "controlvector"})

_IN_BLOCK = re.compile(r"blk\.([0-9]+)\.(.+)", re.DOTALL)

Values = Mapping[str, object]


def role(name: str, dtype: str, values: Values) -> Role | None:
    """Return what a tensor is where the name says so: a buffer, or part of an adapter; else None."""
    if name.endswith((".lora_a", ".lora_b")):
        return "adapter"
    if values.get("general.type") in _NO_MODEL or values.get("general.architecture") in _NO_MODEL:
        return "buffer"
    module, _, last = name.rpartition(".")
    if module.rpartition(".")[2] in _BUFFERS or last in ("scale", "input_scale", "in_sum2", "counts"):
        return "buffer"
    return "buffer" if DTYPES[dtype].kind == "int" else None


def origin(name: str, shape: tuple[int, ...], values: Values) -> Origin | None:
    """Return where a tensor comes from, or None where that is not known for sure: then it keeps its name."""
    architecture = str(values.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        return None
    layers, modules = modules_of(architecture, bool(values.get("llama.expert_count")))
    layer, module, last = _split(name)
    if module not in modules:
        return None
    there = modules[module] if module in _BARE else f"{modules[module]}.{last}"
    full = f"{layers}.{layer}.{there}" if layer else there
    if architecture in PAIRED and module in _HEADS:
        rows = _rows_per_head(shape, _of_layer(values.get(f"{architecture}.attention.{_HEADS[module]}"), layer))
        return None if rows is None else Origin(full, paired_rows=rows)
    shift = 1.0 if architecture in SHIFTED and module.endswith("norm") and last == "weight" else 0.0
    turned = module in TURNED.get(architecture, ()) and last == "weight"
    return Origin(full, transposed=turned, shift=shift)


def modules_of(architecture: str, experts: bool) -> tuple[str, Mapping[str, str]]:
    """Return the prefix of a layer and the names of the modules; `experts` says whether it is a mixture of them."""
    layers, modules = ARCHITECTURES[architecture]
    return layers, {**modules, **_MIXTRAL} if architecture == "llama" and experts else modules


def _split(name: str) -> tuple[str, str, str]:
    """Split `blk.3.attn_q.weight` into layer, module and last; the layer is empty outside the blocks.

    >>> _split("blk.3.attn_q.weight"), _split("output.weight")
    (('3', 'attn_q', 'weight'), ('', 'output', 'weight'))
    """
    module, _, last = name.rpartition(".")
    match = _IN_BLOCK.fullmatch(module)
    return (match[1], match[2], last) if match else ("", module, last)


def _of_layer(count: object, layer: str) -> object:
    """The number of heads of a layer: one for all, or a list."""
    if isinstance(count, tuple):
        return count[int(layer)] if layer and int(layer) < len(count) else None
    return count


def _rows_per_head(shape: tuple[int, ...], heads: object) -> int | None:
    """The rows of one head, or None where the heads do not divide the rows into pairs."""
    rows = shape[-2] if len(shape) > 1 else shape[-1] if shape else 0
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads) or not rows:
        return None
    return rows // heads
