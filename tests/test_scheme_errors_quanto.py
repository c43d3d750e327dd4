"""Broken optimum-quanto checkpoints: each row says what the error must name."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from pytest_quantcheck import inspect
from pytest_quantcheck.errors import FormatError

U8, F32 = torch.uint8, torch.float32
QBYTES = {"layer.weight._data": torch.zeros(4, 6, dtype=torch.int8), "layer.weight._scale": torch.ones(4, 1)}
QBITS = {
    "layer.weight._data._data": torch.zeros(17, 100, dtype=U8),
    "layer.weight._scale": torch.ones(33, 1),
    "layer.weight._shift": torch.ones(33, 1),
}
GROUPED = {
    "layer.weight._data._data": torch.zeros(9, 128, dtype=U8),
    "layer.weight._scale": torch.ones(18, 1),
    "layer.weight._shift": torch.ones(18, 1),
}


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


ROWS = [
    ("qbytes-no-scale", without(QBYTES, "layer.weight._scale"), {}, "layer.weight._data: has no `layer.weight._scale`"),
    ("qbytes-no-data", without(QBYTES, "layer.weight._data"), {}, "layer.weight._scale: .*part of an encoded weight"),
    ("qbytes-scale-shape", QBYTES | {"layer.weight._scale": torch.ones(3, 1)}, {}, r"\[3, 1\] does not scale"),
    ("qbytes-dtype", QBYTES | {"layer.weight._data": torch.zeros(4, 6, dtype=U8)}, {}, "U8 is no 8-bit code"),
    ("qbytes-map-lies", QBYTES, {"layer": {"weights": "qfloat8"}}, "stored as qint8, .* says `qfloat8`"),
    ("qbits-no-scale", without(QBITS, "layer.weight._scale"), {}, "has no `layer.weight._scale`"),
    ("qbits-no-shift", without(QBITS, "layer.weight._shift"), {}, "has no `layer.weight._shift`"),
    ("qbits-no-data", without(QBITS, "layer.weight._data._data"), {}, "part of an encoded weight"),
    ("qbits-shift-shape", QBITS | {"layer.weight._shift": torch.ones(32, 1)}, {}, "is not the shape of `_scale`"),
    ("qbits-dtype", QBITS | {"layer.weight._data._data": torch.zeros(17, 100)}, {}, "F32 is not the uint8"),
    ("qbits-rows", QBITS | {"layer.weight._data._data": torch.zeros(18, 100, dtype=U8)}, {}, "18 packed rows of 33"),
    ("qbits-map-lies", QBITS, {"layer": {"weights": "qint2"}}, "17 packed rows of 33 .* says `qint2`"),
    ("qbits-grouped-shape-unknown", GROUPED, {}, "2,304 values in groups of 128, but nothing says"),
]


@pytest.mark.parametrize(("tensors", "qmap", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_names_the_fault(tensors, qmap, message, tmp_path):
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    if qmap:
        (tmp_path / "quanto_qmap.json").write_text(json.dumps(qmap))
    with pytest.raises(FormatError, match=message):
        inspect(tmp_path)
