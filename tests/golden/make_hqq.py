"""Write tests/golden/hqq.safetensors: hqq quantizes small weights and decodes them, in float32.

    python -m tests.golden.make_hqq

Needs hqq 0.2.8.post1, whose installation tries to build CUDA kernels.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.golden.file import Golden, write


def quantize(bits, *, rows=16, columns=48, group=24, axis=1, dtype=torch.float32, view_as_float=False, bias=False):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(int(10 * bits) + axis)
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=view_as_float)
    linear = nn.Linear(columns, rows, bias=bias)
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    tensors = {f"layer.{name}": tensor.clone() for name, tensor in layer.state_dict().items() if tensor is not None}
    meta = {name: value for name, value in layer.meta.items() if not isinstance(value, torch.Tensor)}
    meta = {name: value if isinstance(value, (int, float)) else str(value) for name, value in meta.items()}
    record = {"meta": meta | {"shape": list(layer.meta["shape"])}, "dtype": str(dtype)}
    return Golden(tensors, layer.dequantize().float(), record)


if __name__ == "__main__":
    cases = {
        f"{bits}bit-axis{axis}": quantize(bits, axis=axis) for bits in (8, 6, 5, 4, 3, 2, 1.58, 1) for axis in (0, 1)
    }
    cases |= {
        "3bit-padded": quantize(3, rows=12, columns=64, group=32),
        "3bit-axis0-padded": quantize(3, rows=12, columns=64, group=64, axis=0),
        "groups-over-rows": quantize(4, rows=8, columns=20, group=16),
        "one-group-per-row": quantize(4, rows=6, columns=24, group=None),
        "float16": quantize(4, dtype=torch.float16),
        "bfloat16-seen-as-float": quantize(4, dtype=torch.bfloat16, view_as_float=True),
        "float32-seen-as-float": quantize(2, view_as_float=True),
        "3bit-float16-seen-as-float": quantize(3, dtype=torch.float16, view_as_float=True),
        "bias": quantize(4, bias=True),
    }
    write("hqq", f"hqq 0.2.8.post1, torch {torch.__version__}", cases)
