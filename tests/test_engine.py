"""The engine: the same numbers as float64 over the whole, the same bits however it is spread, and bounded memory."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import bitsandbytes.functional
import pytest
import safetensors.torch
import torch

from pytest_quantcheck import assert_dequant_fidelity, compiled, executors, inspect
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.checks import engine, fidelity
from pytest_quantcheck.checks.limits import Limits
from pytest_quantcheck.checks.metrics import Extremes, Fidelity, Sums
from pytest_quantcheck.checks.shards import cuts
from pytest_quantcheck.report.json import of_comparison
from pytest_quantcheck.tensor import LogicalTensor

SIGMA = 0.02


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def loops(request, monkeypatch):
    """Everything holds in both: passes of torch, and loops of numba."""
    monkeypatch.setattr(compiled, "FROM", 0 if request.param == "compiled" else 1 << 60)


def stored_as_nf4(name: str, values: torch.Tensor, *, nested: bool = False, block: int = 64) -> dict[str, torch.Tensor]:
    codes, state = bitsandbytes.functional.quantize_4bit(
        values, quant_type="nf4", blocksize=block, compress_statistics=nested
    )
    return {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}


def checkpoint(path, tensors: dict[str, torch.Tensor]) -> Artifact:
    safetensors.torch.save_file(tensors, path)
    return inspect(path)


def pair_of(tmp_path, values: torch.Tensor, name: str = "weight", **options) -> tuple[LogicalTensor, LogicalTensor]:
    """One NF4 tensor and its reference, in files."""
    quantized = checkpoint(tmp_path / "nf4.safetensors", stored_as_nf4(name, values, **options))
    return quantized.tensor(name), checkpoint(tmp_path / "reference.safetensors", {name: values}).tensor(name)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return SIGMA * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [
    pytest.param((96, 160), 64, id="blocks-run-on-across-rows"),
    pytest.param((7, 34), 64, id="smaller-than-a-window-of-blocks"),
    pytest.param((300, 4160), 64, id="several-windows"),
    pytest.param((5, 128), 128, id="a-block-is-a-row"),
    pytest.param((3, 8, 192), 64, id="a-stack"),
    pytest.param((1, 70), 64, id="one-row"),
]


@pytest.mark.parametrize("flat", [True, False], ids=["blocks-run-on", "blocks-begin-anew-in-rows"])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_metrics_are_those_of_float64_over_the_whole(tmp_path, shape, block, flat, monkeypatch):
    monkeypatch.setattr(engine, "WINDOW", 1 << 14)
    tensor, reference = pair_of(tmp_path, gaussian(*shape), block=block)
    tensor = tensor._replace(flat=flat)
    row = engine.measure(tensor, reference)
    d, r = tensor.decode().double(), reference.decode().double()
    e = d - r
    sigma = r.pow(2).mean().sub(r.mean() ** 2).sqrt()
    rows = r.pow(2).sum(1) / e.pow(2).sum(1)
    signal, noise = (
        torch.nn.functional.pad(line.pow(2), (0, -line.shape[1] % block)).view(-1, block).sum(1)
        for line in ((r.view(1, -1), e.view(1, -1)) if flat else (r, e))
    )
    blocks = signal / noise
    assert row.sums.values == r.numel()
    assert row.sqnr_db == pytest.approx(float(10 * torch.log10(r.pow(2).sum() / e.pow(2).sum())), abs=1e-5)
    assert row.relative_error == pytest.approx(float(e.norm() / r.norm()), rel=1e-6)
    assert row.gain == pytest.approx(float((r * d).sum() / r.pow(2).sum()), abs=1e-7)
    assert row.bias == pytest.approx(float(e.mean() / sigma), abs=1e-7)
    assert row.cosine == pytest.approx(float((r * d).sum() / r.norm() / d.norm()), abs=1e-7)
    assert row.max_error == float(e.float().abs().max())
    assert row.max_error_sigmas == pytest.approx(row.max_error / float(sigma), rel=1e-6)
    assert row.min_row_sqnr_db == pytest.approx(float(10 * torch.log10(rows.min())), abs=1e-5)
    assert row.worst_row == int(rows.argmin())
    assert row.min_block_sqnr_db == pytest.approx(float(10 * torch.log10(blocks.min())), abs=1e-5)
    assert row.zero_fraction == float((d == 0).double().mean())
    assert row.reference_zero_fraction == float((r == 0).double().mean())


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_rounding_is_predicted_in_the_same_pass(tmp_path, shape, block, monkeypatch):
    monkeypatch.setattr(engine, "WINDOW", 1 << 14)
    row = engine.measure(*pair_of(tmp_path, gaussian(*shape), block=block))
    assert row.rounding_sqnr_db == pytest.approx(row.sqnr_db, abs=0.01)


def test_errors_in_steps_are_measured_on_demand(tmp_path):
    tensor, reference = pair_of(tmp_path, gaussian(96, 192))
    assert engine.measure(tensor, reference).max_error_steps is None
    healthy = engine.measure(tensor, reference, in_steps=True)
    assert 0.45 < healthy.max_error_steps <= 0.5001
    assert healthy.beyond_half_step == 0
    wrong = reference.decode().clone()
    wrong[17, 5] += 0.05
    other = checkpoint(tmp_path / "wrong.safetensors", {"weight": wrong}).tensor("weight")
    found = engine.measure(tensor, other, in_steps=True)
    assert found.beyond_half_step == 1
    assert found.max_error_steps > 1


def test_values_too_large_to_square_in_float32_have_metrics(tmp_path):
    tensors = {"weight": torch.tensor([[3e30, -1e30, 2e30], [1e30, 1e30, 1e30]])}
    tensor = checkpoint(tmp_path / "a.safetensors", tensors).tensor("weight")
    other = checkpoint(tmp_path / "b.safetensors", {"weight": tensors["weight"] * 1.1}).tensor("weight")
    row = engine.measure(tensor, other)
    assert row.sqnr_db == pytest.approx(20 * math.log10(11), abs=1e-4)
    assert row.extremes.non_finite == 0


def test_non_finite_values_are_counted_on_their_side(tmp_path):
    values = gaussian(40, 64)
    broken = values.clone()
    broken[3, 4], broken[5, 6], broken[7, 8] = math.nan, math.inf, -math.inf
    good = checkpoint(tmp_path / "a.safetensors", {"weight": values}).tensor("weight")
    bad = checkpoint(tmp_path / "b.safetensors", {"weight": broken}).tensor("weight")
    for pair, counts in (((bad, good), (3, 0)), ((good, bad), (0, 3))):
        row = engine.measure(*pair)
        assert (row.extremes.non_finite, row.extremes.reference_non_finite) == counts
        assert math.isnan(row.sqnr_db)


# Plain tensors.

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASTS = [(one, other) for one in DTYPES for other in DTYPES]


@pytest.mark.parametrize(("written", "of"), CASTS, ids=[f"{one}-of-{other}" for one, other in CASTS])
def test_plain_tensors_are_the_reference_cast_to_their_dtype(tmp_path, written, of):
    reference = gaussian(33, 65).to(DTYPES[of])
    cast = reference.to(DTYPES[written])
    original = checkpoint(tmp_path / "reference.safetensors", {"norm": reference}).tensor("norm")
    row = engine.measure(checkpoint(tmp_path / "same.safetensors", {"norm": cast}).tensor("norm"), original)
    assert row.extremes.changed == 0
    cast.view(torch.int16 if cast.element_size() == 2 else torch.int32)[4, 7] += 1
    row = engine.measure(checkpoint(tmp_path / "next.safetensors", {"norm": cast}).tensor("norm"), original)
    assert row.extremes.changed == 1


def test_truncation_instead_of_rounding_is_a_fault(tmp_path):
    values, weight = gaussian(40, 64), gaussian(64, 128)
    truncated = (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    ours = checkpoint(tmp_path / "nf4.safetensors", {"norm": truncated} | stored_as_nf4("weight", weight))
    theirs = checkpoint(tmp_path / "reference.safetensors", {"norm": values, "weight": weight})
    with pytest.raises(AssertionError, match=r"norm: 1,\d\d\d of 2,560 values are not those of the reference in BF16"):
        assert_dequant_fidelity(ours, theirs)
    assert_dequant_fidelity(ours, theirs, {"norm": 40.0}, equal=False)


def test_long_vectors_and_short_rows_are_compared_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "WINDOW", 1 << 12)
    tensors = {"vector": gaussian(12_345), "kernel": gaussian(9, 7, 3, 3), "empty": gaussian(0, 5), "one": gaussian(1)}
    ours = checkpoint(tmp_path / "a.safetensors", {name: 2 * values for name, values in tensors.items()})
    theirs = checkpoint(tmp_path / "b.safetensors", tensors)
    for name, values in tensors.items():
        row = engine.measure(ours.tensor(name), theirs.tensor(name))
        assert (row.sums.values, row.shape) == (values.numel(), tuple(values.shape))
        assert row.gain == pytest.approx(2.0 if values.numel() else 1.0)


# Shards.


def test_one_scale_for_two_halves_is_seen_in_the_half(tmp_path):
    values = gaussian(512, 192)
    quantized = stored_as_nf4("mlp.gate_up_proj.weight", values)
    quantized["mlp.gate_up_proj.weight.absmax"][256 * 3 :] *= 1.07
    ours = checkpoint(tmp_path / "nf4.safetensors", quantized)
    theirs = checkpoint(tmp_path / "reference.safetensors", {"mlp.gate_up_proj.weight": values})
    with pytest.raises(AssertionError, match=r"gain 1\.06\d of up is off 1 by more than 0\.04"):
        assert_dequant_fidelity(ours, theirs)


SHARDS = [
    ("mlp.gate_up_proj.weight", (96, 64), {"gate": 48, "up": 48}),
    ("experts.gate_up_proj", (3, 32, 64), {"gate": 48, "up": 48}),
    ("self_attn.qkv_proj.weight", (96, 64), {"q": 64, "k": 16, "v": 16}),
    ("attn.query_key_value.weight", (96, 64), None),
    ("mlp.down_proj.weight", (10, 64), {f"rows {a} to {b}": b - a + 1 for a, b in ((0, 1), (2, 4), (5, 6), (7, 9))}),
]


@pytest.mark.parametrize(("name", "shape", "rows"), SHARDS, ids=[row[0] for row in SHARDS])
def test_shards_are_the_parts_of_a_fusion_or_quarters(tmp_path, name, shape, rows):
    row = engine.measure(*pair_of(tmp_path, gaussian(*shape), name=name))
    found = {shard.name: shard.sums.values // shape[-1] for shard in row.shards}
    assert found == rows or (rows is None and list(found.values()) == [24] * 4)
    assert sum(shard.sums.noise for shard in row.shards) == pytest.approx(row.noise)


# Limits.


def pairs(tmp_path, count: int = 6, *, spoil: int | None = None) -> tuple[Artifact, Artifact]:
    """A checkpoint of layers, of which one may be quantized twice, with other blocks."""
    originals = {f"layers.{at}.down_proj.weight": gaussian(48, 256, seed=at) for at in range(count)}
    quantized: dict[str, torch.Tensor] = {}
    for at, (name, values) in enumerate(originals.items()):
        stored = values
        if at == spoil:
            stored = bitsandbytes.functional.dequantize_4bit(
                *bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", blocksize=256)
            )
        quantized |= stored_as_nf4(name, stored)
    return (
        checkpoint(tmp_path / "nf4.safetensors", quantized),
        checkpoint(tmp_path / "reference.safetensors", originals),
    )


def test_a_layer_worse_than_its_siblings_is_a_warning(tmp_path):
    comparison = fidelity.compare(*pairs(tmp_path, spoil=4), Limits(min_sqnr_db=10.0))
    (found,) = comparison.findings
    assert (found.check, found.severity, found.tensor) == ("outlier", "warning", "layers.4.down_proj.weight")
    assert "dB worse than the median of 6 like it" in found.message
    assert comparison.passed
    assert fidelity.compare(*pairs(tmp_path)).findings == ()


def test_requantized_weights_fail_against_what_rounding_keeps(tmp_path):
    with pytest.raises(
        AssertionError, match=r"down_proj.weight: SQNR 1\d\.\d+ dB is under .* rounding to nearest keeps"
    ):
        assert_dequant_fidelity(*pairs(tmp_path, spoil=2))


def test_floors_can_be_given_by_name_pattern(tmp_path):
    ours, theirs = pairs(tmp_path)
    rows = assert_dequant_fidelity(ours, theirs, {"layers.3.*": 19.0, "*.down_proj": 17.5}).tensors
    assert {row.name.split(".")[1]: row.expected_sqnr_db for row in rows} == dict.fromkeys("01245", 17.5) | {"3": 19.0}
    with pytest.raises(AssertionError, match="1 wrong"):
        assert_dequant_fidelity(ours, theirs, {"layers.3.*": 25.0})
    with pytest.raises(ValueError, match=r"pattern `\*\.up_proj` matches no tensor that is compared"):
        assert_dequant_fidelity(ours, theirs, {"*.up_proj": 17.5})


def test_a_dead_row_is_seen_without_blocks():
    sums = Sums(values=64 * 64, signal=1.0, noise=1e-4)
    sums = sums._replace(rounding=sums)
    row = Fidelity("w", "int8", (64, 64), sums, Extremes(lost_row=1.0, lost_at=17), rounds=True)
    tensor = LogicalTensor("w", (64, 64), "int8", "parameter", (), None, floor_db=28.0)
    judged = fidelity.judge(row, tensor, Limits())
    assert judged.faults == ("row 17 has 0.0 dB, under 3.0 dB: a row is dead or corrupt",)


def test_a_reference_of_zeros_shows_nothing(tmp_path):
    zeros = torch.zeros(32, 64)
    ours = checkpoint(tmp_path / "nf4.safetensors", stored_as_nf4("weight", zeros))
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": zeros})
    with pytest.raises(AssertionError, match="every quantized tensor was compared with zeros"):
        assert_dequant_fidelity(ours, theirs)


# Sampling.


@pytest.fixture
def windows_of_rows(monkeypatch):
    """Windows of 8 rows of 512, of which every eighth is rounded."""
    monkeypatch.setattr(engine, "WINDOW", 8 * 512)
    monkeypatch.setattr(engine, "CODED_WINDOW", 8 * 512)
    monkeypatch.setattr(engine, "SAMPLED_FROM", 128 * 512)


def test_rounding_a_part_changes_nothing_else(tmp_path, windows_of_rows):
    tensor, reference = pair_of(tmp_path, gaussian(128, 512))
    (part,) = engine.measure_each([(tensor, reference)], sample=True)
    whole = engine.measure(tensor, reference)
    assert part.sampled
    assert not whole.sampled
    assert part.sums.rounding.values * engine.SAMPLED == whole.sums.rounding.values == whole.sums.values
    assert part.rounding_sqnr_db == pytest.approx(whole.rounding_sqnr_db, abs=0.1)
    assert part.sums._replace(rounding=None) == whole.sums._replace(rounding=None)
    assert part.extremes == whole.extremes


@pytest.mark.parametrize("window", [0, 1, 6, 15])
def test_a_dead_block_is_seen_in_every_window(tmp_path, window, windows_of_rows):
    """Also in those that would not be rounded: a weak place is looked at."""
    values = gaussian(128, 512)
    stored = stored_as_nf4("weight", values)
    stored["weight.absmax"][window * 64 + 3] = 0
    ours = checkpoint(tmp_path / "nf4.safetensors", stored)
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": values})
    (row,) = fidelity.compare(ours, theirs).tensors
    assert row.faults == ("worst block has 0.0 dB, under 3.0 dB: a block is dead or corrupt",)


def test_windows_that_are_harder_than_the_sample_are_no_fault(tmp_path, windows_of_rows):
    """The rows that are rounded are levels of the table, the others have outliers: all are rounded before it fails."""
    values = gaussian(128, 512)
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.01] *= 30
    for start in range(0, 128, 8 * engine.SAMPLED):
        values[start : start + 8] = gaussian(8, 512).sign() * SIGMA * 8
    tensor, reference = pair_of(tmp_path, values)
    (part,) = engine.measure_each([(tensor, reference)], sample=True)
    assert part.rounding_sqnr_db > part.sqnr_db + 3
    comparison = fidelity.compare(inspect(tmp_path / "nf4.safetensors"), inspect(tmp_path / "reference.safetensors"))
    assert comparison.passed, comparison.findings
    assert not comparison.tensors[0].sampled


# Spreading.


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Tensors of many slabs, so that there is something to spread."""
    monkeypatch.setattr(engine, "WINDOW", 1 << 12)
    monkeypatch.setattr(engine, "SLAB", 1 << 14)
    ours, theirs = pairs(tmp_path)
    slabs = [slab for at, pair in enumerate(_paired(ours, theirs)) for slab in engine._slabs(at, pair, engine.Given())]
    assert len(slabs) == 6
    assert len(list(engine._batches(slabs))) > 2
    return ours, theirs


def _paired(ours: Artifact, theirs: Artifact):
    return [(tensor, theirs.tensor(tensor.name)) for tensor in ours.parameters]


def document(pair, **options) -> str:
    return json.dumps(of_comparison(fidelity.compare(*pair, **options)))


def test_results_are_the_same_to_the_bit_however_they_are_spread(many):
    alone = fidelity.compare(*many, workers=1)
    threads = torch.get_num_threads()
    for workers in (2, 3):
        assert fidelity.compare(*many, workers=workers) == alone
    with ThreadPoolExecutor(3) as executor:
        assert fidelity.compare(*many, executor=executor) == alone
    with executors.processes(2) as executor:
        assert isinstance(executor, ProcessPoolExecutor)
        assert fidelity.compare(*many, executor=executor) == alone
    assert torch.get_num_threads() == threads


def test_a_dask_cluster_gives_the_same_document(many):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, executors.cluster(cluster.scheduler_address) as executor:
        assert document(many, executor=executor) == document(many, workers=1)


def test_a_live_model_is_not_sent_to_other_processes():
    model = torch.nn.Linear(4, 3)
    with executors.processes(1) as executor, pytest.raises(ValueError, match="is a live model: other processes cannot"):
        fidelity.compare(inspect(model), inspect(model), executor=executor)


def test_a_file_that_changes_meanwhile_is_an_error_in_every_process(tmp_path):
    ours, theirs = pairs(tmp_path)
    os.utime(tmp_path / "reference.safetensors", ns=(1, 1))
    with executors.processes(1) as executor, pytest.raises(ValueError, match="changed while being read"):
        fidelity.compare(ours, theirs, executor=executor)


def test_progress_counts_all_values(many):
    told: list[tuple[int, int]] = []
    fidelity.compare(*many, progress=lambda done, total: told.append((done, total)))
    assert len(told) == 6
    assert told[-1] == (6 * 48 * 256, 6 * 48 * 256)


# Memory.

# VmHWM is of this program alone; ru_maxrss keeps what the process had before it became this program.
PEAK = """
import re, sys, torch
from pytest_quantcheck import inspect
from pytest_quantcheck.checks import engine, fidelity

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

torch.ones(4).sum()
before = peak()
rows = fidelity.compare(*map(inspect, sys.argv[1:]), workers=2).tensors
assert len(rows) == 1, rows
print(rows[0].sums.values, peak() - before)
"""
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}


def sparse(path, entries: dict[str, tuple[str, list[int]]], contents: dict[str, bytes] = {}):  # noqa: B006
    """A safetensors file of zeros that takes no space on disk, but for some small tensors."""
    header, at, placed = {}, 0, []
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * {"BF16": 2, "F32": 4, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        placed.append((at, contents.get(name, b"")))
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for offset, content in placed:
            file.seek(8 + len(raw) + offset)
            file.write(content)
        file.truncate(8 + len(raw) + at)
    return path


def sparse_nf4(path, name: str, shape: list[int]):
    state = json.dumps(STATE | {"shape": shape}).encode()
    values = math.prod(shape)
    parts = {
        name: ("U8", [values // 2, 1]),
        f"{name}.absmax": ("F32", [values // 64]),
        f"{name}.quant_map": ("F32", [16]),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", [len(state)]),
    }
    return sparse(path, parts, {f"{name}.quant_state.bitsandbytes__nf4": state})


LARGE = [
    ("an-embedding", "embed", [16_384, 4096], "plain"),
    ("a-stack-of-experts", "mlp.experts.down_proj", [4, 4096, 4096], "nf4"),
    ("a-vector", "bias", [1 << 26], "plain"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a program is read from /proc")
@pytest.mark.parametrize(("name", "shape", "kind"), [row[1:] for row in LARGE], ids=[row[0] for row in LARGE])
def test_memory_is_bounded_whatever_the_size(tmp_path, name, shape, kind):
    reference = sparse(tmp_path / "reference.safetensors", {name: ("F32", shape)})
    path = tmp_path / "stored.safetensors"
    stored = sparse(path, {name: ("BF16", shape)}) if kind == "plain" else sparse_nf4(path, name, shape)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, stored, reference], capture_output=True, text=True, check=False, timeout=300
    )
    assert not done.returncode, done.stderr
    values, megabytes = done.stdout.split()
    assert int(values) == 1 << 26
    assert 8 < float(megabytes) < 256  # at least a window of each side


def test_cuts_cover_every_row(tmp_path):
    for shape in ((1, 8), (3, 64), (5, 7, 64), (257, 64)):
        where = cuts(pair_of(tmp_path, gaussian(*shape))[0])
        assert where.starts[0] == 0
        assert list(where.starts) == sorted(set(where.starts))
        assert where.starts[-1] < where.period
