"""Measuring pairs of tensors: cut into slabs, slabs in parallel, windows that fit the cache, results in order.

    pair    a tensor and its reference, of equal shape
    slab    about `SLAB` values of a pair: what one worker does at once, in any thread or process
    window  about `WINDOW` values of a slab: what is decoded and added up at once

Slabs and windows depend on the pair alone, and sums are added in their order: the result is the same to the last bit
however the slabs are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from itertools import groupby
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from pytest_quantcheck import compiled
from pytest_quantcheck.checks import views, window
from pytest_quantcheck.checks.metrics import Extremes, Fidelity, Shard, Sums
from pytest_quantcheck.checks.pairing import Pair
from pytest_quantcheck.checks.shards import cuts, pieces
from pytest_quantcheck.containers import files
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.schemes import CODERS, packing, plain
from pytest_quantcheck.tensor import Coded, LogicalTensor

if TYPE_CHECKING:
    import torch

WINDOW = 1 << 19
CODED_WINDOW = 1 << 20  # nothing decoded of it lies in memory
GPU_WINDOW = 1 << 24
ROWS = 4096  # of a window at most, so that no sum over rows is long
SLAB = 1 << 24
STRIP = 1 << 22  # values of a turned reference that are read at once
HELD = 1 << 22  # bytes of a part that every window looks into
THREADS = 8

# Rounding to nearest costs more than all that is measured. Of a tensor of so many values it is tried on one window in
# eight, and on those with a weak place.
SAMPLED, SAMPLED_FROM = 8, 1 << 22

# Floats to which casting is exact to say: to nearest, ties to even.
CASTS = frozenset({"F64", "F32", "F16", "BF16"})


class Given(NamedTuple):
    """What holds for all pairs that are measured together."""

    device: str = "cpu"
    in_steps: bool = False
    sample: bool = False
    compiled: bool = False


class Slab(NamedTuple):
    """Some rows of a pair, and how they are read."""

    pair: int
    tensor: LogicalTensor
    reference: LogicalTensor
    start: int
    stop: int
    step: int
    device: str
    in_steps: bool
    sampled: int  # every how manyth window is rounded to nearest
    compiled: bool


class Measured(NamedTuple):
    """What one slab has: the sums of each shard, and the extremes."""

    pair: int
    values: int
    shards: tuple[Sums, ...]
    extremes: Extremes
    in_steps: bool


def measure(
    tensor: LogicalTensor, reference: LogicalTensor, *, device: str = "cpu", in_steps: bool = False
) -> Fidelity:
    """Return the metrics of one tensor against a reference of the same shape.

    `in_steps` measures errors in quantization steps too, where they are known: that takes several times longer.
    Raises `NotDecodable` where values cannot be reached.
    """
    (row,) = measure_each([Pair(tensor, reference)], device=device, in_steps=in_steps, workers=1)
    return row


def measure_each(
    pairs: Sequence[Pair],
    *,
    device: str = "cpu",
    in_steps: bool = False,
    sample: bool = False,
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Fidelity]:
    """Yield the metrics of each pair, in order, as soon as they are there.

    `sample` tries rounding to nearest on a part of large tensors; everything else is over all values anyway.

    Slabs go to `executor`, or to `workers` threads of this process (as many as torch would use, at most eight; one for
    a GPU). `progress` is told how many values have been compared since it was told last.
    """
    given = Given(device, in_steps, sample, compiled.pays(sum(pair[0].params for pair in pairs), device))
    slabs = [slab for at, pair in enumerate(pairs) for slab in _slabs(at, pair, given)]
    batches = list(_batches(slabs))
    with _running(executor, workers, device) as submit:
        for at, parts in groupby(_told(submit(batches), progress), key=lambda part: part.pair):
            yield _fidelity(pairs[at][0], list(parts))


def measure_slabs(slabs: Sequence[Slab]) -> list[Measured]:
    """Return what each slab has: the function that is sent to other threads and processes."""
    _keep_freed_memory()
    return [_measure(slab) for slab in slabs]


@contextmanager
def _running(
    executor: Executor | None, workers: int | None, device: str
) -> Iterator[Callable[[list[list[Slab]]], Iterator[Measured]]]:
    """A function that measures batches in parallel and yields in order; what is under way is dropped on the way out."""
    if executor is not None:
        yield lambda batches: _in_order(executor, batches)
        return
    import torch

    threads = torch.get_num_threads()
    workers = workers or (min(threads, THREADS) if device == "cpu" else 1)
    torch.set_num_threads(1 if device == "cpu" else threads)  # parallel over slabs, not within each sum
    pool = ThreadPoolExecutor(workers, thread_name_prefix="quantcheck")
    try:
        yield lambda batches: _in_order(pool, batches)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Have malloc keep what windows free, where it is glibc's: else each window faults in all of its pages anew.

    A large block that is freed raises its thresholds for good (mallopt(3), M_MMAP_THRESHOLD, dynamic adjustment).
    """
    import torch

    torch.empty(31 << 20, dtype=torch.uint8)


def _in_order(executor: Executor, batches: list[list[Slab]]) -> Iterator[Measured]:
    futures = [executor.submit(measure_slabs, batch) for batch in batches]
    try:
        for future in futures:
            yield from future.result()
    finally:
        for future in futures:
            future.cancel()


def _told(parts: Iterator[Measured], progress: Callable[[int], None] | None) -> Iterator[Measured]:
    for part in parts:
        if progress is not None:
            progress(part.values)
        yield part


def _slabs(at: int, pair: Pair, given: Given) -> Iterator[Slab]:
    tensor, reference = _flat(*pair)
    step = _rows_per_window(tensor, _window(tensor, given))
    in_steps = given.in_steps and tensor.rounding is not None and tensor.rounding.steps is not None
    rows = max(step, SLAB // max(1, tensor.columns) // step * step)
    sampled = SAMPLED if given.sample and tensor.params >= SAMPLED_FROM else 1
    if tensor.rounding is not None and tensor.rounding.whole:
        rows = max(1, tensor.rows)  # the largest magnitude of all is looked for once
    for start in range(0, max(1, tensor.rows), rows):
        stop = min(start + rows, tensor.rows)
        yield Slab(at, tensor, reference, start, stop, step, given.device, in_steps, sampled, given.compiled)


def _window(tensor: LogicalTensor, given: Given) -> int:
    if given.device != "cpu":
        return GPU_WINDOW
    return CODED_WINDOW if given.compiled and tensor.decoder in CODERS else WINDOW


def _batches(slabs: Iterable[Slab]) -> Iterator[list[Slab]]:
    """Small slabs together, so that a hundred thousand norms are not a hundred thousand messages."""
    batch: list[Slab] = []
    size = 0
    for slab in slabs:
        batch.append(slab)
        size += (slab.stop - slab.start) * slab.tensor.columns
        if size >= SLAB // 4:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _flat(tensor: LogicalTensor, reference: LogicalTensor) -> Pair:
    """Plain values with very long or very short rows as one column, which can be cut anywhere."""
    columns = tensor.columns
    plain = not tensor.quantized and not reference.quantized and not views.is_view(reference)
    if not plain or tensor.paired_rows or reference.paired_rows or 16 <= columns <= WINDOW:
        return Pair(tensor, reference)
    width = next((width for width in (4096, 1024, 256, 64, 16) if tensor.params % width == 0), 1)
    shape = (tensor.params // width, width)
    return Pair(tensor._replace(shape=shape), reference._replace(shape=shape))


def _rows_per_window(tensor: LogicalTensor, values: int) -> int:
    """As many rows as come near a window, in full blocks, in full grids of scales, and in full heads."""
    columns = max(1, tensor.columns)
    block = tensor.block or 1
    units = [lcm(block, columns) // columns if block <= WINDOW else 1, tensor.rounding.rows if tensor.rounding else 1]
    unit = lcm(*units, tensor.paired_rows or 1)
    if unit * columns > 16 * values:
        unit = lcm(*units[1:])
    return max(1, min(values // columns, ROWS) // unit) * unit


def _measure(slab: Slab) -> Measured:
    """Add up one slab."""
    with compiled.used(slab.compiled):
        return _added_up(slab)


def _added_up(slab: Slab) -> Measured:
    where = cuts(slab.tensor)
    shards = [Sums() for _ in where.starts]
    extremes = Extremes()
    for start, found in _windows(slab):
        extremes = extremes.plus(found.extremes)
        for shard, first, last in pieces(where, start, start + found.sums.shape[1]):
            shards[shard] = shards[shard].plus(found.over(first - start, last - start))
    return Measured(slab.pair, (slab.stop - slab.start) * slab.tensor.columns, tuple(shards), extremes, slab.in_steps)


def _windows(slab: Slab) -> Iterator[tuple[int, window.Rows]]:
    """Yield what each window has, and its first row."""
    tensor, reference, device = _held(slab.tensor), _held(slab.reference), slab.device
    for one in (tensor, reference):
        if not views.is_view(one):
            files.expect(one.stored, slab.start, slab.stop, one.rows)
    rounding = tensor.rounding
    largest = _largest(reference, device) if rounding is not None and rounding.whole else None
    exact = not tensor.quantized and tensor.stored.dtype in CASTS and not views.is_scaled(reference)
    for low, high in _strips(slab, tensor, reference):
        for start, ours, theirs in _sides(slab, tensor, reference, low, high):
            at_once = _at_once(slab, tensor, ours, theirs, start, largest)
            if at_once is not None:
                yield start, at_once
                continue
            decoded, wanted = packing.expand(ours) if isinstance(ours, Coded) else ours, theirs.float()
            changed = _changed(tensor, decoded, wanted) if exact else 0
            found = _rounded_against(slab, tensor, decoded, wanted, largest, start)
            extremes = found.extremes._replace(changed=changed)
            if slab.in_steps and rounding is not None and rounding.steps is not None:
                steps = rounding.steps(tensor, start, start + len(wanted), device)
                worst, beyond = window.in_steps(decoded - wanted, steps)
                extremes = extremes._replace(max_steps=worst, beyond=beyond)
            yield start, found._replace(extremes=extremes)


def _at_once(
    slab: Slab,
    tensor: LogicalTensor,
    ours: Coded | torch.Tensor,
    theirs: torch.Tensor,
    start: int,
    largest: float | None,
) -> window.Rows | None:
    """What a window has where one loop decodes and compares it; None where that cannot be, or values look weak."""
    rounding = tensor.rounding
    rounded = rounding if _is_turn(slab, tensor, start) else None
    cannot_round = rounded is not None and rounded.levels is None
    if not isinstance(ours, Coded) or slab.in_steps or cannot_round:
        return None
    blocks = window.blocks_of(tensor)
    found = window.measure_coded(ours, theirs, rounded, largest, blocks=blocks, first=start)
    return None if found is None or (found.weak and rounded is not rounding) else found


def _rounded_against(
    slab: Slab, tensor: LogicalTensor, decoded: torch.Tensor, wanted: torch.Tensor, largest: float | None, start: int
) -> window.Rows:
    """What a window has, with what rounding to nearest has where it is its turn or something looks weak."""
    measured = partial(window.measure, decoded, wanted, blocks=window.blocks_of(tensor), first=start)
    rounding = tensor.rounding
    if rounding is None:
        return measured(None)
    if not _is_turn(slab, tensor, start):
        found = measured(None)
        if not found.weak:
            return found
    return measured(rounding.nearest(tensor, wanted, largest))


def _changed(tensor: LogicalTensor, decoded: torch.Tensor, reference: torch.Tensor) -> int:
    """How many plain values are not what the reference is in the stored dtype, to the bit."""
    import torch

    dtype = getattr(torch, DTYPES[tensor.stored.dtype].torch or "")
    cast = (reference + tensor.shift if tensor.shift else reference).to(dtype).to(torch.float32)
    cast = cast - tensor.shift if tensor.shift else cast
    if torch.equal(decoded.view(torch.int32), cast.view(torch.int32)):
        return 0
    return int((decoded.view(torch.int32) != cast.view(torch.int32)).sum())


def _held(tensor: LogicalTensor) -> LogicalTensor:
    """The same tensor with the parts that every window looks into read once."""
    first, *others = tensor.parts
    parts = [part._replace(stored=files.held(part.stored, limit=HELD)) for part in others]
    return tensor._replace(parts=(first, *parts))


def _is_turn(slab: Slab, tensor: LogicalTensor, start: int) -> bool:
    """Whether the window that starts there is one of those that are rounded to nearest."""
    return tensor.rounding is not None and start // slab.step % slab.sampled == 0


def _strips(slab: Slab, tensor: LogicalTensor, reference: LogicalTensor) -> Iterator[tuple[int, int]]:
    """Yield the rows that are decoded at once: a window, or many where that is cheaper."""
    if not tensor.params:
        return
    strip = slab.step
    if views.is_turned(reference) or _lies_across(tensor) or (slab.compiled and tensor.decoder in CODERS):
        strip = max(slab.step, STRIP // max(1, tensor.columns) // slab.step * slab.step)
    for low in range(slab.start, slab.stop, strip):
        yield low, min(low + strip, slab.stop)


def _sides(
    slab: Slab, tensor: LogicalTensor, reference: LogicalTensor, low: int, high: int
) -> Iterator[tuple[int, Coded | torch.Tensor, torch.Tensor]]:
    """Yield the first row of each window and both sides of it, codes and bfloat16 as stored where loops take them."""
    ours = _codes(slab, tensor, low, high)
    as_stored = reference.decoder is plain.decode and reference.stored.dtype == "BF16" and not reference.shift
    if isinstance(ours, Coded) and as_stored and not reference.paired_rows:
        theirs = packing.stored_rows(reference, low, high, slab.device)
    else:
        theirs = reference.decode(low, high, slab.device)
    for start in range(0, high - low, slab.step):
        stop = min(start + slab.step, high - low)
        yield low + start, ours.rows(start, stop) if isinstance(ours, Coded) else ours[start:stop], theirs[start:stop]


def _codes(slab: Slab, tensor: LogicalTensor, start: int, stop: int) -> Coded | torch.Tensor:
    """Rows as codes where loops take them, else as values."""
    as_stored = slab.compiled and not tensor.paired_rows and not tensor.shift
    coder = CODERS.get(tensor.decoder) if as_stored else None
    coded = None if coder is None else coder(tensor, start, stop, slab.device)
    return tensor.decode(start, stop, slab.device) if coded is None else coded


def _lies_across(tensor: LogicalTensor) -> bool:
    """Whether codes seem to be stored with inputs first, so that some rows are a little of every stored row."""
    shape = tensor.stored.shape
    if not tensor.quantized or len(shape) != 2:
        return False
    return 1 < shape[1] == tensor.rows > shape[0] or shape[0] == tensor.columns > shape[1] > 1


def _largest(reference: LogicalTensor, device: str) -> float:
    """The largest magnitude of a reference."""
    found = 0.0
    for start, stop in reference.windows(WINDOW):
        values = reference.decode(start, stop, device)
        found = max(found, float(_magnitude(values))) if values.numel() else found
    return found


def _magnitude(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a window."""
    loops = compiled.loops("windows")
    return values.abs().max() if loops is None else loops.largest_of_blocks(values.reshape(1, -1))


def _fidelity(tensor: LogicalTensor, parts: list[Measured]) -> Fidelity:
    where = cuts(tensor)
    shards = [Sums() for _ in parts[0].shards]
    for part in parts:
        shards = [one.plus(more) for one, more in zip(shards, part.shards, strict=True)]
    named = tuple(Shard(name, sums) for name, sums in zip(where.names, shards, strict=False) if sums.values)
    return Fidelity(
        tensor.name,
        tensor.scheme,
        tensor.shape,
        reduce(Sums.plus, shards, Sums()),
        reduce(Extremes.plus, (part.extremes for part in parts)),
        named if tensor.quantized and len(named) > 1 else (),
        rounds=tensor.rounding is not None,
        in_steps=parts[0].in_steps,
    )
