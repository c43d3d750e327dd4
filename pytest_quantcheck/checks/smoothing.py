"""Factors that a quantizer moved from one tensor into its neighbour (AWQ, SmoothQuant), undone before comparing.

    folded into a norm        norm' = norm / s    (bias too)      W' = W * s, column by column
    folded into a layer       V'    = V / s, row by row           O' = O * s, column by column

The first is seen in the norm, which is not quantized: s = norm / norm'. The second is seen only in the values: the
gains of the rows of one matrix and of the columns of the next are each other's inverse, which no fault makes so.
The reference is scaled the same way, and a finding says so. (Gemma's norms multiply by 1 + weight.)
Sources: mit-han-lab/llm-awq quantize/auto_scale.py, mit-han-lab/smoothquant smooth.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pytest_quantcheck.checks.metrics import sqnr_db
from pytest_quantcheck.checks.pairing import FUSED, Pair, Pairing
from pytest_quantcheck.checks.views import scaled
from pytest_quantcheck.finding import Finding

if TYPE_CHECKING:
    import torch

# What the second layer takes in is what the first one gives out.
PRODUCERS: Mapping[str, str] = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj", "fc2": "fc1"}
SPREAD = 0.02  # 16-bit rounding moves a factor by 0.4 % at most
BETTER_DB = 3.0
RECIPROCAL = 0.1
NOISE_SHARE = 0.25
SAMPLE = 1 << 16  # values
_LAYER = re.compile(r".*?\.[0-9]+(?=\.)", re.DOTALL)


Change = tuple[list[Pair], Finding]


def undo(pairing: Pairing, device: str = "cpu") -> Pairing:
    """Return the pairs with the reference smoothed as the artifact is, and a finding for each place."""
    pairs = {pair.tensor.name: pair for pair in pairing.pairs}
    findings: list[Finding] = []
    for layer in _layers(pairing.pairs):
        for step in (_norms, _producers):
            for changed, finding in step([pairs[pair.tensor.name] for pair in layer], device):
                pairs |= {pair.tensor.name: pair for pair in changed}
                findings.append(finding)
    return Pairing(tuple(pairs.values()), (*pairing.findings, *findings)) if findings else pairing


def _layers(pairs: Iterable[Pair]) -> Iterable[list[Pair]]:
    layers: dict[str, list[Pair]] = {}
    for pair in pairs:
        match = _LAYER.match(pair.tensor.name)
        if match and pair.tensor.params:
            layers.setdefault(match[0], []).append(pair)
    return layers.values()


def _norms(layer: list[Pair], device: str) -> Iterator[Change]:
    """Each norm that differs from the reference by factors which its linear layers have taken in."""
    for norm in layer:
        users = [pair for pair in layer if len(pair.tensor.shape) > 1 and pair.tensor.columns == norm.tensor.columns]
        for factors in _factors(norm, device) if users else ():
            smoothed = _with_siblings([pair for pair in users if _explains(pair, factors, device)], users)
            if smoothed:
                yield _unsmoothed(norm, layer, smoothed, factors)
                break


def _factors(norm: Pair, device: str) -> Iterator[torch.Tensor]:
    """The factors that the ratio of two norms gives, as RMSNorm multiplies and as Gemma's does (1 + weight)."""
    tensor = norm.tensor
    if tensor.quantized or len(tensor.shape) != 1 or not tensor.name.endswith("weight"):
        return
    ours, theirs = tensor.decode(device=device)[0], norm.reference.decode(device=device)[0]
    for offset in (0.0, 1.0):
        ratio = (theirs + offset) / (ours + offset)
        positive = bool(ratio.isfinite().all()) and bool((ratio > 0).all())
        if positive and float(ratio.std()) > SPREAD * float(ratio.mean()):
            yield ratio


def _with_siblings(smoothed: list[Pair], users: list[Pair]) -> list[Pair]:
    """q, k and v take in the same norm, as do gate and up: where one was multiplied, all must have been."""
    names = {pair.tensor.name for pair in smoothed}
    groups = {_group(name) for name in names} - {None}
    return [pair for pair in users if pair.tensor.name in names or _group(pair.tensor.name) in groups]


def _group(name: str) -> tuple[str, str] | None:
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    return next(((path, fused) for fused, parts in FUSED.items() if leaf in parts), None)


def _explains(pair: Pair, factors: torch.Tensor, device: str) -> bool:
    """Whether a sample of the values is clearly nearer to the reference when its columns are multiplied."""
    ours, theirs = _sample(pair, device)
    return _db(theirs * factors, ours) > _db(theirs, ours) + BETTER_DB


def _unsmoothed(norm: Pair, layer: list[Pair], users: list[Pair], factors: torch.Tensor) -> Change:
    """The linear layers beside a scaled reference. The norm gave the factors: it says nothing of its own any more."""
    bias = norm.tensor.name.removesuffix("weight") + "bias"
    changed = [Pair(pair.tensor, scaled(pair.reference, factors)) for pair in users]
    changed += [Pair(pair.tensor, scaled(pair.reference, 1 / factors)) for pair in layer if pair.tensor.name == bias]
    changed += [Pair(norm.tensor, norm.tensor)]
    names = ", ".join(f"`{pair.tensor.name}`" for pair in users)
    what = f"was divided by factors of {_span(factors)} that {names} took in: undone before comparing"
    return changed, Finding("smoothing", "note", norm.tensor.name, what)


def _producers(layer: list[Pair], device: str) -> Iterator[Change]:
    """Each pair of layers where the rows of one have gains that are the inverse of those of the columns of the next."""
    modules = {pair.tensor.name.removesuffix(".weight"): pair for pair in layer if len(pair.tensor.shape) == 2}
    for name, user in modules.items():
        path, _, leaf = name.rpartition(".")
        producer = modules.get(f"{path}.{PRODUCERS.get(leaf, '')}")
        fits = producer is not None and producer.tensor.rows == user.tensor.columns
        change = _folded(producer, user, device) if producer and fits and _suspicious(user, device) else None
        if change is not None:
            yield change


def _suspicious(user: Pair, device: str) -> bool:
    """Whether factors of whole columns make up a good part of the noise of a few rows, as in no sound layer."""
    ours, theirs = _sample(user, device)
    noise = float((ours - theirs).square().sum() / theirs.square().sum())
    return noise > 0 and float(_gains(ours, theirs, dim=0).var()) > NOISE_SHARE * noise


def _folded(producer: Pair, user: Pair, device: str) -> Change | None:
    rows, columns = _row_gains(producer, device), _column_gains(user, device)
    # A row of the producer is mostly scaled as one, so its gain is the better estimate.
    factors = 1 / rows
    if not float((rows * columns - 1).abs().median()) < RECIPROCAL or not _explains(user, factors, device):
        return None
    changed = [
        Pair(producer.tensor, scaled(producer.reference, rows, by_row=True)),
        Pair(user.tensor, scaled(user.reference, factors)),
    ]
    what = f"has columns multiplied by {_span(factors)}, the inverse of the rows of `{producer.tensor.name}`"
    return changed, Finding("smoothing", "warning", user.tensor.name, f"{what}: estimated and undone before comparing")


def _row_gains(pair: Pair, device: str) -> torch.Tensor:
    """The least-squares factor of each row, read in windows."""
    import torch

    return torch.cat([_gains(*_both(pair, start, stop, device), dim=1) for start, stop in pair.tensor.windows()])


def _column_gains(pair: Pair, device: str) -> torch.Tensor:
    """The least-squares factor of each column, over all rows, read in windows."""
    import torch

    cross = torch.zeros(pair.tensor.columns, dtype=torch.float64, device=device)
    power = torch.zeros_like(cross)
    for start, stop in pair.tensor.windows():
        ours, theirs = _both(pair, start, stop, device)
        cross += (ours * theirs).sum(dim=0)
        power += (theirs * theirs).sum(dim=0)
    return _quotient(cross, power).float()


def _gains(ours: torch.Tensor, theirs: torch.Tensor, dim: int) -> torch.Tensor:
    return _quotient((ours * theirs).sum(dim=dim), (theirs * theirs).sum(dim=dim))


def _quotient(cross: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """The factors; 1 where the values cannot tell."""
    import torch

    found = cross / power
    return torch.where(found.isfinite() & (found > 0), found, torch.ones_like(found))


def _sample(pair: Pair, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows of both sides, from the middle."""
    rows = min(pair.tensor.rows, max(1, SAMPLE // max(1, pair.tensor.columns)))
    start = (pair.tensor.rows - rows) // 2
    return _both(pair, start, start + rows, device)


def _both(pair: Pair, start: int, stop: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.tensor.decode(start, stop, device), pair.reference.decode(start, stop, device)


def _db(reference: torch.Tensor, values: torch.Tensor) -> float:
    return sqnr_db(float(reference.square().sum()), float((values - reference).square().sum()))


def _span(factors: torch.Tensor) -> str:
    return f"{float(factors.min()):.3g} to {float(factors.max()):.3g}"
