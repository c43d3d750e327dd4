"""Small real models, made by transformers with random weights and quantized by bitsandbytes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


def config_of(kind: str) -> Any:
    """A tiny configuration of a known architecture: non-square, layers enough to be told apart."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 131,
    }
    match kind:
        case "llama":
            return transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=False)
        case "llama-tied":
            return transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
        case "mixtral":
            return transformers.MixtralConfig(
                **small, num_key_value_heads=2, num_local_experts=4, tie_word_embeddings=False
            )
        case "deepseek":
            return transformers.DeepseekV3Config(
                **small,
                moe_intermediate_size=32,
                n_routed_experts=6,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                first_k_dense_replace=1,
                kv_lora_rank=16,
                q_lora_rank=24,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
            )
        case "ernie":
            return transformers.Ernie4_5_MoeConfig(
                **small, num_key_value_heads=2, moe_num_experts=6, moe_k=2, moe_intermediate_size=32
            )
        case "gpt2":
            return transformers.GPT2Config(vocab_size=131, n_positions=32, n_embd=64, n_layer=2, n_head=4, n_inner=96)
        case "falcon":
            return transformers.FalconConfig(vocab_size=131, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    raise ValueError(kind)


def save(kind: str, folder: Path) -> Path:
    """Write the unquantized model."""
    torch.manual_seed(11)
    config = config_of(kind)
    cls = transformers.AutoModelForCausalLM
    model = cls.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **quantization: Any) -> Any:
    """Load a model on the CPU, quantized by bitsandbytes where `quantization` says so."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    if quantization:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def parameters(kind: str) -> int:
    """The parameters of the unquantized model, counted the naive way, which is right there."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind))
    return sum(parameter.numel() for parameter in model.parameters())
