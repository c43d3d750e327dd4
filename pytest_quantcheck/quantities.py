"""Counts and sizes as people write and read them: `7.24B`, `4.3 GB`, `512 MiB`.

SI units are powers of 1000, IEC units powers of 1024, and a label always says which.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SI = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_IEC = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Commas stand between groups of three; underscores where Python has them.
_NUMBER = r"\s*((?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?)\s*"
_SIZE = re.compile(_NUMBER + r"([KMGT]?i?B)\s*", re.IGNORECASE)

_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(_NUMBER + r"([KMBT]?)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return a number of bytes, rounded down.

    >>> parse_size("4.3 GB"), parse_size("4.3 GiB"), parse_size(10)
    (4300000000, 4617089843, 10)
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"size `{text}` is not a number with a unit (B, KB, MB, GB, TB, KiB, MiB, GiB or TiB)")
    number, unit = match.groups()
    return int(Decimal(number.replace("_", "").replace(",", "")) * (_SI | _IEC)[unit.upper()])


def format_size(nbytes: int) -> str:
    """Return bytes in the SI unit that leaves one to three digits before the point.

    >>> format_size(4459986944), format_size(-1500), format_size(12)
    ('4.46 GB', '-1.50 KB', '12 B')
    """
    size = abs(nbytes)
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if size >= _SI[unit]), None)
    return f"{nbytes} B" if unit is None else f"{nbytes / _SI[unit]:.2f} {unit}"


def format_binary_size(nbytes: int) -> str:
    """Return bytes in the IEC unit that leaves one to four digits before the point.

    >>> format_binary_size(4459986944), format_binary_size(-1536), format_binary_size(12)
    ('4.15 GiB', '-1.50 KiB', '12 B')
    """
    size = abs(nbytes)
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if size >= _IEC[unit.upper()]), None)
    return f"{nbytes} B" if unit is None else f"{nbytes / _IEC[unit.upper()]:.2f} {unit}"


def format_sizes(nbytes: int) -> str:
    """Return bytes in both kinds of unit.

    >>> format_sizes(4459986944), format_sizes(12)
    ('4.46 GB (4.15 GiB)', '12 B')
    """
    si, iec = format_size(nbytes), format_binary_size(nbytes)
    return si if si == iec else f"{si} ({iec})"


def parse_count(text: str) -> tuple[Decimal, Decimal]:
    """Return a written count and half a unit of its last written digit.

    >>> parse_count("7.24B")
    (Decimal('7240000000.00'), Decimal('5000000.00'))
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"count `{text}` is not a number with an optional unit (K, M, B or T)")
    digits, unit = match.groups()
    number = Decimal(digits.replace("_", "").replace(",", ""))
    scale = _COUNT_UNITS[unit.upper()]
    exponent = number.as_tuple().exponent
    return number * scale, Decimal(10) ** int(exponent) * scale / 2


def format_count(count: int) -> str:
    """Return an exact count with thousands separators and, from a million on, its short form.

    >>> format_count(7241732096), format_count(21)
    ('7,241,732,096 (7.24B)', '21')
    """
    unit = next((unit for unit in ("T", "B", "M") if abs(count) >= _COUNT_UNITS[unit]), None)
    return f"{count:,}" if unit is None else f"{count:,} ({count / _COUNT_UNITS[unit]:.2f}{unit})"


def counted(number: int, noun: str) -> str:
    """Return a number of things, in the singular for one.

    >>> counted(1, "tensor"), counted(2300, "tensor")
    ('1 tensor', '2,300 tensors')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as people write it.

    >>> format_shape((4096, 4096)), format_shape(())
    ('4,096 x 4,096', 'scalar')
    """
    return " x ".join(f"{size:,}" for size in shape) or "scalar"


def grouped_bits_per_weight(bits: float, group: int, beside: float = 16) -> float:
    """Return the bits that a weight takes where groups of weights share a scale.

    `beside` are the bits of all that a group has beside its codes: 16 for one fp16 scale, 20 with a zero point of four
    bits, `16 * bits` with a scale for each bit plane (LUT-GEMM's binary codes).

    >>> grouped_bits_per_weight(4, 32), 16 / grouped_bits_per_weight(4, 32, beside=4 * 16)
    (4.5, 2.6666666666666665)
    """
    if not (bits > 0 and group > 0 and beside >= 0):
        raise ValueError(f"{bits:g} bits in groups of {group:g} with {beside:g} beside them")
    return bits + beside / group
