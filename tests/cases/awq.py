"""AWQ in all its versions, packed by AutoAWQ, GPTQModel and auto-round (tests/golden/make_awq.py), and by hand."""

from __future__ import annotations

import torch

from tests.cases import Case, Made
from tests.cases.buffer_linear import live_layer
from tests.golden import file


def golden(case: str, **config):
    """A golden case; `config` replaces what its config says, and None leaves it out."""

    def make() -> Made:
        found = file.read("awq")[case]
        said = {key: value for key, value in (found.record["config"] | config).items() if value is not None}
        rows, columns = found.values.shape
        sizes = {"bits": said.get("bits"), "in_features": columns, "out_features": rows}
        kernel, module = found.record["kernel"], found.record["module"]
        live = None if config else live_layer(found.tensors, kernel, module, group_size=said["group_size"], **sizes)
        return Made(found.values, live, dict(found.tensors), {"quantization_config": said} if said else {})

    return make


# No config at all.
NOTHING = dict.fromkeys(("quant_method", "bits", "group_size", "zero_point", "version", "packing_format", "sym"))


def by_hand() -> Made:
    """Two inputs, eight outputs: the nibbles of a word, lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        "layer.qweight": torch.tensor([[0x76543210], [0x00000007]], dtype=torch.int32),
        "layer.qzeros": torch.tensor([[0x00000001]], dtype=torch.int32),  # of output 0
        "layer.scales": torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]], dtype=torch.float16),
        "layer.bias": torch.zeros(8, dtype=torch.float16),
    }
    codes = torch.tensor([[0.0, 4, 1, 5, 2, 6, 3, 7], [7, 0, 0, 0, 0, 0, 0, 0]])
    zeros = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 2, "version": "gemm"}}
    values = ((codes - zeros) * torch.arange(0.5, 4.5, 0.5)).t()
    return Made(values, live_layer(tensors, "WQLinear_GEMM", "awq.modules.linear.gemm", w_bit=4), tensors, config)


def bfloat16_scales() -> Made:
    made = golden("gemm-4bit", torch_dtype="bfloat16")()
    made.tensors["layer.scales"] = made.tensors["layer.scales"].to(torch.bfloat16)  # three bits: nothing is lost
    return made


def marlin_of_gptq() -> Made:
    """The names that GPTQ's Marlin checkpoints use, one group over all inputs among them."""
    made = golden("marlin-one-group")()
    tensors = {"layer.B": made.tensors["layer.qweight"], "layer.s": made.tensors["layer.scales"]}
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "is_marlin_format": True}
    live = live_layer(tensors, "QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_marlin")
    return Made(made.values, live, tensors, {"quantization_config": config})


def awq_case(case: str, scheme: str, shape: tuple[int, int], suffix: str = "", **config) -> Case:
    return Case(f"awq-{case}{suffix}", golden(case, **config), scheme, shape)


CASES = [
    Case("awq-by-hand", by_hand, "awq", (8, 2), total=24, bytes={"codes": 8, "zero_points": 4, "scales": 16}),
    *(awq_case(f"gemm-{bits}bit", "awq", (40, 48)) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(awq_case(f"gemm-{bits}bit", "awq", (40, 48), "-no-config", **NOTHING) for bits in (2, 3, 4, 8)),
    *(awq_case(f"auto-round-{bits}bit", "awq", (32, 48)) for bits in (4, 5, 6, 7)),
    Case("awq-bfloat16-scales", bfloat16_scales, "awq", (40, 48)),
    awq_case("gemm-4bit", "awq", (40, 48), "-labelled-llm-awq", version="llm-awq"),
    awq_case("gemv", "awq-gemv", (40, 96)),
    awq_case("gemv-looks-like-gptq", "awq-gemv", (8, 256)),
    awq_case("gemv-group-64", "awq-gemv", (64, 128)),
    awq_case("gemv", "awq-gemv", (40, 96), "-no-config", **NOTHING),
    awq_case("gemv-looks-like-gptq", "awq-gemv", (8, 256), "-no-config", **NOTHING),
    awq_case("gemv-fast", "awq-gemv-fast", (24, 192)),
    awq_case("gemv-fast", "awq-gemv-fast", (24, 192), "-no-config", **NOTHING),
    awq_case("gemv-fast-square", "awq-gemv-fast", (64, 64)),
    awq_case("llm-awq", "awq-gemv-fast", (24, 128)),
    awq_case("llm-awq", "awq-gemv-fast", (24, 128), "-labelled-gemm", version="gemm"),
    awq_case("marlin", "marlin", (128, 64)),
    awq_case("marlin-one-group", "marlin", (64, 48)),
    awq_case("marlin", "marlin", (128, 64), "-no-config", **NOTHING),
    Case("marlin-of-gptq", marlin_of_gptq, "marlin", (64, 48)),
]  # fmt: skip
