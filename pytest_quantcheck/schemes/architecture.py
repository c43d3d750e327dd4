"""What a model's configuration says about the shape of a linear layer, for formats that store only its size.

Source: transformers 5.17, `configuration_*.py` and `modeling_*.py` of llama, qwen2, mixtral, phi3, opt and gpt_neox.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_NESTED = ("text_config", "llm_config")
_INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")


def linear_shape(name: str, params: int, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return `[N, K]` of the linear weight `name` of `params` values, None where the configuration leaves it open.

    >>> linear_shape("model.layers.0.mlp.down_proj.weight", 6, {"hidden_size": 2, "intermediate_size": 3})
    (2, 3)
    """
    layer = name.removesuffix(".weight").rpartition(".")[2]
    levels = (config, *(config[key] for key in _NESTED if isinstance(config.get(key), Mapping)))
    found = {shape for level in levels for shape in _candidates(layer, level) if shape[0] * shape[1] == params}
    return found.pop() if len(found) == 1 else None


def _candidates(layer: str, config: Mapping[str, Any]) -> list[tuple[int, int]]:
    hidden, heads = _size(config, "hidden_size", "d_model", "n_embd"), _size(config, "num_attention_heads", "n_head")
    if not hidden or not heads:
        return [shape for shape in _feed_forward(layer, hidden, config) if 0 not in shape]
    head = _size(config, "head_dim") or hidden // heads
    queries, keys = heads * head, (_size(config, "num_key_value_heads") or heads) * head
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "out_proj": (hidden, queries),
        "qkv_proj": (queries + 2 * keys, hidden),
        "query_key_value": (queries + 2 * keys, hidden),
    }
    if layer in attention:
        return [attention[layer]]
    return [shape for shape in _feed_forward(layer, hidden, config) if 0 not in shape]


def _feed_forward(layer: str, hidden: int, config: Mapping[str, Any]) -> list[tuple[int, int]]:
    if layer in ("lm_head", "embed_out"):
        return [(_size(config, "vocab_size"), hidden)]
    inner = {_size(config, key) for key in _INNER}
    if layer in ("gate_proj", "up_proj", "fc1", "w1", "w3", "dense_h_to_4h"):
        return [(size, hidden) for size in inner]
    if layer in ("down_proj", "fc2", "w2", "dense_4h_to_h"):
        return [(hidden, size) for size in inner]
    if layer == "gate_up_proj":
        return [(2 * size, hidden) for size in inner]
    return []


def _size(config: Mapping[str, Any], *keys: str) -> int:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), 0)


def fitting_shape(name: str, config: Mapping[str, Any], fits: Callable[[int, int], bool]) -> tuple[int, int] | None:
    """Return `[N, K]` of the linear weight `name` for formats that pad; None where the configuration leaves it open.

    >>> config = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 2}
    >>> fitting_shape("layers.0.mlp.up_proj.weight", config, lambda n, k: -(-n // 4) == 3)
    (10, 6)
    """
    layer = name.removesuffix(".weight").rpartition(".")[2]
    levels = (config, *(config[key] for key in _NESTED if isinstance(config.get(key), Mapping)))
    found = {shape for level in levels for shape in _candidates(layer, level) if fits(*shape)}
    return found.pop() if len(found) == 1 else None


_SIZES = ("size", "dim", "width", "features", "channels", "rank", "d_model", "n_embd", "n_inner")


def named_sizes(config: Mapping[str, Any]) -> set[int]:
    """Return every size that a configuration names, quantization left out: no layer is wide in another way by accident.

    >>> sorted(named_sizes({"hidden_size": 33, "vision_config": {"head_dim": 3}, "eos_token_id": 32}))
    [3, 33]
    """
    found: set[int] = set()
    left: list[Mapping[str, Any]] = [config]
    while left:
        for key, value in left.pop().items():
            if isinstance(value, Mapping) and "quantization" not in key:
                left.append(value)
            values = value if isinstance(value, list) else [value]
            if any(word in key for word in _SIZES):
                found.update(size for size in values if type(size) is int)
    return found
