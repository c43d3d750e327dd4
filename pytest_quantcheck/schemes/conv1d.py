"""GPT-2's Conv1D: the layer whose unquantized weight is `[in, out]`, while every quantizer stores `[out, in]`."""

from __future__ import annotations

from pytest_quantcheck.schemes.scheme import Namespace

MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def holds(module: str, namespace: Namespace) -> bool:
    """Whether the module of this name is a Conv1D of a model that has them."""
    return namespace.config.get("model_type") in MODELS and module[module.rfind(".") + 1 :] in LAYERS
