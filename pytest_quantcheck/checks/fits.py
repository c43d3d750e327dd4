"""The same decoded values times or plus what the reference says is missing, or less what is lost.

So few numbers are fitted that noise does not profit: what needs a factor for each block has sound codes and wrong
scales. A factor for each of 64 values adds 0.07 dB to values that have nothing to do with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_quantcheck.checks.sample import Attempt, Pair, Sample, Window
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch

# Runs of rows whose factors differ by more than this belong to different shards; noise moves a row by 2 %.
JUMP = 0.1
MAX_SHARDS = 8
MIN_SHARD = 4  # rows
SHARED = 16  # values for each number that is fitted, at least
LOST = 0.5  # noise to signal of a lost block: 3 dB, where 4-bit formats have healthy ones of 10 and more
MAX_LOST = 20  # one block in so many
MUCH = 8.0  # times the noise of rounding: 9 dB
SOUND_DB = 14.0  # formats that keep less have such blocks when they are sound


def damage(sample: Sample) -> Iterator[Attempt]:
    """A few blocks that are lost, in a tensor that is sound otherwise."""
    tensor = sample.tensor
    lost = [_lost(tensor, window) for window in sample.windows]
    count, total = sum(int(each.sum()) for each in lost), sum(each.numel() for each in lost)
    if not 0 < count <= total // MAX_LOST:
        return
    window, bad = next((window, bad) for window, bad in zip(sample.windows, lost, strict=True) if bad.any())
    where = _place(tensor, window, int(bad.nonzero()[0]))
    words = f"{count:,} of {total:,} blocks left out ({'the first is ' if count > 1 else ''}{where})"

    def pairs() -> Iterator[Pair]:
        for window, bad in zip(sample.windows, lost, strict=True):
            yield blocks(tensor, window.decoded)[~bad], blocks(tensor, window.reference)[~bad]

    yield Attempt("damaged-blocks", words, pairs, "their scale is dead or their codes are corrupt")


def _lost(tensor: LogicalTensor, window: Window) -> torch.Tensor:
    """Which blocks of a window carry next to nothing of the reference, though rounding to nearest would."""
    noise = _energy(tensor, window.decoded - window.reference)
    lost = ~(noise <= LOST * _energy(tensor, window.reference))
    rounding = tensor.rounding
    if rounding is None or rounding.whole:
        return lost & ((tensor.floor_db or 0.0) >= SOUND_DB)
    nearest = rounding.nearest(tensor, window.reference, None)
    return lost & ~(noise <= MUCH * _energy(tensor, nearest - window.reference))


def _energy(tensor: LogicalTensor, values: torch.Tensor) -> torch.Tensor:
    return blocks(tensor, values).square().sum(dim=1)


def _place(tensor: LogicalTensor, window: Window, at: int) -> str:
    """Where a block of a window starts."""
    if _runs_on(tensor):
        row, column = divmod(at * (tensor.block or 1), tensor.columns)
    else:
        width = _width(tensor)
        row, column = divmod(at, -(-tensor.columns // width))
        column *= width
    return f"row {window.start + row:,}, column {column:,}"


def gains(sample: Sample) -> Iterator[Attempt]:
    """One factor for all, or for a run of rows."""
    import torch

    windows = sample.windows
    usual = _ratio(sample.rounded) if sample.rounded else 1.0  # a few levels are best scaled down, sound or not
    total = _ratio(windows) / (usual or 1.0)
    if total and sample.tensor.params >= SHARED:
        yield Attempt(
            "gain",
            f"every value divided by {1 / total:.4g}",
            lambda: ((window.decoded * total, window.reference) for window in windows),
            "one scale is missing, applied twice or inverted",
        )
    runs = _runs(torch.cat([_factor(window, dim=1) for window in windows]))
    if 1 < len(runs) <= MAX_SHARDS and min(stop - first for first, stop, _ in runs) >= MIN_SHARD:
        starts = torch.cat([torch.arange(window.start, window.stop) for window in windows])
        yield _shards(sample, runs, [int(starts[first]) for first, _, _ in runs])


def axis_gains(sample: Sample) -> Iterator[Attempt]:
    """A factor for each row, or for each column."""
    windows = sample.windows
    if sample.tensor.columns >= SHARED:
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
    if count < SHARED:
        return
    drift = sum(float((window.reference - window.decoded).double().sum()) for window in windows) / count
    yield Attempt(
        "shifted",
        f"{drift:+.4g} added to every value",
        lambda: ((window.decoded + drift, window.reference) for window in windows),
        "a constant was added on the way (norms that multiply by 1 + weight) or taken off",
    )
    if sample.tensor.quantized and _width(sample.tensor) >= SHARED:
        yield Attempt(
            "zero-points",
            "an offset fitted to each block",
            partial(_fitted, sample, _block_offset),
            "codes and scales are sound, the zero points are not",
        )


def block_gains(sample: Sample) -> Iterator[Attempt]:
    """One factor for each block."""
    if sample.tensor.quantized and _width(sample.tensor) >= SHARED:
        yield Attempt(
            "block-scales",
            "a factor fitted to each block",
            partial(_fitted, sample, _block_factor),
            "the codes are sound, the scales of the blocks are not",
        )


def low_rank(sample: Sample) -> Iterator[Attempt]:
    """A difference of few dimensions, spread over rows and columns: an adapter."""
    import torch

    if sample.stored_db < 0:
        return  # more would have been added than there is
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
    if len(decoded) < SHARED:
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
    block = tensor.block or 0
    return block if block > 1 and (block <= tensor.columns or _runs_on(tensor)) else tensor.columns


def _runs_on(tensor: LogicalTensor) -> bool:
    """Whether blocks run on across rows: there are as many scales as for one long row."""
    block = tensor.block or 1
    scales = next((part.stored.elements for part in tensor.parts if part.kind == "scales"), 0)
    return tensor.columns % block > 0 and scales == -(-tensor.params // block)


def _spread(vectors: torch.Tensor) -> bool:
    """Whether unit vectors involve a good part of their places, each of them: one row or one block is no adapter."""
    share = 1 / (vectors.square().square().sum(dim=1) * vectors.shape[1])
    return bool((share > 0.1).all())
