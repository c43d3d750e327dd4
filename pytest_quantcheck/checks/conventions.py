"""The same stored bytes under another convention: other logical tensors that are decoded again.

What only one scheme knows comes from the scheme (`Scheme.alternatives`); here is what can happen to any: the order of
nibbles and bytes, the sign of codes, the format of floats, scales inverted or beside their block, zero points.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_quantcheck.checks.sample import Attempt, Pair, Sample
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.schemes import SCHEMES, rewritten
from pytest_quantcheck.tensor import LogicalTensor, Part

if TYPE_CHECKING:
    import torch

MAX_GROUPS = 256
MAX_HEAD = 512  # rows
MAX_GRID = 1 << 22  # scales that are held at once to be transposed
FLOATS = {
    "F16": ("BF16",),
    "BF16": ("F16",),
    "F8_E4M3": ("F8_E5M2", "F8_E4M3FNUZ", "F8_E8M0"),
    "F8_E5M2": ("F8_E4M3", "F8_E5M2FNUZ"),
    "F8_E4M3FNUZ": ("F8_E4M3",),
    "F8_E5M2FNUZ": ("F8_E5M2",),
}


def readings(sample: Sample) -> Iterator[Attempt]:
    """What the scheme itself knows to go wrong."""
    tensor = sample.tensor
    for scheme in SCHEMES:
        if tensor.scheme in scheme.variants and scheme.alternatives is not None:
            for reading in scheme.alternatives(tensor):
                attempt = _read(sample, reading.name, reading.words, reading.tensor, reading.advice)
                yield attempt._replace(pairs=partial(_along, sample, reading.tensor)) if reading.along else attempt


def nibbles(sample: Sample) -> Iterator[Attempt]:
    """The two codes of a byte the other way round."""
    tensor = sample.tensor
    if not _packed(tensor, 4):
        return
    other = rewritten.part(tensor, tensor.parts[0].name, rewritten.swap_nibbles)
    yield _read(
        sample, "nibbles-swapped", "the two nibbles of each byte swapped", other, "the packer has the other order"
    )
    for part in _parts(tensor, "zero_points"):
        if DTYPES[part.stored.dtype].kind == "int":
            both = rewritten.part(other, part.name, rewritten.swap_nibbles)
            words = f"the two nibbles of each byte swapped, in `{part.name}` too"
            yield _read(sample, "nibbles-swapped", words, both, "the packer has the other order")


def signs(sample: Sample) -> Iterator[Attempt]:
    """Two's complement for offset binary."""
    tensor = sample.tensor
    for bits in (2, 4, 8):
        if _packed(tensor, bits):
            change = partial(rewritten.flip_signs, bits=bits)
            other = rewritten.part(tensor, tensor.parts[0].name, change)
            words = "the highest bit of each code turned over"
            yield _read(sample, "sign-convention", words, other, "two's complement and offset binary were mistaken")


def borrows(sample: Sample) -> Iterator[Attempt]:
    """Offsets taken off whole words, so that one code borrows from the next."""
    tensor = sample.tensor
    width = max(1, BITS.get(tensor.stored.dtype, 8) // 8)
    for bits in (2, 4):
        if _packed(tensor, bits):
            change = partial(rewritten.undo_borrows, bits=bits)
            other = rewritten.part(tensor, tensor.parts[0].name, change, unit=width)
            words = "the borrows between neighbouring codes undone"
            yield _read(sample, "borrows", words, other, "signed codes were made by subtracting from whole words")


def byte_order(sample: Sample) -> Iterator[Attempt]:
    """Words and floats of the other byte order."""
    for part in sample.tensor.parts:
        width = BITS.get(part.stored.dtype, 8) // 8
        if part.kind in ("codes", "scales", "unquantized") and width > 1:
            other = rewritten.part(sample.tensor, part.name, rewritten.reverse_bytes, unit=width)
            words = f"the bytes of each {part.stored.dtype} of `{part.name}` reversed"
            yield _read(sample, "byte-order", words, other, "it was written in the other byte order")


def float_formats(sample: Sample) -> Iterator[Attempt]:
    """Floats of the same width in another format."""
    for part in sample.tensor.parts:
        for dtype in FLOATS.get(part.stored.dtype, ()):
            other = rewritten.part(sample.tensor, part.name, dtype=dtype)
            words = f"`{part.name}` read as {dtype}, not {part.stored.dtype}"
            doubled = ", or the scales are doubled" if dtype.endswith("FNUZ") else ""
            advice = f"the bytes are {dtype} and the dtype in the header is wrong{doubled}"
            yield _read(sample, "float-format", words, other, advice)


def scales(sample: Sample) -> Iterator[Attempt]:
    """Scales inverted, or in the place of their neighbours."""
    for part in _parts(sample.tensor, "scales"):
        dtype, width = part.stored.dtype, BITS[part.stored.dtype] // 8
        if DTYPES[dtype].kind != "float" or DTYPES[dtype].torch is None:
            continue
        change = partial(rewritten.inverse, dtype=dtype)
        other = rewritten.part(sample.tensor, part.name, change, unit=width)
        yield _read(sample, "scale-inverted", f"`{part.name}` inverted", other, "what was stored is one over the scale")
        for shift in (1, -1) if part.stored.elements > 1 else ():
            other = rewritten.part(sample.tensor, part.name, unit=width, shift=shift)
            words = f"`{part.name}` taken from the {'next' if shift > 0 else 'previous'} block"
            yield _read(sample, "scales-shifted", words, other, "the scales are stored one block off")
        yield from _transposed_grid(sample, part)


def zero_points(sample: Sample) -> Iterator[Attempt]:
    """Integer zero points off by one, or not meant at all."""
    tensor, bits = sample.tensor, _code_bits(sample.tensor)
    for part in _parts(tensor, "zero_points"):
        width = BITS.get(part.stored.dtype, 0)
        if DTYPES[part.stored.dtype].kind != "int":
            continue
        field = width if part.stored.elements == _groups(tensor) else bits
        if field not in (2, 4, 8, width):
            continue
        unit = max(1, field // 8)
        for number in (1, -1):
            change = partial(rewritten.add, bits=field, number=number)
            words = f"every zero point one {'higher' if number > 0 else 'lower'}"
            other = rewritten.part(tensor, part.name, change, unit=unit)
            yield _read(sample, "zero-point-off-by-one", words, other, f"`{part.name}` is stored with another offset")
        for value in (0, 2 ** (bits - 1)) if field <= 8 else ():
            other = rewritten.part(tensor, part.name, partial(rewritten.fill, bits=field, number=value))
            words = f"all zero points {value}"
            yield _read(sample, "zero-points-not-meant", words, other, f"the codes were made without `{part.name}`")


def code_offsets(sample: Sample) -> Iterator[Attempt]:
    """Codes that are all off by one, round the end."""
    tensor = sample.tensor
    for bits in (2, 4, 8):
        for number in (1, -1) if _packed(tensor, bits) else ():
            change = partial(rewritten.add, bits=bits, number=number)
            words = f"every code one {'higher' if number > 0 else 'lower'}, round the end"
            other = rewritten.part(tensor, tensor.parts[0].name, change)
            yield _read(
                sample, "codes-off-by-one", words, other, "the packer takes them for signed, or counts from one"
            )


def group_order(sample: Sample) -> Iterator[Attempt]:
    """Each column in another group than its index says."""
    tensor = sample.tensor
    part = next(_parts(tensor, "index"), None)
    if part is None or part.stored.elements != tensor.columns or _groups(tensor) % max(1, tensor.rows):
        return
    groups = _groups(tensor) // tensor.rows
    if 1 < groups <= MAX_GROUPS:
        advice = f"`{part.name}` is not the one that the codes were made with"
        pairs = partial(_best_groups, sample, part, groups)
        yield Attempt("group-index", "each column in the group that fits it best", pairs, advice)


def heads(sample: Sample) -> Iterator[Attempt]:
    """Rows paired in heads of another size, or never paired, where the artifact says that they are."""
    tensor = sample.tensor
    if tensor.paired_rows is None:
        return
    advice = "the converter took another number of heads (grouped queries have fewer keys)"
    for size in range(4, min(tensor.rows, MAX_HEAD) + 1, 2):
        if tensor.rows % size == 0 and size != tensor.paired_rows:
            words = f"rows paired in heads of {size}, not {tensor.paired_rows}"
            yield _read(sample, "rotary-heads", words, tensor._replace(paired_rows=size), advice)
    unpaired = tensor._replace(paired_rows=None)
    yield _read(sample, "rotary-heads", "rows as they are stored", unpaired, "the converter did not pair them")


def _best_groups(sample: Sample, part: Part, groups: int) -> list[Pair]:
    import torch

    window, width = sample.windows[0], BITS[part.stored.dtype] // 8
    best, least = window.decoded, torch.full_like(window.decoded[0], float("inf"))
    for group in range(groups):
        change = partial(rewritten.put, number=group)
        other = rewritten.part(sample.tensor, part.name, change, unit=width)
        decoded = other.decode(window.start, window.stop, sample.device)
        noise = (decoded - window.reference).square().sum(dim=0)
        best = torch.where(noise < least, decoded, best)
        least = torch.minimum(noise, least)
    return [(best, window.reference)]


def _read(sample: Sample, name: str, words: str, tensor: LogicalTensor, advice: str) -> Attempt:
    """An attempt that decodes the windows from other stored parts or by another layout."""

    def pairs() -> Iterator[Pair]:
        for window in sample.windows:
            decoded = tensor.decode(window.start, window.stop, sample.device)
            yield decoded.reshape(window.reference.shape), window.reference

    return Attempt(name, words, pairs, advice)


def _along(sample: Sample, tensor: LogicalTensor) -> Iterator[Pair]:
    """The decoded values and as much of the difference to another reading as the reference asks for."""
    steps = [tensor.decode(window.start, window.stop, sample.device) - window.decoded for window in sample.windows]
    missing = [window.reference - window.decoded for window in sample.windows]
    energy = sum(float(step.double().square().sum()) for step in steps)
    cross = sum(float((step.double() * rest.double()).sum()) for step, rest in zip(steps, missing, strict=True))
    share = cross / energy if energy else 0.0
    for window, step in zip(sample.windows, steps, strict=True):
        yield window.decoded + share * step, window.reference


def _parts(tensor: LogicalTensor, kind: str) -> Iterator[Part]:
    return (part for part in tensor.parts if part.kind == kind and part.stored.elements and not part.between)


def _packed(tensor: LogicalTensor, bits: int) -> bool:
    """Whether the codes take so many bits each, in bytes of their own."""
    first = tensor.parts[0]
    return first.kind == "codes" and not first.between and _code_bits(tensor) == bits


def _code_bits(tensor: LogicalTensor) -> int:
    stored = tensor.stored
    return round(stored.elements * BITS.get(stored.dtype, 0) / max(1, tensor.params))


def _groups(tensor: LogicalTensor) -> int:
    """How many scales there are."""
    return next((part.stored.elements for part in _parts(tensor, "scales")), 0)


def _transposed_grid(sample: Sample, part: Part) -> Iterator[Attempt]:
    """Scales whose grid was written the other way round."""
    stored = part.stored
    if len(stored.shape) != 2 or min(stored.shape) < 2 or stored.elements > MAX_GRID:
        return
    rows, columns = stored.shape
    width = BITS[stored.dtype] // 8
    change = partial(_turn_grid, rows=rows, columns=columns, width=width)
    other = rewritten.part(sample.tensor, part.name, change, unit=stored.elements * width)
    words = f"`{part.name}` transposed"
    yield _read(sample, "scales-transposed", words, other, "the grid of scales was written by columns")


def _turn_grid(units: torch.Tensor, rows: int, columns: int, width: int) -> torch.Tensor:
    return units.view(columns, rows, width).transpose(0, 1).reshape(units.shape)
