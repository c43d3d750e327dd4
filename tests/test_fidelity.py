"""Fidelity: the metrics by hand, the faults each metric exists for, and no vacuous pass."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
from torch import nn

from pytest_quantcheck import assert_checkpoint_intact, assert_dequant_fidelity, inspect
from pytest_quantcheck.checks import fidelity

SIGMA = 0.02


def plain(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return model


def weights(distribution: str, rows: int = 256, columns: int = 512) -> torch.Tensor:
    torch.manual_seed(0)
    match distribution:
        case "gaussian":
            return SIGMA * torch.randn(rows, columns)
        case "student-t":
            return SIGMA * torch.distributions.StudentT(5.0).sample((rows, columns))
        case "outliers":
            values = SIGMA * torch.randn(rows, columns)
            return torch.where(torch.rand_like(values) < 0.001, 10 * values, values)
    raise ValueError(distribution)


def quantized(values: torch.Tensor, kind: str = "nf4", **options: object) -> nn.Module:
    rows, columns = values.shape
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, quant_type=kind, **{"compress_statistics": False} | options
        )
        layer.weight.data = values.clone()
    return layer.to("cpu")


def row_of(model: nn.Module, reference: torch.Tensor) -> fidelity.Fidelity:
    (row,) = fidelity.compare(inspect(model), inspect(plain(weight=reference))).tensors
    return row


def test_metrics_by_hand():
    reference = torch.tensor([[3.0, -1.0, 2.0], [0.0, 1.0, -1.0]])
    decoded = torch.tensor([[3.0, -1.0, 2.5], [0.0, 1.0, -2.0]])
    row = row_of(plain(weight=decoded), reference)
    assert row.signal == 16.0
    assert row.noise == 1.25
    assert row.sqnr_db == pytest.approx(10 * math.log10(16 / 1.25))
    assert row.gain == pytest.approx((9 + 1 + 5 + 0 + 1 + 2) / 16)
    sigma = math.sqrt(16 / 6 - (4 / 6) ** 2)
    assert row.bias == pytest.approx((0.5 - 1.0) / 6 / sigma)
    assert row.max_error == 1.0


# The table of fidelity-metrics: measured on 1024 x 4096, so a smaller matrix comes within 0.3 dB.
EXPECTED = [
    ("nf4", {}, 20.73),
    ("nf4", {"compress_statistics": True}, 20.72),
    ("fp4", {}, 18.28),
    ("int8", {}, 43.0),
]


@pytest.mark.parametrize(("kind", "options", "expected"), EXPECTED)
def test_gaussian_weights_have_the_sqnr_of_their_format(kind, options, expected):
    values = weights("gaussian")
    row = row_of(quantized(values, kind, **options), values)
    assert row.sqnr_db == pytest.approx(expected, abs=1.5 if kind == "int8" else 0.3)


@pytest.mark.parametrize("distribution", ["gaussian", "student-t", "outliers"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_healthy_weights_raise_no_alarm(kind, distribution):
    values = weights(distribution)
    assert_dequant_fidelity(quantized(values, kind), plain(weight=values))


def state(model: nn.Module):
    return model.weight.quant_state


def swap_nibbles(model):
    codes = model.weight.data
    model.weight.data = (codes >> 4) | (codes << 4)


def scale_all(factor: float):
    def fault(model):
        state(model).absmax *= factor

    return fault


def kill_one_block(model):
    state(model).absmax[17] = 0


def corrupt_codes(model):
    model.weight.data[800:816] = 0


def shift_blocks(model):
    state(model).absmax = state(model).absmax.roll(1)


def nan_scale(model):
    state(model).absmax[3] = float("nan")


def read_as_fp4(model):
    state(model).code = bnb.functional.get_4bit_type("fp4", device="cpu")


def drop_offset(model):
    state(model).offset = torch.zeros(())


FAULTS = [
    ("nibbles-swapped", swap_nibbles, {}, "SQNR"),
    ("all-scales-5-percent-up", scale_all(1.05), {}, r"gain 1\.04"),
    ("all-scales-50-percent-up", scale_all(1.5), {}, "gain 1.49"),
    ("one-dead-block", kill_one_block, {}, "worst block has 0.0 dB"),
    ("sixteen-bytes-corrupted", corrupt_codes, {}, "worst block"),
    ("scales-shifted-by-a-block", shift_blocks, {}, "SQNR 1"),
    ("nan-in-a-scale", nan_scale, {}, r"decoded values are NaN or infinite\n    likely damaged-blocks"),
    ("codes-read-with-the-wrong-table", read_as_fp4, {}, "SQNR -"),
    ("nested-offset-dropped", drop_offset, {"compress_statistics": True}, "SQNR -"),
]


@pytest.mark.parametrize(("fault", "options", "seen_by"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_each_fault_is_seen(fault, options, seen_by):
    values = weights("gaussian")
    model = quantized(values, "nf4", **options)
    fault(model)
    with pytest.raises(AssertionError, match=seen_by) as caught:
        assert_dequant_fidelity(model, plain(weight=values))
    assert str(caught.value).startswith("fidelity: 1 tensor compared")


VACUOUS = [
    ("nothing-in-common", lambda v: plain(other=v), "nothing was compared"),
    ("shape-differs", lambda v: plain(weight=v[:-1]), "the reference has 255 x 512"),
    ("transposed-without-reason", lambda v: plain(weight=v.t().contiguous()), "the reference has 512 x 256"),
    (
        "reference-of-nan",
        lambda v: plain(weight=torch.full_like(v, float("nan"))),
        "reference values are NaN or infinite\n",
    ),
    ("reference-of-zeros", lambda v: plain(weight=torch.zeros_like(v)), "SQNR -inf dB"),
]


@pytest.mark.parametrize(("reference", "why"), [row[1:] for row in VACUOUS], ids=[row[0] for row in VACUOUS])
def test_comparing_nothing_fails(reference, why):
    values = weights("gaussian")
    with pytest.raises(AssertionError, match=why):
        assert_dequant_fidelity(quantized(values), reference(values))


def test_comparing_nothing_quantized_fails():
    values = weights("gaussian")
    with pytest.raises(AssertionError, match="no quantized tensor was compared"):
        assert_dequant_fidelity(plain(weight=values), plain(weight=values))


def test_thresholds_can_be_given():
    values = weights("gaussian")
    model, reference = quantized(values), plain(weight=values)
    comparison = assert_dequant_fidelity(model, reference, 20.0, gain=0.01, bias=0.01, min_block_sqnr_db=10.0)
    assert comparison.sqnr_db == pytest.approx(20.7, abs=0.3)
    with pytest.raises(AssertionError, match=r"SQNR 20\.\d dB is under 25\.0 dB given \(block 64\)"):
        assert_dequant_fidelity(model, reference, 25.0)
    with pytest.raises(AssertionError, match="maximum error"):
        assert_dequant_fidelity(model, reference, max_error=1e-6)


def test_worst_tensors_come_first_and_at_most_ten():
    model, reference = nn.ModuleDict(), nn.ModuleDict()
    for at in range(14):
        values = weights("gaussian", 32, 64)
        model[f"l{at:02}"], reference[f"l{at:02}"] = quantized(values), plain(weight=values)
        scale_all(1.0 + 0.1 * at)(model[f"l{at:02}"])
    with pytest.raises(AssertionError) as caught:
        assert_dequant_fidelity(model, reference)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("13 wrong")
    assert lines[1].strip().startswith("l13.weight")
    assert lines[-2].strip() == "... and 3 more"
    assert lines[-1].startswith("  limits are arguments of assert_dequant_fidelity: min_sqnr_db, ")
    assert len([line for line in lines if not line.strip().startswith("likely gain")]) == 13


def test_a_prefix_that_one_side_has_is_bridged():
    values = weights("gaussian")
    reference = nn.ModuleDict({"model": plain(weight=values)})
    assert_dequant_fidelity(quantized(values), reference)


def test_the_avx512_defect_of_bitsandbytes_is_not_ours():
    """160 columns in blocks of 64: bitsandbytes 0.50.2 starts blocks anew on each row on AVX-512; ours does not."""
    values = weights("gaussian", 96, 160)
    model = quantized(values)
    ours = row_of(model, values)
    theirs = bnb.functional.dequantize_4bit(model.weight.data, state(model)).float()
    error = float(((theirs - values) ** 2).sum())
    library_db = fidelity.sqnr_db(float((values**2).sum()), error)
    assert ours.sqnr_db == pytest.approx(20.7, abs=0.3)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip(f"the defect needs AVX-512, this CPU has {torch.backends.cpu.get_cpu_capability()}")
    assert library_db < 15


# Integrity.


def save(path, **tensors):
    safetensors.torch.save_file(tensors, path)
    return path


def healthy(tmp_path):
    torch.manual_seed(1)
    return save(tmp_path / "a.safetensors", a=torch.randn(300, 200), b=torch.randn(300, 200))


def with_nan(tmp_path):
    values = torch.randn(300, 200)
    values[5, 7] = float("nan")
    return save(tmp_path / "a.safetensors", a=values)


def with_a_copy(tmp_path):
    values = torch.randn(300, 200)
    return save(tmp_path / "a.safetensors", a=values, b=values.clone())


def with_infinite_scale(tmp_path):
    layer = quantized(weights("gaussian", 32, 64))
    state(layer).absmax[2] = float("inf")
    return save(tmp_path / "a.safetensors", **layer.state_dict())


def truncated(tmp_path):
    path = healthy(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def empty(tmp_path):
    return save(tmp_path / "a.safetensors")


BROKEN = [
    (with_nan, "a: 1 of 60,000 values are NaN or infinite"),
    (with_infinite_scale, r"weight\.absmax: 1 of 32 values are NaN or infinite"),
    (with_a_copy, r"b: holds the same bytes as `a`: 240\.00 KB could be saved"),
    (truncated, "truncated"),
    (empty, "holds no parameter at all"),
]


@pytest.mark.parametrize(("make", "why"), BROKEN, ids=[make.__name__ for make, _ in BROKEN])
def test_broken_checkpoints_are_not_intact(make, why, tmp_path):
    path = make(tmp_path)
    with pytest.raises(AssertionError, match=why):
        assert_checkpoint_intact(path)


def test_healthy_checkpoints_are_intact(tmp_path):
    assert_checkpoint_intact(healthy(tmp_path))
    freshly_initialised = save(tmp_path / "n.safetensors", a=torch.ones(20_000), b=torch.ones(20_000))
    assert_checkpoint_intact(freshly_initialised)
    assert_checkpoint_intact(with_a_copy(tmp_path), allow=["duplicate-tensor"])
    assert_checkpoint_intact(with_nan(tmp_path), values=False)
