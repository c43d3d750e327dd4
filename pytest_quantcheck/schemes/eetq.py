"""EETQ: 8-bit codes with one scale per output, laid out for CUTLASS's mixed GEMM.

    part           dtype  stored shape   packing
    weight         I8     [K, N]         bytes of code + 128, in this order: pairs of outputs, 64-column tiles, the two
                                         outputs, sixteens of columns; in each sixteen 0 1 8 9 2 3 10 11 4 5 12 13 6 7
                                         14 15, and in each four bytes the middle two swapped
    weight_scales  F16    [N]

Formula: w[n, k] = (byte - 128) * weight_scales[n].
Source: EETQ 1.0.1, csrc/cutlass_kernels/cutlass_preprocessors.cc (`preprocess_weights_for_mixed_gemm`); transformers
5.17, integrations/eetq.py (`EetqLinear`).

This is the order for compute capability 7.5 to 8.9. On 7.0 (Volta) the same library writes another one, and a file does
not say which GPU it was made on: its values then decode as noise, which any fidelity check sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

TILE = 64  # columns of one output that lie together
ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
FLOOR_DB = 28.0


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `weight_scales` belong to."""
    prefix, _, last = anchor.name.rpartition(".")
    name = f"{prefix}.weight" if prefix else "weight"
    weight = namespace.tensors.get(name)
    announced = namespace.quantization.get("quant_method") == "eetq"
    if last != "weight_scales" or (not announced and (weight is None or weight.dtype != "I8")):
        return None
    if weight is None:
        raise FormatError(f"has no `{name}` beside it", tensor=anchor.name)
    parts = (Part("weight", "codes", weight), Part("weight_scales", "scales", anchor))
    _check(weight, anchor)
    rows, columns = weight.shape[1], weight.shape[0]
    if weight.dtype != "I8":  # live, on its way to being quantized while it loads
        return LogicalTensor(name, (rows, columns), "plain", "parameter", parts, None)
    expected = rounding.grouped(rounding.symmetric(8, scale="float16"), columns, steps=steps.even(8))
    return LogicalTensor(
        name,
        (rows, columns),
        "eetq-int8",
        "parameter",
        parts,
        decode,
        block=columns,
        floor_db=FLOOR_DB,
        rounding=expected,
    )


def refuse(stored: StoredTensor, namespace: Namespace) -> str | None:
    """Say what an 8-bit weight lacks."""
    if stored.dtype != "I8" or not stored.name.endswith("weight"):
        return None
    return f"{stored.dtype} {list(stored.shape)} is an 8-bit weight, but has no `{stored.name}_scales`"


def _check(weight: StoredTensor, scales: StoredTensor) -> None:
    if len(weight.shape) != 2 or (weight.dtype != "I8" and (weight.role is None or _is_integer(weight))):
        raise FormatError(f"{weight.dtype} {list(weight.shape)} is not I8 [K, N]", tensor=weight.name)
    if scales.shape != weight.shape[1:] or _is_integer(scales):
        rule = f"one float for each of {weight.shape[1]:,} outputs"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} is not {rule}", tensor=scales.name)


def _is_integer(stored: StoredTensor) -> bool:
    return DTYPES[stored.dtype].kind != "float"


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    rows, columns = tensor.shape
    if rows % TILE or columns % TILE or not columns:
        raise NotDecodable(
            f"{rows} x {columns} does not fill tiles of {TILE}: no GPU layout has it", tensor=tensor.name
        )
    first, last = start // 2, max(start // 2, -(-stop // 2))  # pairs of outputs
    raw = tensor.stored.load_bytes(2 * first * columns, 2 * last * columns, device)
    raw = raw.view(-1, 2, 2).transpose(1, 2).reshape(-1, columns // TILE, 2, TILE)  # four bytes in order again
    lines = raw.transpose(1, 2).reshape(-1, columns // len(ORDER), len(ORDER))  # (outputs, sixteens, 16)
    codes = torch.empty_like(lines)
    codes[..., list(ORDER)] = lines
    values = codes.reshape(-1, columns)[start - 2 * first : stop - 2 * first].to(torch.float32) - 128
    scales = tensor.part("weight_scales").load(start, stop, device).to(torch.float32)
    return values.mul_(scales.view(-1, 1))


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show a layer of EETQ's own, which keeps everything in buffers."""
    held = {**owner._parameters, **owner._buffers}
    if name or held.get("weight") is None or held.get("weight_scales") is None:
        return None
    return {part: held[part] for part in ("weight", "weight_scales", "bias") if held.get(part) is not None}


SCHEME = Scheme(
    name="eetq",
    title="EETQ (8 bits, CUTLASS order)",
    variants=("eetq-int8",),
    claim=claim,
    anchors=("weight_scales",),
    methods=("eetq",),
    live={"transformers.EetqLinear": expose, "eetq.EetqLinear": expose},
    refuse=refuse,
    source="EETQ 1.0.1, csrc/cutlass_kernels/cutlass_preprocessors.cc; transformers 5.17, integrations/eetq.py",
    verified="EETQ 1.0.1",
)
