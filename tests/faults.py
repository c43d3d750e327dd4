"""The faults that real users met, injected into small weights: rows 35 to 80 of the list in docs/reference/faults.md.

Each row writes a healthy artifact and the same one with the fault, and says which check must fail, what its message
must say, and what the diagnosis must name. `python -m tests.faults` writes the page.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

from pytest_quantcheck import (
    FormatError,
    assert_checkpoint_intact,
    assert_delta_preserved,
    assert_dequant_fidelity,
    assert_kernel_parity,
    assert_logical_params,
    assert_module_output,
    assert_same_weights,
    inspect,
)
from tests import encoders, gguf_files
from tests.cases import onnx as onnx_cases
from tests.encoders import gaussian

PAGE = Path(__file__).parents[1] / "docs/reference/faults.md"


class Given(NamedTuple):
    """What a check is called with."""

    subject: Any
    reference: Any = None
    options: Mapping[str, Any] = MappingProxyType({})


class Fault(NamedTuple):
    """One row: `make(folder, broken)` gives what `check` gets; `seen` is in its message, `diagnosis` is the name."""

    row: int
    what: str
    make: Callable[[Path, bool], Given] | None
    check: str
    seen: str = ""
    diagnosis: str | None = None
    reason: str = ""  # why a row cannot run


def _fidelity(given: Given) -> None:
    assert_dequant_fidelity(given.subject, given.reference, **given.options)


# check -> how it is made, and the function that a user calls
CHECKS: dict[str, Callable[[Given], object]] = {
    "fidelity": _fidelity,
    "integrity": lambda given: assert_checkpoint_intact(given.subject),
    "opens": lambda given: inspect(given.subject),
    "params": lambda given: assert_logical_params(given.subject, given.reference),
    "delta": lambda given: assert_delta_preserved(*given.subject, min_db=3.0),
    "same weights": lambda given: assert_same_weights(given.subject, given.reference),
    "module output": lambda given: assert_module_output(given.subject),
    "kernel parity": lambda given: assert_kernel_parity(given.subject),
}


def reference(weight: torch.Tensor, **others: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Module()
    for name, tensor in {"weight": weight, **others}.items():
        model.layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


def in_memory(
    quantize: Callable[[torch.Tensor], nn.Module], fault: Callable[[Any], object], rows: int = 96, columns: int = 160
):
    """A live layer of bitsandbytes whose weight `fault` changes."""

    def make(folder: Path, broken: bool) -> Given:
        weight = gaussian(rows, columns)
        model = quantize(weight)
        if broken:
            fault(model.layer.weight)
        return Given(model, reference(weight))

    return make


def on_disk(write: Callable[[bool], tuple], **options: Any):
    """A folder of safetensors: `write(broken)` gives the weight, the tensors and the config."""

    def make(folder: Path, broken: bool) -> Given:
        weight, tensors, config = write(broken)
        return Given(encoders.folder(folder, tensors, config), reference(weight), options)

    return make


def of_tensors(write: Callable[[], tuple], fault: Callable[[dict], object], **options: Any):
    """A folder of safetensors, one or more of whose tensors `fault` changes."""

    def both(broken: bool) -> tuple:
        weight, tensors, config = write()
        if broken:
            fault(tensors)
        return weight, tensors, config

    return on_disk(both, **options)


def nested(weight: torch.Tensor) -> nn.Module:
    return encoders.bnb_4bit(weight, nested=True)


# GPTQ and AWQ: 40 outputs, 72 and 96 inputs in groups of 32.


def mislabelled_version(broken: bool):
    weight = gaussian(40, 72)
    tensors, config = encoders.gptq(weight, version=2)
    if broken:
        config["quantization_config"]["checkpoint_format"] = "gptq"
    return weight, tensors, config


def gptq(**options: Any):
    def write():
        weight = gaussian(40, 72)
        return weight, *encoders.gptq(weight, **options)

    return write


def wrapped_zero_point():
    """One group of positive weights, whose zero point is 0 (1 as our encoder clamps it)."""
    weight = gaussian(40, 72)
    weight[7, 32:64] = weight[7, 32:64].abs() + 0.01
    return weight, *encoders.gptq(weight, version=2)


def wrap_zero_point(tensors: dict) -> None:
    tensors["layer.qzeros"][1, 0] |= torch.tensor(0xF << 28, dtype=torch.int64).to(torch.int32)  # output 7: 0 - 1 is 15


def borrow_across_lanes(tensors: dict) -> None:
    """Excess 8 taken off whole words: a nibble under 8 borrows from the next."""
    words = tensors["layer.qweight"].to(torch.int64) & 0xFFFFFFFF
    turned = ((words - 0x88888888) ^ 0x88888888) & 0xFFFFFFFF
    tensors["layer.qweight"] = torch.where(turned >= 2**31, turned - 2**32, turned).to(torch.int32)


def linear_nibbles(broken: bool):
    weight = gaussian(40, 96)
    return weight, *encoders.awq(weight, interleaved=not broken)


def act_order(broken: bool):
    weight = gaussian(40, 96)
    g_idx = torch.arange(96) // 32
    tensors, config = encoders.gptq(weight, g_idx=g_idx[torch.randperm(96, generator=torch.Generator().manual_seed(1))])
    if broken:
        tensors["layer.g_idx"] = g_idx.to(torch.int32)
    return weight, tensors, config


def planes_for_a_stream(broken: bool):
    weight = gaussian(32, 96)
    tensors, config = encoders.gptq(weight, bits=3, version=2)
    if broken:
        config["quantization_config"]["checkpoint_format"] = "gptq_p"
    return weight, tensors, config


def packed_along_outputs(tensors: dict) -> None:
    tensors["layer.qweight"] = tensors["layer.qweight"].reshape(5, -1)


def big_nibble_first(tensors: dict) -> None:
    """Zero points packed highest nibble first."""
    raw = tensors["layer.qzeros"].contiguous().view(torch.uint8)
    raw = (raw << 4 | raw >> 4).view(-1, 4).flip(-1)
    tensors["layer.qzeros"] = raw.reshape(tensors["layer.qzeros"].shape[0], -1).view(torch.int32)


def set_scale(value: float, part: str = "layer.scales"):
    def fault(tensors: dict) -> None:
        tensors[part][1, 3] = value

    return fault


def channel_underflow(tensors: dict) -> None:
    tensors["layer.scales"][:, 11] = 0.0


# ggml, quantized by the gguf package.


def q4_0(change: Callable[[torch.Tensor], torch.Tensor]):
    """Blocks of 18 bytes, the last 16 of which `change` gets."""

    def make(folder: Path, broken: bool) -> Given:
        weight = gaussian(21, 96)
        raw = torch.from_numpy(encoders.ggml_blocks(weight, "Q4_0")).view(-1, 18)
        if broken:
            raw = torch.cat((raw[:, :2], change(raw[:, 2:])), dim=1)
        folder.mkdir()
        blocks = raw.view(21, -1).numpy()
        return Given(encoders.gguf(folder / "m.gguf", "layer.weight", "Q4_0", (21, 96), blocks), reference(weight))

    return make


def in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Byte i holds values 2 i and 2 i + 1, not i and i + 16."""
    values = torch.cat((codes & 15, codes >> 4), dim=1)
    return values[:, 0::2] | values[:, 1::2] << 4


def nan_in_a_block(kind: str, at: int):
    """The float16 at byte `at` of one block is NaN: what a group of nothing, or an imatrix of zeros, gave."""

    def make(folder: Path, broken: bool) -> Given:
        weight = gaussian(7, 96)
        raw = encoders.ggml_blocks(weight, kind)
        if broken:
            raw[4, at : at + 2] = list(struct.pack("<e", float("nan")))
        folder.mkdir()
        return Given(encoders.gguf(folder / "m.gguf", "layer.weight", kind, (7, 96), raw))

    return make


def odd_rows(folder: Path, broken: bool) -> Given:
    """Rows of 80 values: blocks of 32 run on across them."""
    weight = gaussian(8, 80 if broken else 96)
    raw = encoders.ggml_blocks(weight.reshape(-1, 32), "Q4_0")
    folder.mkdir()
    tensor = gguf_files.Tensor("layer.weight", "Q4_0", tuple(weight.shape), raw.tobytes())
    path = folder / "m.gguf"
    path.write_bytes(gguf_files.gguf([tensor]))
    return Given(path)


def grouped_heads(folder: Path, broken: bool) -> Given:
    """k of a llama with 6 heads of which 2 are keys: 32 rows, permuted as though there were 6 / 2 = 3, or 2."""
    weight = gaussian(48, 96)
    heads = 3 if broken else 2
    stored = weight.view(heads, 2, 48 // heads // 2, 96).transpose(1, 2).reshape(48, 96)
    raw = encoders.ggml_blocks(stored, "Q8_0")
    folder.mkdir()
    keys = gguf_files.architecture("llama", head_count=6, head_count_kv=2)
    path = encoders.gguf(folder / "m.gguf", "blk.0.attn_k.weight", "Q8_0", (48, 96), raw, keys)
    whole = nn.Module()
    whole.register_module("model", nest("layers.0.self_attn.k_proj", weight))
    return Given(path, whole)


def nest(name: str, weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    head, _, rest = name.partition(".")
    module.register_module(head, nest(rest, weight) if rest else reference(weight).layer)
    return module


def not_unpermuted(folder: Path, broken: bool) -> Given:
    """q as llama.cpp has it, put into a file that has Hugging Face's order."""
    weight = gaussian(48, 160)
    stored = weight.view(3, 2, 8, 160).transpose(1, 2).reshape(48, 160) if broken else weight
    return Given(encoders.bnb_4bit(stored), reference(weight))


# bitsandbytes.


def lost_state(folder: Path, broken: bool) -> Given:
    tensors = encoders.bnb_4bit(gaussian(40, 96)).state_dict()
    if broken:
        tensors = {"layer.weight": tensors["layer.weight"]}
    return Given(encoders.folder(folder, tensors, encoders.BNB_CONFIG))


def wrong_blocksize(broken: bool):
    """Quantized in blocks of 128; the state says 64 and there are as many statistics, half of them nobody's."""
    weight = gaussian(50, 128)
    tensors = encoders.bnb_4bit(weight, blocksize=128).state_dict()
    if broken:
        state = "layer.weight.quant_state.bitsandbytes__nf4"
        record = bytes(tensors[state].tolist()).replace(b'"blocksize": 128', b'"blocksize": 64')
        tensors[state] = torch.tensor(list(record), dtype=torch.uint8)
        tensors["layer.weight.absmax"] = tensors["layer.weight.absmax"].repeat(2)
    return weight, tensors, encoders.BNB_CONFIG


def wrong_type(broken: bool):
    """NF4 codes under a state that says FP4, its table too."""
    weight = gaussian(40, 96)
    tensors = encoders.bnb_4bit(weight, "nf4").state_dict()
    if broken:
        other = encoders.bnb_4bit(weight, "fp4").state_dict()
        del tensors["layer.weight.quant_state.bitsandbytes__nf4"]
        state = "layer.weight.quant_state.bitsandbytes__fp4"
        tensors |= {name: other[name] for name in (state, "layer.weight.quant_map")}
    return weight, tensors, encoders.BNB_CONFIG


def denormal_statistics(broken: bool):
    weight = gaussian(40, 96)
    tensors = encoders.bnb_4bit(weight, nested=True).state_dict()
    if broken:
        tensors["layer.weight.nested_absmax"].fill_(1e-40)
        state = "layer.weight.quant_state.bitsandbytes__nf4"
        record = re.sub(rb'"nested_offset": [-0-9.e]+', b'"nested_offset": 0.0', bytes(tensors[state].tolist()))
        tensors[state] = torch.tensor(list(record), dtype=torch.uint8)
    return weight, tensors, encoders.BNB_CONFIG


def use_raw_bytes(weight: Any) -> None:
    state = weight.quant_state
    state.absmax, state.nested = state.absmax.float(), False


def misread_offset(weight: Any) -> None:
    """bfloat16 read as float32: its two bytes are the lower half."""
    state = weight.quant_state
    raw = state.offset.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    state.offset = raw.view(torch.float32)


def zero_statistics(weight: Any) -> None:
    weight.quant_state.absmax.zero_()


def unscaled(weight: Any) -> None:
    weight.SCB.fill_(127.0)


def wrong_axis(folder: Path, broken: bool) -> Given:
    """int8 with a scale for each column of a square matrix, which the layer takes for those of its rows."""
    weight = gaussian(48, 48)
    model = encoders.bnb_8bit(weight.t().contiguous() if broken else weight)
    if broken:
        model.layer.weight.data = model.layer.weight.data.t().contiguous()
    return Given(model, reference(weight))


def packed_again(folder: Path, broken: bool) -> Given:
    """A second move quantizes the bytes of the first."""
    model = encoders.bnb_4bit(gaussian(40, 96))
    before = encoders.folder(folder, model.state_dict(), encoders.BNB_CONFIG)
    if broken:
        codes = model.layer.weight.data.view(-1, 1).float()
        weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_type="nf4", compress_statistics=False)
        model.layer.weight = weight.to("cpu")
    return Given(model, before)


def moved_without_unpacking(folder: Path, broken: bool) -> Given:
    """What `.to()` leaves behind: the codes as the CPU's kernel has them, under a state that says otherwise."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = encoders.bnb_4bit(gaussian(64, 192))
    before = encoders.folder(folder, model.state_dict(), encoders.BNB_CONFIG)
    if broken:
        weight = model.layer.weight
        codes, _ = _convert_weight_packed_for_cpu(weight.data.clone(), weight.quant_state)
        weight.data = codes.view(weight.data.shape)
        model = encoders.bnb_4bit(gaussian(64, 192))
        model.layer.weight.data = codes.view(model.layer.weight.data.shape)
    return Given(model, before)


def stale_reload(folder: Path, broken: bool) -> Given:
    """`strict=False` with renamed keys: the layer keeps the weights it was built with."""
    saved = encoders.bnb_4bit(gaussian(40, 96))
    path = encoders.folder(folder, saved.state_dict(), encoders.BNB_CONFIG)
    model = encoders.bnb_4bit(gaussian(40, 96, seed=1)) if broken else saved
    return Given(model, path)


class WrongGemv(bnb.nn.Linear4bit):
    """A layer whose result for one row of inputs is that of its inputs in reverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(-1) if x.numel() == x.shape[-1] else x)


def wrong_gemv(folder: Path, broken: bool) -> Given:
    model = encoders.bnb_4bit(gaussian(40, 128))
    if broken:
        model.layer.__class__ = WrongGemv
    return Given(model)


# FP8, NVFP4, BitNet and others.


def fp8(block: tuple[int, int] | None = (16, 32), rows: int = 48, columns: int = 100):
    def write():
        weight = gaussian(rows, columns) * torch.linspace(0.5, 2, rows).view(-1, 1)
        return weight, *encoders.fp8(weight, block)

    return write


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def rename(old: str, new: str):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]):
    return lambda tensors: tensors.__setitem__(name, function(tensors[name]))


def merged_scales(broken: bool):
    """gate over up, each made with a scale of its own; the larger one is given to both."""
    weight = torch.cat((gaussian(24, 100), gaussian(24, 100, seed=1) / 2.14))
    halves = [encoders.fp8(half, None) for half in weight.split(24)]
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 100]}}
    scales = torch.stack([tensors["layer.weight_scale_inv"] for tensors, _ in halves]).view(2, 1)
    scales = scales.amax().expand(2, 1) if broken else scales
    codes = torch.cat([tensors["layer.weight"].view(torch.uint8) for tensors, _ in halves])
    return weight, {"layer.weight": codes.view(torch.float8_e4m3fn), "layer.weight_scale_inv": scales}, config


def transposed_grid(tensors: dict) -> None:
    scale = tensors["layer.weight_scale_inv"]
    tensors["layer.weight_scale_inv"] = scale.t().reshape(scale.shape)


def turned_experts(folder: Path, broken: bool) -> Given:
    """A square matrix: nothing but its values tells that it lies on its side."""
    weight = gaussian(64, 64)
    return Given(encoders.bnb_4bit(weight.t().contiguous() if broken else weight), reference(weight))


def twice_normalised(tensors: dict) -> None:
    tensors["layer.weight_scale_inv"] *= 2


def ternary():
    return encoders.bitnet(60, 33, 0.02)


def ternary_of_signed(tensors: dict) -> None:
    """Fields of -1, 0 and 1 in two's complement where 0, 1 and 2 belong."""
    raw = tensors["layer.weight"]
    fields = [((raw >> shift & 3).to(torch.int16) - 1) & 3 for shift in (0, 2, 4, 6)]
    tensors["layer.weight"] = sum(field << 2 * at for at, field in enumerate(fields)).to(torch.uint8)


def nvfp4():
    return encoders.nvfp4(10, 96)


def ct_int4():
    return encoders.compressed_tensors(
        "pack-quantized", 12, 96, num_bits=4, type="int", symmetric=False, strategy="group", group_size=32
    )


def odd_columns(broken: bool):
    """33 columns packed by twos without saying so: the file has 34."""
    weight, tensors, config = encoders.compressed_tensors(
        "mxfp4-pack-quantized", 24, 96, dtype=torch.bfloat16, num_bits=4, type="float", symmetric=True,
        strategy="group", group_size=32, scale_dtype="torch.uint8",
    )  # fmt: skip
    return (weight[:, :95] if broken else weight), tensors, config


def adapter_lost(folder: Path, broken: bool) -> Given:
    """The adapter was merged into the reference, and quantized without it."""
    base = gaussian(96, 160)
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(96, 4, generator=generator) @ torch.randn(4, 160, generator=generator) * 0.002
    return Given(encoders.bnb_4bit(base if broken else base + delta), reference(base + delta))


def adapter_in_noise(folder: Path, broken: bool) -> Given:
    """A difference a tenth as large as the weight: 8 bits keep it, 4 bits do not."""
    base = gaussian(96, 160)
    generator = torch.Generator().manual_seed(2)
    merged = base + torch.randn(96, 4, generator=generator) @ torch.randn(4, 160, generator=generator) * 0.0007
    quantized = encoders.bnb_4bit(merged) if broken else encoders.bnb_8bit(merged)
    return Given((reference(base), reference(merged), quantized))


def other_bias(folder: Path, broken: bool) -> Given:
    weight, bias = gaussian(40, 96), gaussian(40, seed=3)
    tensors = encoders.bnb_4bit(weight).state_dict() | {"layer.bias": gaussian(40, seed=4) if broken else bias}
    return Given(encoders.folder(folder, tensors, encoders.BNB_CONFIG), reference(weight, bias=bias))


def bias_gone(folder: Path, broken: bool) -> Given:
    tensors = encoders.bnb_4bit(gaussian(40, 96)).state_dict() | {"layer.bias": gaussian(40)}
    if broken:
        del tensors["layer.bias"]
    return Given(encoders.folder(folder, tensors, encoders.BNB_CONFIG), 40 * 96 + 40)


def random_experts(folder: Path, broken: bool) -> Given:
    weight = gaussian(96, 160)
    return Given(encoders.bnb_4bit(gaussian(96, 160, seed=5) if broken else weight), reference(weight))


def smoothed(folder: Path, broken: bool) -> Given:
    """AWQ moved a factor of each channel from the norm into the weight: a false alarm if it were seen."""
    weight, norm = gaussian(64, 96), 1 + gaussian(96, seed=6)
    factors = torch.linspace(0.5, 2.0, 96) if broken else torch.ones(96)
    tensors = {
        **{f"model.layers.0.mlp.up_proj.{name[6:]}": tensor
           for name, tensor in encoders.bnb_4bit(weight * factors).state_dict().items()},
        "model.layers.0.input_layernorm.weight": norm / factors,
    }  # fmt: skip
    folder.mkdir()
    plain = {"model.layers.0.mlp.up_proj.weight": weight, "model.layers.0.input_layernorm.weight": norm}
    original = encoders.folder(folder / "original", plain)
    return Given(encoders.folder(folder / "smoothed", tensors, encoders.BNB_CONFIG), original)


FLOOR = {"min_sqnr_db": 16.0}
V = "layer.weight_scale_inv"
G = "layer.weight_global_scale"


def blocks_of_512(folder: Path, broken: bool) -> Given:
    folder.mkdir()
    made = onnx_cases.nbits_node(4, 512 if broken else 128, 1024)()
    return Given(made.write(folder))


FAULTS = [
    Fault(35, "GPTQ zero points of version 2 under the label of version 1: every weight off by one scale",
          on_disk(mislabelled_version), "fidelity", r"bias [-+]0\.\d+ sigma", "zero-point-version"),
    Fault(36, "a zero point of 0 wrapped to 15",
          of_tensors(wrapped_zero_point, wrap_zero_point), "fidelity", "block", "damaged-blocks"),
    Fault(37, "nibbles in sequence, and the config says AWQ's order",
          on_disk(linear_nibbles, **FLOOR), "fidelity", "SQNR", "awq-order"),
    Fault(38, "excess 8 taken off whole words: borrows run from nibble to nibble, half of the codes are off by one",
          of_tensors(gptq(), borrow_across_lanes), "fidelity", "SQNR", "borrows"),
    Fault(39, "Q4_0 with neighbours in a byte, not halves of the block",
          q4_0(in_pairs), "fidelity", "SQNR", "columns-permuted"),
    Fault(39, "Q4_0 in two's complement, not excess 8",
          q4_0(lambda codes: codes ^ 0x88), "fidelity", "SQNR", "sign-convention"),
    Fault(40, "the bytes of nested absmax taken for the absmax",
          in_memory(nested, use_raw_bytes), "fidelity", "gain", "block-scales"),
    Fault(41, "a bfloat16 nested offset read as float32",
          in_memory(nested, misread_offset), "fidelity", "SQNR", "nested-offset"),
    Fault(42, "a block size of 64 in the state of blocks of 128",
          on_disk(wrong_blocksize), "fidelity", "SQNR", "block-size"),
    Fault(43, "everything decodes to zero", in_memory(encoders.bnb_4bit, zero_statistics), "fidelity",
          r"SQNR 0\.0 dB", "zeros"),
    Fault(44, "a matrix-vector kernel that reads the weight in another order, without an error", wrong_gemv,
          "module output", "layer"),
    Fault(45, "the quantization state was not saved", lost_state, "opens", "packed 4-bit, but has no"),
    Fault(45, "strict=False: the layer keeps the weights it was built with", stale_reload, "same weights", "differ"),
    Fault(46, "a second move to a device quantizes the packed bytes", packed_again, "same weights", "1,920 x 1"),
    Fault(47, "moved without unpacking what the CPU's kernel had repacked", moved_without_unpacking, "same weights",
          "differ"),
    Fault(48, "int8 scales along the wrong axis, hidden by a square matrix", wrong_axis, "fidelity", "SQNR",
          "scale-axis"),
    Fault(49, "int8 codes taken for the weights", in_memory(encoders.bnb_8bit, unscaled), "fidelity", "gain",
          "row-scales"),
    Fault(50, "the FP8 scale was dropped", of_tensors(fp8(), drop(V)), "opens", "has no `layer.weight_scale_inv`"),
    Fault(50, "the FP8 scales are all 1", of_tensors(fp8(), change(V, torch.ones_like)), "fidelity", "gain",
          "block-scales"),
    Fault(51, "the FP8 scale under a name that no loader knows", of_tensors(fp8(), rename(V, "layer.weight.s_inv")),
          "opens", "has no `layer.weight_scale_inv`"),
    Fault(52, "the global scale of NVFP4 multiplied, not divided by",
          of_tensors(nvfp4, change(G, torch.reciprocal)), "fidelity", "gain", "scale-inverted"),
    Fault(53, "the scales of gate and up merged to the larger", on_disk(merged_scales), "fidelity", "gain",
          "shard-scales"),
    Fault(54, "a ternary weight divided by its scale",
          of_tensors(ternary, change("layer.weight_scale", torch.reciprocal), **FLOOR), "fidelity", "gain",
          "scale-inverted"),
    Fault(55, "the grid of FP8 scales transposed", of_tensors(fp8(), transposed_grid), "fidelity", "SQNR",
          "scales-transposed"),
    Fault(56, "a square expert transposed", turned_experts, "fidelity", "SQNR", "transposed"),
    Fault(57, "FP8 normalised to fnuz twice: scales doubled", of_tensors(fp8(), twice_normalised), "fidelity",
          r"gain (1\.99|2\.0)", "float-format"),
    Fault(57, "e4m3 bytes under the dtype of e5m2",
          of_tensors(fp8(), change("layer.weight", lambda codes: codes.view(torch.float8_e5m2))), "fidelity", "NaN",
          "float-format"),
    Fault(58, "a NaN scale of a block of almost nothing", nan_in_a_block("Q4_0", 18), "integrity", "NaN"),
    Fault(59, "a NaN block from an importance matrix of zeros", nan_in_a_block("Q5_1", 2), "integrity", "NaN"),
    Fault(60, "a scale of zero over codes that are not", of_tensors(gptq(), set_scale(0.0)), "integrity",
          "is zero, or as good as zero"),
    Fault(60, "the same, seen by its values", of_tensors(gptq(), set_scale(0.0)), "fidelity", "block",
          "damaged-blocks"),
    Fault(61, "float16 scales that underflow: a channel of zeros", of_tensors(gptq(), channel_underflow), "integrity",
          "is zero, or as good as zero"),
    Fault(61, "the same, seen by its values", of_tensors(gptq(), channel_underflow), "fidelity", "row",
          "damaged-blocks"),
    Fault(62, "nested statistics of 1e-40", on_disk(denormal_statistics), "integrity", "is zero, or as good as zero"),
    Fault(63, "infinite scales after AWQ in float16", of_tensors(gptq(), set_scale(float("inf"))), "integrity",
          "NaN or infinite"),
    Fault(64, "k of grouped heads permuted by the wrong number of heads", grouped_heads, "fidelity", "SQNR",
          "rotary-heads"),
    Fault(64, "q in the order of llama.cpp, not undone", not_unpermuted, "fidelity", "SQNR", "rotary-pairs"),
    Fault(65, "MatMulNBits in blocks of 512: onnxruntime returned zeros, and refuses it now", blocks_of_512,
          "kernel parity", "onnxruntime .* does not run it: Only block sizes .* got: 512"),
    Fault(66, "onnxruntime's fusion of int4 blocks along axis 0 and their product miscomputes", None, "kernel parity",
          reason="reported of onnxruntime 1.29.0; it and 1.31.1 compute such models right where this was tried"),
    Fault(67, "zero points of another shape",
          of_tensors(gptq(), change("layer.qzeros", lambda packed: packed.reshape(-1, 1))), "opens", "qzeros"),
    Fault(68, "ternary fields packed from signed numbers", of_tensors(ternary, ternary_of_signed, **FLOOR), "fidelity",
          "SQNR", "codes-off-by-one"),
    Fault(69, "packed along one dimension, unpacked along the other", of_tensors(gptq(), packed_along_outputs),
          "opens", "qweight"),
    Fault(70, "rows that are no multiple of the block", odd_rows, "opens", "80"),
    Fault(71, "3-bit codes of a stream read as planes", on_disk(planes_for_a_stream), "fidelity", "SQNR",
          "planes"),
    Fault(72, "zero points packed in the other order", of_tensors(gptq(version=2), big_nibble_first), "fidelity",
          "SQNR", "zero-points"),
    Fault(73, "an odd last dimension packed by twos", on_disk(odd_columns), "fidelity", "the reference has"),
    Fault(74, "NVFP4 without its global scale", of_tensors(nvfp4, drop(G)), "opens", "has no `layer.weight_global"),
    Fault(75, "an adapter lost before quantization", adapter_lost, "fidelity", "SQNR", "low-rank-difference"),
    Fault(75, "an adapter merged into a 4-bit weight: lost in its noise", adapter_in_noise, "delta", r"-\d"),
    Fault(76, "a bias that is another's", other_bias, "fidelity", "layer.bias", "unrelated"),
    Fault(76, "a bias that was lost", bias_gone, "params", "40"),
    Fault(77, "experts that were never loaded", random_experts, "fidelity", "SQNR", "unrelated"),
    Fault(78, "reloaded as garbage", stale_reload, "same weights", "differ"),
    Fault(79, "FP4 taken for the type of NF4 codes", on_disk(wrong_type), "fidelity", "SQNR", "table"),
    Fault(80, "channel factors that AWQ moved from the norm into the weight: no fault", smoothed, "fidelity"),
]  # fmt: skip


def table() -> list[str]:
    """Return a line for each row."""
    return [f"| {f.row} | {f.what} | {f.check if f.make else 'not run'} | {_named(f)} |" for f in FAULTS]


def page() -> str:
    """Return docs/reference/faults.md: its introduction as it is, the table, and what each check says."""
    introduction = PAGE.read_text().partition("| # |")[0]
    messages = [f"## {fault.row}: {fault.what}\n\n{_said(fault)}" for fault in FAULTS]
    return introduction + "\n".join(["| # | fault | check | named |", "|---:|---|---|---|", *table(), "", *messages])


def _named(fault: Fault) -> str:
    return f"`{fault.diagnosis}`" if fault.diagnosis else ""


def _said(fault: Fault) -> str:
    if fault.make is None:
        return f"Not run: {fault.reason}.\n"
    with tempfile.TemporaryDirectory() as folder:
        said = outcome(fault, Path(folder) / "model", broken=True)
    return f"```text\n{said}\n```\n" if said else f"Passes the check of {fault.check}.\n"


def outcome(fault: Fault, folder: Path, *, broken: bool) -> str | None:
    """What the check of a row says, or None where it passes."""
    assert fault.make is not None
    given = fault.make(folder, broken)
    try:
        CHECKS[fault.check](given)
    except (AssertionError, FormatError) as error:
        return str(error).replace(str(folder), "FOLDER")
    return None


if __name__ == "__main__":
    PAGE.write_text(page())
