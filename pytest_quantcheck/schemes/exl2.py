"""EXL2: every group of inputs with bits of its own, inputs in the order of their importance.

    part         dtype      stored shape  packing
    q_weight     I32        [R, N]        per group its rows of words, each column a stream of that group's bits
    q_invperm    I32, I16   [K]           where each input went
    q_scale      I32        [G, N/8]      4-bit scales
    q_scale_max  F16        [G]           the scale of those
    q_groups     I16        [2*G]         bits and first row of q_weight, by group

Formula: not decoded here. Its kernels unpack on the GPU only, and nothing on a CPU could confirm what we would read.
Source: GPTQModel 7.6.0, nn_modules/qlinear/exllamav2.py (the names); exllamav2, conversion/adaptivegptq.py.

The count follows from q_invperm and q_weight, and is checked against the words that the groups take.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

PARTS: dict[str, ByteClass] = {
    "q_weight": "codes",
    "q_scale": "scales",
    "q_scale_max": "scales",
    "q_groups": "bookkeeping",
    "q_invperm": "index",
    "q_perm": "index",
    "q_group_map": "index",
}


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `q_weight` belongs to."""
    stem, _, last = anchor.name.rpartition(".")
    if last != "q_weight":
        return None
    prefix = f"{stem}." if stem else ""
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    for part in ("q_scale", "q_scale_max", "q_groups", "q_invperm"):
        if part not in found:
            raise FormatError(f"has no `{prefix}{part}` beside it", tensor=anchor.name)
    _check_rows(anchor, found)
    return LogicalTensor(
        f"{prefix}weight",
        (anchor.shape[1], found["q_invperm"].elements),
        "exl2",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        None,
    )


def _check_rows(codes: StoredTensor, parts: Mapping[str, StoredTensor]) -> None:
    """The groups take all rows of words, and hold all inputs."""
    groups = parts["q_groups"]
    if codes.dtype != "I32" or len(codes.shape) != 2 or groups.dtype not in ("I16", "U16") or groups.elements % 2:
        what = f"{codes.dtype} {list(codes.shape)} with {groups.dtype} {list(groups.shape)} is not EXL2"
        raise FormatError(f"{what} (I32 matrix, I16 pairs)", tensor=codes.name)
    numbers = struct.unpack(f"<{groups.elements}H", groups.read(limit=1 << 20))
    bits, starts = numbers[::2], (*numbers[1::2], codes.shape[0])
    words = [stop - start for start, stop in pairwise(starts)]
    inputs = sum(32 * rows // width for rows, width in zip(words, bits, strict=True) if width)
    wanted = parts["q_invperm"].elements
    if starts[0] or min(words, default=0) < 0 or not all(2 <= width <= 8 for width in bits) or inputs != wanted:
        rule = f"{wanted:,} in `q_invperm`, 2 to 8 bits each"
        raise FormatError(f"has groups that hold {inputs:,} inputs ({rule})", tensor=groups.name)


SCHEME = Scheme(
    name="exl2",
    title="EXL2 (ExLlamaV2's mixed bits)",
    variants=("exl2",),
    claim=claim,
    anchors=("q_weight",),
    methods=("exl2",),
    source="GPTQModel 7.6.0, nn_modules/qlinear/exllamav2.py; exllamav2, conversion/adaptivegptq.py",
    verified="shapes only",
    decoded="no",
)
