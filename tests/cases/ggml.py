"""ggml's types in GGUF files: blocks of random bytes, decoded by the `gguf` package; blocks worked by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import gguf_files
from tests.cases import Case, Made
from tests.gguf_files import SIZES, Tensor, architecture

ROWS = 7
Q_NAME, Q_HERE = "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"


def _file(tensors: list[Tensor], keys=(), **options):
    def write(folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(gguf_files.gguf(tensors, keys, **options))
        return path

    return write


def _blocks(kind: str, rows: int, blocks: int) -> tuple[np.ndarray, torch.Tensor]:
    """Random blocks whose values are all finite, and what the package makes of them."""
    gguf = pytest.importorskip("gguf", reason="the gguf package decodes what we compare with")
    width = SIZES[kind][1]
    raw = np.random.default_rng(len(kind) + width).integers(0, 256, (40 * rows, blocks * width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    finite = np.isfinite(values).all(axis=1)
    return raw[finite][:rows], torch.from_numpy(values[finite][:rows].copy())


def of_type(kind: str, blocks: int = 3):
    def make() -> Made:
        raw, values = _blocks(kind, ROWS, blocks)
        return Made(values, write=_file([Tensor("layer.weight", kind, tuple(values.shape), raw.tobytes())]))

    return make


def quantized(kind: str):
    """Weights that the package quantized."""

    def make() -> Made:
        gguf = pytest.importorskip("gguf", reason="the gguf package quantizes")
        number = gguf.GGMLQuantizationType[kind]
        weight = np.random.default_rng(1).standard_normal((5, 768)).astype(np.float32)
        raw = gguf.quants.quantize(weight, number)
        values = torch.from_numpy(gguf.quants.dequantize(raw, number).copy())
        return Made(values, write=_file([Tensor("layer.weight", kind, (5, 768), raw.tobytes())]))

    return make


def plain(dtype: torch.dtype, kind: str, order: str = "<"):
    def make() -> Made:
        torch.manual_seed(2)
        weight = torch.randn(7, 12).to(dtype)
        raw = weight.view(torch.uint8).view(-1, weight.element_size())
        raw = raw if order == "<" else raw.flip(1)
        tensor = Tensor("layer.weight", kind, (7, 12), bytes(raw.flatten().tolist()))
        return Made(weight, write=_file([tensor], order=order))

    return make


def by_hand(kind: str, block: bytes, values: list[float]):
    def make() -> Made:
        assert len(block) == SIZES[kind][1]
        tensor = Tensor("layer.weight", kind, (1, len(values)), block)
        return Made(torch.tensor([values]), write=_file([tensor]))

    return make


HALF = struct.pack("<e", 0.5)
ONE = struct.pack("<e", 1.0)

BY_HAND = [
    # nibbles: low ones are the first half. 0x80 is code 0 then code 8; w = 0.5 * (q - 8)
    ("Q4_0", HALF + b"\x80" * 16, [-4.0] * 16 + [0.0] * 16),
    ("Q4_1", HALF + ONE + b"\x10" * 16, [1.0] * 16 + [1.5] * 16),
    # fifth bits: 1 for value 0 only; 16 | 0 = 16 -> 0.5 * (16 - 16)
    ("Q5_0", HALF + b"\x01\x00\x00\x00" + b"\x00" * 16, [0.0] + [-8.0] * 31),
    ("Q5_1", HALF + ONE + b"\x00\x00\x00\x80" + b"\x00" * 16, [1.0] * 31 + [9.0]),
    ("Q8_0", HALF + b"\xff" * 32, [-0.5] * 32),
    # scale 2 and min 1 for the first 16, 0 for the rest; codes 3: 0.5 * 2 * 3 - 1 * 1
    ("Q2_K", b"\x12" + b"\x00" * 15 + b"\xff" * 64 + HALF + ONE, [2.0] * 16 + [0.0] * 240),
    # scales 0 mean -32; third bits set: q = 3, else 3 - 4
    ("Q3_K", b"\xff" * 16 + b"\x00" * 16 + b"\xff" * 64 + b"\x00" * 12 + HALF,
     ([-48.0] * 16 + [16.0] * 16) * 8),
    # scale 3 and min 2 for the first 32: low nibbles 1, 0.5 * 3 * 1 - 1 * 2
    ("Q4_K", HALF + ONE + b"\x03\x00\x00\x00\x02" + b"\x00" * 7 + b"\x01" * 128, [-0.5] * 32 + [0.0] * 224),
    # scale and min of group 7: 6 bits, 4 low in byte 11, 2 high in bytes 3 and 7
    ("Q4_K", HALF + ONE + b"\x00\x00\x00\xc0\x00\x00\x00\x40" + b"\x00\x00\x00\x21" + b"\x10" * 128,
     [0.0] * 224 + [0.5 * 49 - 18] * 32),
    ("Q5_K", HALF + ONE + b"\x01" + b"\x00" * 11 + b"\x01" * 32 + b"\x01" * 128, [8.5] * 32 + [0.0] * 224),
    # codes 32 + 1 in the first 16: 0.5 * -2 * 1
    ("Q6_K", b"\x01" * 128 + b"\x02" * 64 + b"\xfe" + b"\x00" * 15 + HALF, [-1.0] * 16 + [0.0] * 240),
    ("IQ4_NL", HALF + b"\xf0" * 16, [-63.5] * 16 + [56.5] * 16),
    ("MXFP4", b"\x7f" + b"\x72" * 16, [1.0] * 16 + [6.0] * 16),
    ("NVFP4", b"\x38\x00\x40\x7f" + b"\x72" * 32,
     [1.0] * 8 + [6.0] * 8 + [0.0] * 16 + [2.0] * 8 + [12.0] * 8 + [0.0] * 16),
    ("TQ2_0", b"\x24" * 64 + HALF, ([-0.5] * 32 + [0.0] * 32 + [0.5] * 32 + [-0.5] * 32) * 2),
    # 1 bit: lowest first, clear is minus
    ("Q1_0", HALF + b"\x01" + b"\x00" * 15, [0.5] + [-0.5] * 127),
    # 2 bits: lowest first, 0 1 2 3 are -1 0 1 2
    ("Q2_0", HALF + b"\xe4" * 16, [-0.5, 0.0, 0.5, 1.0] * 16),
]  # fmt: skip


def _paired(values: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return values.reshape(heads, 2, len(values) // heads // 2, -1).transpose(1, 2).reshape(values.shape)


def paired_rows(kind: str, heads: int, kv: int | None = None):
    """q or k of a llama: what is stored in pairs comes out in halves."""

    def make() -> Made:
        raw, values = _blocks(kind, 24, 2)
        order = _paired(torch.arange(24), heads)  # the row of the model that each stored row is
        stored = raw[order.numpy()]
        name = Q_HERE if kv is None else "blk.0.attn_k.weight"
        tensor = Tensor(name, kind, tuple(values.shape), stored.tobytes())
        keys = architecture("llama", head_count=heads if kv is None else 2 * heads, head_count_kv=kv or 1)
        return Made(values, write=_file([tensor], keys))

    return make


def paired_bias() -> Made:
    values = torch.randn(24)
    stored = _paired(values, 3)
    tensor = Tensor("blk.0.attn_q.bias", "F32", (24,), bytes(stored.view(torch.uint8).tolist()))
    return Made(values, write=_file([tensor], architecture("llama", head_count=3)))


def shifted_norm() -> Made:
    """Gemma's norms multiply by 1 + weight; the file has the sum."""
    values = torch.randn(12).to(torch.bfloat16).float()
    stored = values + 1
    tensor = Tensor("blk.0.attn_norm.weight", "F32", (12,), bytes(stored.view(torch.uint8).tolist()))
    return Made(values, write=_file([tensor], architecture("gemma2")), tolerance=1e-7)


def experts(kind: str, scales: list[float] | None = None):
    """A stack of experts, perhaps with a scale for all or for each."""

    def make() -> Made:
        raw, values = _blocks(kind, 3 * 5, 2)
        tensors = [Tensor("layer.weight", kind, (3, 5, values.shape[1]), raw.tobytes())]
        if scales:
            tensors.append(Tensor("layer.scale", "F32", (len(scales),), struct.pack(f"<{len(scales)}f", *scales)))
        factor = torch.tensor(scales or [1.0]).view(-1, 1, 1)
        return Made(values.view(3, 5, -1) * factor, write=_file(tensors))

    return make


def big_endian(kind: str, halves: tuple[int, ...]):
    """As llama.cpp's gguf_convert_endian.py writes it: the float16 of each block turned round."""

    def make() -> Made:
        raw, values = _blocks(kind, ROWS, 3)
        turned = raw.reshape(-1, SIZES[kind][1]).copy()
        for at in halves:
            turned[:, [at, at + 1]] = turned[:, [at + 1, at]]
        tensor = Tensor("layer.weight", kind, tuple(values.shape), turned.tobytes())
        return Made(values, write=_file([tensor], order=">"))

    return make


def splits() -> Made:
    """Three files of one model, the first without tensors."""
    raw, values = _blocks("Q4_0", ROWS, 3)
    weight = Tensor("layer.weight", "Q4_0", tuple(values.shape), raw.tobytes())
    norm = Tensor("norm.weight", "F32", (96,))

    def write(folder: Path) -> Path:
        for number, tensors in enumerate([[], [norm], [weight]]):
            keys = [gguf_files.key("split.no", "u16", number), gguf_files.key("split.count", "u16", 3)]
            if not number:
                keys.append(gguf_files.key("split.tensors.count", "i32", 2))
            (folder / f"m-{number + 1:05}-of-00003.gguf").write_bytes(gguf_files.gguf(tensors, keys))
        return folder

    return Made(values, write=write)


# (type, bytes of a tensor of 7 rows of 3 blocks by class), worked by hand from the structs of ggml-common.h
PARTS = {
    "Q4_0": (16, 2, 0), "Q4_1": (16, 2, 2), "Q5_0": (20, 2, 0), "Q5_1": (20, 2, 2), "Q8_0": (32, 2, 0),
    "Q2_K": (64, 10, 10), "Q3_K": (96, 14, 0), "Q4_K": (128, 8, 8), "Q5_K": (160, 8, 8), "Q6_K": (192, 18, 0),
    "IQ4_NL": (16, 2, 0), "IQ4_XS": (128, 8, 0), "TQ1_0": (52, 2, 0), "TQ2_0": (64, 2, 0), "MXFP4": (16, 1, 0),
    "NVFP4": (32, 4, 0), "IQ1_S": (44, 5, 1), "IQ1_M": (44, 8, 4), "IQ2_XXS": (60, 6, 0), "IQ2_XS": (64, 10, 0),
    "IQ2_S": (72, 10, 0), "IQ3_XXS": (92, 6, 0), "IQ3_S": (104, 6, 0),
}  # fmt: skip


def _bytes(kind: str, blocks: int) -> dict[str, int]:
    return dict(zip(("codes", "scales", "zero_points"), (blocks * size for size in PARTS[kind]), strict=True))


CASES = [
    *(Case(f"ggml-{kind.lower()}", of_type(kind), f"ggml-{kind.lower()}", (ROWS, 3 * SIZES[kind][0]),
           bytes=_bytes(kind, 3 * ROWS)) for kind in PARTS),
    *(Case(f"ggml-{kind.lower()}-by-hand-{number}", by_hand(kind, block, values), f"ggml-{kind.lower()}",
           (1, len(values))) for number, (kind, block, values) in enumerate(BY_HAND)),
    *(Case(f"ggml-{kind.lower()}-quantized", quantized(kind), f"ggml-{kind.lower()}", (5, 768))
      for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")),
    Case("gguf-f32", plain(torch.float32, "F32"), "plain", (7, 12), bytes={"unquantized": 336}),
    Case("gguf-f16", plain(torch.float16, "F16"), "plain", (7, 12)),
    Case("gguf-bf16", plain(torch.bfloat16, "BF16"), "plain", (7, 12)),
    Case("gguf-f64", plain(torch.float64, "F64"), "plain", (7, 12)),
    Case("gguf-q-in-pairs", paired_rows("Q8_0", 3), "ggml-q8_0", (24, 64), Q_NAME),
    Case("gguf-k-in-pairs-grouped", paired_rows("Q4_K", 6, 6), "ggml-q4_k", (24, 512),
         "model.layers.0.self_attn.k_proj.weight"),
    Case("gguf-q-bias-in-pairs", paired_bias, "plain", (24,), "model.layers.0.self_attn.q_proj.bias"),
    Case("gguf-gemma-norm", shifted_norm, "plain", (12,), "model.layers.0.input_layernorm.weight"),
    Case("ggml-experts", experts("Q4_K"), "ggml-q4_k", (3, 5, 512)),
    Case("ggml-nvfp4-scale", experts("NVFP4", [0.25]), "ggml-nvfp4", (3, 5, 128),
         bytes={"codes": 15 * 2 * 32, "scales": 15 * 2 * 4 + 4}),
    Case("ggml-nvfp4-scale-of-each-expert", experts("NVFP4", [0.25, 3.0, -1.5]), "ggml-nvfp4", (3, 5, 128)),
    Case("gguf-splits", splits, "ggml-q4_0", (ROWS, 96), total=ROWS * 96 + 96),
    Case("gguf-big-endian-f32", plain(torch.float32, "F32", ">"), "plain", (7, 12)),
    Case("gguf-big-endian-bf16", plain(torch.bfloat16, "BF16", ">"), "plain", (7, 12)),
    Case("gguf-big-endian-q4_0", big_endian("Q4_0", (0,)), "ggml-q4_0", (ROWS, 96)),
    Case("gguf-big-endian-q4_k", big_endian("Q4_K", (0, 2)), "ggml-q4_k", (ROWS, 768)),
    Case("gguf-big-endian-q6_k", big_endian("Q6_K", (208,)), "ggml-q6_k", (ROWS, 768)),
]  # fmt: skip
