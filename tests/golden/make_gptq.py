"""Write tests/golden/gptq.safetensors: GPTQModel and auto-round pack and decode small weights.

    python -m tests.golden.make_gptq

Needs gptqmodel 7.6.0 and auto-round 0.16.1 beside torch; both pull in far more than a test needs, so the tests read
what this script wrote. Scales have three significant bits: then float16, which the libraries multiply in, is exact.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import nn

from tests.golden.file import Golden, write


def weight_of(codes, zeros, scales, g_idx):
    """codes (N, K), zeros and scales (N, G) -> (N, K)"""
    return (codes - zeros[:, g_idx]) * scales[:, g_idx]


def numbers(rows, columns, bits, group, *, symmetric, act_order, seed):
    torch.manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns))
    zeros = torch.full((rows, groups), 2 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, (rows, groups))
    scales = torch.randint(4, 8, (rows, groups)).float() / 2.0 ** torch.randint(9, 12, (rows, groups))
    g_idx = torch.arange(columns) // group
    if act_order:
        g_idx = g_idx[torch.randperm(columns)]
    return codes, zeros, scales, g_idx.to(torch.int32)


def gptqmodel(bits, *, rows=32, columns=64, group=32, symmetric=False, act_order=False, v1=True, label="gptq",
              pack_dtype=torch.int32, embedding=False, config=None):  # fmt: skip
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear, TorchQuantEmbeddings
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    codes, zeros, scales, g_idx = numbers(
        rows, columns, bits, group, symmetric=symmetric, act_order=act_order, seed=bits + rows + columns
    )
    weight = weight_of(codes, zeros, scales, g_idx.long())
    cls = TorchQuantEmbeddings if embedding else TorchLinear
    packed = cls(
        bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=columns, out_features=rows,
        bias=False, pack_dtype=pack_dtype, register_buffers=True, format=label,
    )  # fmt: skip
    if embedding:
        layer = nn.Embedding(columns, rows)
        layer.weight.data = weight.t().contiguous()
    else:
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight.data = weight
    packed.pack_original(layer, scales, zeros, g_idx)
    packed.eval()
    packed._init_wf_unsqueeze_buffers()
    packed.qzero_format(format=2)
    values = packed.dequantize_weight()
    values = values if embedding else values.t()
    assert torch.equal(values.float(), layer.weight.data), "float16 was not exact"
    if v1:
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=4))
    tensors = {f"layer.{part}": getattr(packed, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    record = {"config": said | {"checkpoint_format": label} | (config or {}), "kernel": cls.__name__,
              "zeros": 1 if v1 else 2, "planar": packed.planar}  # fmt: skip
    return Golden(tensors, values.half(), record)


def auto_round(bits, packing_format, *, rows=32, columns=64, group=32, symmetric=False):
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    codes, zeros, scales, g_idx = numbers(
        rows, columns, bits, group, symmetric=symmetric, act_order=False, seed=bits + rows + columns
    )
    if packing_format.endswith("auto_gptq"):
        zeros = zeros.clamp(min=1)  # less one is what it stores, and it cannot store -1
    cls = (qlinear_torch_zp if packing_format.endswith("auto_gptq") else qlinear_torch).QuantLinear
    packed = cls(bits, group, columns, rows, bias=False)
    packed.device = "cpu"
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = weight_of(codes, zeros, scales, g_idx.long())
    packed.pack(layer, scales, zeros, None, "cpu")
    packed.scales = packed.scales.float()
    values = packed(torch.eye(columns)).t()
    assert torch.equal(values, layer.weight.data)
    packed.scales = packed.scales.half()
    tensors = {f"layer.{part}": getattr(packed, part).clone() for part in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "auto-round", "bits": bits, "group_size": group, "sym": symmetric,
              "packing_format": packing_format}  # fmt: skip
    return Golden(tensors, values.half(), {"config": config, "kernel": cls.__module__})


GPTQ, PLAIN = "auto_round:auto_gptq", "auto_round"

if __name__ == "__main__":
    from gptqmodel.version import __version__ as gptqmodel_version

    cases = {f"v1-{bits}bit": gptqmodel(bits) for bits in (2, 3, 4, 8)}
    cases |= {f"planes-{bits}bit": gptqmodel(bits, v1=False, label="gptq_p") for bits in (3, 5, 6, 7)}
    cases |= {
        "v2-4bit": gptqmodel(4, v1=False, label="gptq_v2"),
        "v1-4bit-symmetric": gptqmodel(4, symmetric=True),
        "v2-under-v1-label": gptqmodel(4, symmetric=True, v1=False),
        "v2-3bit-under-v1-label": gptqmodel(3, symmetric=True, v1=False),
        "act-order": gptqmodel(4, columns=96, act_order=True),
        "odd-sizes": gptqmodel(4, rows=40, columns=72),
        "one-group": gptqmodel(4, group=64),
        "int16-words": gptqmodel(4, pack_dtype=torch.int16, v1=False, label="gptq_v2"),
        "embedding": gptqmodel(4, rows=24, columns=77, embedding=True),
        "auto-round-2bit": auto_round(2, GPTQ),
        "auto-round-3bit": auto_round(3, GPTQ),
        "auto-round-4bit": auto_round(4, GPTQ, columns=96),
        "auto-round-5bit": auto_round(5, GPTQ),
        "auto-round-6bit-plain-zeros": auto_round(6, PLAIN),
        "auto-round-7bit": auto_round(7, GPTQ),
        "auto-round-4bit-plain-zeros": auto_round(4, "auto_round:gptqmodel"),
        "auto-round-8bit": auto_round(8, GPTQ),
    }
    write(
        "gptq", f"gptqmodel {gptqmodel_version}, auto-round {version('auto-round')}, torch {torch.__version__}", cases
    )
