"""Small weights written as checkpoints: by the libraries where they run here, else by the formula of the format.

Every function gives tensors (and a config where the format has one) from which nothing is missing; `tests/faults.py`
breaks them. Round to nearest throughout.
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests import gguf_files
from tests.cases.compressed_tensors import compressed

SIGMA = 0.02
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # what the stream holds of every eight neighbours


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return SIGMA * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folder(path: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def gguf(path: Path, name: str, kind: str, shape: tuple[int, ...], raw: np.ndarray, keys=()) -> Path:
    tensor = gguf_files.Tensor(name, kind, shape, raw.tobytes())
    path.write_bytes(gguf_files.gguf([tensor], keys))
    return path


def ggml_blocks(weight: torch.Tensor, kind: str) -> np.ndarray:
    """Blocks as the gguf package quantizes them, (rows, bytes)."""
    package = pytest.importorskip("gguf", reason="the gguf package quantizes")
    return package.quants.quantize(weight.numpy(), package.GGMLQuantizationType[kind])


def bnb_4bit(weight: torch.Tensor, kind: str = "nf4", *, nested: bool = False, blocksize: int = 64) -> nn.Module:
    rows, columns = weight.shape
    model = nn.Module()
    model.layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested)
    model.layer.weight.data = weight.clone()
    model.layer.weight.blocksize = blocksize
    return model.to("cpu")


def bnb_8bit(weight: torch.Tensor) -> nn.Module:
    rows, columns = weight.shape
    model = nn.Module()
    model.layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    model.layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return model.to("cpu")


BNB_CONFIG = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes packed into int32 words, lowest bits first, each row anew: (rows, count) -> (rows, words)."""
    expanded = (codes.unsqueeze(-1) >> torch.arange(bits)) & 1
    flat = expanded.flatten(1).to(torch.int64)
    flat = nn.functional.pad(flat, (0, -flat.shape[1] % 32)).view(len(codes), -1, 32)
    return (flat << torch.arange(32)).sum(-1).to(torch.int32)


def affine(weight: torch.Tensor, groups: torch.Tensor, bits: int, *, symmetric: bool):
    """Codes (N, K), zero points and scales (N, G) of round-to-nearest; zero points are 1 and more."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    parts = [weight[:, groups == group] for group in range(count)]
    if symmetric:
        scales = torch.stack([part.abs().amax(1) for part in parts], 1) / (2 ** (bits - 1) - 1)
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
        high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
        scales = (high - low) / top
        zeros = (-low / scales).round().clamp(1, top)
    scales = scales.half().float()
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return codes.to(torch.int64), zeros.to(torch.int64), scales


def gptq(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    version: int = 1,
    g_idx: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], dict]:
    columns = weight.shape[1]
    index = torch.arange(columns) // group if g_idx is None else g_idx
    codes, zeros, scales = affine(weight, index, bits, symmetric=symmetric)
    tensors = {
        "layer.qweight": stream(codes, bits).t(),
        "layer.qzeros": stream(zeros.t() - (2 - version), bits),
        "layer.scales": scales.t().half(),
        "layer.g_idx": index.to(torch.int32),
    }
    label = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": label}
    return tensors, {"quantization_config": config}


def awq(weight: torch.Tensor, *, group: int = 32, interleaved: bool = True) -> tuple[dict[str, torch.Tensor], dict]:
    rows, columns = weight.shape
    codes, zeros, scales = affine(weight, torch.arange(columns) // group, 4, symmetric=False)
    order = torch.arange(rows).view(-1, 8)[:, AWQ_ORDER if interleaved else list(range(8))].flatten()
    tensors = {
        "layer.qweight": stream(codes.t()[:, order], 4),
        "layer.qzeros": stream(zeros.t()[:, order], 4),
        "layer.scales": scales.t().half(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return tensors, {"quantization_config": config}


def fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[dict[str, torch.Tensor], dict]:
    """Fine-grained FP8 by blocks, or with one scale."""
    rows, columns = weight.shape
    high, wide = block or (rows, columns)
    padded = nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    tiles = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    scales = tiles.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    tensors = {
        "layer.weight": (weight / spread).to(torch.float8_e4m3fn),
        "layer.weight_scale_inv": scales if block else scales.view(()),
    }
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if block else None,
    }
    return tensors, {"quantization_config": config}


def compressed_tensors(form: str, rows: int, columns: int, **weights):
    """A Linear by compressed-tensors' own compressor: the weight it had, its tensors, its config."""
    dtype = weights.get("dtype", torch.float32)
    made = compressed(form, rows, columns, **weights)()
    torch.manual_seed(rows * columns)
    return nn.Linear(columns, rows, bias=False, dtype=dtype).weight.data.float(), dict(made.tensors), made.config


def nvfp4(rows: int, columns: int):
    return compressed_tensors(
        "nvfp4-pack-quantized", rows, columns, dtype=torch.bfloat16, num_bits=4, type="float", symmetric=True,
        strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn",
    )  # fmt: skip


def bitnet(rows: int, columns: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
    """A ternary weight, packed by transformers, under a scale that the layer multiplies by."""
    from transformers.integrations.bitnet import pack_weights

    ternary = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    tensors = {"layer.weight": pack_weights(ternary.clone()), "layer.weight_scale": torch.tensor([scale])}
    config = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return ternary * scale, tensors, {"quantization_config": config}
