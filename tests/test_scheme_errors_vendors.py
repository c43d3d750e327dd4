"""Broken checkpoints of the vendors' formats: an error that names the tensor and what was expected, never a guess."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError

FP8, F32 = torch.float8_e4m3fn, torch.float32


class Broken(NamedTuple):
    """One checkpoint that must be refused: what it holds, and what the message must say."""

    id: str
    tensors: dict[str, Any]
    quantization: dict[str, Any]
    says: tuple[str, ...]


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}

FINE_GRAINED = [
    Broken("fp8-weight-without-scale", {"layer.weight": zeros(130, 140, dtype=FP8)}, BLOCKS,
           ("layer.weight", "weight_scale")),
    Broken("fp8-scale-without-weight", {"layer.weight_scale_inv": zeros(2, 2)}, BLOCKS,
           ("layer.weight_scale_inv", "no weight `layer.weight`")),
    Broken("fp8-floor-grid", {"layer.weight": zeros(576, 384, dtype=FP8), "layer.weight_scale_inv": zeros(4, 3)},
           BLOCKS, ("layer.weight_scale_inv", "5 x 3", "128 x 128")),
    Broken("fp8-grid-of-another-block", {"layer.weight": zeros(256, 256, dtype=FP8),
                                         "layer.weight_scale_inv": zeros(4, 4)}, BLOCKS, ("2 x 2", "[256, 256]")),
    Broken("fp8-scale-of-a-bf16-weight", {"layer.weight": zeros(256, 256, dtype=torch.bfloat16),
                                          "layer.weight_scale_inv": zeros(2, 2)}, BLOCKS, ("layer.weight", "BF16")),
    Broken("fp8-packed-scales", {"layer.weight": zeros(256, 256, dtype=FP8),
                                 "layer.weight_scale_inv": zeros(2, 2, dtype=torch.int32)}, BLOCKS, ("I32",)),
    Broken("fp8-block-size-is-a-number", {"layer.weight": zeros(256, 256, dtype=FP8),
                                          "layer.weight_scale_inv": zeros(2, 2)},
           BLOCKS | {"weight_block_size": 128}, ("weight_block_size", "128")),
    Broken("fp4-grid-of-fp8", {"layer.weight": zeros(256, 128, dtype=torch.int8),
                               "layer.weight_scale_inv": zeros(2, 2)}, BLOCKS, ("256 x 8", "1 x 32")),
]  # fmt: skip

ROWS = [*FINE_GRAINED]


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_is_refused_by_name(row, tmp_path):
    safetensors.torch.save_file(row.tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": row.quantization}))
    with pytest.raises(FormatError) as error:
        inspect(tmp_path)
    for part in row.says:
        assert part in str(error.value)


def test_block_size_unknown_counts_but_does_not_decode(tmp_path):
    tensors = {"layer.weight": zeros(256, 256, dtype=FP8), "layer.weight_scale_inv": zeros(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    tensor = inspect(tmp_path).tensor("layer.weight")
    assert tensor.params == 256 * 256
    with pytest.raises(FormatError, match="weight_block_size"):
        tensor.decode()
