"""What ggml's block types share: rows cut into blocks, codes and scales of a block written together.

The schemes of the `ggml_*` files say how one block is read; here is the way from a stored tensor to rows. A tensor
`X.scale` beside `X.weight` (NVFP4, BitNet) belongs to it: one float32 for all, or one for each expert of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import dtypes
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes.scheme import Namespace
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

# Values that are unpacked at a time: bounds what is in between, and is enough for a kernel.
STEP = 1 << 20


class BlockType(NamedTuple):
    """How one block type is read.

    `unpack(blocks, values)` fills values (n, values of a block) float32 from blocks (n, bytes of a block) uint8.
    `scales` and `zero_points` are the bytes of either in a block; the rest are codes. `scaled` is the rounding where
    one scale of the whole tensor stands above those of the blocks.
    """

    unpack: Callable[[torch.Tensor, torch.Tensor], None]
    scales: int
    zero_points: int = 0
    floor_db: float | None = None
    rounding: Rounding | None = None
    scaled: Rounding | None = None


def claim(stored: StoredTensor, namespace: Namespace, kind: BlockType) -> LogicalTensor:
    """Return the tensor with its bytes split into codes, scales and zero points, and its `.scale` where it has one."""
    blocks = stored.elements // DTYPES[stored.dtype].block
    shares: tuple[tuple[ByteClass, int], ...] = (
        ("scales", blocks * kind.scales),
        ("zero_points", blocks * kind.zero_points),
    )
    parts = [Part("blocks", "codes", stored, tuple(share for share in shares if share[1]))]
    scale = namespace.tensors.get(stored.name.removesuffix(".weight") + ".scale")
    if scale is not None:
        _check_scale(scale, stored)
        parts.append(Part("scale", "scales", scale))
    return LogicalTensor(
        stored.name,
        stored.shape,
        f"ggml-{stored.dtype.lower()}",
        stored.role or "parameter",
        tuple(parts),
        decode,
        kind,
        block=DTYPES[stored.dtype].block,
        floor_db=kind.floor_db,
        rounding=kind.rounding if scale is None else kind.scaled,
    )


def _check_scale(scale: StoredTensor, weight: StoredTensor) -> None:
    matrices = weight.shape[0] if len(weight.shape) > 2 else 1
    if scale.dtype != "F32" or scale.elements not in (1, matrices):
        rule = f"F32, one for `{weight.name}` {list(weight.shape)} or for each of its matrices"
        raise FormatError(f"{scale.dtype} {list(scale.shape)} is no scale ({rule})", tensor=scale.name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    kind, stored = tensor.layout, tensor.stored
    assert isinstance(kind, BlockType)
    dtype = DTYPES[stored.dtype]
    row = dtypes.nbytes(dtype.name, tensor.columns)
    blocks = stored.load_bytes(start * row, stop * row, device).view(-1, dtype.bits // 8)
    values = torch.empty((len(blocks), dtype.block), dtype=torch.float32, device=device)
    step = STEP // dtype.block
    for at in range(0, len(blocks), step):
        kind.unpack(blocks[at : at + step], values[at : at + step])
    values = values.view(stop - start, tensor.columns)
    return values.mul_(_scale(tensor, start, stop, device)) if tensor.has("scale") else values


def _scale(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """The scale of each row, or of all."""
    import torch

    scale = tensor.part("scale").load(device=device)
    if len(scale) == 1:
        return scale
    rows = torch.arange(start, stop, device=device)
    return scale[rows // (tensor.rows // len(scale))].view(-1, 1)
