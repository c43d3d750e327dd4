"""GPTQ, packed and decoded by GPTQModel and auto-round (tests/golden/make_gptq.py), and worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases import Case, Made
from tests.cases.buffer_linear import live_layer
from tests.golden import file

MODULE = "gptqmodel.nn_modules.qlinear.torch"


def golden(case: str, *, name: str = "layer", **config):
    """A golden case; `config` replaces what its config says, and None leaves it out."""

    def make() -> Made:
        found = file.read("gptq")[case]
        said = {key: value for key, value in (found.record["config"] | config).items() if value is not None}
        tensors = {key.replace("layer", name, 1): tensor for key, tensor in found.tensors.items()}
        live = _live(found) if not config and name == "layer" else None
        return Made(found.values, live, tensors, {"quantization_config": said} if config != NOTHING else {})

    return make


# No config at all.
NOTHING = dict.fromkeys(
    ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "packing_format")
)


def _live(found: file.Golden) -> nn.Module:
    config, kernel = found.record["config"], found.record["kernel"]
    sizes = {"bits": config["bits"], "group_size": config["group_size"]}
    if kernel.startswith("auto_round_extension."):
        return live_layer(found.tensors, "QuantLinear", kernel, infeatures=found.values.shape[1], **sizes)
    zeros = found.record["zeros"]
    sizes |= {"in_features": len(found.tensors["layer.g_idx"]), "planar": found.record["planar"]}
    return live_layer(found.tensors, kernel, MODULE, qzero_format=lambda: zeros, **sizes)


def by_hand() -> Made:
    """Eight inputs, eight outputs, one group: a word holds a column, its lowest nibble the first input."""
    tensors = {
        "layer.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "layer.qzeros": torch.tensor([[0x77777777]], dtype=torch.int32),  # version 1: less one
        "layer.scales": torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]], dtype=torch.float16),
        "layer.g_idx": torch.zeros(8, dtype=torch.int32),
        "layer.bias": torch.zeros(8, dtype=torch.float16),
    }
    values = torch.arange(-8.0, 0.0) * torch.arange(0.5, 4.5, 0.5).view(-1, 1)
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True}}
    return Made(values, live_layer(tensors, "QuantLinear", "auto_gptq.nn_modules.qlinear", bits=4), tensors, config)


def wrapped() -> Made:
    """A zero point of 0 less one is 15 and borrows from the next field, so adding one must carry into it."""
    true_zeros = 0x00000050 | 0x88888800
    tensors = {
        "layer.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "layer.qzeros": torch.tensor([[(true_zeros - 0x11111111)]], dtype=torch.int32),
        "layer.scales": torch.ones(1, 8, dtype=torch.float16),
        "layer.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    zeros = torch.tensor([0.0, 5.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]).view(-1, 1)
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False}}
    return Made(torch.arange(8.0) - zeros, None, tensors, config)


def live_embedding() -> Made:
    return Made(file.read("gptq")["embedding"].values, _live(file.read("gptq")["embedding"]))


def gptqmodel_live() -> Made:
    """The real class, zero points turned into version 2 in memory while the label still says version 1."""
    pytest.importorskip("gptqmodel", reason="gptqmodel 7.6.0 is not installed: its live class is not checked")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    found = file.read("gptq")["v1-4bit"]
    layer = TorchLinear(bits=4, group_size=32, sym=False, desc_act=False, in_features=64, out_features=32, bias=True)
    for name, tensor in found.tensors.items():
        getattr(layer, name.removeprefix("layer.")).copy_(tensor)
    convert_gptq_v1_to_v2_format_module(layer, bits=4, pack_dtype=torch.int32)
    layer.eval().post_init()
    model = nn.Module()
    model.layer = layer
    return Made(found.values, model)


DYNAMIC = {"+:.*layer.*": {"bits": 8}, "-:lm_head": {}}
EXTRA = {"layer": {"bits": 3}, "lm_head": {"bits": 16}}
SYMMETRIC = ("v1-4bit-symmetric", "v2-under-v1-label", "v2-3bit-under-v1-label")
SHAPES = {"act-order": (32, 96), "odd-sizes": (40, 72), "embedding": (77, 24), "auto-round-4bit": (32, 96)}
ALL = [case for case in file.read("gptq") if case != "embedding"]

CASES = [
    Case("gptq-by-hand", by_hand, "gptq", (8, 8), total=72,
         bytes={"codes": 32, "zero_points": 4, "scales": 16, "index": 32}),
    Case("gptq-zero-point-wraps", wrapped, "gptq", (8, 8)),
    *(Case(f"gptq-{case}", golden(case), "gptq", SHAPES.get(case, (32, 64))) for case in ALL),
    *(Case(f"gptq-{case}-no-config", golden(case, **NOTHING), "gptq", (32, 64)) for case in SYMMETRIC),
    Case("gptq-embedding", golden("embedding", name="embed_tokens"), "gptq", (77, 24), name="embed_tokens.weight"),
    Case("gptq-embedding-live", live_embedding, "gptq", (77, 24)),
    Case("gptq-bits-by-pattern", golden("v1-8bit", bits=4, dynamic=DYNAMIC), "gptq", (32, 64)),
    Case("gptq-bits-by-extra-config", golden("auto-round-3bit", bits=4, extra_config=EXTRA), "gptq", (32, 64)),
    Case("gptq-auto-round-no-packing-format", golden("auto-round-5bit", packing_format=None), "gptq", (32, 64)),
    Case("gptq-gptqmodel-live", gptqmodel_live, "gptq", (32, 64), total=2048 + 32),
]  # fmt: skip
