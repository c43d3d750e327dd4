"""Real models' layouts, written sparse: the headers and the small records are real, the weights are holes."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

WIDTH = {"U8": 8, "I8": 8, "BF16": 16, "F16": 16, "F32": 32, "F8_E4M3": 8, "I32": 32, "U32": 32, "I64": 64}


class Entry(NamedTuple):
    """One stored tensor; `content` is written where it is given, everything else stays a hole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes = b""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTH[self.dtype] // 8


def write_file(path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> int:
    """Write one safetensors file without its data and return the number of data bytes."""
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    at, places = 0, []
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.nbytes]}
        places.append(at)
        at += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
        for entry, place in zip(entries, places, strict=True):
            if entry.content:
                file.seek(8 + len(raw) + place)
                file.write(entry.content)
    return at


def write_folder(folder: Path, entries: Iterable[Entry], config: dict[str, object], shards: int = 2) -> Path:
    """Write a sharded checkpoint folder with its index and config."""
    entries = list(entries)
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(entries) // shards)
    weight_map, total = {}, 0
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = entries[number * size : (number + 1) * size]
        total += write_file(folder / name, part)
        weight_map |= {entry.name: name for entry in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nf4(name: str, shape: tuple[int, int], *, double_quant: bool = False) -> list[Entry]:
    """The stored tensors of one bitsandbytes NF4 weight."""
    numel = math.prod(shape)
    blocks = -(-numel // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    nested = []
    if double_quant:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04}
        outer = -(-blocks // 256)
        nested = [Entry(f"{name}.nested_absmax", "F32", (outer,)), Entry(f"{name}.nested_quant_map", "F32", (256,))]
    blob = json.dumps(state).encode()
    return [
        Entry(name, "U8", (-(-numel // 2), 1)),
        Entry(f"{name}.absmax", "U8" if double_quant else "F32", (blocks,)),
        Entry(f"{name}.quant_map", "F32", (16,)),
        *nested,
        Entry(f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(blob),), blob),
    ]


BNB_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
}


def mistral_7b(*, layers: Iterable[int] = range(32), quantized: bool = True) -> list[Entry]:
    """Mistral-7B: 7,241,732,096 parameters; NF4 on all decoder linears, embeddings, norms and head in bf16."""
    hidden, inner, kv = 4096, 14336, 8 * 128
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    entries = [Entry("model.embed_tokens.weight", "BF16", (32000, hidden))]
    for layer in layers:
        prefix = f"model.layers.{layer}"
        for name, shape in linears.items():
            weight = f"{prefix}.{name}.weight"
            entries += nf4(weight, shape) if quantized else [Entry(weight, "BF16", shape)]
        entries += [
            Entry(f"{prefix}.{norm}.weight", "BF16", (hidden,))
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
    return [*entries, Entry("model.norm.weight", "BF16", (hidden,)), Entry("lm_head.weight", "BF16", (32000, hidden))]


MISTRAL_CONFIG: dict[str, object] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "tie_word_embeddings": False,
    "quantization_config": BNB_CONFIG,
}


def falcon_7b(*, vocab: int = 65025, quantized: bool = True) -> list[Entry]:
    """Falcon-7B: one layer norm and four linears per layer, the head tied to the embedding and not saved."""
    hidden, fused = 4544, 4672
    linears = {
        "self_attention.query_key_value": (fused, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    entries = [Entry("transformer.word_embeddings.weight", "BF16", (vocab, hidden))]
    for layer in range(32):
        prefix = f"transformer.h.{layer}"
        for name, shape in linears.items():
            weight = f"{prefix}.{name}.weight"
            entries += nf4(weight, shape) if quantized else [Entry(weight, "BF16", shape)]
        entries += [Entry(f"{prefix}.input_layernorm.{kind}", "BF16", (hidden,)) for kind in ("weight", "bias")]
    return [*entries, *(Entry(f"transformer.ln_f.{kind}", "BF16", (hidden,)) for kind in ("weight", "bias"))]


FALCON_CONFIG: dict[str, object] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 65025,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "tie_word_embeddings": True,
}


DEEPSEEK_CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}
DEEPSEEK_SHARDS = 163


def deepseek_v3() -> list[Entry]:
    """DeepSeek-V3: 671 billion parameters and a layer that predicts the next but one token, FP8 in blocks of 128."""
    hidden, vocab, prediction = 7168, 129280, 61
    entries = [Entry("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(prediction + 1):
        entries += _deepseek_layer(f"model.layers.{layer}", dense=layer < 3)
    last = f"model.layers.{prediction}"
    for name, shape in (
        ("embed_tokens", (vocab, hidden)),
        ("enorm", (hidden,)),
        ("hnorm", (hidden,)),
        ("eh_proj", (hidden, 2 * hidden)),
        ("shared_head.norm", (hidden,)),
        ("shared_head.head", (vocab, hidden)),
    ):
        entries.append(Entry(f"{last}.{name}.weight", "BF16", shape))
    ends = [("model.norm", (hidden,)), ("lm_head", (vocab, hidden))]
    return [*entries, *(Entry(f"{name}.weight", "BF16", shape) for name, shape in ends)]


def _deepseek_layer(layer: str, *, dense: bool) -> list[Entry]:
    hidden, inner, expert, experts = 7168, 18432, 2048, 256
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    linears = {
        "self_attn.q_a_proj": (1536, hidden),
        "self_attn.q_b_proj": (128 * 192, 1536),
        "self_attn.kv_a_proj_with_mqa": (576, hidden),
        "self_attn.kv_b_proj": (128 * 256, 512),
        "self_attn.o_proj": (hidden, 128 * 128),
    }
    blocks = {"mlp": inner} if dense else {f"mlp.experts.{index}": expert for index in range(experts)}
    for block, width in blocks.items() if dense else (*blocks.items(), ("mlp.shared_experts", expert)):
        linears |= {f"{block}.gate_proj": (width, hidden), f"{block}.up_proj": (width, hidden)}
        linears[f"{block}.down_proj"] = (hidden, width)
    entries = [Entry(f"{layer}.{name}.weight", "BF16", (size,)) for name, size in norms.items()]
    for name, (rows, columns) in linears.items():
        grid = (-(-rows // 128), -(-columns // 128))
        entries.append(Entry(f"{layer}.{name}.weight", "F8_E4M3", (rows, columns)))
        entries.append(Entry(f"{layer}.{name}.weight_scale_inv", "F32", grid))
    if not dense:
        entries.append(Entry(f"{layer}.mlp.gate.weight", "BF16", (experts, hidden)))
        entries.append(Entry(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,)))
    return entries


def sparse_bytes(path: Path) -> int:
    """The bytes a folder really takes on the disk."""
    return sum(os.stat(file).st_blocks * 512 for file in path.iterdir())
