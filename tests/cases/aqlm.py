"""AQLM: layers of the real library, decoded by its own `_dequantize_weight`."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from tests.cases import Case, Made

os.environ.setdefault("AQ_USE_JIT", "0")


def _config(books: int, bits: int, out_size: int, in_size: int) -> dict:
    return {
        "quantization_config": {
            "quant_method": "aqlm",
            "num_codebooks": books,
            "nbits_per_codebook": bits,
            "out_group_size": out_size,
            "in_group_size": in_size,
        }
    }


def layer(rows: int, columns: int, books: int, bits: int, out_size: int, in_size: int, *, forward: bool = False):
    def make() -> Made:
        aqlm = pytest.importorskip("aqlm", reason="aqlm is not installed: `pip install aqlm`")
        from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data

        torch.manual_seed(rows * columns)
        linear = aqlm.QuantizedLinear(columns, rows, in_size, out_size, books, bits, bias=True, dtype=torch.float32)
        with torch.no_grad():
            linear.codebooks.normal_()
            linear.scales.uniform_(0.5, 2.0)
            linear.bias.zero_()
            codes = torch.randint(0, 2**bits, linear.codes.shape)
            codes.view(-1)[-1] = 2**bits - 1
            linear.codes.copy_(pack_int_data(codes, bits))
        values = _dequantize_weight(unpack_int_data(linear.codes, bits), linear.codebooks, linear.scales)
        if forward:
            before = linear.codes.clone()
            _run(linear)
            assert torch.equal(linear.codes, before.transpose(0, 1))  # turned around in place
        model = nn.Module()
        model.layer = linear
        # A square layer that ran is saved turned around, and its file cannot say so.
        tensors = None if forward and linear.codes.shape[0] == linear.codes.shape[1] else model.state_dict()
        return Made(values, model, tensors, _config(books, bits, out_size, in_size), tolerance=1e-6)

    return make


def _run(linear: nn.Module) -> None:
    """One forward on the CPU; codes are turned around before its kernel is chosen, which needs numba and scipy.

    Its answer is of no use: in 1.1.7 the threads of `numba_gemm_lut` add to the same output without a lock.
    """
    try:
        linear(torch.eye(linear.in_features))
    except ImportError:
        if linear.codes.shape[0] == linear.codes.shape[1]:
            pytest.skip("numba and scipy are not installed: aqlm cannot run on the CPU")


def by_hand() -> Made:
    """Two rows of two tiles, two codebooks: 10 + 1, 20 + 2, times the scale of the row."""
    tensors = {
        "layer.codes": torch.tensor([[[0, 1], [-1, 0]], [[1, 1], [0, -1]]], dtype=torch.int8),  # -1 is entry 3
        "layer.codebooks": torch.tensor(
            [[[10, 11], [20, 21], [30, 31], [40, 41]], [[1, 1], [2, 2], [3, 3], [4, 4]]], dtype=torch.float16
        ).view(2, 4, 1, 2),
        "layer.scales": torch.tensor([1.0, 0.5], dtype=torch.float16).view(2, 1, 1, 1),
    }
    return Made(torch.tensor([[12, 13, 41, 42], [11, 11.5, 7, 7.5]]), None, tensors)


CASES = [
    Case("aqlm-by-hand", by_hand, "aqlm", (2, 4), bytes={"codes": 8, "codebooks": 32, "scales": 4}),
    Case("aqlm-1x16", layer(24, 40, 1, 16, 1, 8), "aqlm", (24, 40), total=24 * 40 + 24,
         bytes={"codes": 24 * 5 * 2, "codebooks": 65536 * 8 * 4, "scales": 24 * 4}),
    Case("aqlm-2x8", layer(24, 40, 2, 8, 1, 8), "aqlm", (24, 40), total=24 * 40 + 24),
    Case("aqlm-3x5-tiles-of-two-rows", layer(30, 12, 3, 5, 2, 4), "aqlm", (30, 12), total=30 * 12 + 30),
    Case("aqlm-2x8-after-first-forward", layer(24, 40, 2, 8, 1, 8, forward=True), "aqlm", (24, 40),
         total=24 * 40 + 24),
    Case("aqlm-2x8-square-after-first-forward", layer(6, 48, 2, 8, 1, 8, forward=True), "aqlm", (6, 48),
         total=6 * 48 + 6),
]  # fmt: skip
