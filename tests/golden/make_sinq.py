"""Write tests/golden/sinq.safetensors: sinq's quantizer packs small weights and decodes them, in float32.

    python -m tests.golden.make_sinq FOLDER

FOLDER holds the unpacked wheel of sinq 0.2.0 without its `sitecustomize.py`. The package itself must never be
installed: that file imports sinq, torch and transformers at every start of Python.
"""

from __future__ import annotations

import sys

import torch

from tests.golden.file import Golden, write


def quantize(bits, *, rows=32, columns=48, group=24, tiles="1D", method="sinq"):
    from sinq.quantizer import Quantizer

    torch.manual_seed(int(10 * bits) + group)
    codes, meta = Quantizer.quantize(
        torch.randn(rows, columns), None, nbits=bits, group_size=group, axis=1, tiling_mode=tiles, method=method,
        compute_dtype=torch.float32, device="cpu", round_zero=bits == 4,
    )  # fmt: skip
    values = Quantizer.dequantize(codes, meta)
    tensors, numbers = {"layer.W_q": codes}, {}
    for name, value in meta.items():
        flatten(f"layer.meta.{name}", name, value, tensors, numbers)
    return Golden(tensors, values, {"meta": numbers})


def flatten(key, name, value, tensors, numbers):
    """As `SINQLinear._meta_to_cpu` and `save_weights_safetensors` do."""
    if isinstance(value, torch.Tensor):
        tensors[key] = value
    elif isinstance(value, tuple) and len(value) == 4:
        for at, inner in zip("xsm", value, strict=False):
            tensors[f"{key}.{at}"] = inner
        numbers[f"{name}.shape"] = list(value[3])
    else:
        plain = value is None or isinstance(value, (int, float, str))
        numbers[name] = list(value) if isinstance(value, (tuple, torch.Size)) else value if plain else str(value)


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    cases = {f"{bits}bit": quantize(bits) for bits in (8, 6, 5, 4, 3, 2, 1)}
    cases |= {
        "4bit-scales-as-bytes": quantize(4, method="sinq_quantAux"),
        "4bit-square-tiles-as-bytes": quantize(4, rows=32, columns=48, group=16, tiles="2D", method="sinq_quantAux"),
        "4bit-no-zero": quantize(4, method="sinq_noz"),
        "4bit-group-halved": quantize(4, rows=16, columns=96, group=64),
        "4bit-square-tiles": quantize(4, rows=32, columns=48, group=16, tiles="2D"),
        "nf4": quantize(4, method="sinq_nf4"),
        "nf3": quantize(3, method="sinq_nf3"),
        "nf4-square-tiles": quantize(4, rows=32, columns=48, group=16, tiles="2D", method="sinq_nf4"),
    }
    write("sinq", f"sinq 0.2.0, torch {torch.__version__}", cases)
