"""Compiled loops: used where they pay, left where they cannot be had, and the same numbers as passes of torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch

from pytest_quantcheck import compiled, inspect
from pytest_quantcheck.checks import engine, window
from pytest_quantcheck.checks.metrics import Extremes, Fidelity
from pytest_quantcheck.compiled import ggml, machine, windows
from pytest_quantcheck.schemes import CODERS, ggml_iq4, ggml_k, packing, rounding
from tests.cases import Made, all_cases
from tests.scheme_table import saved
from tests.test_engine import checkpoint, gaussian, stored_as_nf4
from tests.test_expectation import db
from tests.test_fidelity import weights
from tests.test_schemes import same_bits


def both(tensor, reference, monkeypatch, *, sample: bool = False) -> tuple[Fidelity, Fidelity]:
    """What loops measure, and what torch does."""
    found = []
    for start in (0, 1 << 60):
        monkeypatch.setattr(compiled, "FROM", start)
        found += engine.measure_each([(tensor, reference)], sample=sample, workers=1)
    return found[0], found[1]


def assert_equal(ours: Fidelity, theirs: Fidelity) -> None:
    """Equal but for the order of sums."""
    for kind in (ours.sums, theirs.sums), (ours.sums.rounding, theirs.sums.rounding):
        one, other = kind
        assert (one is None) == (other is None)
        if one is not None:
            scale = math.sqrt(other.signal * other.values)
            assert one.values == other.values
            assert one.signal == pytest.approx(other.signal, rel=1e-6)
            assert one.noise == pytest.approx(other.noise, rel=1e-6)
            lost = 2e-7 * other.signal  # torch subtracts the sum of squares from that of products
            assert one.cross == pytest.approx(other.cross, abs=lost + 1e-6 * math.sqrt(other.signal * other.noise))
            assert (one.total, one.drift) == pytest.approx((other.total, other.drift), abs=1e-6 * scale)
    for field in Extremes._fields:
        assert getattr(ours.extremes, field) == pytest.approx(getattr(theirs.extremes, field), rel=1e-5), field


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain-absmax", "nested-absmax"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 512), 64), ((40, 1100), 64), ((33, 160), 64), ((16, 3072), 1024), ((6, 2, 128), 128), ((5, 63), 64)],
    ids=str,
)
def test_sums_are_those_of_torch(tmp_path, monkeypatch, shape, block, nested, dtype):
    values = gaussian(*shape).to(dtype)
    values[0, 0] = 0
    ours = checkpoint(tmp_path / "nf4.safetensors", stored_as_nf4("weight", values, nested=nested, block=block))
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": values})
    assert_equal(*both(ours.tensor("weight"), theirs.tensor("weight"), monkeypatch))


def test_a_part_is_rounded_in_both(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "WINDOW", 8 * 512)
    monkeypatch.setattr(engine, "CODED_WINDOW", 8 * 512)
    monkeypatch.setattr(engine, "SAMPLED_FROM", 64 * 512)
    values = gaussian(128, 512).bfloat16()
    ours = checkpoint(tmp_path / "nf4.safetensors", stored_as_nf4("weight", values))
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": values})
    found = both(ours.tensor("weight"), theirs.tensor("weight"), monkeypatch, sample=True)
    assert_equal(*found)
    assert found[0].sampled


def test_codes_are_not_written_out(tmp_path, monkeypatch):
    """Where windows are full blocks, no window is decoded by itself: else the test above would compare torch twice."""
    values = gaussian(64, 512).bfloat16()
    ours = checkpoint(tmp_path / "nf4.safetensors", stored_as_nf4("weight", values))
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": values})
    monkeypatch.setattr(compiled, "FROM", 0)
    monkeypatch.setattr(window, "measure", lambda *_, **__: pytest.fail("a window was decoded by itself"))
    (row,) = engine.measure_each([(ours.tensor("weight"), theirs.tensor("weight"))])
    assert row.sqnr_db == pytest.approx(20.7, abs=0.5)


# Rows of the table of schemes, one for each way to say codes.
CODED = [
    "int8",
    "fp8-256x384",
    "fp8-ragged-200x130",
    "fp8-e5m2-bf16-scales",
    "fp8-per-row",
    "fp8-per-tensor-static",
    "fp8-fused-experts",
    "fp4-fused-experts",
    "mxfp4-openai",
    "ct-nvfp4-stack",
    "ct-mxfp4",
    "modelopt-nvfp4-stack",
    "modelopt-mxfp4",
    "fouroversix-mxfp4",
    "torchao-nf4",
    "torchao-nvfp4-swizzled-two-tiles",
    "torchao-nvfp4-experts",
    "torchao-mxfp4",
    "torchao-mxfp8-e5m2-swizzled",
    "torchao-mxfp6-e3m2",
    "onnx-bnb-fp4",
    "mxfp8-e8m0",
    "ct-int8-channel",
    "ct-int8-group-asym",
    "ct-naive-4-bit-in-bytes",
    "ct-float8-tensor",
    "ct-float8-ragged-block",
    "ct-mxfp8",
    "fbgemm-linear",
    "modelopt-fp8",
    "modelopt-fp8-ragged-block",
    "modelopt-fp8-stack-per-column",
    "modelopt-mxfp8",
    "modelopt-int8",
]


@pytest.mark.parametrize("rounds", [False, True], ids=["limit-given", "auto"])
@pytest.mark.parametrize("case", [case for case in all_cases() if case.id in CODED], ids=lambda case: case.id)
def test_every_format_of_codes_is_compared_as_it_is_stored(case, rounds, tmp_path, monkeypatch):
    """The sums are those of torch, and no window is decoded by itself."""
    made = case.make()
    ours = inspect(saved(made, tmp_path) if made.tensors or made.write else made.live).tensor(case.name)
    values = ours.decode().view(case.shape)
    noise = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    original = (values + 0.1 * values.std() * noise).bfloat16()
    theirs = checkpoint(tmp_path / "reference.safetensors", {case.name: original}).tensor(case.name)
    ours = ours if rounds else ours._replace(rounding=None)
    if ours.rounding is None or ours.rounding.levels is not None:  # others have more than a scale to choose
        monkeypatch.setattr(window, "measure", partial(_by_torch, window.measure))
    assert_equal(*both(ours, theirs, monkeypatch))


def test_the_table_above_has_rows():
    assert {case.id for case in all_cases()} >= set(CODED)


def _by_torch(measure, *positional, **by_name):
    assert compiled.loops("windows") is None, "a window was decoded by itself"
    return measure(*positional, **by_name)


@pytest.mark.parametrize("zeros", [False, True])
def test_scattered_groups_of_codes_of_one_byte(tmp_path, zeros):
    """Neither loops nor passes take the groups in order."""
    index = torch.arange(48, dtype=torch.int32).flip(0) // 16
    codes, scales = torch.arange(-96, 96).view(4, 48).to(torch.int8), torch.rand(4, 3) + 0.5
    points = torch.arange(12).view(4, 3).to(torch.int8) * zeros
    tensors = {"layer.weight": codes, "layer.weight_scale": scales, "layer.weight_g_idx": index}
    weights = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    made = Made(None, tensors=tensors | ({"layer.weight_zero_point": points} if zeros else {}))
    made.config["quantization_config"] = config
    tensor = inspect(saved(made, tmp_path)).tensor("layer.weight")
    expected = (codes.float() - points.float()[:, index.long()]) * scales[:, index.long()]
    assert same_bits(tensor.decode(), expected)
    with compiled.used(True):
        assert same_bits(tensor.decode(), expected)
    assert CODERS[tensor.decoder](tensor, 0, 4, "cpu") is None


def every_float(*, apart: int = 1) -> torch.Tensor:
    """Floats of every sign and exponent with 7 bits of mantissa, on a tie or beside it, as one block."""
    high = torch.arange(0, 1 << 16, apart, dtype=torch.int64).view(-1, 1) << 16
    words = high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return words.to(torch.int32).view(torch.float32).view(1, -1)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_small_floats_are_those_that_torch_casts_to(dtype):
    levels = rounding.small_float(dtype).keywords["levels"](torch.ones(1, 1))
    levels, values = levels._replace(steps=torch.ones(1, 1)), every_float()
    top = levels.among.top
    expected = values.clamp(-top, top).to(getattr(torch, dtype)).to(torch.float32)
    assert same_bits(windows.nearest(values, levels), expected)


@pytest.mark.parametrize("round_", [rounding.symmetric(8), rounding.symmetric(4, reach=7), rounding.symmetric(3)])
def test_integers_are_those_that_torch_rounds_to(round_):
    levels = round_.keywords["levels"](torch.ones(1, 1))._replace(steps=torch.ones(1, 1))
    values = every_float()
    low, high = levels.among
    assert same_bits(windows.nearest(values, levels), values.round().clamp(low, high))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("side", ["absmax", "reference"])
def test_values_that_are_no_numbers_or_too_large(tmp_path, monkeypatch, wrong, side):
    values = gaussian(64, 512).bfloat16()
    stored = stored_as_nf4("weight", values)
    if side == "absmax":
        stored["weight.absmax"][7] = wrong
    else:
        values[3, 4] = wrong
    ours = checkpoint(tmp_path / "nf4.safetensors", stored)
    theirs = checkpoint(tmp_path / "reference.safetensors", {"weight": values})
    found, expected = both(ours.tensor("weight"), theirs.tensor("weight"), monkeypatch)
    assert found.extremes.non_finite == expected.extremes.non_finite
    assert found.extremes.reference_non_finite == expected.extremes.reference_non_finite
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-6, nan_ok=True)


SEARCHED = {
    **{kind: ggml_k.TYPES[kind] for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
    **{kind: ggml_iq4.TYPES[kind] for kind in ("IQ4_NL", "IQ4_XS")},
}


@pytest.mark.parametrize("distribution", ["gaussian", "student-t", "outliers"])
@pytest.mark.parametrize("kind", SEARCHED)
def test_searches_of_ggml_keep_what_those_of_torch_keep(kind, distribution):
    """To the last bit all but everywhere: where two scales are as good, the order of sums decides between them."""
    rounding = SEARCHED[kind].rounding
    values = weights(distribution, 131, 1024)
    wanted = rounding.nearest(None, values, None)
    with compiled.used(True):
        found = rounding.nearest(None, values, None)
    assert db(found, values) == pytest.approx(db(wanted, values), abs=0.01)
    assert float((found != wanted).float().mean()) < 0.05


def test_the_range_of_blocks_is_that_of_torch():
    blocks = gaussian(9, 33)
    blocks[1], blocks[2] = blocks[1].abs(), -blocks[2].abs()
    blocks[3, 5], blocks[4, 5], blocks[5, 7] = math.inf, -math.inf, math.nan
    blocks[6, 0] = torch.tensor(math.nan).copysign(torch.tensor(-1.0))
    blocks[7] = 1e-42  # not normal
    for found, wanted in zip(ggml.range_of_blocks(blocks), (blocks.amin(dim=1), blocks.amax(dim=1)), strict=True):
        assert torch.equal(found.view(-1).nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_small_models_and_other_devices_are_left_to_torch():
    assert compiled.pays(compiled.FROM, "cpu")
    assert not compiled.pays(compiled.FROM - 1, "cpu")
    assert not compiled.pays(compiled.FROM, "cuda")


def test_one_thread_does_not_decide_for_another():
    from concurrent.futures import ThreadPoolExecutor

    with compiled.used(True), ThreadPoolExecutor(1) as pool:
        assert compiled.loops("windows") is windows
        assert pool.submit(compiled.loops, "windows").result() is None
    assert compiled.loops("windows") is None


TOGETHER = """
import sys, threading
import torch
from pytest_quantcheck import compiled
sys.setswitchinterval(1e-6)
found, start = [], threading.Barrier(8)
def work():
    with compiled.used(True):
        start.wait()
        found.append(compiled.loops("windows").compare(torch.ones(3, 4), torch.ones(3, 4), (4, 4))[4])
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [(0, 0)] * 8
"""


def test_threads_that_import_together_all_get_the_whole_module():
    subprocess.run([sys.executable, "-c", TOGETHER], check=True, timeout=120)


WITHOUT = """
import sys
sys.modules["numba"] = None
from pytest_quantcheck import compiled
with compiled.used(True):
    assert compiled.loops("windows") is None
"""


def test_without_numba_torch_does_it():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch):
    def njit(*, cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available for file 'windows.py'")
        return lambda function: (function, options)

    monkeypatch.setattr(machine, "njit", njit)
    function, options = machine._compiled(sum, fastmath=False)
    assert function is sum
    assert options["nogil"]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "count"), [(3, 64), (5, 19), (1, 8), (2, 1), (0, 16)], ids=str)
def test_codes_of_rows_are_those_of_torch(bits, rows, count):
    raw = torch.randint(0, 256, (rows, -(-count * bits // 8)), dtype=torch.uint8)
    readings = {
        "row_codes": lambda: packing.row_codes(raw, bits, count),
        "bit_rows": lambda: packing.bit_rows(raw, bits, count),
        "unpack_words": lambda: packing.unpack_words(raw, bits, count),
    }
    for name, read in readings.items():
        expected = read()
        with compiled.used(True):
            found = read()
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("columns", [slice(0, 40), slice(7, 40), slice(16, 33), slice(5, 6)], ids=str)
def test_words_are_turned_out_of_a_wider_matrix(columns):
    words = torch.randint(-(2**31), 2**31, (37, 40), dtype=torch.int32)[:, columns]
    with compiled.used(True):
        found = packing.turned(words)
    assert found.is_contiguous()
    assert torch.equal(found, words.t())


@pytest.mark.parametrize(("bits", "order"), [(4, (0, 4, 1, 5, 2, 6, 3, 7)), (8, range(4)), (2, range(16))])
def test_fields_of_words_are_those_of_torch(bits, order):
    words = torch.randint(-(2**31), 2**31, (3, 21), dtype=torch.int32)
    expected = packing.fields(words, bits, order)
    with compiled.used(True):
        assert torch.equal(packing.fields(words, bits, order), expected)


def gptq(values: torch.Tensor, *, scattered: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A checkpoint of four bits in groups of 32, zero points of their own, and what it stands for."""
    outputs, inputs = values.shape
    g_idx = torch.arange(inputs) // 32
    if scattered:
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    scales = torch.full((inputs // 32, outputs), 0.01, dtype=torch.float16)
    zeros = torch.arange(inputs // 32 * outputs).view(-1, outputs) % 5 + 6
    codes = (values.t() / scales[g_idx].float()).round().add(zeros[g_idx]).clamp(0, 15).long()  # (inputs, outputs)
    tensors = {
        "layer.qweight": packed(codes.t()).t().contiguous(),
        "layer.qzeros": packed(zeros),
        "layer.scales": scales,
        "layer.g_idx": g_idx.int(),
    }
    return tensors, ((codes - zeros[g_idx]) * scales[g_idx].float()).t()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits along rows, lowest bits first, as int32."""
    words = (codes.view(len(codes), -1, 8) << torch.arange(0, 32, 4)).sum(dim=2)
    return words.where(words < 2**31, words - 2**32).int()


@pytest.mark.parametrize("whole", [True, False], ids=["read-whole", "read-by-row"])
@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
def test_strips_of_words_are_decoded_window_by_window(tmp_path, monkeypatch, scattered, whole):
    monkeypatch.setattr(engine, "CODED_WINDOW", 24 * 96)
    monkeypatch.setattr(engine, "WINDOW", 24 * 96)
    monkeypatch.setattr(engine, "STRIP", 100 * 96)
    monkeypatch.setattr(packing, "SMALL", 1 << 22 if whole else 0)
    values = gaussian(1000, 96).bfloat16()
    tensors, stands_for = gptq(values.float(), scattered=scattered)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    theirs = checkpoint(tmp_path / "reference.safetensors", {"layer.weight": values}).tensor("layer.weight")
    folder = tmp_path / "gptq"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint(folder / "model.safetensors", tensors)
    ours = inspect(folder).tensor("layer.weight")
    assert torch.equal(ours.decode(), stands_for)
    plain = ours._replace(rounding=None)
    assert_equal(*both(ours, theirs, monkeypatch))
    assert_equal(*both(plain, theirs, monkeypatch))
    if not scattered:
        monkeypatch.setattr(compiled, "FROM", 0)
        monkeypatch.setattr(window, "measure", lambda *_, **__: pytest.fail("a window was decoded by itself"))
        engine.measure(plain, theirs)


ADDED = """
import torch
from pytest_quantcheck.compiled import windows
values, reference = (torch.randn(16, 1000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
print([found.double().sum().item().hex() for found in windows.compare(values, reference, (64, 1000))[:3]])
"""


def test_kept_machine_code_adds_in_the_order_of_what_was_just_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    run = [sys.executable, "-c", ADDED]
    first, second = (subprocess.run(run, check=True, timeout=120, capture_output=True).stdout for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert first == second
