"""The keys of an artifact in `quantcheck.toml`: how each is read, what it checks, and what to write there."""

from __future__ import annotations

import difflib
import math
import os
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from pytest_quantcheck import devices
from pytest_quantcheck.artifact import Artifact, inspect
from pytest_quantcheck.asserts import require_torch
from pytest_quantcheck.checks import baseline, coverage, hosts, integrity, params, size
from pytest_quantcheck.checks.baseline import Allowed, Record
from pytest_quantcheck.checks.diff import Difference, Outline, difference, outline
from pytest_quantcheck.checks.fidelity import Comparison, Limits
from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.checks.why import Reason, explain
from pytest_quantcheck.containers import files
from pytest_quantcheck.containers.remote import is_url, shown
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.quantities import format_sizes, parse_count, parse_size
from pytest_quantcheck.tensor import BYTE_CLASSES

SAVINGS = 3
# What a checkpoint, a device or a missing library can do to one check. Anything else is a bug, and its place is said.
FORESEEN = (ValueError, TypeError, ImportError, OSError, MemoryError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Opened:
    """An artifact while it is checked: what several checks need is made once, and only where one needs it."""

    path: str
    reference_path: str | None = None
    limits: Limits = field(default_factory=Limits)
    record: Record | None = None
    lock: str = "quantcheck.lock"
    device: str = "cpu"
    worker: int | None = None

    @cached_property
    def artifact(self) -> Artifact:
        """The artifact, by its headers."""
        return inspect(self.path)

    @cached_property
    def failure(self) -> str | None:
        """Why the artifact cannot be read, in one line."""
        try:
            self.artifact  # noqa: B018
        except Exception as error:  # the other artifacts are checked all the same
            return said(error)
        return None

    @cached_property
    def comparison(self) -> Comparison:
        """Its decoded values against the reference."""
        if self.reference_path is None:
            raise ValueError("fidelity needs a `reference`: the path of the unquantized model")
        require_torch("fidelity decodes values")
        from pytest_quantcheck.checks import fidelity

        artifact = self.artifact
        try:
            reference = inspect(self.reference_path)
        except FormatError as error:
            raise FormatError(f"the reference cannot be read: {error}") from None
        device = devices.choose(self.device, worker=self.worker)
        if device.missing:
            raise ValueError(device.missing)
        return fidelity.compare(artifact, reference, self.limits, device=device.name)

    @cached_property
    def outline(self) -> Outline:
        """What a baseline keeps of it, SQNR included where there is a reference."""
        found = outline(self.artifact)
        return found if self.reference_path is None else baseline.with_fidelity(found, self.comparison.tensors)

    @cached_property
    def change(self) -> Difference | None:
        """What changed since the baseline, None without one."""
        return difference(self.record.outline, self.artifact) if self.record else None


class Check(NamedTuple):
    """One key: `read` returns its setting or raises a ValueError or TypeError, `run` checks it."""

    key: str
    read: Callable[[Any], Any]
    run: Callable[[Opened, Any], Verdict]
    value: str  # what may be written, as the documentation has it
    about: str


def said(error: Exception) -> str:
    """Return what an error says in its first line, torch goes on for many; a bug also says what and where it is."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, FORESEEN):
        return line
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line} (a bug, in {os.path.basename(last.filename)}:{last.lineno})"


def closest(what: str, name: str, known: Collection[str]) -> str:
    """Return a line that says which name is unknown, which it is nearest to, and which are known.

    >>> closest("key", "sise", ["size", "path"])
    'unknown key `sise` (did you mean `size`? known: path, size)'
    """
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"unknown {what} `{name}` ({hint}known: {', '.join(sorted(known))})"


def read_count(value: object) -> int | float | str:
    """Return an expected count: exact, within a thousandth, or text that rounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError("is neither a count nor text such as `7.24B`")
    if isinstance(value, str):
        parse_count(value)
    return value


def read_size(value: object) -> int:
    """Return a number of bytes."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError("is neither bytes nor text such as `4.3 GB`")
    found = parse_size(value)
    if found < 0:
        raise ValueError(f"is {found:,} bytes, under none")
    return found


def read_classes(value: object) -> dict[str, int]:
    """Return the most bytes of each byte class."""
    return {name: read_size(limit) for name, limit in _table(value, "byte class", BYTE_CLASSES).items()}


def read_bits(value: object) -> dict[str, Any]:
    """Return the limits of the bits per weight; a number is the most."""
    if isinstance(value, dict):
        found = _table(value, "key", ("max", "min", "of"))
        if found.get("of", "model") not in ("quantized", "model"):
            raise ValueError(f"of `{found['of']}` is neither `quantized` nor `model`")
        return found | {name: _number(found[name]) for name in ("max", "min") if name in found}
    return {"max": _number(value)}


def read_fraction(value: object) -> dict[str, float]:
    """Return the limits of a share, 0 to 1; a number is the least."""
    given = _table(value, "key", ("max", "min")) if isinstance(value, dict) else {"min": value}
    found = {name: _number(limit) for name, limit in given.items()}
    outside = [limit for limit in found.values() if not 0 <= limit <= 1]
    if outside:
        raise ValueError(f"is {outside[0]:g}, and a share is from 0 to 1")
    return found


def read_patterns(value: object) -> list[str]:
    """Return name patterns: one or a list."""
    patterns = _texts(value)
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"pattern `{pattern}` is not one ({error})") from None
    return patterns


def read_integrity(value: object) -> dict[str, Any]:
    """Return what to look at and which findings may stay."""
    if value in ("headers", "values"):
        return {"values": value == "values", "allow": []}
    if not isinstance(value, dict):
        raise ValueError(f"`{value}` is neither `headers`, `values` nor a table")
    found = _table(value, "key", ("values", "allow"))
    if not isinstance(found.get("values", True), bool):
        raise TypeError("`values` is not true or false")
    return {"values": found.get("values", True), "allow": _texts(found["allow"]) if "allow" in found else []}


def read_fidelity(value: object) -> Limits:
    """Return the limits of fidelity; a number or `auto` is the least SQNR in dB."""
    if not isinstance(value, dict):
        return Limits(min_sqnr_db=_limit("min_sqnr_db", value))
    found = _table(value, "limit", Limits._fields)
    return Limits()._replace(**{name: _limit(name, limit) for name, limit in found.items()})


def read_hosts(value: object) -> list[str]:
    """Return names of hosts: one or a list."""
    known = [host.name for host in hosts.HOSTS]
    names = _texts(value)
    for name in names:
        if name not in known:
            raise ValueError(closest("host", name, known))
    return names


def read_baseline(value: object) -> Allowed:
    """Return what may change: nothing (`true`), a growth, or a table."""
    if value is True:
        return Allowed()
    if not isinstance(value, dict):
        return Allowed(growth=_growth(value))
    found = _table(value, "key", Allowed._fields)
    growth = _growth(found["growth"]) if "growth" in found else Allowed().growth
    return Allowed(growth, _number(found.get("sqnr_drop_db", baseline.SQNR_DROP_DB)))


def check_params(opened: Opened, expected: float | str) -> Verdict:
    """Compare the logical parameters."""
    artifact = opened.artifact
    allowed = float(parse_count(expected)[0]) if isinstance(expected, str) else float(expected)
    verdict = params.check_logical_params(artifact, expected)
    return verdict._replace(measured=artifact.logical_params, allowed=allowed, unit="parameters")


def check_size(opened: Opened, budget: int) -> Verdict:
    """Weigh all files, and say of a failure what grew and what could be saved."""
    verdict = size.check_size_budget(opened.artifact, budget)
    return _advised(opened, verdict)._replace(measured=opened.artifact.file_bytes, allowed=budget, unit="bytes")


def check_classes(opened: Opened, limits: Mapping[str, int]) -> Verdict:
    """Weigh the bytes of some classes."""
    verdict = size.check_size_budget(opened.artifact, per_class=limits)
    held = ", ".join(f"{name} {format_sizes(opened.artifact.bytes[name])}" for name in BYTE_CLASSES if name in limits)
    return _advised(opened, verdict if not verdict.passed else verdict._replace(headline=f"{held}: within the budget"))


def check_bits(opened: Opened, limits: Mapping[str, Any]) -> Verdict:
    """Compare the bits per weight."""
    bits = opened.artifact.bits_per_weight
    measured = bits.model if limits.get("of") == "model" else bits.quantized
    verdict = coverage.check_bits_per_weight(opened.artifact, **limits)
    return verdict._replace(measured=measured, allowed=limits.get("max", limits.get("min")), unit="bits")


def check_fraction(opened: Opened, limits: Mapping[str, float]) -> Verdict:
    """Compare the share that is quantized."""
    verdict = coverage.check_quantized_fraction(opened.artifact, **limits)
    measured = opened.artifact.quantized_fraction
    return verdict._replace(measured=measured, allowed=limits.get("min", limits.get("max")), unit="share")


def check_integrity(opened: Opened, how: Mapping[str, Any]) -> Verdict:
    """Look for what is broken, double or dead."""
    if how["values"]:
        require_torch("integrity of values reads them (integrity = `headers` does not)")
    return integrity.check_intact(opened.artifact, **how)


def check_fidelity(opened: Opened, limits: Limits) -> Verdict:
    """Compare the decoded values with the reference."""
    from pytest_quantcheck.checks import fidelity

    comparison = opened.comparison
    allowed = limits.min_sqnr_db if isinstance(limits.min_sqnr_db, float) else None
    return fidelity.check_fidelity(comparison)._replace(measured=comparison.sqnr_db, allowed=allowed, unit="dB")


def check_hosts(opened: Opened, names: Sequence[str]) -> Verdict:
    """Compare the largest file with what each host takes: the first that does not, else the strictest."""
    sizes = _file_sizes(opened)
    verdicts = sorted((hosts.check_host(sizes, name) for name in names), key=lambda verdict: verdict.allowed or 0)
    return next((verdict for verdict in verdicts if not verdict.passed), verdicts[0])


def check_baseline(opened: Opened, allowed: Allowed) -> Verdict:
    """Compare with the record in the lock."""
    return baseline.check_baseline(opened.record, opened.outline, allowed, where=opened.lock)


CHECKS = (
    Check(
        "logical_params",
        read_count,
        check_params,
        '`7_241_732_096`, `"7.24B"` or `7.24e9`',
        "The parameters of the unquantized model: exactly, as text when the count rounds to it, a float within 0.1 %.",
    ),
    Check(
        "size",
        read_size,
        check_size,
        '`"4.3 GB"`, `"4 GiB"` or bytes',
        "The most that all files of the artifact may weigh together.",
    ),
    Check(
        "size_per_class",
        read_classes,
        check_classes,
        '`{ scales = "450 MB", dead = 0 }`',
        "The most that the bytes of a class may weigh; the classes are those of `quantcheck inspect`.",
    ),
    Check(
        "bits_per_weight",
        read_bits,
        check_bits,
        '`4.6` (the most) or `{ max = 4.6, min = 4, of = "model" }`',
        "Bits per weight with scales and bookkeeping, of the quantized tensors or of the whole model.",
    ),
    Check(
        "quantized_fraction",
        read_fraction,
        check_fraction,
        "`0.96` (the least) or `{ min = 0.96, max = 0.99 }`",
        "The share of the parameters that is quantized.",
    ),
    Check(
        "must_be_quantized",
        read_patterns,
        lambda opened, patterns: coverage.check_quantized(opened.artifact, patterns),
        '`["*.mlp.*"]`',
        "Every matrix that a pattern matches is quantized; a pattern that matches nothing fails.",
    ),
    Check(
        "must_not_be_quantized",
        read_patterns,
        lambda opened, patterns: coverage.check_not_quantized(opened.artifact, patterns),
        '`["lm_head", "*.router"]`',
        "Everything that a pattern matches is left plain.",
    ),
    Check(
        "integrity",
        read_integrity,
        check_integrity,
        '`"headers"`, `"values"` or `{ values = false, allow = ["orphan-file"] }`',
        "Header, file, index and config agree, nothing is double or dead; of values, all are finite (needs torch).",
    ),
    Check(
        "fidelity",
        read_fidelity,
        check_fidelity,
        '`"auto"`, `18.5` (dB) or `{ min_sqnr_db = 18.5, gain = 0.02 }`',
        "The decoded values against `reference` (needs torch): the limits of `assert_dequant_fidelity`.",
    ),
    Check(
        "host",
        read_hosts,
        check_hosts,
        '`"github"`, `"github-release"`, `"huggingface"` or a list',
        "The largest file is one that the host takes.",
    ),
    Check(
        "baseline",
        read_baseline,
        check_baseline,
        '`true`, `"2 %"`, `"10 MB"` or `{ growth = "2 %", sqnr_drop_db = 0.5 }`',
        "No tensor is gone, grown or worse against the record in `quantcheck.lock`.",
    ),
)
SIZES = ("size", "size_per_class", "host")

# What somebody looks for here, and where it is.
ELSEWHERE = {
    "trainable_params": "what is trainable is known for live models only: use assert_trainable_params in a test",
}


def _advised(opened: Opened, verdict: Verdict) -> Verdict:
    """Add to a failure what grew since the baseline, what could be saved, and how it was measured."""
    if verdict.passed:
        return verdict
    kind = "all files of the folder" if os.path.isdir(opened.path) else "the file"
    grown = baseline.where_it_grew(opened.change) if opened.change else []
    reasons = sorted(explain(opened.artifact).reasons, key=lambda reason: -reason.could_save)[:SAVINGS]
    lines = [f"  up to {format_sizes(r.could_save)}  {_whose(r)}: {r.savings[0].how}" for r in reasons if r.savings]
    could = ["could be saved (quantcheck why has the rest):", *lines] if lines else []
    return verdict._replace(details=(*grown, *could, f"measured: {kind}", *verdict.details))


def _whose(reason: Reason) -> str:
    return reason.names[0] if reason.holders == 1 else f"{reason.kind.replace('_', ' ')} of {reason.holders:,} tensors"


def _file_sizes(opened: Opened) -> dict[str, int]:
    path = opened.path
    if is_url(path):
        return {os.path.basename(shown(path)): opened.artifact.file_bytes}
    if os.path.isdir(path):
        return files.listing(path)
    return {os.path.basename(path): files.open_file(path).size}


def _table(value: object, what: str, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise TypeError(f"is not a table with some of: {', '.join(known)}")
    for name in value:
        if name not in known:
            raise ValueError(closest(what, name, known))
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise TypeError(f"`{value}` is not a number")
    return float(value)


def _limit(name: str, value: object) -> Any:
    """One limit of fidelity: of the kind that its default has, or by name pattern."""
    default = Limits._field_defaults[name]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` is not true or false")
        return value
    if isinstance(value, dict) and name == "min_sqnr_db":
        return {pattern: _limit(name, limit) for pattern, limit in value.items()}
    return value if value == default == "auto" else _number(value)


def _texts(value: object) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise TypeError("is neither text nor a list of texts")
    return found


def _growth(value: object) -> baseline.Growth:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError("is neither a share such as `2 %` nor a size such as `10 MB`")
    return baseline.parse_growth(value)
