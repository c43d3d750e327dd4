"""QQQ and EXL3, decoded by GPTQModel's torch kernels (tests/golden/make_exllama.py)."""

from __future__ import annotations

import torch

from tests.cases import Case, Made
from tests.cases.buffer_linear import live_layer
from tests.golden import file

MODULES = {"QQQTorchLinear": "gptqmodel.nn_modules.qlinear.qqq",
           "ExllamaV3TorchLinear": "gptqmodel.nn_modules.exllamav3_torch"}  # fmt: skip


def golden(case: str, *, tolerance: float = 0.0, method: str = "exl3"):
    def make() -> Made:
        found = file.read("exllama")[case]
        tensors = found.tensors | {"layer.bias": torch.zeros(found.values.shape[0]).half()}
        kernel = found.record["kernel"]
        config = {"quantization_config": {"quant_method": method}}
        return Made(found.values, live_layer(tensors, kernel, MODULES[kernel]), tensors, config, tolerance=tolerance)

    return make


def signs() -> Made:
    """Old files keep the scales as signs, 16 to the word, lowest bit first, a set bit for a minus."""
    made = golden("exl3-3bit", tolerance=2**-11)()
    made.tensors = made.tensors | {"layer.su": torch.full((16,), 2, dtype=torch.int16)}
    old = made.tensors.pop("layer.suh").float()
    inputs = torch.ones(256)
    inputs[1::16] = -1
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 128:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    hadamard = hadamard / 128**0.5
    outputs = made.tensors["layer.svh"].float().view(-1, 1)
    inner = hadamard @ (made.values.float() / outputs)  # both Hadamard matrices undo themselves
    return Made((hadamard @ (inner / old * inputs)) * outputs, None, made.tensors, made.config, tolerance=2**-6)


def exl2() -> Made:
    """96 inputs and 40 outputs: 64 inputs of 5 bits in 10 rows of words, then 32 of 3 bits in 3."""
    tensors = {
        "layer.q_weight": torch.zeros(13, 40, dtype=torch.int32),
        "layer.q_invperm": torch.arange(96, dtype=torch.int16),
        "layer.q_scale": torch.zeros(2, 5, dtype=torch.int32),
        "layer.q_scale_max": torch.ones(2, dtype=torch.float16),
        "layer.q_groups": torch.tensor([5, 0, 3, 10], dtype=torch.int16),
    }
    return Made(None, None, tensors, {"quantization_config": {"quant_method": "exl2"}})


def bitblas(*shape: int):
    """24 outputs, 64 inputs of 4 bits in two groups; the codes in whatever shape."""

    def make() -> Made:
        tensors = {
            "layer.qweight": torch.zeros(*shape, dtype=torch.int8),
            "layer.scales": torch.ones(24, 2, dtype=torch.float16),
            "layer.qzeros": torch.zeros(2, 12, dtype=torch.int8),
        }
        config = {"quant_method": "gptq", "checkpoint_format": "bitblas", "bits": 4}
        return Made(None, None, tensors, {"quantization_config": config})

    return make


def half_bits() -> Made:
    """Two and a half bits: rates that only exllamav3's own kernels read."""
    tensors = {
        "layer.trellis": torch.zeros(8, 16, 40, dtype=torch.int16),
        "layer.suh": torch.ones(128, dtype=torch.float16),
        "layer.svh": torch.ones(256, dtype=torch.float16),
        "layer.mul1": torch.zeros((), dtype=torch.int32),
    }
    return Made(None, None, tensors, {"quantization_config": {"quant_method": "exl3", "bits": 2.5}})


EXL3 = ("exl3-3bit", "exl3-5bit-mcg", "exl3-4bit-mul1")
HALF = 2**-11  # the golden values are float16

CASES = [
    Case("qqq", golden("qqq", method="qqq"), "qqq", (64, 128), total=64 * 129,
         bytes={"codes": 64 * 128 // 2, "scales": 4 * 64 + 2 * 4 * 64}),
    Case("qqq-one-group", golden("qqq-one-group", method="qqq"), "qqq", (128, 64), total=128 * 65),
    *(Case(case, golden(case, tolerance=HALF), "exl3", shape := (128, 256 if case == "exl3-3bit" else 128),
           total=128 * (shape[1] + 1)) for case in EXL3),
    Case("exl2", exl2, "exl2", (40, 96), bytes={"codes": 2080, "scales": 44, "index": 192, "bookkeeping": 8}),
    Case("bitblas", bitblas(24, 32), "bitblas", (24, 64), bytes={"codes": 768, "scales": 96, "zero_points": 24}),
    Case("bitblas-rearranged", bitblas(3, 4, 8, 8), "bitblas", (24, 64)),
    Case("exl3-half-bits", half_bits, "exl3", (256, 128), bytes={"codes": 10240, "scales": 768, "codebooks": 4}),
    Case("exl3-signs", signs, "exl3", (128, 256), total=128 * 257),
]  # fmt: skip
