"""Write tests/golden/awq.safetensors: AutoAWQ, GPTQModel and auto-round pack small weights, and decode where a CPU can.

    python -m tests.golden.make_awq PATH/TO/autoawq-0.2.9

Needs gptqmodel 7.6.0, auto-round 0.16.1 and the unpacked source of autoawq 0.2.9, whose package cannot be imported
beside a current transformers: its packers are taken past its `__init__`. The kernels of gemv, gemv_fast and Marlin
need a GPU: there the values are those that were packed. Scales have three significant bits, so float16 is exact.
"""

from __future__ import annotations

import sys
import types
from importlib.metadata import version

import torch
from torch import nn

from tests.golden.file import Golden, write


def numbers(rows, columns, bits, group, *, symmetric=False):
    """codes (N, K), zeros and scales (N, G)"""
    torch.manual_seed(rows + columns + bits)
    groups = columns // group
    codes = torch.randint(0, 2**bits, (rows, columns))
    zeros = torch.full((rows, groups), 2 ** (bits - 1)) if symmetric else torch.randint(0, 2**bits, (rows, groups))
    scales = torch.randint(4, 8, (rows, groups)).float() / 2.0 ** torch.randint(9, 12, (rows, groups))
    return codes, zeros, scales


def linear_of(codes, zeros, scales):
    group = codes.shape[1] // zeros.shape[1]
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    layer.weight.data = (codes - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    return layer


def buffers(packed):
    return {f"layer.{name}": tensor.clone() for name, tensor in packed._buffers.items() if tensor is not None}


def config(bits, group, form, **more):
    return {"quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": form} | more


def gptqmodel(kind, bits, *, rows, columns, group):
    from gptqmodel.nn_modules.qlinear import gemv_awq, gemv_fast_awq, torch_awq
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    cls, form = {
        "gemm": (torch_awq.AwqTorchLinear, "gemm"),
        "gemv": (gemv_awq.AwqGEMVLinear, "gemv"),
        "gemv_fast": (gemv_fast_awq.AwqGEMVFastLinear, "gemv_fast"),
        "llm-awq": (gemv_fast_awq.LLMAwqLinear, "llm-awq"),
    }[kind]
    codes, zeros, scales = numbers(rows, columns, bits, group)
    layer = linear_of(codes, zeros, scales)
    packed = cls(bits, group, True, False, columns, rows, bias=False, register_buffers=True,
                 pack_dtype=torch.int16 if form in ("gemv_fast", "llm-awq") else torch.int32)  # fmt: skip
    packed.pack(layer, scales, zeros)
    values = layer.weight.data
    if kind == "gemm":
        values = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, bits, group).t()
        assert torch.equal(values.float(), layer.weight.data)
    return Golden(buffers(packed), values.half(), {"config": config(bits, group, form), "kernel": cls.__name__,
                                                   "module": cls.__module__})  # fmt: skip


def auto_round(bits, *, rows, columns, group):
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    codes, zeros, scales = numbers(rows, columns, bits, group)
    layer = linear_of(codes, zeros, scales)
    packed = WQLinear_GEMM.from_linear(
        layer, bits, group, scales=scales.t(), zeros=zeros.t().contiguous(), device="cpu"
    )
    values = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, bits, group).t()
    assert torch.equal(values.float(), layer.weight.data)
    said = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": bits, "group_size": group}
    return Golden(buffers(packed), values.half(), {"config": said | {"sym": False}, "kernel": "WQLinear_GEMM",
                                                   "module": WQLinear_GEMM.__module__})  # fmt: skip


def autoawq(kind, source, *, rows, columns, group):
    for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [f"{source}/{package.replace('.', '/')}"]
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.modules.linear.marlin import WQLinear_Marlin

    codes, zeros, scales = numbers(rows, columns, 4, group, symmetric=kind == "marlin")
    layer = linear_of(codes, zeros, scales)
    cls = WQLinear_Marlin if kind == "marlin" else WQLinear_GEMV
    more = {} if kind == "marlin" else {"zeros": zeros}
    packed = cls.from_linear(layer, 4, group, scales=scales, **more)
    said = config(4, group, kind, zero_point=kind != "marlin")
    return Golden(buffers(packed), layer.weight.data.half(), {"config": said, "kernel": cls.__name__,
                                                              "module": cls.__module__})  # fmt: skip


if __name__ == "__main__":
    from gptqmodel.version import __version__ as gptqmodel_version

    cases = {
        f"gemm-{bits}bit": gptqmodel("gemm", bits, rows=40, columns=48, group=16) for bits in (2, 3, 4, 5, 6, 7, 8)
    }
    cases |= {f"auto-round-{bits}bit": auto_round(bits, rows=32, columns=48, group=16) for bits in (4, 5, 6, 7)}
    cases |= {
        "gemv": autoawq("gemv", sys.argv[1], rows=40, columns=96, group=32),
        "gemv-looks-like-gptq": autoawq("gemv", sys.argv[1], rows=8, columns=256, group=32),
        "gemv-group-64": gptqmodel("gemv", 4, rows=64, columns=128, group=64),
        "gemv-fast": gptqmodel("gemv_fast", 4, rows=24, columns=192, group=64),
        "llm-awq": gptqmodel("llm-awq", 4, rows=24, columns=128, group=128),
        "gemv-fast-square": gptqmodel("gemv_fast", 4, rows=64, columns=64, group=32),
        "marlin": autoawq("marlin", sys.argv[1], rows=128, columns=64, group=32),
        "marlin-one-group": autoawq("marlin", sys.argv[1], rows=64, columns=48, group=48),
    }
    libraries = f"gptqmodel {gptqmodel_version}, auto-round {version('auto-round')}, autoawq 0.2.9"
    write("awq", f"{libraries}, torch {torch.__version__}", cases)
