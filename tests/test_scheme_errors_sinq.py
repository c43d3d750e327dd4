"""SINQ checkpoints that cannot be read exactly: an error that names the tensor and what was expected, never a guess."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError
from tests.cases.sinq import SIDECAR, golden

# A weight of [32, 48] in 64 groups of 24, two codes to the byte: W_q [32, 24].
BROKEN = [
    ("no-scale", {"meta.scale": None}, {}, r"layer.W_q: has no `meta.scale.x` beside it"),
    ("no-zero", {"meta.zero": None}, {}, r"layer.W_q: has no `meta.zero.x` beside it"),
    ("no-sidecar", {}, None, r"layer.W_q: has no entry in `model.safetensors.index.json.meta.json`"),
    ("no-codes", {"W_q": None}, {}, r"layer.meta.scale: .* part of an encoded weight"),
    ("no-shape", {}, {"shape": None}, r"layer.W_q: belongs to the shape `None`"),
    ("other-packing", {}, {"packing": "4bit_32"}, r"layer.W_q: \[32, 24\] is packed as `4bit_32` on axis 1"),
    ("other-axis", {}, {"axis": 0}, r"packed as `4bit_u8` on axis 0"),
    ("other-shape", {}, {"shape": [32, 96]}, r"layer.W_q: has 768 bytes \(1,536 for 128 x 24 codes in `4bit_u8`\)"),
    ("indivisible-shape", {}, {"shape": [32, 50]}, r"layer.W_q: has groups of 24, which do not divide 50 inputs"),
    (
        "fewer-scales",
        {"meta.scale": torch.ones(63, 1)},
        {},
        r"layer.meta.scale: F32 \[63, 1\] is not one value",
    ),
    (
        "shorter-second-scale",
        {"meta.scale2": torch.ones(1, 47)},
        {},
        r"layer.meta.scale2: F32 \[1, 47\] is not 48",
    ),
]


@pytest.mark.parametrize(("change", "meta", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_weight_is_an_error_that_names_it(tmp_path, change, meta, message):
    made = golden("4bit")()
    tensors = made.tensors | {f"layer.{part}": tensor for part, tensor in change.items()}
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
                                tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    if meta is not None:
        own = made.files[SIDECAR]["layer"]["meta"] | meta
        (tmp_path / SIDECAR).write_text(json.dumps({"layer": {"meta": own}}))
    with pytest.raises(FormatError, match=message):
        inspect(tmp_path)
