"""The groups of AWQ's gemv kernels: more scales than groups, because they are padded to whole tiles with zeros.

Source: AutoAWQ 0.2.9, awq/modules/linear/gemv.py `calculate_zeros_width`; GPTQModel 7.6.0, utils/gemv.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import quantization_config
from pytest_quantcheck.tensor import StoredTensor

SIZES = (16, 32, 64, 128, 256)


def group_size(
    scales: StoredTensor,
    *,
    padded: int,
    inputs: int,
    quantization: Mapping[str, Any],
    record: Mapping[str, Any],
    filled: Callable[[StoredTensor], int],
) -> int:
    """Return the group size that makes `padded` scales, as the module or the config says, else as the padding shows.

    `filled` counts the scales before the padding; it is asked only where more than one size fits.
    Raises `FormatError` where none does.
    """
    said = quantization_config.each(quantization, "group_size", "q_group_size")
    wanted = {record["group_size"]} if record.get("group_size") else said
    sizes = sorted({inputs if size == -1 else size for size in wanted or (*SIZES, inputs)})
    fitting = [size for size in sizes if size > 0 and with_padding(inputs, size) == padded]
    if len(fitting) > 1:
        groups = filled(scales)
        fitting = [size for size in fitting if inputs // size == groups]
    if len(fitting) != 1:
        rule = f"groups of {' or '.join(map(str, sizes))} over {inputs:,} inputs"
        raise FormatError(f"{list(scales.shape)} holds {padded:,} groups (not {rule}, padded)", tensor=scales.name)
    return fitting[0]


def with_padding(inputs: int, size: int) -> int:
    """Return how many scales a row has.

    >>> with_padding(4096, 128), with_padding(4096, 64), with_padding(256, 64), with_padding(256, 32)
    (32, 64, 16, 32)
    """
    unit = 8 if size >= 128 else 8 * max(1, 128 // size)
    return -(-(inputs // size) // unit) * unit
