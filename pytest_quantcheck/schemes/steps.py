"""How far a value may be from what is stored for it, found by decoding constant codes under the stored scales.

    even      (decode(highest code) - decode(lowest code)) / (codes - 1)
    levels    the wider of the two gaps beside a level of the table, times decode(unit) / unit
    floats    the distance of neighbours at the value's exponent, times decode(1)

Where all bytes of codes are the same, so are all codes, however they are packed: the decoder itself shows the scales.

Every step is widened by what is rounded beside the codes: scales and minima that are kept in 16 bits, and a reference
that was cast to 16 bits before it was quantized. That is 2**-8 of the value (of what the lowest code stands for, where
that is kept instead of a zero point) and of the step, each way.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.tensor import LogicalTensor, Source, Steps, StoredTensor

if TYPE_CHECKING:
    import torch

SLACK = 2.0**-7  # bfloat16 keeps 8 bits: 2**-8 of a value, each way
HALF_UNIT = 2.0**-24  # the smallest float16: scales that are kept so are no nearer than half of it


class Span(NamedTuple):
    """Where the bytes of codes are in each block of so many bytes."""

    period: int
    first: int
    last: int


class Filled(NamedTuple):
    """A source whose bytes of codes are all the same."""

    source: Source
    byte: int
    span: Span | None

    def read(self, start: int, stop: int) -> bytearray:
        """Return what is stored: small records are no codes."""
        return self.source.read(start, stop)

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements of the same dtype, their bytes of codes replaced."""
        import torch

        values = self.source.load(stored, start, stop, device)
        if self.span is None:
            return torch.full_like(values.view(torch.uint8), self.byte).view(values.dtype)
        place = torch.arange(start, stop, device=device) % self.span.period
        return values.masked_fill((place >= self.span.first) & (place < self.span.last), self.byte)


@lru_cache
def even(
    bits: int,
    *,
    fills: tuple[int, int] = (0x00, 0xFF),
    clips: tuple[bool, bool] = (False, False),
    least: bool = False,
    span: Span | None = None,
) -> Steps:
    """Return the steps of codes of equal distance; `fills` are bytes full of the lowest and of the highest code.

    `clips` says for each of the two whether it also stands for what is beyond it; `least` that what the lowest code
    stands for is kept, and not a zero point.
    """
    return partial(_even, bits=bits, fills=fills, clips=clips, least=least, span=span)


@lru_cache
def levels(table: tuple[float, ...], unit: float, fill: int, *, clips: bool = False, span: Span | None = None) -> Steps:
    """Return the steps of a table; `fill` is a byte full of the code of the level `unit`."""
    return partial(_levels, table=table, unit=unit, fill=fill, clips=clips, span=span)


@lru_cache
def floats(dtype: str, *, clips: bool = False) -> Steps:
    """Return the steps of one of torch's 8-bit floats, by name."""
    return partial(_floats, dtype=dtype, clips=clips)


# Bytes full of the lowest and the highest code in two's complement.
SIGNED = {8: (0x80, 0x7F), 4: (0x88, 0x77)}


def filled(tensor: LogicalTensor, byte: int, span: Span | None = None, part: int = 0) -> LogicalTensor:
    """Return the tensor with one byte for all bytes of its codes, or of another part."""
    found = tensor.parts[part]
    stored = found.stored._replace(source=Filled(found.stored.source, byte, span))
    parts = (*tensor.parts[:part], found._replace(stored=stored), *tensor.parts[part + 1 :])
    return tensor._replace(parts=parts)


def _even(
    tensor: LogicalTensor,
    start: int,
    stop: int,
    device: str,
    *,
    bits: int,
    fills: tuple[int, int],
    clips: tuple[bool, bool],
    least: bool,
    span: Span | None,
) -> torch.Tensor:
    low, high = (filled(tensor, byte, span).decode(start, stop, device) for byte in fills)
    step = (high - low).abs_().div_(2**bits - 1)
    values = tensor.decode(start, stop, device)
    rounded = low.abs() + (values - low).abs_() if least else values.abs()
    widened: torch.Tensor = step + SLACK * rounded.add_(step) + 2**bits * HALF_UNIT
    for end, clipped in zip((low, high), clips, strict=True):
        if clipped:
            widened.masked_fill_((values - end).abs_() < step / 2, float("inf"))
            widened.masked_fill_(step == 0, float("inf"))  # a scale that was rounded to nothing
    return widened


def _levels(
    tensor: LogicalTensor,
    start: int,
    stop: int,
    device: str,
    *,
    table: tuple[float, ...],
    unit: float,
    fill: int,
    clips: bool,
    span: Span | None,
) -> torch.Tensor:
    import torch

    ordered = torch.tensor(sorted(set(table)), dtype=torch.float32, device=device)
    gaps = ordered.diff()
    end = gaps.new_tensor([float("inf")] if clips else [0.0])
    wider = torch.maximum(torch.cat((end, gaps)), torch.cat((gaps, end)))
    scale = filled(tensor, fill, span).decode(start, stop, device).div_(unit)
    level = tensor.decode(start, stop, device) / scale
    step = wider[torch.bucketize(level, (ordered[1:] + ordered[:-1]) / 2)]
    return _scaled(step.add_(SLACK * level.abs_().add_(step)), scale, clips=clips)


def _floats(tensor: LogicalTensor, start: int, stop: int, device: str, *, dtype: str, clips: bool) -> torch.Tensor:
    import torch

    kind = torch.finfo(getattr(torch, dtype))
    one = int(torch.tensor(1.0).to(getattr(torch, dtype)).view(torch.uint8))
    scale = filled(tensor, one).decode(start, stop, device)
    level = (tensor.decode(start, stop, device) / scale).abs_()
    exponent = torch.frexp(level).exponent - 1
    step = torch.ldexp(torch.full_like(level, kind.eps), exponent).clamp_(min=kind.tiny * kind.eps)
    if clips:
        step.masked_fill_(level >= kind.max, float("inf"))
    return _scaled(step.add_(SLACK * level.add_(step)), scale, clips=clips)


def _scaled(step: torch.Tensor, scale: torch.Tensor, *, clips: bool) -> torch.Tensor:
    """Steps of codes as steps of values; a scale of 0 stands for zeros alone, or for what it was too coarse for."""
    return step.mul_(scale.abs()).masked_fill_(scale == 0, float("inf") if clips else 0.0)
