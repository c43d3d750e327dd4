"""ggml's codebook types: groups of 4 or 8 values are rows of a fixed grid, with signs or a shift beside.

    type     bytes  layout of a block of 256 values
    IQ1_S    50     d f16 | 32 bytes: lower 8 bits of 32 rows | 8 u16: 4 x 3 upper bits, 3 of scale, 1 of shift
    IQ1_M    56     32 bytes, as IQ1_S | 16 bytes: 3 upper bits and 1 of shift for each row
                    | 4 u16: 4 x 3 of scale, 4 of d f16
    IQ2_XXS  66     d f16 | 8 x (4 rows u8 | u32: 4 x 7 of signs, 4 of scale)
    IQ2_XS   74     d f16 | 32 u16: 9 bits row, 7 of signs | 8 bytes: 16 scales of 4 bits
    IQ2_S    82     d f16 | 32 bytes: lower 8 bits of rows | 32 bytes: signs | 8 bytes: 2 more bits | 8 bytes: 16 scales
    IQ3_XXS  98     d f16 | 64 rows u8 | 8 u32: 4 x 7 of signs, 4 of scale
    IQ3_S    110    d f16 | 64 bytes: lower 8 bits of rows | 8 bytes: ninth bits | 32 bytes: signs | 4 bytes: 8 scales

Rows are of 8 values, of IQ3 of 4; fields lie lowest first. 7 bits of signs stand for 8: the last makes them even.
Formula, in float32: IQ2 d * (0.5 + scale) * 0.25 * grid * sign; IQ3_XXS d * (0.5 + scale) * 0.5 * grid * sign;
IQ3_S d * (1 + 2 * scale) * grid * sign; IQ1 d * (2 * scale + 1) * (grid +- 0.125).
Source: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c; gguf 0.19, quants.py.

The grids are those of the `gguf` package, which is imported when values are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.schemes import ggml_blocks, packing
from pytest_quantcheck.schemes.ggml_blocks import BlockType
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, StoredTensor

if TYPE_CHECKING:
    import torch

SHIFT = 0.125


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor that these blocks are."""
    return ggml_blocks.claim(stored, namespace, TYPES[stored.dtype])


def _iq1_s(blocks: torch.Tensor, values: torch.Tensor) -> None:
    high = packing.little_endian(blocks[:, 34:], 2)  # (n, 8)
    rows = blocks[:, 2:34].to(high.dtype) | (_fields(high, 4, 3) << 8).flatten(1)
    scale = packing.halves(blocks, 0) * (2 * (high >> 12 & 7) + 1)
    values.copy_(_grid_rows("IQ1_S", rows))
    values.view(-1, 8, 32).add_(_shift(high >> 15).unsqueeze(-1)).mul_(scale.unsqueeze(-1))


def _iq1_m(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    words = packing.little_endian(blocks[:, 48:], 2)  # (n, 4)
    places = torch.arange(0, 16, 4, device=words.device)
    whole = ((words >> 12) << places).sum(dim=1).to(torch.int16)
    scale = whole.view(torch.float16).to(torch.float32).view(-1, 1) * (2 * _fields(words, 4, 3).flatten(1) + 1)
    high = packing.shifted(blocks[:, 32:48], 4).flatten(1).to(words.dtype)  # (n, 32)
    values.copy_(_grid_rows("IQ1_M", blocks[:, :32].to(words.dtype) | (high & 7) << 8))
    values.view(-1, 32, 8).add_(_shift(high >> 3).unsqueeze(-1))
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1))


def _iq2_xxs(blocks: torch.Tensor, values: torch.Tensor) -> None:
    words = packing.little_endian(blocks[:, 2:], 4).view(-1, 8, 2)
    rows, rest = _fields(words[:, :, 0], 4, 8).flatten(1), words[:, :, 1]
    scale = packing.halves(blocks, 0) * (0.5 + (rest >> 28)) * 0.25  # (n, 8)
    values.copy_(_grid_rows("IQ2_XXS", rows))
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1))
    values.mul_(_even_signs(_fields(rest, 4, 7).flatten(1)))


def _iq2_xs(blocks: torch.Tensor, values: torch.Tensor) -> None:
    words = packing.little_endian(blocks[:, 2:66], 2)  # (n, 32)
    scale = packing.halves(blocks, 0) * (0.5 + packing.shifted(blocks[:, 66:], 4).flatten(1)) * 0.25  # (n, 16)
    values.copy_(_grid_rows("IQ2_XS", words & 511))
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1))
    values.mul_(_even_signs(words >> 9))


def _iq2_s(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    high = packing.shifted(blocks[:, 66:74], 2).flatten(1).to(torch.int64)  # (n, 32)
    scale = packing.halves(blocks, 0) * (0.5 + packing.shifted(blocks[:, 74:], 4).flatten(1)) * 0.25  # (n, 16)
    values.copy_(_grid_rows("IQ2_S", blocks[:, 2:34] | high << 8))
    values.view(-1, 16, 16).mul_(scale.unsqueeze(-1))
    values.mul_(_signs(blocks[:, 34:66]))


def _iq3_xxs(blocks: torch.Tensor, values: torch.Tensor) -> None:
    words = packing.little_endian(blocks[:, 66:], 4)  # (n, 8)
    scale = packing.halves(blocks, 0) * (0.5 + (words >> 28)) * 0.5
    values.copy_(_grid_rows("IQ3_XXS", blocks[:, 2:66]))
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1))
    values.mul_(_even_signs(_fields(words, 4, 7).flatten(1)))


def _iq3_s(blocks: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    high = packing.shifted(blocks[:, 66:74], 1).flatten(1).to(torch.int64)  # (n, 64)
    scale = packing.halves(blocks, 0) * (1 + 2 * packing.shifted(blocks[:, 106:], 4).flatten(1))  # (n, 8)
    values.copy_(_grid_rows("IQ3_S", blocks[:, 2:66] | high << 8))
    values.view(-1, 8, 32).mul_(scale.unsqueeze(-1))
    values.mul_(_signs(blocks[:, 74:106]))


def _fields(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Return the first `count` fields of each word, lowest first.

    words  # (...) int64
    ->     # (..., count)
    """
    import torch

    places = torch.arange(count, device=words.device) * bits
    return (words.unsqueeze(-1) >> places) & ((1 << bits) - 1)


def _grid_rows(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Return the grid's values for a block's rows.

    rows  # (n, rows)
    ->    # (n, 256)
    """
    import torch

    grid = torch.from_numpy(_package_table(name)).to(rows.device)
    return packing.look_up(rows, grid).flatten(1)


def _package_table(name: str) -> Any:
    try:
        quants = importlib.import_module("gguf.quants")
    except ImportError:
        raise NotDecodable("its codebook is in the `gguf` package: pip install 'pytest-quantcheck[gguf]'") from None
    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid.reshape(kind.grid_shape)


def _even_signs(codes: torch.Tensor) -> torch.Tensor:
    """Return 8 signs for 7 bits: an odd number of minuses among seven makes the eighth a minus."""
    import torch

    parity = codes.clone()
    for step in (4, 2, 1):
        parity = parity ^ (parity >> step)
    return _signs((codes | (parity & 1) << 7).to(torch.uint8))


def _signs(packed: torch.Tensor) -> torch.Tensor:
    """Return -1 for every bit that is set, else 1, as float32."""
    import torch

    return 1 - 2 * packing.shifted(packed, 1).flatten(1).to(torch.float32)


def _shift(negative: torch.Tensor) -> torch.Tensor:
    import torch

    return SHIFT - 2 * SHIFT * (negative & 1).to(torch.float32)


# Worst of Gaussian, Student-t and outlier weights under a flat and a steep importance matrix, less 1 dB.
TYPES = {
    "IQ1_S": BlockType(_iq1_s, scales=5, zero_points=1, floor_db=3.2),
    "IQ1_M": BlockType(_iq1_m, scales=8, zero_points=4, floor_db=3.8),
    "IQ2_XXS": BlockType(_iq2_xxs, scales=6, floor_db=5.6),
    "IQ2_XS": BlockType(_iq2_xs, scales=10, floor_db=7.0),
    "IQ2_S": BlockType(_iq2_s, scales=10, floor_db=8.5),
    "IQ3_XXS": BlockType(_iq3_xxs, scales=6, floor_db=10.8),
    "IQ3_S": BlockType(_iq3_s, scales=6, floor_db=13.4),
}

SCHEME = Scheme(
    name="ggml-codebook",
    title="ggml IQ1, IQ2, IQ3",
    variants=tuple(f"ggml-{name.lower()}" for name in TYPES),
    claim=claim,
    dtypes=tuple(TYPES),
    source="llama.cpp ggml-common.h, ggml-quants.c; gguf 0.19, quants.py",
    verified="gguf 0.19.0",
)
