"""ggml's IQ4 types: 4-bit codes into a table of 16 int8 values that lie closer together near zero.

    type    bytes  layout of a block
    IQ4_NL  18     d f16 | 16 bytes: low nibbles are values 0 to 15, high nibbles 16 to 31            block 32
    IQ4_XS  136    d f16 | 2 bytes: upper 2 bits of 8 scales, lowest first | 4 bytes: lower 4 bits    block 256
                   | 8 runs of 16 bytes, each as IQ4_NL

Formula, in float32: IQ4_NL d * TABLE[q]; IQ4_XS (d * (scale - 32)) * TABLE[q], one scale for 32 values.
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c; gguf 0.19, quants.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck import compiled
from pytest_quantcheck.schemes import ggml_blocks, ggml_search, packing, rounding, steps
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.ggml_search import Scales
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.schemes.steps import Span
from pytest_quantcheck.tensor import LogicalTensor, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _iq4_nl(blocks: torch.Tensor, values: torch.Tensor) -> None:
    scale, loops = packing.halves(blocks, 0), compiled.loops("ggml")
    if loops is not None:
        loops.unpack_levels(blocks, 2, 16, TABLE, scale, values)
        return
    packing.look_up_halves(blocks[:, 2:], TABLE, values.view(-1, 2, 16))
    values.mul_(scale)


def _iq4_xs(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    high = packing.shifted(blocks[:, 2:4], 2).flatten(1)  # (n, 8)
    low = packing.shifted(blocks[:, 4:8], 4).flatten(1)
    scale = packing.halves(blocks, 0) * ((low | high << 4).to(torch.float32) - 32)
    loops = compiled.loops("ggml")
    if loops is not None:
        loops.unpack_levels(blocks, 8, 16, TABLE, scale, values)
        return
    runs = blocks[:, 8:].reshape(-1, 16)
    packing.look_up_halves(runs, TABLE, values.view(-1, 2, 16))
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1))


def _rounding(scales: Scales, block: int, span: Span) -> Rounding:
    to_level = ggml_search.from_zero(TABLE, scales, (-7.0, 7.0))
    gaps = steps.levels(TABLE, float(TABLE[0]), 0x00, clips=True, span=span)
    return rounding.grouped(to_level, block, margin_db=rounding.COMPENSATED_DB, steps=gaps)


IQ4_NL = _rounding(Scales(32, 1), 32, Span(18, 2, 18))
IQ4_XS = _rounding(Scales(32, 32), 256, Span(136, 8, 136))

TYPES = {
    "IQ4_NL": BlockType(_iq4_nl, scales=2, floor_db=20.0, rounding=IQ4_NL),
    "IQ4_XS": BlockType(_iq4_xs, scales=8, floor_db=19.9, rounding=IQ4_XS),
}

SCHEME = Scheme(
    name="ggml-iq4",
    title="ggml IQ4_NL, IQ4_XS",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
