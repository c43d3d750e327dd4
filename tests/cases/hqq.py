"""HQQ in every width, quantized and decoded by hqq (tests/golden/make_hqq.py), and worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases import Case, Made
from tests.golden import file

# float16 and bfloat16 round every step of hqq's own decode; ours keeps float32.
ROUNDED = {"float16": 2**-10, "3bit-float16-seen-as-float": 2**-10, "bfloat16-seen-as-float": 2**-7}
CONFIG = {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}


def golden(case: str):
    def make() -> Made:
        found = file.read("hqq")[case]
        live = _live(found.tensors, found.record["meta"])
        return Made(found.values, live, found.tensors, CONFIG, tolerance=ROUNDED.get(case, 0.0))

    return make


def _live(tensors, meta) -> nn.Module:
    """A stand-in for the library's class: a parameter, a dict of metadata and a bias that is no parameter."""
    layer = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})()
    layer.W_q = nn.Parameter(tensors["layer.W_q"], requires_grad=False)
    layer.meta = meta | {"shape": torch.Size(meta["shape"])}
    layer.meta |= {part: tensors[f"layer.{part}"] for part in ("scale", "zero")}
    layer.bias = tensors.get("layer.bias")
    model = nn.Module()
    model.layer = layer
    return model


def by_hand() -> Made:
    """Rows 0 and 1 of the groups in the high nibbles, rows 2 and 3 in the low ones."""
    meta = {"nbits": 4, "group_size": 3, "shape": [2, 6], "axis": 1, "packing": "4bit_u8", "view_as_float": False}
    tensors = {
        "layer.W_q": torch.tensor([[0x06, 0x17, 0x28], [0x39, 0x4A, 0x5B]], dtype=torch.uint8),
        "layer.scale": torch.tensor([[1.0], [2.0], [0.5], [4.0]]),
        "layer.zero": torch.tensor([[0.0], [1.5], [6.0], [8.0]]),
    }
    values = torch.tensor([[0.0, 1, 2, 3, 5, 7], [0, 0.5, 1, 4, 8, 12]])
    saved = {f"layer.{name}": _encoded(value) for name, value in meta.items()}
    return Made(values, _live(tensors, meta), tensors | saved, CONFIG)


def _encoded(value) -> torch.Tensor:
    """As hqq's `encode_safetensor_type` does."""
    if isinstance(value, str):
        return torch.tensor([ord(char) for char in value], dtype=torch.uint8)
    if isinstance(value, list):
        return torch.tensor(value)
    return torch.tensor(int(value), dtype=torch.uint8 if isinstance(value, bool) else torch.int32)


def offloaded() -> Made:
    """`offload_meta` keeps zero points and scales as one tensor, zero points first."""
    made = by_hand()
    both = torch.stack((made.tensors.pop("layer.zero"), made.tensors.pop("layer.scale")))
    made.live.layer.meta = {name: value for name, value in made.live.layer.meta.items() if name not in _BOTH}
    made.live.layer.meta["zero_scale"] = both
    return Made(made.values, made.live, made.tensors | {"layer.zero_scale": both}, CONFIG)


_BOTH = ("scale", "zero")


def one_scale() -> Made:
    """`channel_wise=False`: one scale for the whole weight, and no groups."""
    made = by_hand()
    meta = {"nbits": 8, "group_size": 3, "shape": [2, 6], "axis": 0, "packing": "8bit_u8", "channel_wise": False}
    codes = torch.arange(12, dtype=torch.uint8).view(2, 6)
    tensors = {"layer.W_q": codes, "layer.scale": torch.tensor(0.5), "layer.zero": torch.tensor(4.0)}
    made.values = (codes.float() - 4) * 0.5
    saved = {f"layer.{name}": _encoded(value) for name, value in meta.items()}
    return Made(made.values, _live(tensors, meta), tensors | saved, CONFIG)


def unpacked() -> Made:
    """`bitpack=False` keeps the codes as floats; live only, since it saves no `packing`."""
    made = by_hand()
    meta = made.live.layer.meta | {"packing": None}
    codes = torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    parts = {f"layer.{part}": made.tensors[f"layer.{part}"] for part in _BOTH}
    return Made(made.values, _live(parts | {"layer.W_q": codes}, meta))


def library(bits: float, axis: int):
    def make() -> Made:
        quantize = pytest.importorskip(
            "hqq.core.quantize", reason="hqq is not installed: its live class is not checked"
        )
        torch.manual_seed(9)
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=40, axis=axis)
        linear = nn.Linear(80, 28, bias=True)
        model = nn.Module()
        model.layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        return Made(model.layer.dequantize(), model, dict(model.state_dict()))

    return make


SHAPES = {"3bit-padded": (12, 64), "3bit-axis0-padded": (12, 64), "groups-over-rows": (8, 20),
          "one-group-per-row": (6, 24)}  # fmt: skip
ALL = list(file.read("hqq"))

CASES = [
    Case("hqq-by-hand", by_hand, "hqq", (2, 6), bytes={"codes": 6, "scales": 16, "zero_points": 16}),
    Case("hqq-scales-offloaded", offloaded, "hqq", (2, 6), bytes={"codes": 6, "scales": 32}),
    Case("hqq-one-scale", one_scale, "hqq", (2, 6)),
    Case("hqq-not-packed", unpacked, "hqq", (2, 6)),
    *(Case(f"hqq-{case}", golden(case), "hqq", SHAPES.get(case, (16, 48)), total=784 if case == "bias" else None)
      for case in ALL),
    *(Case(f"hqq-library-{bits}bit-axis{axis}", library(bits, axis), "hqq", (28, 80), total=2268)
      for bits, axis in ((4, 1), (3, 0))),
]  # fmt: skip
