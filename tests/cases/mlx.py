"""MLX, quantized by mlx on the CPU, saved as mlx-lm saves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cases import Case, Made


def _mlx():
    return pytest.importorskip("mlx.core", reason="mlx is not installed: `pip install mlx[cpu]`")


def _torch(array) -> torch.Tensor:
    """The same bytes as a torch tensor; bfloat16 has no numpy form."""
    mx = _mlx()
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _quantization(mode: str, group: int, bits: int, **modules) -> dict:
    block = {"group_size": group, "bits": bits, "mode": mode} | modules
    return {"quantization": block, "quantization_config": block}


def quantized(
    shape: tuple[int, ...],
    mode: str,
    group: int,
    bits: int,
    *,
    dtype="float32",
    config: dict | None = None,
    values=None,
):
    def make() -> Made:
        mx = _mlx()
        random = mx.random.normal(shape, key=mx.random.key(bits * group))
        weight = (random if values is None else mx.array(values.numpy())).astype(getattr(mx, dtype))
        codes, scales, *biases = mx.quantize(weight, group, bits, mode=mode)
        exact = [part.astype(mx.float32) for part in biases]  # the library rounds to the dtype of its scales
        decoded = mx.dequantize(
            codes, scales.astype(mx.float32) if biases else scales, *(exact or [None]), group, bits, mode,
            dtype=mx.float32,
        )  # fmt: skip
        tensors = dict(zip(("layer.weight", "layer.scales", "layer.biases"), (codes, scales, *biases), strict=False))
        tensors = {name: _torch(array) for name, array in tensors.items()} | {"norm.weight": torch.ones(shape[-1])}
        whole = _quantization(mode, group, bits) if config is None else config
        return Made(_torch(decoded), None, tensors, whole, tolerance=1e-7)

    return make


def by_hand() -> Made:
    """Three-bit codes 0 to 7 over and over: 11 codes do not fill a word, the twelfth lies in two."""
    codes = [index % 8 for index in range(32)]
    stream = sum(code << 3 * index for index, code in enumerate(codes))
    words = [stream >> 32 * word & 0xFFFFFFFF for word in range(3)]
    assert words[0] == 0b10_001_000_111_110_101_100_011_010_001_000
    tensors = {
        "layer.weight": torch.tensor([words], dtype=torch.uint32),
        "layer.scales": torch.tensor([[0.5]]),
        "layer.biases": torch.tensor([[-1.0]]),
        "layer.bias": torch.tensor([7.0]),  # the layer's own
    }
    values = torch.tensor([[0.5 * code - 1.0 for code in codes]])
    return Made(values, None, tensors, _quantization("affine", 32, 3))


def global_scale() -> Made:
    """Stacked experts of nvfp4, each with a scale of its own: mlx-lm's `_quantize_experts`."""
    mx = _mlx()
    weight = mx.random.normal((3, 6, 48), key=mx.random.key(3))
    largest = mx.max(mx.abs(weight), axis=(-2, -1))
    made = [mx.quantize(weight[e], 16, 4, mode="nvfp4", global_scale=largest[e]) for e in range(3)]
    values = [
        mx.dequantize(codes, scales, None, 16, 4, "nvfp4", global_scale=largest[e], dtype=mx.float32)
        for e, (codes, scales) in enumerate(made)
    ]
    tensors = {
        "layer.weight": mx.stack([codes for codes, _ in made]),
        "layer.scales": mx.stack([scales for _, scales in made]),
        "layer.global_scale": largest,
    }
    tensors = {name: _torch(array) for name, array in tensors.items()}
    return Made(_torch(mx.stack(values)), None, tensors, _quantization("nvfp4", 16, 4), tolerance=1e-6)


def every_scale(mode: str, group: int, bits: int):
    """All 256 bytes as scales (255 of E8M0 left out: MLX reads infinity, the OCP standard NaN)."""

    def make() -> Made:
        mx = _mlx()
        count = 256 if mode == "nvfp4" else 255
        codes = mx.random.randint(0, 2**31 - 1, (count, group * bits // 32), key=mx.random.key(9)).astype(mx.uint32)
        codes = codes * 2 + codes % 3
        scales = mx.arange(count).astype(mx.uint8).reshape(count, 1)
        values = mx.dequantize(codes, scales, None, group, bits, mode, dtype=mx.float32)
        tensors = {"layer.weight": _torch(codes), "layer.scales": _torch(scales)}
        return Made(_torch(values), None, tensors, _quantization(mode, group, bits))

    return make


OWN_BITS = _quantization("affine", 64, 4, layer={"group_size": 32, "bits": 6})
DEFAULT_IS_4_BITS = _quantization("affine", 64, 4)

CASES = [
    Case("mlx-3bit-by-hand", by_hand, "mlx-affine-3bit", (1, 32), total=33,
         bytes={"codes": 12, "scales": 4, "zero_points": 4}),
    *(Case(f"mlx-{bits}bit-group-{group}", quantized((7, 384), "affine", group, bits), f"mlx-affine-{bits}bit",
           (7, 384), total=7 * 384 + 384, bytes={"codes": 7 * 48 * bits, "scales": 4 * 7 * (384 // group)})
      for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    Case("mlx-4bit-bf16", quantized((50, 192), "affine", 64, 4, dtype="bfloat16"), "mlx-affine-4bit", (50, 192),
         total=50 * 192 + 192, bytes={"codes": 4800, "scales": 300, "zero_points": 300}),
    Case("mlx-5bit-f16-experts", quantized((3, 10, 64), "affine", 32, 5, dtype="float16"), "mlx-affine-5bit",
         (3, 10, 64), total=3 * 10 * 64 + 64),
    Case("mlx-mxfp4", quantized((9, 96), "mxfp4", 32, 4), "mlx-mxfp4", (9, 96), total=9 * 96 + 96),
    Case("mlx-nvfp4", quantized((10, 48), "nvfp4", 16, 4), "mlx-nvfp4", (10, 48), total=10 * 48 + 48),
    Case("mlx-mxfp8", quantized((9, 96), "mxfp8", 32, 8), "mlx-mxfp8", (9, 96), total=9 * 96 + 96),
    *(Case(f"mlx-{mode}-every-scale", every_scale(mode, group, bits), f"mlx-{mode}",
           (256 if mode == "nvfp4" else 255, group))
      for mode, group, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8))),
    Case("mlx-nvfp4-global-scale-per-expert", global_scale, "mlx-nvfp4", (3, 6, 48)),
    Case("mlx-own-bits-of-a-module", quantized((7, 192), "affine", 32, 6, config=OWN_BITS), "mlx-affine-6bit",
         (7, 192), total=7 * 192 + 192),
    Case("mlx-module-that-the-default-does-not-fit", quantized((7, 192), "affine", 32, 3, config=DEFAULT_IS_4_BITS),
         "mlx-affine-3bit", (7, 192), total=7 * 192 + 192),
    Case("mlx-mxfp4-without-config", quantized((7, 64), "mxfp4", 32, 4, config={}), "mlx-mxfp4", (7, 64),
         total=7 * 64 + 64),
    Case("mlx-5bit-without-config", quantized((7, 128), "affine", 128, 5, config={}), "mlx-affine-5bit", (7, 128),
         total=7 * 128 + 128),
]  # fmt: skip
