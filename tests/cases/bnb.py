"""bitsandbytes 4-bit and 8-bit, quantized by bitsandbytes on the CPU."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from tests.cases import Case, Made


def _holder(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layer = layer
    return model


def _flat_decode(weight, state) -> torch.Tensor:
    """The library's own decode; its portable path, since its AVX-512 path is wrong for some sizes."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = weight.data.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(codes, absmax.float(), state.code, state.blocksize, state.shape, torch.float32)


def four_bit(rows: int, columns: int, quant_type: str, storage: torch.dtype, nested: bool, blocksize: int = 64):
    def make() -> Made:
        torch.manual_seed(rows * columns)
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, quant_type=quant_type, quant_storage=storage, compress_statistics=nested
        )
        layer.weight.blocksize = blocksize
        layer.to("cpu")
        assert layer.weight.quant_state.blocksize == blocksize
        live = _holder(layer)
        config = {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
            }
        }
        values = _flat_decode(layer.weight, layer.weight.quant_state)
        return Made(values, live, live.state_dict(), config)

    return make


def experts() -> Made:
    """A fused stack of experts quantized in place by a parametrization."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    torch.manual_seed(3)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(3, 40, 24), requires_grad=False)
    replace_parameter_4bit(layer, "weight", quant_type="nf4", compress_statistics=True)
    live = _holder(layer)
    state = layer.parametrizations["weight"][0].quant_state
    return Made(_flat_decode(layer.parametrizations["weight"].original, state), live, live.state_dict())


def embedding() -> Made:
    torch.manual_seed(4)
    layer = bnb.nn.EmbeddingNF4(50, 64).to("cpu")
    return Made(_flat_decode(layer.weight, layer.weight.quant_state), _holder(layer))


def lost_by_copy() -> Made:
    """FSDP and `.data` copies turn the weight into a plain Parameter; the module still has the state."""
    made = four_bit(24, 64, "nf4", torch.bfloat16, nested=False)()
    layer = made.live.layer
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return Made(made.values, made.live)


def not_quantized_yet() -> Made:
    torch.manual_seed(5)
    layer = bnb.nn.Linear4bit(33, 7, bias=False)
    return Made(layer.weight.data.clone(), _holder(layer))


def packed_for_cpu() -> Made:
    """What the first forward leaves behind on a CPU with AVX512-BF16, made by the library's own function."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    made = four_bit(64, 192, "nf4", torch.uint8, nested=True)()
    weight = made.live.layer.weight
    codes, state = made.values, weight.quant_state
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, state)
    absmax = weight.quant_state.absmax.float().t().repeat_interleave(64, dim=1)  # bf16 now: the library rounded it
    before = four_bit(64, 192, "nf4", torch.uint8, nested=True)().live.layer.weight
    exact = bnb.functional.dequantize_blockwise(before.quant_state.absmax, before.quant_state.state2)
    exact = (exact + before.quant_state.offset).view(64, 3).repeat_interleave(64, dim=1)
    return Made((codes / exact) * absmax, made.live, tolerance=1e-6)


def eight_bit(*, after_forward: bool):
    def make() -> Made:
        torch.manual_seed(6)
        layer = bnb.nn.Linear8bitLt(33, 12, bias=False, has_fp16_weights=False).to("cpu")
        values = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        if after_forward:
            layer(torch.randn(2, 33))
            assert layer.weight.SCB is None
            assert layer.state.SCB is not None
        live = _holder(layer)
        config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        return Made(values, live, live.state_dict(), config)

    return make


def fp16_weights() -> Made:
    torch.manual_seed(7)
    layer = bnb.nn.Linear8bitLt(33, 12, bias=False, has_fp16_weights=True).half()
    return Made(layer.weight.data.float(), _holder(layer))


U8, BF16, F16, F32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32

CASES = [
    Case("nf4", four_bit(96, 128, "nf4", U8, False), "bnb-nf4", (96, 128),
         bytes={"codes": 6144, "scales": 4 * 192, "codebooks": 64}),
    Case("fp4", four_bit(96, 128, "fp4", U8, False), "bnb-fp4", (96, 128)),
    Case("nf4-double-quant", four_bit(96, 128, "nf4", U8, True), "bnb-nf4", (96, 128),
         bytes={"codes": 6144, "scales": 192 + 4, "codebooks": 64 + 1024}),
    Case("nf4-bf16-storage", four_bit(96, 160, "nf4", BF16, False), "bnb-nf4", (96, 160)),
    Case("fp4-f16-storage-double-quant", four_bit(96, 160, "fp4", F16, True), "bnb-fp4", (96, 160)),
    Case("nf4-f32-storage", four_bit(40, 64, "nf4", F32, True), "bnb-nf4", (40, 64)),
    Case("nf4-21-weights-not-22", four_bit(7, 3, "nf4", U8, False), "bnb-nf4", (7, 3),
         bytes={"codes": 11, "scales": 4, "codebooks": 64}),
    Case("nf4-odd-columns", four_bit(7, 33, "nf4", U8, True), "bnb-nf4", (7, 33)),
    Case("nf4-blocks-across-rows", four_bit(5, 96, "nf4", U8, False), "bnb-nf4", (5, 96)),
    Case("nf4-block-32", four_bit(10, 48, "nf4", U8, False, 32), "bnb-nf4", (10, 48)),
    Case("fp4-block-256", four_bit(10, 100, "fp4", U8, True, 256), "bnb-fp4", (10, 100)),
    Case("nf4-block-4096", four_bit(130, 66, "nf4", U8, False, 4096), "bnb-nf4", (130, 66)),
    Case("nf4-fused-experts", experts, "bnb-nf4", (3, 40, 24)),
    Case("nf4-embedding", embedding, "bnb-nf4", (50, 64)),
    Case("nf4-state-only-on-module", lost_by_copy, "bnb-nf4", (24, 64)),
    Case("nf4-packed-for-avx512-bf16", packed_for_cpu, "bnb-nf4", (64, 192)),
    Case("params4bit-not-quantized-yet", not_quantized_yet, "plain", (7, 33)),
    Case("int8", eight_bit(after_forward=False), "bnb-int8", (12, 33), bytes={"codes": 396, "scales": 48}),
    Case("int8-after-first-forward", eight_bit(after_forward=True), "bnb-int8", (12, 33)),
    Case("int8-has-fp16-weights", fp16_weights, "plain", (12, 33)),
]  # fmt: skip
