"""Makes the release: a small Llama in 16 bit, and the same in NF4, which is what is published."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

FULL, RELEASE = "models/tiny-llama", "models/tiny-llama-nf4"

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(FULL)

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(
    FULL, quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.bfloat16
)
model.save_pretrained(RELEASE)
