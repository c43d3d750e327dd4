"""The logits of two models on the same tokens: Kullback-Leibler divergence and agreement of the first choice.

    kl      sum_v p_v (log p_v - log q_v)       per token; p: reference, q: model, both log_softmax in float64
    top1    share of tokens where both have the same most likely next token
    +-      standard error over tokens, as llama.cpp prints it: sqrt((E[kl^2] - E[kl]^2) / (n - 1))

Tokens that the attention mask leaves out do not count. Percentiles are interpolated over all tokens. NaN in either
model's logits fails, and so does comparing no token. A model that is given as a path or a function is loaded when it is
its turn and let go before the other is; the logits of the first then wait in a temporary file, as they came.

Source: llama.cpp, tools/perplexity/perplexity.cpp (`kl_divergence`), for the statistics.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.quantities import counted

if TYPE_CHECKING:
    import torch

    Batch = dict[str, Any]

CHECK = "logits"
WINDOW = 1 << 20
WORST = 5


class Limits(NamedTuple):
    """What is allowed; None is no limit."""

    max_kl: float | None = None
    max_kl_median: float | None = None
    max_kl_99: float | None = None
    max_kl_999: float | None = None
    min_top1: float | None = None


class Worst(NamedTuple):
    """A token with a large divergence: where it is, and the first choice of both."""

    batch: int
    sequence: int
    position: int
    kl: float
    reference: int
    model: int


class Agreement(NamedTuple):
    """The statistics over all tokens (see the module docstring). `not_finite` tokens have NaN or infinite logits."""

    tokens: int
    not_finite: int
    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_999: float
    kl_max: float
    top1: float
    top1_error: float
    worst: tuple[Worst, ...]


Load = Callable[[Any], Any]


def compare(model: Any, reference: Any, inputs: Any, *, load: Load, release: Callable[[], None]) -> Agreement:
    """Run both models on the inputs and compare token by token.

    `load` makes a live model of what is not one; `release` gives the memory of a model that was let go back.
    """
    if model is reference:
        raise ValueError("the model is compared with itself")
    batches = list(_batches(inputs))
    tally = _Tally()
    with _logits_of_reference(reference, batches, load, release) as run:
        other = model if _live(model) else load(model)
        for number, (batch, theirs) in enumerate(zip(batches, run, strict=True)):
            tally.add(number, batch, _run(other, batch), theirs)
        del other
    if not _live(model):
        release()
    return tally.result()


def check_logits(agreement: Agreement, limits: Limits) -> Verdict:
    """Require what `limits` say; at least one limit is needed."""
    rows = (
        ("mean KL", agreement.kl, agreement.kl_error, limits.max_kl),
        ("median KL", agreement.kl_median, 0.0, limits.max_kl_median),
        ("99 % KL", agreement.kl_99, 0.0, limits.max_kl_99),
        ("99.9 % KL", agreement.kl_999, 0.0, limits.max_kl_999),
    )
    faults = [
        _fault(what, measured, limit, error, most=True)
        for what, measured, error, limit in rows
        if limit is not None and not measured <= limit
    ]
    if limits.min_top1 is not None and not agreement.top1 >= limits.min_top1:
        faults.append(_fault("same top token", agreement.top1, limits.min_top1, agreement.top1_error, most=False))
    if not agreement.tokens:
        faults = ["no token was compared (a check that compared nothing has failed)"]
    elif agreement.not_finite:
        bad = counted(agreement.not_finite, "token")
        faults.insert(0, f"{bad} of {agreement.tokens:,} have logits that are NaN or infinite")
    headline = (
        f"logits: KL {_pm(agreement.kl, agreement.kl_error)}, same top token "
        f"{_pm(agreement.top1, agreement.top1_error)} over {counted(agreement.tokens, 'token')}"
    )
    details = [*faults, *_details(agreement)] if agreement.tokens else faults
    return Verdict(CHECK, not faults, headline, tuple(details))


def _fault(what: str, measured: float, limit: float, error: float, *, most: bool) -> str:
    verb, word = ("is over", "max") if most else ("is under", "min")
    line = f"{what} {_pm(measured, error)} {verb} the allowed {word} {limit:g}"
    if abs(measured - limit) < 2 * error:
        return f"{line}, by less than two standard errors: more tokens would tell"
    return line


def _details(agreement: Agreement) -> Iterator[str]:
    yield (
        f"KL: median {agreement.kl_median:.4g}, 99 % {agreement.kl_99:.4g}, 99.9 % {agreement.kl_999:.4g}, "
        f"largest {agreement.kl_max:.4g}"
    )
    yield "worst tokens:"
    for token in agreement.worst:
        where = f"batch {token.batch}, sequence {token.sequence}, position {token.position}"
        yield f"  {where}: KL {token.kl:.4g}, the reference says {token.reference}, the model {token.model}"


def _pm(value: float, error: float) -> str:
    return f"{value:.4g} +- {error:.2g}" if error else f"{value:.4g}"


def _live(model: Any) -> bool:
    return hasattr(model, "named_modules")


@contextmanager
def _logits_of_reference(
    reference: Any, batches: list[Batch], load: Load, release: Callable[[], None]
) -> Iterator[Iterator[torch.Tensor]]:
    """The reference's logits of each batch: as it goes from a live model, otherwise all before the other."""
    if _live(reference):
        yield (_run(reference, batch) for batch in batches)
        return
    with tempfile.TemporaryFile() as file:
        live = load(reference)
        shapes = [_write(_run(live, batch), file) for batch in batches]
        del live
        release()
        file.seek(0)
        yield (_read(file, *shape) for shape in shapes)


def _write(logits: torch.Tensor, file: IO[bytes]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Append the logits in windows and return what they are."""
    import torch

    flat = logits.reshape(-1)
    for start in range(0, len(flat), WINDOW):
        file.write(flat[start : start + WINDOW].cpu().view(torch.uint8).numpy().tobytes())
    return logits.dtype, tuple(logits.shape)


def _read(file: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    content = bytearray(file.read(math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)


def _batches(inputs: Any) -> Iterator[Batch]:
    """The batches of anything that holds token ids: what a tokenizer returns, a tensor, a list, or several of them."""
    import torch

    if isinstance(inputs, str):
        raise TypeError("inputs are text: give what the tokenizer makes of it")
    if isinstance(inputs, Mapping):
        yield {name: torch.as_tensor(value) for name, value in inputs.items()}
    elif isinstance(inputs, torch.Tensor) or _is_sequence_of_ids(inputs):
        ids = torch.as_tensor(inputs)
        yield {"input_ids": ids.view(1, -1) if ids.dim() == 1 else ids}
    elif isinstance(inputs, Iterable):
        for entry in inputs:
            yield from _batches(entry)
    else:
        raise TypeError(f"inputs hold `{type(inputs).__name__}`, which is no batch of token ids")


def _is_sequence_of_ids(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and bool(inputs) and all(isinstance(entry, int) for entry in inputs)


def _run(model: Any, batch: Batch) -> torch.Tensor:
    """The logits of one batch, [..., vocabulary], on the device of the model, which keeps its mode."""
    import torch

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model(**{name: value.to(device) for name, value in batch.items()})
    finally:
        for module, training in modes:
            module.training = training
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"`{type(model).__name__}` returns `{type(output).__name__}`, which has no logits")
    return logits.detach()


class _Tally:
    """What is kept of each token: its divergence, whether the first choices agree, and where it is."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.tops: list[torch.Tensor] = []  # (tokens, 2): reference, model
        self.places: list[torch.Tensor] = []  # (tokens, 3): batch, sequence, position
        self.not_finite = 0

    def add(self, number: int, batch: Batch, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        import torch

        if ours.shape != theirs.shape:
            what = f"the model's logits are {list(ours.shape)}, the reference's {list(theirs.shape)}"
            raise ValueError(f"{what}: same tokens and same vocabulary are needed")
        places = _places(number, batch, ours)
        step = max(1, WINDOW // max(1, ours.shape[-1]))
        ours, theirs = (logits.reshape(-1, logits.shape[-1]) for logits in (ours, theirs))
        keep = places[1].nonzero().view(-1)
        for start in range(0, len(keep), step):
            rows = keep[start : start + step]
            p, q = theirs[rows.to(theirs.device)], ours[rows.to(ours.device)]
            self._add_window(p.to(q.device).double(), q.double())
        self.places.append(places[0][keep].to(torch.int32))

    def _add_window(self, p: torch.Tensor, q: torch.Tensor) -> None:
        import torch

        log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
        share = log_p.exp()
        terms = torch.where(share > 0, share * (log_p - log_q), 0.0)
        kl = terms.sum(dim=1).clamp(min=0)
        # Minus infinity rules a token out, which is sound; NaN and infinity are not, nor is ruling out all.
        bad = (p.isnan() | q.isnan() | (p == torch.inf) | (q == torch.inf)).any(dim=1) | kl.isnan()
        self.not_finite += int(bad.sum())
        self.kl.append(kl.masked_fill(bad, torch.nan).cpu())
        self.tops.append(torch.stack((p.argmax(dim=1), q.argmax(dim=1)), dim=1).cpu())

    def result(self) -> Agreement:
        import torch

        if not self.kl:
            nothing = math.nan
            return Agreement(0, 0, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, ())
        kl, tops, places = torch.cat(self.kl), torch.cat(self.tops), torch.cat(self.places)
        same = (tops[:, 0] == tops[:, 1]).double()
        ordered = kl.sort().values  # NaN is last
        order = kl.nan_to_num(nan=torch.inf).argsort(descending=True)[:WORST].tolist()
        return Agreement(
            len(kl),
            self.not_finite,
            float(kl.mean()),
            _standard_error(kl),
            kl_median=_percentile(ordered, 0.5),
            kl_99=_percentile(ordered, 0.99),
            kl_999=_percentile(ordered, 0.999),
            kl_max=float(ordered[-1]),
            top1=float(same.mean()),
            top1_error=_standard_error(same),
            worst=tuple(_worst(places[at], float(kl[at]), tops[at]) for at in order),
        )


def _worst(place: torch.Tensor, kl: float, tops: torch.Tensor) -> Worst:
    batch, sequence, position = place.tolist()
    reference, model = tops.tolist()
    return Worst(batch, sequence, position, kl, reference, model)


def _places(number: int, batch: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row of logits is, as (rows, 3), and whether it counts."""
    import torch

    shape = logits.shape[:-1]
    mask = batch.get("attention_mask", torch.ones(shape))
    if mask.shape != shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, the logits are {list(logits.shape)}")
    row, length = torch.arange(math.prod(shape)), shape[-1] if shape else 1
    places = torch.stack((torch.full_like(row, number), row // length, row % length), dim=1)
    return places, mask.reshape(-1).cpu() != 0


def _standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _percentile(ordered: torch.Tensor, share: float) -> float:
    """Linear between the two nearest of the ordered values."""
    at = share * (len(ordered) - 1)
    low, high = float(ordered[math.floor(at)]), float(ordered[math.ceil(at)])
    return low if low == high else low + (high - low) * (at - math.floor(at))
