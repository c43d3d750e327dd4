"""Assertions about quantized models: thin, each raises AssertionError with numbers.

Every one takes a live model, a path or an `Artifact`. A file that cannot be read exactly is a `FormatError`, a call
that makes no sense a `ValueError` or `TypeError`; only a check that was made and failed is an AssertionError.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from pytest_quantcheck.artifact import Artifact, Subject, inspect
from pytest_quantcheck.checks import coverage, integrity, params, same_weights, size
from pytest_quantcheck.checks.verdict import Verdict
from pytest_quantcheck.containers import onnx
from pytest_quantcheck.errors import FormatError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import torch

    from pytest_quantcheck.checks.delta import Deltas
    from pytest_quantcheck.checks.fidelity import Comparison
    from pytest_quantcheck.checks.kernel_parity import Parities
    from pytest_quantcheck.checks.logits import Agreement
    from pytest_quantcheck.checks.module_output import Outputs
    from pytest_quantcheck.models import ModelSource


def assert_logical_params(
    subject: Subject, expected: float | str, *, rel: float | None = None, abs: float | None = None
) -> None:
    """Fail unless the model has the parameters it claims, whatever the way they are stored.

    An int must match exactly, a float within `rel` (default 1e-3), a string such as `"7.24B"` when the count rounds to
    what is written. `rel` and `abs` (in parameters) widen the first two.
    """
    __tracebackhide__ = True
    _require(params.check_logical_params(inspect(subject), expected, rel=rel, abs=abs))


def assert_trainable_params(
    subject: Subject, expected: float | str, *, rel: float | None = None, abs: float | None = None
) -> None:
    """Fail unless an optimizer would see this many logical parameters of a live model.

    The message tells what is frozen because it is packed from what is frozen by choice.
    """
    __tracebackhide__ = True
    _require(params.check_trainable_params(inspect(subject), expected, rel=rel, abs=abs))


def assert_quantized(subject: Subject, *patterns: str) -> None:
    """Fail unless every matrix that a pattern matches is quantized.

    Patterns are globs over tensor or module names (`"*.mlp.*"`), or regular expressions after `re:`. A pattern that
    matches nothing fails.
    """
    __tracebackhide__ = True
    _require(coverage.check_quantized(inspect(subject), patterns))


def assert_not_quantized(subject: Subject, *patterns: str) -> None:
    """Fail unless every tensor that a pattern matches is left unquantized: `"lm_head"`, `"*.router"`."""
    __tracebackhide__ = True
    _require(coverage.check_not_quantized(inspect(subject), patterns))


def assert_quantized_fraction(subject: Subject, *, min: float | None = None, max: float | None = None) -> None:
    """Fail unless the share of logical parameters that is quantized lies between `min` and `max` (0 to 1)."""
    __tracebackhide__ = True
    _require(coverage.check_quantized_fraction(inspect(subject), min=min, max=max))


def assert_bits_per_weight(
    subject: Subject,
    *,
    max: float | None = None,
    min: float | None = None,
    of: Literal["quantized", "model"] = "quantized",
) -> None:
    """Fail unless the bits per weight are within limits, scales and bookkeeping included.

    Over the quantized tensors, or with `of="model"` over all parameters, unquantized embeddings included.
    """
    __tracebackhide__ = True
    _require(coverage.check_bits_per_weight(inspect(subject), max=max, min=min, of=of))


def assert_size_budget(
    subject: Subject,
    budget: str | int | None = None,
    *,
    per_class: Mapping[str, str | int] | None = None,
    bits_per_weight: float | None = None,
) -> None:
    """Fail when the artifact is larger than its budget, and say where the bytes go.

    `budget` is bytes or text such as `"4.3 GB"` (powers of 1000) or `"4 GiB"` (powers of 1024), over all files of a
    folder. `per_class` limits byte classes (`{"scales": "100 MB"}`); `bits_per_weight` limits the file size over the
    logical parameters.
    """
    __tracebackhide__ = True
    _require(size.check_size_budget(inspect(subject), budget, per_class=per_class, bits_per_weight=bits_per_weight))


def assert_checkpoint_intact(subject: Subject, *, values: bool = True, allow: Sequence[str] = ()) -> None:
    """Fail unless header, file, index and config agree, all values are finite, and nothing is stored twice or dead.

    `values=False` looks at headers only and needs no torch. `allow` names findings that may stay, such as
    `"orphan-file"`.
    """
    __tracebackhide__ = True
    if values:
        require_torch("assert_checkpoint_intact reads values (values=False does not)")
    try:
        artifact = inspect(subject)
    except FormatError as error:
        raise AssertionError(f"integrity: {error}") from None
    _require(integrity.check_intact(artifact, values=values, allow=allow))


def assert_dequant_fidelity(
    subject: Subject,
    reference: Subject,
    min_sqnr_db: float | Literal["auto"] | Mapping[str, float | Literal["auto"]] = "auto",
    *,
    gain: float | Literal["auto"] = "auto",
    bias: float = 0.05,
    min_block_sqnr_db: float | Literal["auto"] = "auto",
    max_error: float | None = None,
    equal: bool = True,
    max_steps: float | None = None,
    device: str = "cpu",
    executor: Executor | None = None,
) -> Comparison:
    """Fail unless what is stored still decodes to the reference; return the comparison otherwise.

    Per tensor: SQNR in dB (`"auto"`: what rounding the reference to nearest in the same encoding keeps, less a margin,
    or the floor of the encoding where that is not known; a mapping of name patterns to dB), `gain` off 1 (`"auto"`:
    0.04 off the gain of rounding, where known), `bias` in standard deviations of the reference, the SQNR of the worst
    block (`"auto"`: 3 dB, for block formats of four bits and more), and `max_error` in the units of the weights. Plain
    tensors must be equal to the reference in their dtype, to the bit, unless `equal` is False. `max_steps` limits the
    error in quantization steps, where they are known: 0.5 is what rounding to nearest has (slow). Work goes to
    `executor` where one is given (to other processes for files only), else to threads.
    Comparing nothing, or nothing quantized, fails.
    """
    __tracebackhide__ = True
    require_torch("assert_dequant_fidelity decodes values")
    from pytest_quantcheck.checks import fidelity

    limits = fidelity.Limits(min_sqnr_db, gain, bias, min_block_sqnr_db, max_error, equal, max_steps)
    comparison = fidelity.compare(inspect(subject), inspect(reference), limits, device=device, executor=executor)
    verdict = fidelity.check_fidelity(comparison)
    where = "limits are arguments of assert_dequant_fidelity: " + ", ".join(fidelity.Limits._fields)
    _require(verdict._replace(details=(*verdict.details, where)))
    return comparison


def assert_matches_baseline(
    subject: Subject,
    name: str,
    *,
    reference: Subject | None = None,
    growth: str | int = 0,
    sqnr_drop_db: float = 0.1,
    lock: str | os.PathLike[str] = "quantcheck.lock",
    device: str = "cpu",
) -> None:
    """Fail unless the artifact is what the record `name` of the lock says: no tensor gone, reshaped, grown or worse.

    `growth` is what the whole and each tensor may have more: `"2 %"`, `"10 MB"` or bytes. With a `reference` the SQNR
    of each tensor is recorded, and may fall by `sqnr_drop_db`. `pytest --quantcheck-update` records, and fails once.
    """
    __tracebackhide__ = True
    from pytest_quantcheck import lock as locks
    from pytest_quantcheck import uses
    from pytest_quantcheck.checks import baseline, diff

    path = os.fspath(lock)
    uses.note(path, name)
    allowed = baseline.Allowed(baseline.parse_growth(growth), sqnr_drop_db)
    artifact = inspect(subject)
    outline = diff.outline(artifact)
    if reference is not None:
        require_torch("a baseline with a reference decodes values")
        from pytest_quantcheck.checks import fidelity

        comparison = fidelity.compare(artifact, inspect(reference), device=device)
        outline = baseline.with_fidelity(outline, comparison.tensors)
    if locks.updating():
        _require(locks.update(path, name, baseline.Record("test", version("pytest-quantcheck"), outline)))
    else:
        _require(baseline.check_baseline(locks.read(path).get(name), outline, allowed, where=path))


def assert_same_weights(one: Subject, other: Subject, *, skip: Sequence[str] = ()) -> None:
    """Fail unless both sides hold the same weights, bit for bit: codes, scales, zero points, codebooks and indices.

    Either side may be saved or live, so what is held to it is saving and loading, copying, and moves between devices.
    Says which part differs, in how many bytes and where first, and what is on one side only. `skip` are patterns of
    tensors to leave out. Comparing nothing fails.
    """
    __tracebackhide__ = True
    require_torch("assert_same_weights compares values")
    _require(same_weights.check_same_weights(inspect(one), inspect(other), skip=skip))


def assert_kernel_parity(model: Subject, reference: Subject | None = None, *, skip: Sequence[str] = ()) -> Parities:
    """Fail unless the library decodes every quantized layer to the values that are stored; return the comparison.

    The library's own dequantize runs on the device where the layer is, against our decode of the same bytes, within
    four roundings of its precision. Of the path of an ONNX model, each node that takes an encoded weight runs alone in
    onnxruntime, on the CPU. With a `reference`, both are measured against it too. `skip` are patterns of
    tensors that no library decodes. The message names layer, library, version, device and blocks, and where it can
    gives a script that shows the difference.
    """
    __tracebackhide__ = True
    require_torch("assert_kernel_parity decodes values")
    from pytest_quantcheck.checks import kernel_parity, kernels, onnx_kernels

    artifact = inspect(model) if _is_onnx(model) else _live(model, "assert_kernel_parity")
    layers = onnx_kernels.layers(artifact) if artifact.container == "onnx" else kernels.layers(model, artifact)
    parities = kernel_parity.compare(layers, artifact, None if reference is None else inspect(reference), skip=skip)
    _require(kernel_parity.check_kernel_parity(parities))
    return parities


def assert_module_output(
    model: torch.nn.Module,
    *,
    batches: Sequence[int] = (1, 2, 33),
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    skip: Sequence[str] = (),
) -> Outputs:
    """Fail unless the forward of every quantized linear layer is x @ W.T + bias of the stored W; return the runs.

    Each layer runs alone, as a copy, on random inputs of every batch size: 1 takes the matrix-vector kernel of most
    libraries, more the matrix-matrix kernel. `dtypes` are those of the inputs (`"float32"`, `"bfloat16"`,
    `"float16"`); by default the layer's own, or all three where its library takes them. What rounding in the layer's
    precision, over so many columns, cannot explain fails. `skip` are patterns of tensors to leave out, such as
    quantized embeddings and stacks of experts.
    """
    __tracebackhide__ = True
    require_torch("assert_module_output runs layers")
    from pytest_quantcheck.checks import module_output

    artifact = _live(model, "assert_module_output")
    outputs = module_output.compare(model, artifact, batches=batches, dtypes=dtypes, seed=seed, skip=skip)
    _require(module_output.check_module_output(outputs))
    return outputs


def assert_logits_close(
    model: torch.nn.Module | ModelSource,
    reference: torch.nn.Module | ModelSource,
    inputs: Any,
    *,
    max_kl: float | None = None,
    max_kl_median: float | None = None,
    max_kl_99: float | None = None,
    max_kl_999: float | None = None,
    min_top1: float | None = None,
    device: str = "cpu",
) -> Agreement:
    """Fail unless the model's next-token distributions are close to the reference's; return the statistics.

    Limits on the Kullback-Leibler divergence per token, in nats: its mean, median, 99 and 99.9 percentile; and on the
    share of tokens with the same most likely next token (0 to 1). At least one is needed: what is good depends on the
    model. `inputs` are what a tokenizer returns, a tensor of token ids, or any iterable of those; tokens that the
    attention mask leaves out do not count. A model that is a path or a function is loaded on `device` when it is its
    turn and let go after it, so that only one is in memory.
    """
    __tracebackhide__ = True
    require_torch("assert_logits_close runs models")
    from pytest_quantcheck import devices, models
    from pytest_quantcheck.checks import logits

    limits = logits.Limits(max_kl, max_kl_median, max_kl_99, max_kl_999, min_top1)
    if limits == logits.Limits():
        raise ValueError("a limit is needed: max_kl, max_kl_median, max_kl_99, max_kl_999 or min_top1")
    agreement = logits.compare(
        model, reference, inputs, load=lambda source: models.load(source, device), release=devices.release
    )
    _require(logits.check_logits(agreement, limits))
    return agreement


def assert_delta_preserved(
    base: Subject, merged: Subject, quantized: Subject, *, min_db: float, device: str = "cpu"
) -> Deltas:
    """Fail unless an adapter that was merged is still there after quantization; return what is left of it.

    `base` and `merged` are unquantized, before and after merging; `quantized` is made of `merged`. Per tensor that
    merging changed: the adapter over the noise in dB, which has to be `min_db` or more. At 0 dB the noise is as large
    as the adapter.
    """
    __tracebackhide__ = True
    require_torch("assert_delta_preserved decodes values")
    from pytest_quantcheck.checks import delta

    deltas = delta.compare(inspect(base), inspect(merged), inspect(quantized), device=device)
    _require(delta.check_delta(deltas, min_db))
    return deltas


def require_torch(what: str) -> None:
    """Raise an ImportError that says what to install, where torch is not."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(f"{what} and needs torch: pip install pytest-quantcheck[torch]")


def _is_onnx(subject: Subject) -> bool:
    """Whether it is an ONNX model, whose nodes onnxruntime can run from the file."""
    if isinstance(subject, Artifact):
        return subject.container == "onnx"
    return isinstance(subject, str | os.PathLike) and onnx.accepts(os.fspath(subject))


def _live(model: Subject, what: str) -> Artifact:
    """The artifact of a live model; a path has nothing that could be run."""
    if not hasattr(model, "named_modules"):
        raise TypeError(f"{what} runs the library, so it needs a live torch.nn.Module, not `{type(model).__name__}`")
    return inspect(model)


def _require(verdict: Verdict) -> None:
    __tracebackhide__ = True
    if not verdict.passed:
        raise AssertionError(str(verdict))
