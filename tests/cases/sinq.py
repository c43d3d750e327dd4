"""SINQ, packed and decoded by sinq's quantizer (tests/golden/make_sinq.py); sinq itself is never installed."""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made
from tests.golden import file

SIDECAR = "model.safetensors.index.json.meta.json"
CONFIG = {"quantization_config": {"quant_method": "sinq", "nbits": 4, "group_size": 24, "tiling_mode": "1D"}}


def golden(case: str, *, saved_once: bool = False):
    def make() -> Made:
        found = file.read("sinq")[case]
        sidecar = {"layer": {"meta": found.record["meta"]}}
        model = nn.Module()
        model.layer = live_layer("SINQLinear")
        model.layer.W_q, model.layer.bias_param = found.tensors["layer.W_q"], torch.zeros(found.values.shape[0])
        model.layer.meta = _meta(found, saved_once=saved_once)
        tensors = found.tensors | {"layer.bias": model.layer.bias_param}
        return Made(found.values, model, tensors, CONFIG, files={SIDECAR: sidecar})

    return make


def live_layer(kind: str) -> nn.Module:
    return type(kind, (nn.Module,), {"__module__": "sinq.sinqlinear_hf"})()


def _meta(found: file.Golden, *, saved_once: bool) -> dict:
    """The dict of the live module: scales as bytes are a tuple, and after one save and load a dict."""
    meta = {key: value for key, value in found.record["meta"].items() if "." not in key}
    for key, tensor in found.tensors.items():
        name, _, at = key.removeprefix("layer.").removeprefix("meta.").partition(".")
        if at:
            meta.setdefault(name, {})[at] = tensor
        elif name != "W_q":
            meta[name] = tensor
    for name in ("scale", "zero"):
        if isinstance(meta[name], dict):
            meta[name]["shape"] = found.record["meta"][f"{name}.shape"]
            meta[name] = meta[name] if saved_once else tuple(meta[name][at] for at in ("x", "s", "m", "shape"))
    return meta | {"shape": torch.Size(meta["shape"])}


def experts() -> Made:
    """Three experts, each in lists of codes and metadata: no parameter, no buffer."""
    found = file.read("sinq")["4bit"]
    model = nn.Module()
    model.layer = live_layer("SINQExperts")
    for weight in ("gate_up", "down"):
        setattr(model.layer, f"{weight}_W_q", [found.tensors["layer.W_q"].clone() for _ in range(3)])
        metas = [_meta(found, saved_once=False) for _ in range(3)]
        setattr(model.layer, f"{weight}_meta", [
            {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in meta.items()}
            for meta in metas
        ])  # fmt: skip
    return Made(found.values, model)


def unpacked() -> Made:
    """Codes that are not packed under metadata that says they are: sinq drops the label when it loads them."""
    made = golden("8bit")()
    made.files[SIDECAR] = {"layer": {"meta": made.files[SIDECAR]["layer"]["meta"] | {"packing": "4bit_u8"}}}
    return Made(made.values, None, made.tensors, made.config, files=made.files)


def by_hand() -> Made:
    """Groups of two inputs: those of row 0 in the high nibbles, those of row 1 in the low ones."""
    tensors = {
        "layer.W_q": torch.tensor([[0x04, 0x15], [0x26, 0x37]], dtype=torch.uint8),
        "layer.meta.scale": torch.tensor([[1.0], [2.0], [0.5], [4.0]]),
        "layer.meta.zero": torch.tensor([[0.0], [1.0], [4.0], [6.0]]),
        "layer.meta.scale2": torch.tensor([[1.0, 10.0, 1.0, 100.0]]),
    }
    meta = {"nbits": 4, "shape": [2, 4], "axis": 1, "packing": "4bit_u8", "method": "sinq"}
    values = torch.tensor([[0.0, 10, 2, 400], [0, 5, 0, 400]])
    return Made(values, None, tensors, CONFIG, files={SIDECAR: {"layer": {"meta": meta}}})


SHAPES = {"4bit-group-halved": (16, 96)}

CASES = [
    Case("sinq-by-hand", by_hand, "sinq", (2, 4), bytes={"codes": 4, "scales": 32, "zero_points": 16}),
    *(Case(f"sinq-{case}", golden(case), "sinq", shape := SHAPES.get(case, (32, 48)), total=shape[0] * (shape[1] + 1))
      for case in file.read("sinq")),
    Case("sinq-4bit-scales-as-bytes-reloaded", golden("4bit-scales-as-bytes", saved_once=True), "sinq", (32, 48),
         total=32 * 49),
    Case("sinq-experts", experts, "sinq", (32, 48), name="layer.down_proj.2.weight", total=6 * 32 * 48),
    Case("sinq-codes-not-packed", unpacked, "sinq", (32, 48), total=32 * 49),
]  # fmt: skip
