"""torchao, quantized by torchao on the CPU; flattened by its own safetensors support."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from tests.cases import Case, Made


def _library():
    logging.getLogger("torchao").setLevel(logging.ERROR)
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def _holder(weight) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _flattened(model: nn.Module) -> tuple[dict, dict]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict({"layer.weight": model.layer.weight.data})
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    return {"tensors": tensors, "metadata": metadata}, config


def _made(weight, values=None, *, tolerance: float = 0.0, saved: bool = True) -> Made:
    model = _holder(weight)
    values = weight.dequantize() if values is None else values
    if not saved:
        return Made(values, model, tolerance=tolerance)
    kept, config = _flattened(model)
    return Made(values, model, config=config, tolerance=tolerance, **kept)


def quantized(configuration: str, rows: int, columns: int, dtype=torch.float32, **options):
    """A linear layer quantized by `quantize_`."""

    def make() -> Made:
        library = _library()
        torch.manual_seed(rows * columns)
        model = nn.Sequential(nn.Linear(columns, rows, bias=False).to(dtype))
        made = {name: option(library) if callable(option) else option for name, option in options.items()}
        library.quantize_(model, getattr(library, configuration)(**made))
        return _made(model[0].weight.data, tolerance=2**-7 if dtype == torch.bfloat16 else 0.0)

    return make


def float8(granularity: str, rows: int, columns: int, *sizes: int, dtype=torch.float8_e4m3fn):
    def make() -> Made:
        library = _library()
        torch.manual_seed(1)
        weight = library.Float8Tensor.from_hp(
            torch.randn(rows, columns), float8_dtype=dtype, granularity=getattr(library, granularity)(*sizes)
        )
        return _made(weight)

    return make


def float8_experts() -> Made:
    library = _library()
    torch.manual_seed(2)
    weight = library.Float8Tensor.from_hp(torch.randn(3, 6, 20), granularity=library.PerRow())
    return _made(weight)


def with_pre_scale() -> Made:
    """AWQ and SmoothQuant: the layer multiplies its input, so the weight it stands for is multiplied by column."""
    made = quantized("Int8WeightOnlyConfig", 12, 20, version=2)()
    weight = made.live.layer.weight.data
    weight.act_pre_scale = torch.rand(20) + 0.5
    return _made(weight, weight.dequantize() * weight.act_pre_scale)


def nvfp4(rows: int, columns: int, *, swizzled: bool, outer: bool = False, experts: int = 0):
    def make() -> Made:
        _library()
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        torch.manual_seed(3)
        weight = torch.randn(experts, rows, columns) if experts else torch.randn(rows, columns)
        scale = None
        if outer:
            scale = torch.full((experts, 1, 1), 0.25) * torch.arange(1, experts + 1).view(-1, 1, 1) if experts else None
            scale = torch.tensor(0.013) if scale is None else scale
        return _made(NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale, is_swizzled_scales=swizzled))

    return make


def mx(element, rows: int, columns: int, *, swizzled: bool = False):
    def make() -> Made:
        _library()
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        torch.manual_seed(4)
        return _made(MXTensor.to_mx(torch.randn(rows, columns), element, is_swizzled_scales=swizzled))

    return make


def packed_int4(*, experts: int = 0, pre_scale: bool = False):
    """Codes packed as FBGEMM packs them; torchao has no decode of its own for this class."""

    def make() -> Made:
        library = _library()
        torch.manual_seed(5)
        shape = (experts, 6, 40) if experts else (6, 40)
        codes = torch.randint(-8, 8, shape, dtype=torch.int8)
        scale, zero = (torch.randn(*shape[:-2], 5, 6).to(torch.bfloat16) for _ in range(2))
        packed = (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)
        factor = torch.rand(40) + 0.5 if pre_scale else None
        block = [1] * (len(shape) - 1) + [8]
        weight = library.Int4Tensor(packed, scale, zero, block, torch.Size(shape), act_pre_scale=factor)
        spread = [part.float().transpose(-1, -2).repeat_interleave(8, dim=-1) for part in (scale, zero)]
        values = codes * spread[0] + spread[1]
        return _made(weight, values * factor if pre_scale else values)

    return make


def int4_for_cpu(rows: int, columns: int, group: int):
    """Packed by torch for its CPU kernel; the library's decode is the kernel itself on the identity."""

    def make() -> Made:
        _library()
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        torch.manual_seed(6)
        weight = Int4OpaqueTensor.from_hp(torch.randn(rows, columns, dtype=torch.bfloat16), [1, group])
        identity = torch.eye(columns, dtype=torch.bfloat16)
        values = torch._weight_int4pack_mm_for_cpu(identity, weight.qdata, group, weight.scale_and_zero).t()
        return _made(weight, values, tolerance=2**-7, saved=False)

    return make


def nf4(dtype, rows: int, columns: int, block: int, outer: int):
    def make() -> Made:
        _library()
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        torch.manual_seed(7)
        weight = to_nf4(torch.randn(rows, columns, dtype=dtype), block, outer)
        return _made(
            weight, weight.get_original_weight(), tolerance=0.02 if dtype != torch.float32 else 0.0, saved=False
        )

    return make


def tiles() -> Made:
    """Packed for tensor cores: 96 x 256 is padded to 96 x 1024, and eight values a word would overcount four times."""
    library = _library()
    codes, scale = torch.zeros(12, 8, 32, 4, dtype=torch.int32), torch.zeros(8, 96, 2, dtype=BF16)
    weight = library.Int4TilePackedTo4dTensor(codes, scale, [1, 128], torch.Size((96, 256)))
    made = _made(weight, torch.zeros(()))
    made.values = None
    return made


def shuffled() -> Made:
    library = _library()
    codes, scale = torch.zeros(6, 20, dtype=torch.int8), torch.zeros(5, 6, dtype=BF16)
    weight = library.Int4PreshuffledTensor(codes, scale, [1, 8], [6, 40], group_zero=scale.clone())
    return Made(None, _holder(weight))


def prepacked_for_cpu() -> Made:
    _library()
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    codes, scale = torch.zeros(2, 2, 32, 16, dtype=torch.uint8), torch.zeros(2, 2, 32)
    weight = Int4OpaqueTensor(codes, scale, [1, 32], torch.Size((64, 64)), act_mapping_type="asymmetric")
    return Made(None, _holder(weight))


def by_hand() -> Made:
    """NVFP4 in bytes: codes 1, 2, ... in the low nibbles, 9, 10, ... in the high ones; the scale 0x40 is 2."""
    metadata = {
        "tensor_names": json.dumps(["layer.weight"]),
        "layer.weight": json.dumps(
            {
                "_type": "NVFP4Tensor",
                "_data": {"block_size": 16, "is_swizzled_scales": False},
                "_tensor_data_names": ["qdata", "scale"],
            }
        ),
    }
    tensors = {
        "layer._weight_qdata": torch.tensor([[0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7, 0x80]], dtype=torch.uint8),
        "layer._weight_scale": torch.tensor([[0x40]], dtype=torch.uint8).view(torch.float8_e4m3fn),
    }
    halves = [0.5, 1, 1.5, 2, 3, 4, 6]
    values = [sign * 2 * value for value in halves for sign in (1, -1)] + [0.0, -0.0]
    return Made(torch.tensor([values]), None, tensors, metadata=metadata)


def intx(bits: int):
    return lambda library: getattr(torch, f"int{bits}")


def group(size: int):
    return lambda library: library.PerGroup(size)


def whole(library):
    return library.PerTensor()


BF16, F32 = torch.bfloat16, torch.float32
FP4, FP8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn

CASES = [
    Case("torchao-int8", quantized("Int8WeightOnlyConfig", 12, 20, version=2), "torchao-int8", (12, 20),
         bytes={"codes": 240, "scales": 48}),
    Case("torchao-int8-bf16", quantized("Int8WeightOnlyConfig", 12, 20, BF16, version=2), "torchao-int8", (12, 20)),
    Case("torchao-int8-dynamic", quantized("Int8DynamicActivationInt8WeightConfig", 12, 20, version=2),
         "torchao-int8", (12, 20)),
    Case("torchao-int8-pre-scale", with_pre_scale, "torchao-int8", (12, 20)),
    *(Case(f"torchao-int{bits}-one-a-byte",
           quantized("IntxWeightOnlyConfig", 7, 48, weight_dtype=intx(bits), granularity=group(16)),
           f"torchao-int{bits}", (7, 48), bytes={"codes": 7 * 48, "scales": 7 * 3 * 4, "zero_points": 7 * 3})
      for bits in (2, 3, 4, 5, 8)),
    Case("torchao-int4-asymmetric",
         quantized("IntxWeightOnlyConfig", 7, 48, weight_dtype=intx(4), granularity=group(16),
                   mapping_type=lambda library: library.MappingType.ASYMMETRIC), "torchao-int4", (7, 48)),
    Case("torchao-int4-dynamic",
         quantized("Int8DynamicActivationIntxWeightConfig", 7, 64, weight_dtype=intx(4),
                   weight_granularity=group(32)), "torchao-int4", (7, 64)),
    Case("torchao-int8-tensor", quantized("Int8WeightOnlyConfig", 12, 20, granularity=whole, version=2),
         "torchao-int8", (12, 20)),
    Case("torchao-float8-row", quantized("Float8WeightOnlyConfig", 12, 20), "torchao-float8", (12, 20)),
    Case("torchao-float8-tensor", float8("PerTensor", 12, 20), "torchao-float8", (12, 20)),
    Case("torchao-float8-e5m2", float8("PerRow", 12, 20, dtype=torch.float8_e5m2), "torchao-float8", (12, 20)),
    Case("torchao-float8-blocks", float8("PerBlock", 12, 20, (3, 5)), "torchao-float8", (12, 20),
         bytes={"codes": 240, "scales": 4 * 4 * 4}),
    Case("torchao-float8-experts", float8_experts, "torchao-float8", (3, 6, 20)),
    Case("torchao-nvfp4", nvfp4(7, 48, swizzled=False), "torchao-nvfp4", (7, 48), bytes={"codes": 168, "scales": 21}),
    Case("torchao-nvfp4-swizzled", nvfp4(96, 256, swizzled=True, outer=True), "torchao-nvfp4", (96, 256),
         bytes={"codes": 96 * 128, "scales": 2048 + 4}),
    Case("torchao-nvfp4-swizzled-two-tiles", nvfp4(200, 80, swizzled=True), "torchao-nvfp4", (200, 80)),
    Case("torchao-nvfp4-experts", nvfp4(7, 48, swizzled=False, outer=True, experts=3), "torchao-nvfp4", (3, 7, 48)),
    Case("torchao-nvfp4-by-hand", by_hand, "torchao-nvfp4", (1, 16), bytes={"codes": 8, "scales": 1}),
    Case("torchao-mxfp4", mx(FP4, 7, 96), "torchao-mxfp4", (7, 96), bytes={"codes": 7 * 48, "scales": 21}),
    Case("torchao-mxfp4-swizzled", mx(FP4, 140, 96, swizzled=True), "torchao-mxfp4", (140, 96)),
    Case("torchao-mxfp8", mx(FP8, 7, 96), "torchao-mxfp8-e4m3", (7, 96)),
    Case("torchao-mxfp8-e5m2-swizzled", mx(torch.float8_e5m2, 140, 96, swizzled=True), "torchao-mxfp8-e5m2", (140, 96)),
    Case("torchao-mxfp6-e2m3", mx("fp6_e2m3", 7, 96), "torchao-mxfp6-e2m3", (7, 96)),
    Case("torchao-mxfp6-e3m2", mx("fp6_e3m2", 7, 96), "torchao-mxfp6-e3m2", (7, 96)),
    Case("torchao-packed-int4", packed_int4(), "torchao-packed-int4", (6, 40), bytes={"codes": 120, "scales": 60}),
    Case("torchao-packed-int4-experts", packed_int4(experts=3), "torchao-packed-int4", (3, 6, 40)),
    Case("torchao-packed-int4-pre-scale", packed_int4(pre_scale=True), "torchao-packed-int4", (6, 40)),
    Case("torchao-int4-cpu", int4_for_cpu(80, 128, 32), "torchao-int4-cpu", (80, 128),
         bytes={"codes": 80 * 64, "scales": 80 * 4 * 4}),
    Case("torchao-int4-cpu-128-rows", int4_for_cpu(128, 64, 64), "torchao-int4-cpu", (128, 64)),
    Case("torchao-int4-cpu-prepacked", prepacked_for_cpu, "torchao-int4-cpu", (64, 64)),
    Case("torchao-int4-tiles", tiles, "torchao-opaque", (96, 256), bytes={"codes": 49152, "scales": 3072}),
    Case("torchao-int4-shuffled", shuffled, "torchao-opaque", (6, 40), bytes={"codes": 120, "scales": 120}),
    Case("torchao-nf4", nf4(F32, 6, 96, 32, 6), "torchao-nf4", (6, 96), bytes={"codes": 288, "scales": 18 + 12 + 4}),
    Case("torchao-nf4-bf16", nf4(BF16, 64, 96, 64, 32), "torchao-nf4", (64, 96)),
    Case("torchao-nf4-blocks-across-rows", nf4(F32, 8, 48, 64, 6), "torchao-nf4", (8, 48)),
]  # fmt: skip
