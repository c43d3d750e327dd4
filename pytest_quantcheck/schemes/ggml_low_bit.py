"""ggml's uniform 1-bit and 2-bit types: codes of equal distance with one scale.

    type  bytes  layout of a block
    Q1_0  18     d f16 | 16 bytes: bit k of byte i is value 8 i + k        128 values
    Q2_0  18     d f16 | 16 bytes: field k of byte i is value 4 i + k      64 values

Formula, in float32: Q1_0 d where the bit is set, else -d; Q2_0 d * (q - 1).
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c (gguf 0.19 has the sizes of Q1_0 and nothing else).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_quantcheck.schemes import ggml_blocks, packing
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _q1_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    values.copy_(packing.shifted(blocks[:, 2:], 1).flatten(1))
    values.mul_(2).sub_(1).mul_(packing.halves(blocks, 0))


def _q2_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    values.copy_(packing.shifted(blocks[:, 2:], 2).flatten(1))
    values.sub_(1).mul_(packing.halves(blocks, 0))


TYPES = {"Q1_0": BlockType(_q1_0, scales=2), "Q2_0": BlockType(_q2_0, scales=2)}

SCHEME = Scheme(
    name="ggml-low-bit",
    title="ggml Q1_0, Q2_0",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-quants.c",
    verified="by hand: gguf 0.19.0 decodes neither",
)
