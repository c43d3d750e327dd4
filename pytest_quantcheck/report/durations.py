"""Times as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time with the two units that matter.

    >>> duration(0.4), duration(7.26), duration(95), duration(4000)
    ('under 1 s', '7 s', '1 min 35 s', '1 h 6 min')
    """
    if seconds < 1:
        return "under 1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def speed(megabits: int) -> str:
    """Return a bandwidth in megabits or gigabits a second.

    >>> speed(25), speed(10_000)
    ('25 Mbit/s', '10 Gbit/s')
    """
    return f"{megabits} Mbit/s" if megabits < 1000 else f"{megabits / 1000:g} Gbit/s"
