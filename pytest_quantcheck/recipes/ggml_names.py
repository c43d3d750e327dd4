"""The tensors of the F16 file that llama.cpp's converter makes of a transformers checkpoint.

    name      `containers.gguf_names` read the other way round; the experts of a layer become one stack
    dtype     F32: one dimension, norms, routers, position embeddings, what is no `.weight`. F16: the rest
    shape     as the checkpoint has it; Conv1D matrices turned
    extra     `rope_freqs` of Llama 3's RoPE scaling, `rope_factors_*` of Phi 3's

Source: llama.cpp, conversion/base.py `prepare_tensors`, conversion/*.py (0c1e5709). Every architecture here was
converted by it and compared (tests/golden/make_llama_cpp.py); others are refused. So is Gemma 3, whose embedding is cut
to the tokenizer, which a configuration does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_quantcheck.containers import gguf_names
from pytest_quantcheck.recipes.recipe import EXPERT, Unquantized, Weight, stored
from pytest_quantcheck.tensor import StoredTensor

# `model_type` of a configuration -> `general.architecture` of the file.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2",
    "phi3": "phi3", "gpt2": "gpt2", "starcoder2": "starcoder2", "olmo": "olmo", "olmo2": "olmo2",
    "cohere": "command-r", "granite": "granite", "smollm3": "smollm3", "arcee": "arcee",
}  # fmt: skip
WITH_ROPE_FREQS = frozenset({"llama", "granite", "smollm3", "arcee"})
WIDE = frozenset({"ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd"})


def architecture(config: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the architecture; one that is not known here is a `ValueError`."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"llama.cpp's names for `{kind}` are not known here: predict from an F16 GGUF of it")
    return ARCHITECTURES[kind]


def tensors(model: Unquantized, experts: int) -> list[StoredTensor]:
    """Return the tensors of the F16 file; a tensor without a name in llama.cpp is a `ValueError`."""
    kind = architecture(model.config)
    layers, modules = gguf_names.modules_of(kind, experts > 0)
    names = {there: name for name, there in modules.items()}
    found: dict[str, StoredTensor] = {}
    stacks: dict[str, int] = {}
    for weight in model.weights:
        if weight.kind == "buffer":
            continue
        name = _name(weight, layers, names)
        stacks[name] = stacks.get(name, 0) + weight.copies
        found[name] = _stored(name, weight)
    stacked = (_stack(tensor, stacks[name]) for name, tensor in found.items())
    return [*stacked, *_extra(model.config, kind)]


def _name(weight: Weight, layers: str, names: Mapping[str, str]) -> str:
    module, _, last = weight.name.rpartition(".")
    prefix = f"{layers}."
    number, _, inside = module.removeprefix(prefix).partition(".") if module.startswith(prefix) else ("", "", module)
    inside = EXPERT.sub("", inside)
    if inside not in names:
        raise ValueError(f"`{weight.name}` has no name in llama.cpp that is known here")
    name = f"{names[inside]}.{last}"
    return f"blk.{number}.{name}" if number else name


def _stored(name: str, weight: Weight) -> StoredTensor:
    module, _, last = name.rpartition(".")
    is_wide = module.rpartition(".")[2] in WIDE or module.endswith("_norm") or last != "weight"
    shape = weight.linear_shape if weight.kind == "conv1d" else weight.shape
    return stored(name, "F32" if is_wide or len(shape) < 2 else "F16", *shape)


def _stack(tensor: StoredTensor, experts: int) -> StoredTensor:
    return tensor if "_exps." not in tensor.name else stored(tensor.name, tensor.dtype, experts, *tensor.shape)


def _extra(config: Mapping[str, Any], kind: str) -> Iterator[StoredTensor]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    head = config.get("head_dim") or config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    if kind in WITH_ROPE_FREQS and rope.get("rope_type", rope.get("type")) == "llama3":
        yield stored("rope_freqs.weight", "F32", head // 2, role="buffer")
    if kind == "phi3":
        for key in ("long", "short"):
            if rope.get(f"{key}_factor"):
                yield stored(f"rope_factors_{key}.weight", "F32", len(rope[f"{key}_factor"]), role="buffer")
