"""What can be wrong with a tensor that decodes wrong, one function each, in the order they are believed.

    re-decoded  the same stored bytes under another convention: another logical tensor (see `schemes.rewritten`)
    reordered   the same decoded values in another place: rows, columns, the two sides of a square
    fitted      the same decoded values times or plus what the reference says is missing, so few numbers that noise
                does not profit: what needs a factor for each block has sound codes and wrong scales

A function gets the sample of one tensor and yields attempts. It opens no file and judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck.checks.sample import Sample, Window
from pytest_quantcheck.dtypes import BITS, DTYPES
from pytest_quantcheck.schemes import SCHEMES, rewritten
from pytest_quantcheck.tensor import LogicalTensor, Part

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]

# Runs of rows whose factors differ by more than this belong to different shards; noise moves a row by 2 %.
JUMP = 0.1
MAX_SHARDS = 8
MIN_ROWS = 8  # fewer rows do not tell their columns apart
MIN_MATCH = 0.7  # cosine of a row with the row of the reference that it is
MAX_COLUMNS = 2048
ORDERED_DB = 10.0  # whoever is above has no row out of place
LOST = 0.5  # noise to signal of a lost block: 3 dB, where 4-bit formats have healthy ones of 10 and more
MAX_LOST = 20  # one block in so many
MAX_GROUPS = 256
MAX_GRID = 1 << 22  # scales that are held at once to be transposed


class Attempt(NamedTuple):
    """One thing to try: `pairs` gives decoded and reference of every window, had the other convention been used.

    `words` complete "with ..."; `advice` says what to change where it decodes right.
    """

    name: str
    words: str
    pairs: Callable[[], Iterable[Pair]]
    advice: str = ""


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
    yield _read(sample, "nibbles-swapped", "the two nibbles of each byte swapped", other, "the packer has the other order")
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


def byte_order(sample: Sample) -> Iterator[Attempt]:
    """Words and floats of the other byte order."""
    for part in sample.tensor.parts:
        width = BITS.get(part.stored.dtype, 8) // 8
        if part.kind in ("codes", "scales", "unquantized") and width > 1:
            other = rewritten.part(sample.tensor, part.name, rewritten.reverse_bytes, unit=width)
            words = f"the bytes of each {part.stored.dtype} of `{part.name}` reversed"
            yield _read(sample, "byte-order", words, other, "it was written in the other byte order")


FLOATS = {
    "F16": ("BF16",),
    "BF16": ("F16",),
    "F8_E4M3": ("F8_E5M2", "F8_E4M3FNUZ", "F8_E8M0"),
    "F8_E5M2": ("F8_E4M3", "F8_E5M2FNUZ"),
    "F8_E4M3FNUZ": ("F8_E4M3",),
    "F8_E5M2FNUZ": ("F8_E5M2",),
}


def float_formats(sample: Sample) -> Iterator[Attempt]:
    """Floats of the same width in another format."""
    for part in sample.tensor.parts:
        for dtype in FLOATS.get(part.stored.dtype, ()):
            other = rewritten.part(sample.tensor, part.name, dtype=dtype)
            words = f"`{part.name}` read as {dtype}, not {part.stored.dtype}"
            yield _read(sample, "float-format", words, other, f"the bytes are {dtype}: the dtype in the header is wrong")


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


def transposed(sample: Sample) -> Iterator[Attempt]:
    """A square matrix, or each of a stack, the other way round."""
    shape = sample.tensor.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return
    size = shape[-1]

    def pairs() -> Iterator[Pair]:
        for window in sample.windows:
            first = window.start % size
            last = min(first + window.stop - window.start, size)
            corner = slice(0, last - first), slice(first, last)
            yield window.decoded[corner].t(), window.reference[corner]

    yield Attempt("transposed", "the square matrix transposed", pairs, "a converter turned it, or forgot to")


def row_order(sample: Sample) -> Iterator[Attempt]:
    """Rows in another order: the pairs and halves of rotary embeddings among them."""
    if sample.stored_db > ORDERED_DB:
        return
    head = sample.head
    order = _matched(head.decoded, head.reference)
    if order is None:
        return
    name, words, advice = _describe_rows(order, sample.tensor)

    def pairs() -> Iterator[Pair]:
        found = order >= 0
        yield head.decoded[order[found]], head.reference[found]

    yield Attempt(name, words, pairs, advice)


def column_order(sample: Sample) -> Iterator[Attempt]:
    """Columns in another order: packing orders that were not undone, activation order."""
    head = sample.head
    if sample.stored_db > ORDERED_DB or len(head.decoded) < MIN_ROWS:
        return
    decoded, reference = head.decoded[:, :MAX_COLUMNS], head.reference[:, :MAX_COLUMNS]
    order = _matched(decoded.t(), reference.t())
    if order is None:
        return

    def pairs() -> Iterator[Pair]:
        found = order >= 0
        yield decoded[:, order[found]], reference[:, found]

    period = _period(order)
    where = f"in each {period}" if period else "throughout"
    words = f"columns reordered {where} ({_excerpt(order)})"
    advice = "the order of packing was not undone" if period else "activation order was not undone"
    yield Attempt("columns-permuted", words, pairs, advice)


def gains(sample: Sample) -> Iterator[Attempt]:
    """One factor for all, or for a run of rows."""
    import torch

    windows = sample.windows
    total = _ratio(windows)
    if total:
        yield Attempt(
            "gain",
            f"every value divided by {1 / total:.4g}",
            lambda: ((window.decoded * total, window.reference) for window in windows),
            "one scale is missing, applied twice or inverted",
        )
    runs = _runs(torch.cat([_factor(window, dim=1) for window in windows]))
    if 1 < len(runs) <= MAX_SHARDS and min(stop - first for first, stop, _ in runs) >= MIN_ROWS // 2:
        starts = torch.cat([torch.arange(window.start, window.stop) for window in windows])
        yield _shards(sample, runs, [int(starts[first]) for first, _, _ in runs])


def axis_gains(sample: Sample) -> Iterator[Attempt]:
    """A factor for each row, or for each column."""
    windows = sample.windows
    yield Attempt(
        "row-scales",
        "each row divided by a factor of its own",
        lambda: ((each.decoded * _factor(each, dim=1).unsqueeze(1), each.reference) for each in windows),
        "the codes are sound, the scales of the rows are not",
    )
    columns = _columns_factor(windows)
    if columns is not None:
        yield Attempt(
            "channel-scales",
            "each column divided by a factor of its own",
            lambda: ((window.decoded * columns, window.reference) for window in windows),
            "channel scales were folded into it (AWQ, SmoothQuant) or lie along the wrong axis",
        )


def offsets(sample: Sample) -> Iterator[Attempt]:
    """One number added to all values, or to a block."""
    windows = sample.windows
    count = sum(window.decoded.numel() for window in windows)
    drift = sum(float((window.reference - window.decoded).double().sum()) for window in windows) / count
    yield Attempt(
        "shifted",
        f"{drift:+.4g} added to every value",
        lambda: ((window.decoded + drift, window.reference) for window in windows),
        "a constant was added on the way (norms that multiply by 1 + weight) or taken off",
    )
    if sample.tensor.quantized:
        yield Attempt(
            "zero-points",
            "an offset fitted to each block",
            partial(_fitted, sample, _block_offset),
            "codes and scales are sound, the zero points are not",
        )


def block_gains(sample: Sample) -> Iterator[Attempt]:
    """One factor for each block."""
    if sample.tensor.quantized:
        yield Attempt(
            "block-scales",
            "a factor fitted to each block",
            partial(_fitted, sample, _block_factor),
            "the codes are sound, the scales of the blocks are not",
        )


def low_rank(sample: Sample) -> Iterator[Attempt]:
    """A difference of few dimensions, spread over rows and columns: an adapter."""
    import torch

    head = sample.head
    residual = head.reference - head.decoded
    limit = min(residual.shape) // 8
    if limit < 1 or not torch.isfinite(residual).all():
        return
    left, size, right = torch.linalg.svd(residual, full_matrices=False)
    rank = int((size[:limit] > 1.5 * size[limit]).sum())
    if not rank or not (_spread(left[:, :rank].t()) and _spread(right[:rank])):
        return
    delta = (left[:, :rank] * size[:rank]) @ right[:rank]
    yield Attempt(
        "low-rank-difference",
        f"a difference of rank {rank} added",
        lambda: [(head.decoded + delta, head.reference)],
        "an adapter (LoRA) was merged into only one of the two",
    )


def damage(sample: Sample) -> Iterator[Attempt]:
    """A few blocks that are lost, in a tensor that is sound otherwise."""
    tensor = sample.tensor
    cut = [_lost(tensor, window) for window in sample.windows]
    count, total = (sum(int(values.sum()) for values in each) for each in zip(*cut, strict=True))
    if not 0 < count <= max(1, total // MAX_LOST):
        return
    window, lost = next((window, lost) for window, (lost, _) in zip(sample.windows, cut, strict=True) if lost.any())
    where = _place(tensor, window, int(lost.nonzero()[0]))
    words = f"{count:,} of {total:,} blocks left out ({'the first is ' if count > 1 else ''}{where})"

    def pairs() -> Iterator[Pair]:
        for window, (bad, _) in zip(sample.windows, cut, strict=True):
            yield blocks(tensor, window.decoded)[~bad], blocks(tensor, window.reference)[~bad]

    yield Attempt("damaged-blocks", words, pairs, "their scale is dead or their codes are corrupt")


def _lost(tensor: LogicalTensor, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of a window carry next to nothing of the reference, and which hold anything."""
    error = blocks(tensor, window.decoded - window.reference)
    energy = blocks(tensor, window.reference).square().sum(dim=1)
    return ~(error.square().sum(dim=1) <= LOST * energy), energy >= 0


def _place(tensor: LogicalTensor, window: Window, at: int) -> str:
    """Where a block of a window starts."""
    if _runs_on(tensor):
        row, column = divmod(at * (tensor.block or 1), tensor.columns)
    else:
        width = _width(tensor)
        row, column = divmod(at, -(-tensor.columns // width))
        column *= width
    return f"row {window.start + row:,}, column {column:,}"


class Hypothesis(NamedTuple):
    """One row of the table: the names its attempts have, the function that makes them, and what it asks for.

    `fitted`: tried only where no convention explains the fault. `better_db` is what it must gain over what is stored.
    """

    names: tuple[str, ...]
    attempts: Callable[[Sample], Iterator[Attempt]]
    fitted: bool = False
    better_db: float = 1.0


# Conventions before reorderings before fits: of those that explain a fault about as well, the first is named.
HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis((), readings),  # of the schemes, see `Scheme.alternatives`
    Hypothesis(("nibbles-swapped",), nibbles),
    Hypothesis(("sign-convention",), signs),
    Hypothesis(("byte-order",), byte_order),
    Hypothesis(("float-format",), float_formats),
    Hypothesis(("scale-inverted", "scales-shifted", "scales-transposed"), scales),
    Hypothesis(("zero-point-off-by-one", "zero-points-not-meant"), zero_points),
    Hypothesis(("group-index",), group_order),
    Hypothesis(("transposed",), transposed),
    Hypothesis(("rotary-pairs", "rows-permuted"), row_order),
    Hypothesis(("columns-permuted",), column_order),
    Hypothesis(("damaged-blocks",), damage, fitted=True, better_db=0.0),
    Hypothesis(("gain", "shard-scales"), gains, fitted=True, better_db=0.5),
    Hypothesis(("row-scales", "channel-scales"), axis_gains, fitted=True),
    Hypothesis(("shifted", "zero-points"), offsets, fitted=True),
    Hypothesis(("block-scales",), block_gains, fitted=True),
    Hypothesis(("low-rank-difference",), low_rank, fitted=True),
)


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


def _matched(decoded: torch.Tensor, reference: torch.Tensor) -> torch.Tensor | None:
    """For each row of the reference the decoded row that it is, -1 where there is none; None where no order shows."""
    import torch

    left, right = (torch.nn.functional.normalize(values) for values in (reference, decoded))
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()) or decoded.shape[1] < MIN_ROWS:
        return None
    cosine, order = (left @ right.t()).max(dim=1)
    order = torch.where(cosine > MIN_MATCH, order, -1)
    found = order[order >= 0]
    unmoved = torch.equal(found, torch.arange(len(order), device=order.device)[order >= 0])
    if unmoved or len(found) < len(order) // 4 or len(found.unique()) < len(found):
        return None
    return order


def _describe_rows(order: torch.Tensor, tensor: LogicalTensor) -> tuple[str, str, str]:
    """The name, the words and the advice for an order of rows."""
    import torch

    for size in range(4, len(order) + 1, 2):
        if tensor.rows % size:
            continue
        whole = order[: len(order) // size * size].view(-1, size)
        local = whole - size * torch.arange(len(whole), device=order.device).view(-1, 1)
        halves = torch.arange(size, device=order.device).view(2, size // 2)
        pairs = halves.t().reshape(-1)
        if (local == pairs.argsort()).all():
            words = f"the rows of each head of {size} taken out of their pairs"
            return "rotary-pairs", words, "q and k of rotary embeddings were permuted, and it was not undone"
        if (local == pairs).all():
            words = f"the rows of each head of {size} put into pairs"
            return "rotary-pairs", words, "q and k of rotary embeddings were permuted back once too often"
    period = _period(order)
    where = f"in each {period}" if period else "throughout"
    return "rows-permuted", f"rows reordered {where} ({_excerpt(order)})", "the order of packing was not undone"


def _period(order: torch.Tensor) -> int | None:
    """The length after which a permutation repeats, or None."""
    import torch

    for size in range(2, len(order) // 2 + 1):
        whole = order[: len(order) // size * size].view(-1, size)
        local = whole - size * torch.arange(len(whole), device=order.device).view(-1, 1)
        if (local == local[0]).all() and int(local[0].min()) == 0 and int(local[0].max()) == size - 1:
            return size
    return None


def _excerpt(order: torch.Tensor) -> str:
    return ", ".join("?" if at < 0 else str(at) for at in order[:6].tolist()) + ", ..."


def _ratio(windows: Iterable[Window]) -> float:
    """The factor that brings decoded values nearest to the reference."""
    cross = sum(float((window.decoded.double() * window.reference.double()).sum()) for window in windows)
    energy = sum(float(window.decoded.double().square().sum()) for window in windows)
    return cross / energy if energy else 0.0


def _factor(window: Window, dim: int) -> torch.Tensor:
    """The factor of each row (dim 1) or column (dim 0); 1 where nothing was decoded."""
    import torch

    energy = window.decoded.square().sum(dim=dim)
    cross = (window.decoded * window.reference).sum(dim=dim)
    return torch.where(energy > 0, cross / energy, torch.ones_like(energy))


def _columns_factor(windows: tuple[Window, ...]) -> torch.Tensor | None:
    import torch

    decoded = torch.cat([window.decoded for window in windows])
    reference = torch.cat([window.reference for window in windows])
    if len(decoded) < MIN_ROWS:
        return None
    return _factor(Window(0, len(decoded), decoded, reference), dim=0)


def _runs(factors: torch.Tensor) -> list[tuple[int, int, float]]:
    """Runs of rows with about one factor, as (first, stop, factor)."""
    runs: list[tuple[int, int, float]] = []
    for at, factor in enumerate(factors.tolist()):
        first, _, mean = runs[-1] if runs else (at, at, factor)
        if runs and abs(factor - mean) <= JUMP * abs(mean):
            runs[-1] = first, at + 1, (mean * (at - first) + factor) / (at + 1 - first)
        else:
            runs.append((at, at + 1, factor))
    return runs


def _shards(sample: Sample, runs: list[tuple[int, int, float]], starts: list[int]) -> Attempt:
    import torch

    factors = torch.cat([torch.full((stop - first,), factor) for first, stop, factor in runs]).to(sample.device)
    said = ", ".join(f"{1 / factor:.3g} from row {start}" for (_, _, factor), start in zip(runs, starts, strict=True))

    def pairs() -> Iterator[Pair]:
        at = 0
        for window in sample.windows:
            size = window.stop - window.start
            yield window.decoded * factors[at : at + size].unsqueeze(1), window.reference
            at += size

    advice = "the scale of one shard was given to all that were fused"
    return Attempt("shard-scales", f"runs of rows divided by their gains ({said})", pairs, advice)


def blocks(tensor: LogicalTensor, values: torch.Tensor) -> torch.Tensor:
    """Return values cut into the blocks that share a scale, the last one of a row or of all filled up with zeros.

    values  # (rows, columns), starting where a block starts
    ->      # (blocks, block)
    """
    import torch

    width = _width(tensor)
    rows = values.reshape(1, -1) if _runs_on(tensor) else values
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).reshape(-1, width)


def _width(tensor: LogicalTensor) -> int:
    """The length of a block; the row where blocks are not known."""
    known = tensor.block is not None and 1 < tensor.block
    return tensor.block or 1 if known and (_runs_on(tensor) or tensor.block <= tensor.columns) else tensor.columns


def _runs_on(tensor: LogicalTensor) -> bool:
    """Whether blocks run on across rows: there are as many scales as for one long row."""
    block = tensor.block or 1
    return tensor.columns % block > 0 and _groups(tensor) == -(-tensor.params // block)


def _fitted(sample: Sample, fit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[Pair]:
    """Decoded values after a fit to the reference, block by block."""
    import torch

    tensor = sample.tensor
    for window in sample.windows:
        decoded, reference = blocks(tensor, window.decoded), blocks(tensor, window.reference)
        held = blocks(tensor, torch.ones_like(window.decoded))
        yield fit(decoded, reference, held), reference


def _block_offset(decoded: torch.Tensor, reference: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    missing = (reference - decoded).sum(dim=1, keepdim=True) / held.sum(dim=1, keepdim=True)
    return decoded + missing * held


def _block_factor(decoded: torch.Tensor, reference: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return decoded * _factor(Window(0, len(decoded), decoded, reference), dim=1).unsqueeze(1)


def _spread(vectors: torch.Tensor) -> bool:
    """Whether unit vectors involve a good part of their places, each of them: one row or one block is no adapter."""
    share = 1 / (vectors.square().square().sum(dim=1) * vectors.shape[1])
    return bool((share > 0.1).all())
