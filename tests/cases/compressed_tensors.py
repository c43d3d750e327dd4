"""compressed-tensors, compressed and decompressed by its own compressors; the removed formats from their definition."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.cases import Case, Made

F32, BF16 = torch.float32, torch.bfloat16


def scheme_of(**weights):
    """A `QuantizationScheme` of the library, or a skip where the library is not installed."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def config_of(scheme, form: str, **more) -> dict:
    weights = scheme.weights.model_dump(mode="json")
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}}
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": []}
    return {"quantization_config": quantization | {"quantization_status": "compressed", "version": "0.20.0"} | more}


def observe(module: nn.Module, args) -> None:
    """Give a module the scales that its weight asks for, by the library's own formula."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = module.weight.data
    rows, columns = weight.shape
    if args.strategy == "tensor":
        blocks = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        blocks = weight.unsqueeze(1)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
    else:
        blocks = weight.unflatten(1, (-1, args.group_size))
    extra = {"global_scale": module.weight_global_scale.data} if hasattr(module, "weight_global_scale") else {}
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, **extra)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape).to(module.weight_zero_point.dtype)


def compressed(form: str, rows: int, columns: int, *, dtype=F32, bias=False, values=None, **weights):
    """A Linear (of the values given) compressed in place by the library, and what the library decompresses again."""

    def make() -> Made:
        scheme = scheme_of(**weights)
        from compressed_tensors.compressors import compress_module, decompress_module
        from compressed_tensors.quantization import QuantizationStatus
        from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

        torch.manual_seed(rows * columns)
        layer = nn.Linear(columns, rows, bias=bias, dtype=dtype)
        if values is not None:
            layer.weight.data = values.to(dtype, copy=True)
        initialize_module_for_quantization(layer, scheme, force_zero_point=not scheme.weights.symmetric)
        if hasattr(layer, "weight_global_scale"):
            layer.weight_global_scale.data = 448 * 6 / layer.weight.abs().max().view(1).float()
        observe(layer, scheme.weights)
        layer.quantization_status = QuantizationStatus.FROZEN
        compress_module(layer, form)
        model = nn.Module()
        model.layer = layer
        plain = copy.deepcopy(layer)
        decompress_module(plain, form)
        return Made(plain.weight.data.float(), model, model.state_dict(), config_of(scheme, form))

    return make


def packed(bits: int, rows: int, columns: int, symmetric: bool, strategy: str, group: int | None = None, **more):
    return compressed(
        "pack-quantized", rows, columns, num_bits=bits, type="int", symmetric=symmetric, strategy=strategy,
        group_size=group, **more
    )  # fmt: skip


def packed_in_bf16() -> Made:
    """The library multiplies in the dtype of its scales, here bfloat16; ours is float32, equal to that rounding."""
    made = packed(4, 10, 64, False, "group", 32, dtype=BF16)()
    made.tolerance = 2**-8
    return made


def packed_by_hand() -> Made:
    """Three rows of five 3-bit codes: 15 bits in one word, -4..3 shifted to 0..7."""
    words = [[0b000_111_100_011_001], [0b100_100_100_100_100], [0b001_010_011_100_101]]
    values = [[-3, -1, 0, 3, -4], [0, 0, 0, 0, 0], [0.5, 0, -0.5, -1, -1.5]]
    tensors = {
        "layer.weight_packed": torch.tensor(words, dtype=torch.int32),
        "layer.weight_shape": torch.tensor([3, 5]),
        "layer.weight_scale": torch.tensor([[1.0], [2.0], [0.5]]),
    }
    args = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    return Made(torch.tensor(values), tensors=tensors, config=config)


def older_packing(columns: int, version: str | None):
    """3-bit codes as 0.17 and before packed them: ten in a word, two bits of it unused."""

    def make() -> Made:
        torch.manual_seed(15)
        codes = torch.randint(0, 8, (6, -(-columns // 10) * 10))
        words = (codes.view(6, -1, 10) << torch.arange(0, 30, 3)).sum(-1).to(torch.int32)
        scales = torch.rand(6, 1)
        tensors = {
            "layer.weight_packed": words,
            "layer.weight_shape": torch.tensor([6, columns], dtype=torch.int32),
            "layer.weight_scale": scales,
        }
        args = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
        groups = {"group_0": {"targets": ["Linear"], "weights": args}}
        config = {"quant_method": "compressed-tensors", "config_groups": groups, "version": version}
        values = (codes[:, :columns] - 4).float() * scales
        return Made(values, tensors=tensors, config={"compression_config": config})

    return make


def activation_order() -> Made:
    """`actorder: group`, removed from the library in 2026: columns keep their place, groups are looked up."""
    made = packed(4, 24, 64, False, "group", 16)()
    index = torch.randperm(64, generator=torch.Generator().manual_seed(16)) // 16
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    tensors = made.tensors | {"layer.weight_g_idx": index.to(torch.int32)}
    codes = unpack_from_int32(tensors["layer.weight_packed"], 4, (24, 64)).float()
    zeros = unpack_from_int32(tensors["layer.weight_zero_point"], 4, (24, 4), packed_dim=0).float()
    values = (codes - zeros[:, index]) * tensors["layer.weight_scale"][:, index]
    return Made(values, tensors=tensors, config=made.config)


def unused_activation_order() -> Made:
    made = packed(4, 24, 64, True, "group", 16)()
    tensors = made.tensors | {"layer.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    return Made(made.values, tensors=tensors, config=made.config)


def without_weight_shape() -> Made:
    made = packed(3, 24, 96, True, "group", 32)()
    tensors = {name: tensor for name, tensor in made.tensors.items() if not name.endswith("weight_shape")}
    return Made(made.values, tensors=tensors, config=made.config)


def nested_in(*keys: str):
    def make() -> Made:
        made = packed(5, 10, 40, False, "channel")()
        config = made.config["quantization_config"]
        return Made(made.values, None, made.tensors, {keys[0]: {keys[1]: config} if len(keys) > 1 else config})

    return make


def fused_experts() -> Made:
    """A stack, each matrix packed on its own: the last words of every expert's zero points are padded."""
    made = [packed(4, 10, 32, False, "group", 8)() for _ in range(3)]
    tensors = {name: torch.stack([one.tensors[name] for one in made]) for name in made[0].tensors}
    tensors["layer.weight_shape"] = torch.tensor([3, 10, 32])
    return Made(torch.stack([one.values for one in made]), tensors=tensors, config=made[0].config)


def two_groups_named_by_pattern() -> Made:
    """8 columns in one word are 1, 2, 3 or 4 bits: only the names of the modules tell."""
    low, high = packed(2, 6, 8, True, "channel")(), packed(4, 7, 8, True, "channel")()
    tensors = {name.replace("layer", "mlp.up"): tensor for name, tensor in low.tensors.items()} | high.tensors
    config = high.config["quantization_config"]
    other = low.config["quantization_config"]["config_groups"]["group_0"] | {"targets": [r"re:.*mlp\.(up|down)$"]}
    own = config["config_groups"]["group_0"] | {"targets": ["re:layer$"]}
    quantization = config | {"config_groups": {"low": other, "high": own}, "format": "mixed-precision"}
    return Made(high.values, tensors=tensors, config={"quantization_config": quantization})


def one_group_of_floats() -> Made:
    """Eight bits each, both per channel: what is stored in words are the integers."""
    made = packed(8, 7, 64, True, "channel")()
    config = made.config["quantization_config"]
    floats = {"targets": ["re:.*attn.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    groups = {"floats": floats, "integers": config["config_groups"]["group_0"] | {"targets": ["re:.*mlp.*"]}}
    return Made(made.values, tensors=made.tensors, config={"quantization_config": config | {"config_groups": groups}})


PACK = [
    Case("ct-pack-by-hand", packed_by_hand, "ct-int3", (3, 5), bytes={"codes": 12, "scales": 12, "bookkeeping": 16}),
    *(Case(f"ct-pack-{bits}-bit-sym", packed(bits, 10, 100, True, "channel"), f"ct-int{bits}", (10, 100))
      for bits in range(1, 9)),
    *(Case(f"ct-pack-{bits}-bit-asym", packed(bits, 13, 96, False, "group", 32), f"ct-int{bits}", (13, 96))
      for bits in range(1, 9)),
    Case("ct-pack-tensor", packed(4, 9, 33, True, "tensor"), "ct-int4", (9, 33), bytes={"codes": 180, "scales": 4}),
    Case("ct-pack-asym-tensor", packed(4, 9, 33, False, "tensor"), "ct-int4", (9, 33)),
    Case("ct-pack-asym-channel", packed(5, 21, 50, False, "channel"), "ct-int5", (21, 50),
         bytes={"codes": 21 * 8 * 4, "scales": 84, "zero_points": 16}),
    Case("ct-pack-bf16-scales", packed_in_bf16, "ct-int4", (10, 64), bytes={"scales": 40}),
    Case("ct-pack-bias", packed(4, 8, 64, True, "group", 32, bias=True), "ct-int4", (8, 64), total=520),
    Case("ct-pack-3-bit-words-of-0.10", older_packing(330, None), "ct-int3", (6, 330)),
    Case("ct-pack-3-bit-words-told-by-version", older_packing(11, "0.10.2"), "ct-int3", (6, 11)),
    Case("ct-pack-g-idx", activation_order, "ct-int4", (24, 64), bytes={"index": 256}),
    Case("ct-pack-g-idx-unused", unused_activation_order, "ct-int4", (24, 64)),
    Case("ct-pack-no-weight-shape", without_weight_shape, "ct-int3", (24, 96)),
    Case("ct-pack-compression-config", nested_in("compression_config"), "ct-int5", (10, 40)),
    Case("ct-pack-text-config", nested_in("text_config", "quantization_config"), "ct-int5", (10, 40)),
    Case("ct-pack-stack", fused_experts, "ct-int4", (3, 10, 32)),
    Case("ct-pack-integers-beside-floats", one_group_of_floats, "ct-int8", (7, 64)),
    Case("ct-pack-bits-by-name", two_groups_named_by_pattern, "ct-int4", (7, 8), total=48 + 56),
]  # fmt: skip


def naive(form: str, rows: int, columns: int, strategy: str, *, bits: int = 8, symmetric=True, kind="int", **more):
    return compressed(form, rows, columns, num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **more)


def kernel_linear() -> Made:
    """transformers' own module for FP8 kernels: scales [1, N]."""
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    torch.manual_seed(17)
    model = nn.Module()
    model.layer = CompressedTensorsFP8Linear(24, 10)
    model.layer.weight.data = torch.randn(10, 24).to(torch.float8_e4m3fn)
    model.layer.weight_scale.data = torch.rand(1, 10)
    return Made(model.layer.weight.data.float() * model.layer.weight_scale.data.t(), model)


def not_compressed_yet() -> Made:
    """`frozen`: the weight is still float, its scales lie beside it."""
    scheme = scheme_of(num_bits=8, type="int", symmetric=False, strategy="channel")
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    layer = nn.Linear(24, 10, bias=False)
    initialize_module_for_quantization(layer, scheme)
    observe(layer, scheme.weights)
    model = nn.Module()
    model.layer = layer
    config = config_of(scheme, "dense")
    config["quantization_config"]["quantization_status"] = "frozen"
    return Made(layer.weight.data, model, model.state_dict(), config)


def nvfp4(rows: int, columns: int):
    """The library's quotient of both scales is float32, its decode bfloat16: equal to that rounding."""
    make = compressed("nvfp4-pack-quantized", rows, columns, dtype=BF16, num_bits=4, type="float", symmetric=True,
                      strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")  # fmt: skip

    def within_bf16() -> Made:
        made = make()
        made.tolerance = 2**-7
        return made

    return within_bf16


def nvfp4_by_hand() -> Made:
    """E2M1 codes 0..15 under one scale of 2 and a global scale of 4: half of each value. Dividing, not multiplying."""
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    values = [[0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, -0.0, -0.25, -0.5, -0.75, -1, -1.5, -2, -3]]
    tensors = {
        "layer.weight_packed": codes,
        "layer.weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        "layer.weight_global_scale": torch.tensor([4.0]),
        "layer.input_global_scale": torch.tensor([1.0]),
    }
    return Made(torch.tensor(values), tensors=tensors)


def nvfp4_experts() -> Made:
    torch.manual_seed(18)
    packed, scales = torch.randint(0, 256, (3, 5, 16), dtype=torch.uint8), torch.rand(3, 5, 2).to(torch.float8_e4m3fn)
    shares = torch.tensor([2.0, 4.0, 8.0])
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(2)
    values = values * (scales.float() / shares.view(3, 1, 1)).repeat_interleave(16, -1)
    tensors = {"layer.weight_packed": packed, "layer.weight_scale": scales, "layer.weight_global_scale": shares}
    return Made(values, tensors=tensors)


def microscaled(form: str, bits: int, rows: int, columns: int):
    return compressed(form, rows, columns, num_bits=bits, type="float", symmetric=True, strategy="group",
                      group_size=32, dtype=BF16, scale_dtype="torch.uint8")  # fmt: skip


def mixed_precision() -> Made:
    """One module in each of two formats, and one that is ignored."""
    low, high = packed(4, 10, 64, True, "group", 32)(), naive("float-quantized", 12, 64, "channel", kind="float")()
    tensors = {name.replace("layer", "mlp.up"): tensor for name, tensor in low.tensors.items()} | high.tensors
    tensors["lm_head.weight"] = torch.randn(5, 64)
    groups = [made.config["quantization_config"]["config_groups"]["group_0"] for made in (low, high)]
    config = high.config["quantization_config"] | {
        "format": "mixed-precision", "ignore": ["lm_head"], "config_groups": dict(enumerate(groups))
    }  # fmt: skip
    return Made(high.values, tensors=tensors, config={"quantization_config": config})


FP8 = {"kind": "float"}


def cache_scales() -> Made:
    """Static scales of the input and of the key-value cache: neither is a parameter."""
    made = naive("float-quantized", 10, 33, "channel", **FP8)()
    tensors = made.tensors | {"layer.input_scale": torch.tensor([0.5]), "self_attn.k_scale": torch.tensor(2.0)}
    tensors["self_attn.v_scale"] = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    return Made(made.values, tensors=tensors, config=made.config)


NAIVE = [
    Case("ct-int8-channel", naive("int-quantized", 10, 33, "channel"), "ct-int8", (10, 33),
         bytes={"codes": 330, "scales": 40}),
    Case("ct-int8-tensor-asym", naive("int-quantized", 10, 33, "tensor", symmetric=False), "ct-int8", (10, 33)),
    Case("ct-int8-channel-asym", naive("int-quantized", 10, 33, "channel", symmetric=False), "ct-int8", (10, 33),
         bytes={"zero_points": 10}),
    Case("ct-int8-group-asym", naive("naive-quantized", 10, 96, "group", symmetric=False, group_size=32), "ct-int8",
         (10, 96)),
    Case("ct-naive-4-bit-in-bytes", naive("naive-quantized", 10, 96, "group", bits=4, group_size=32), "ct-int8",
         (10, 96), bytes={"codes": 960, "scales": 120}),
    Case("ct-float8-tensor", naive("float-quantized", 10, 33, "tensor", **FP8), "ct-float8", (10, 33)),
    Case("ct-float8-channel", naive("float-quantized", 10, 33, "channel", **FP8), "ct-float8", (10, 33)),
    Case("ct-float8-block", naive("float-quantized", 200, 128, "block", block_structure=[128, 64], **FP8), "ct-float8",
         (200, 128), bytes={"codes": 25600, "scales": 16}),
    Case("ct-float8-ragged-block", naive("float-quantized", 192, 100, "block", block_structure=[128, 64], **FP8),
         "ct-float8", (192, 100)),
    Case("ct-float8-kernel-linear", kernel_linear, "ct-float8", (10, 24)),
    Case("ct-not-compressed-yet", not_compressed_yet, "plain", (10, 24), bytes={"unquantized": 960, "scales": 40}),
    Case("ct-mxfp8", microscaled("mxfp8-quantized", 8, 7, 96), "ct-mxfp8", (7, 96), bytes={"codes": 672, "scales": 21}),
    Case("ct-cache-scales", cache_scales, "ct-float8", (10, 33), total=330, bytes={"codes": 330, "scales": 44}),
    Case("ct-mixed-precision", mixed_precision, "ct-float8", (12, 64), total=640 + 768 + 320),
]  # fmt: skip

FLOAT_PACKED = [
    Case("ct-nvfp4-by-hand", nvfp4_by_hand, "ct-nvfp4", (1, 16), bytes={"codes": 8, "scales": 1 + 4 + 4}),
    Case("ct-nvfp4", nvfp4(10, 96), "ct-nvfp4", (10, 96), bytes={"codes": 480, "scales": 60 + 4}),
    Case("ct-nvfp4-stack", nvfp4_experts, "ct-nvfp4", (3, 5, 32)),
    Case("ct-mxfp4", microscaled("mxfp4-pack-quantized", 4, 7, 96), "ct-mxfp4", (7, 96),
         bytes={"codes": 336, "scales": 21}),
    Case("ct-mxfp6", microscaled("mxfp6-pack-quantized", 6, 7, 96), "ct-mxfp6", (7, 96),
         bytes={"codes": 504, "scales": 21}),
]  # fmt: skip


GOLDEN = Path(__file__).parent.parent / "golden" / "compressed_tensors_sparse.safetensors"


def golden(name: str):
    """What compressed-tensors 0.10.2 wrote, the last version with these formats."""

    def make() -> Made:
        found = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in load_file(GOLDEN).items()
            if key.startswith(f"{name}.")
        }
        tensors = {key: tensor for key, tensor in found.items() if key.startswith("layer.")}
        if "values" in found:
            return Made(found["values"], tensors=tensors)
        codes, scale = found["codes"].float(), found["scale"].float()
        values = codes.view(*scale.shape, -1) * scale.unsqueeze(-1)
        return Made(
            values.flatten(1),
            tensors=tensors,
            config={"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
        )

    return make


def quantized_and_sparse() -> Made:
    """2:4 on top of FP8: the values that are kept are codes, with a scale for each row."""
    made = golden("bitmask-24")()
    tensors = made.tensors | {"layer.weight_scale": torch.rand(6, 1)}
    tensors["layer.compressed"] = tensors["layer.compressed"].to(torch.float8_e4m3fn)
    values = torch.zeros(6, 20)
    values[made.values != 0] = tensors["layer.compressed"].float().flatten()
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    return Made(values * tensors["layer.weight_scale"], tensors=tensors, config=config)


SPARSE = [
    Case("ct-sparse-bitmask", golden("bitmask"), "ct-sparse-bitmask", (5, 21), bytes={"codes": 52, "index": 15 + 40}),
    Case("ct-sparse-24-bitmask", golden("bitmask-24"), "ct-sparse-24-bitmask", (6, 20),
         bytes={"codes": 120, "index": 18}),
    Case("ct-sparse-24-bitmask-float8", quantized_and_sparse, "ct-sparse-24-bitmask", (6, 20),
         bytes={"codes": 60, "index": 18, "scales": 24}),
    Case("ct-marlin-24-channel", golden("marlin-24-4-channel"), "ct-marlin24-int4", (128, 128),
         bytes={"codes": 4096, "index": 2048, "scales": 256}),
    Case("ct-marlin-24-group", golden("marlin-24-4-128"), "ct-marlin24-int4", (64, 384)),
    Case("ct-marlin-24-8-bit", golden("marlin-24-8-channel"), "ct-marlin24-int8", (64, 128)),
]  # fmt: skip

CASES = [*PACK, *NAIVE, *FLOAT_PACKED, *SPARSE]
