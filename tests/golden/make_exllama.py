"""Write tests/golden/exllama.safetensors: QQQ and EXL3 weights, decoded by GPTQModel's own torch kernels.

    python -m tests.golden.make_exllama

Needs gptqmodel 7.6.0. An EXL3 trellis may hold any bits, so random ones are decoded; values are kept as float16.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.golden.file import Golden, write


def qqq(*, rows=64, columns=128, group=32):
    from gptqmodel.nn_modules.qlinear.qqq import QQQTorchLinear

    QQQTorchLinear.SUPPORTS_GROUP_SIZE = [-1, group]
    torch.manual_seed(group)
    layer = nn.Linear(columns, rows, bias=False).half()
    packed = QQQTorchLinear(4, group, False, True, columns, rows)
    weight = layer.weight.data.float()
    if group == -1:
        scales = weight.abs().amax(1, keepdim=True) / 7
        packed.pack(layer, scales)
    else:
        extra = weight.abs().amax(1) / 127
        scales = weight.view(rows, -1, group).abs().amax(2) / 7
        packed.pack(layer, scales, extra)
    values, channel = packed._dequantize_weight_for_torch()
    tensors = {f"layer.{part}": packed._buffers[part].clone() for part in ("B", "s_channel", "s_group")}
    return Golden(tensors, (values * channel).t(), {"kernel": "QQQTorchLinear"})


def exl3(bits, codebook, *, rows=128, columns=128):
    from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear

    torch.manual_seed(bits)
    tensors = {
        "trellis": torch.randint(-(2**15), 2**15, (columns // 16, rows // 16, 16 * bits), dtype=torch.int16),
        "suh": torch.randn(columns).half(),
        "svh": torch.randn(rows).half(),
    }
    if codebook != "3inst":
        tensors[codebook] = torch.tensor({"mcg": -877912083, "mul1": -2082680531}[codebook], dtype=torch.int32)
    layer = ExllamaV3TorchLinear.from_tensors(in_features=columns, out_features=rows, name="layer", tensors=tensors)
    values = layer.get_weight_tensor().t()
    return Golden({f"layer.{name}": tensor for name, tensor in tensors.items()}, values.half(),
                  {"kernel": "ExllamaV3TorchLinear"})  # fmt: skip


if __name__ == "__main__":
    from gptqmodel.version import __version__

    cases = {
        "qqq": qqq(),
        "qqq-one-group": qqq(rows=128, columns=64, group=-1),
        "exl3-3bit": exl3(3, "3inst", columns=256),
        "exl3-5bit-mcg": exl3(5, "mcg"),
        "exl3-4bit-mul1": exl3(4, "mul1"),
    }
    write("exllama", f"gptqmodel {__version__}, torch {torch.__version__}", cases)
