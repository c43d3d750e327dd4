"""HQQ weights that cannot be read exactly: an error that names the tensor and what was expected, never a guess."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError, NotDecodable
from tests.cases.hqq import by_hand, golden


def saved(tmp_path, tensors):
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
                                tmp_path / "model.safetensors")  # fmt: skip
    return tmp_path / "model.safetensors"


def number(value, dtype=torch.int32):
    return torch.tensor(value, dtype=dtype)


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


# A weight of [16, 48] in 32 groups of 24, on axis 1, two codes to the byte: W_q [16, 24].
BROKEN = [
    ("no-scale", {"scale": None}, r"layer.W_q: has no `layer.scale` beside it"),
    ("no-zero", {"zero": None}, r"layer.W_q: has no `layer.zero` beside it"),
    ("no-shape", {"shape": None}, r"layer.W_q: has no `layer.shape` beside it"),
    ("no-packing", {"packing": None}, r"layer.W_q: has no `layer.packing` beside it"),
    ("no-axis", {"axis": None}, r"layer.W_q: has no `layer.axis` beside it"),
    ("no-codes", {"W_q": None}, r"encod"),
    ("other-packing", {"packing": text("4bit_32")}, r"layer.W_q: is packed as `4bit_32` on axis `1`"),
    ("other-axis", {"axis": number(2)}, r"layer.W_q: is packed as `4bit_u8` on axis `2`"),
    ("other-shape", {"shape": torch.tensor([16, 96])}, r"layer.W_q: has 384 bytes \(768 for 64 x 24 codes"),
    ("negative-shape", {"shape": torch.tensor([-16, -48])}, r"belongs to the shape `\[-16, -48\]`"),
    ("other-group", {"group_size": number(23)}, r"has groups of `23`, which do not divide 768 values"),
    ("fewer-scales", {"scale": torch.ones(31, 1)}, r"layer.scale: F32 \[31, 1\] is not one float for each of 32"),
    ("scales-of-integers", {"scale": torch.ones(32, 1, dtype=torch.int32)}, r"layer.scale: I32 \[32, 1\]"),
    ("codes-of-other-dtype", {"W_q": torch.zeros(4, 24, dtype=torch.int32)}, r"layer.W_q: is I32, but packed as"),
    ("shape-of-floats", {"shape": torch.ones(2, dtype=torch.float16)}, r"layer.shape: F16 \[2\] is not a small number"),
    ("packing-of-numbers", {"packing": number(4)}, r"layer.packing: I32 \[\] is not text in bytes"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_weight_is_an_error_that_names_it(tmp_path, change, message):
    tensors = golden("4bit-axis1")().tensors | {f"layer.{part}": tensor for part, tensor in change.items()}
    with pytest.raises(FormatError, match=message):
        inspect(saved(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}))


def test_rows_that_the_packer_dropped_are_counted_and_not_decoded(tmp_path):
    """Five rows of groups in two slabs: hqq keeps four, and cannot decode what it packed."""
    tensors = by_hand().tensors | {"layer.shape": torch.tensor([5, 3]), "layer.W_q": torch.zeros(2, 3).byte()}
    tensors |= {"layer.scale": torch.ones(5, 1), "layer.zero": torch.ones(5, 1)}
    tensor = inspect(saved(tmp_path, tensors)).tensor("layer.weight")
    assert tensor.shape == (5, 3)
    with pytest.raises(NotDecodable, match="packer dropped the last 1 of 5 rows of groups"):
        tensor.decode()


def test_decoding_leaves_a_live_model_as_it_was():
    model = golden("8bit-axis1")().live
    before = model.layer.meta["scale"].clone()
    first = inspect(model).tensor("layer.weight").decode()
    assert torch.equal(first, inspect(model).tensor("layer.weight").decode())
    assert torch.equal(model.layer.meta["scale"], before)
