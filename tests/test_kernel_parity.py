"""What a library decodes is what is stored: every library that runs here, its known defects, and injected ones."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn

from pytest_quantcheck import assert_kernel_parity, inspect
from pytest_quantcheck.checks import kernel_parity, kernels, onnx_kernels
from tests import models
from tests.cases import all_cases, compressed_tensors, gemma, hqq, quanto, torch_ao, torchao
from tests.cases import bnb as bnb_cases
from tests.cases import onnx as onnx_cases

CAPABILITY = torch.backends.cpu.get_cpu_capability()


def linear(rows: int, columns: int, kind: str = "nf4", *, nested: bool = False) -> tuple[nn.Module, nn.Module]:
    """A model with one quantized layer of Gaussian weights, and its reference."""
    torch.manual_seed(0)
    model, reference = nn.Module(), nn.Module()
    reference.q_proj = nn.Linear(columns, rows, bias=False)
    reference.q_proj.weight.data = torch.randn(rows, columns)
    model.q_proj = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested)
    model.q_proj.weight.data = reference.q_proj.weight.data.clone()
    return model.to("cpu"), reference


def largest_error(capsys) -> float:
    """What a script of a message printed."""
    return float(re.fullmatch(r"tensor\(([\d.e-]+)\)\n", capsys.readouterr().out)[1])


def test_kernel_parity_names_the_defect_of_bitsandbytes_on_avx512(capsys):
    """160 columns in blocks of 64: its AVX-512 kernel starts blocks anew on each row (csrc/cpu_ops.cpp, 0.50.2)."""
    if CAPABILITY != "AVX512":
        pytest.skip(f"the defect needs AVX-512, this CPU has {CAPABILITY} (/proc/cpuinfo)")
    model, reference = linear(96, 160)
    with pytest.raises(AssertionError) as caught:
        assert_kernel_parity(model, reference)
    message = str(caught.value)
    lines = message.splitlines()
    assert lines[0].startswith("kernel parity: 1 layer compared on cpu, AVX512, 1 computed from other values")
    assert f"q_proj.weight: {kernels.version('bitsandbytes')} decodes bnb-nf4 96 x 160, block 64 on cpu" in lines[1]
    assert re.search(r"2\d\d of 240 blocks of 64 differ, the first at row 1, column 32: ", lines[2])
    stored, computed = map(float, re.findall(r"([\d.]+) dB", lines[3]))
    assert stored == pytest.approx(20.7, abs=0.3)
    assert computed == pytest.approx(11.8, abs=0.5)
    assert "dequantize_4bit(layer.weight.data, layer.weight.quant_state)" in lines[4]
    exec("\n".join(line[4:] for line in lines[6:]), {})
    assert largest_error(capsys) > 0.1


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_script_shows_nothing_where_nothing_is_wrong(kind, capsys):
    model, _ = linear(7, 128, kind)
    tensor = inspect(model).tensor("q_proj.weight")
    script = kernels.KERNELS["bitsandbytes.Linear4bit"].reproduce(tensor, "cpu")
    assert len(script.splitlines()) == 6
    exec(script, {})
    assert largest_error(capsys) < 1e-6


HEALTHY = [(7, 3), (33, 100), (64, 128), (96, 161), (5, 4096), (1, 64)]


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double-quant"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", HEALTHY, ids=str)
def test_healthy_layers_of_bitsandbytes_pass(shape, kind, nested):
    parities = assert_kernel_parity(*linear(*shape, kind, nested=nested))
    assert parities.layers[0].sqnr_db > 120
    assert parities.layers[0].stored_sqnr_db == pytest.approx(parities.layers[0].library_sqnr_db, abs=1e-3)


# Every library that runs here, over its rows of the table of schemes.

# Forms that no library decodes: no dequantize at all, packed for a kernel, recurrent layers, made by hand.
NOT_DECODED = re.compile(
    r"nf4-packed-for|params4bit-not|int8-has-fp16|gemma-embedding|-not-compressed-yet|ct-float8-kernel|quanto-not-frozen|quanto-layer-norm|quanto-awq"
    r"|torchao-packed-int4|torchao-int4-(cpu|tiles|shuffled)|-lstm|-gru|-quantized-parameter|-fx-packed|-linear-f16"
    r"|hqq-(?!library)"
)
CASES = [
    case
    for module in (bnb_cases, compressed_tensors, gemma, hqq, quanto, torch_ao, torchao)
    for case in module.CASES
    if not NOT_DECODED.search(case.id)
]
# Rows whose columns are a multiple of 16 and not of the block: the same defect.
ON_AVX512 = {"nf4-bf16-storage", "fp4-f16-storage-double-quant", "nf4-blocks-across-rows", "nf4-block-32"}


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_library_decodes_what_is_stored(case):
    made = case.make()
    if made.live is None:
        pytest.skip("this layout has no live form here")
    if case.id in ON_AVX512 and CAPABILITY == "AVX512":
        with pytest.raises(AssertionError, match=r"\d+ of \d+ blocks of \d+ differ, the first at row 1"):
            assert_kernel_parity(made.live)
        return
    parities = assert_kernel_parity(made.live)
    assert parities.layers


ONNX = [case for case in all_cases() if case.scheme.startswith("onnx-")]
# Operators whose weight no input of the node alone gives back.
NOT_ALONE = "integer|dynamic-quantize|qgemm|experts|linear|attention|fused|float8-blocks|fpq4|convolution"


@pytest.mark.parametrize("case", ONNX, ids=[case.id for case in ONNX])
def test_onnxruntime_decodes_what_is_stored(case, tmp_path):
    path = case.make().write(tmp_path)
    refused = "no library is known to decode it" if re.search(NOT_ALONE, case.id) else None
    refused = "does not run it: .* NOT_IMPLEMENTED" if "float4" in case.id else refused
    if refused:
        with pytest.raises(AssertionError, match=refused):
            assert_kernel_parity(path)
        return
    (row,) = assert_kernel_parity(path).layers
    assert row.sqnr_db > 70
    assert (row.library, row.shape) == ("onnxruntime", case.shape)


def test_a_dequantize_linear_runs_with_its_product(tmp_path):
    """onnxruntime makes one kernel of both, which was reported to take blocks along axis 0 for others."""
    (case,) = (case for case in ONNX if case.id == "onnx-matmul-as-qdq")
    artifact = inspect(case.make().write(tmp_path))
    (layer,) = onnx_kernels.layers(artifact)
    assert layer.owner.multiplied
    assert (layer.owner.node.integer("axis"), layer.owner.node.integer("block_size")) == (0, 32)
    assert kernel_parity.check_kernel_parity(kernel_parity.compare([layer], artifact)).passed


@pytest.mark.parametrize("level", [0, 1, 4])
def test_products_of_any_accuracy_level_are_told_from_wrong_codes(level, tmp_path):
    """Level 4 rounds inputs to 8 bits, which the identity survives."""
    made = onnx_cases.nbits_node(4, 32, 96, accuracy_level=level)()
    path = made.write(tmp_path)
    assert_kernel_parity(path)
    (tensor,) = inspect(path).parameters
    wrong = tensor._replace(decoder=lambda *_: tensor.decoder(*_) * 1.001)
    artifact = replace(inspect(path), tensors=(wrong,))
    found = kernel_parity.compare(onnx_kernels.layers(artifact), artifact)
    assert "15 of 15 blocks of 32 differ, the first at row 0" in str(kernel_parity.check_kernel_parity(found))


@pytest.mark.parametrize("quantization", [models.NF4, models.INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_whole_models_pass(kind, quantization, tmp_path):
    """Widths of 64 and 96: a layer of 96 columns has the defect of AVX-512."""
    reference = models.save(kind, tmp_path)
    model = models.load(reference, **quantization)
    bad = [] if quantization is models.INT8 or CAPABILITY != "AVX512" else ["*.down_proj", "*.mlp.c_proj"]
    parities = assert_kernel_parity(model, reference, skip=bad)
    assert len(parities.layers) >= 6
    assert all(row.library_sqnr_db > 15 for row in parities.layers)
    if bad and kind != "mixtral":
        with pytest.raises(AssertionError, match=r"64 x 96, block 64"):
            assert_kernel_parity(model)


# Defects that libraries had, put back.


def zeros(codes, state, **_):
    """float16 on the CPU (bitsandbytes 1540)."""
    return torch.zeros_like(functional_decode(codes, state))


def always_fp4(codes, state, **_):
    """The default instead of the type that is stored (bitsandbytes 1566)."""
    other = copy.copy(state)
    other.quant_type = "fp4"
    return functional_decode(codes, other)


def one_scale_wrong(codes, state, **_):
    values = functional_decode(codes, state).clone()
    values.view(-1)[64 * 7 : 64 * 8] *= 1.01
    return values


def not_a_number(codes, state, **_):
    values = functional_decode(codes, state).clone()
    values[2, 5] = float("nan")
    return values


functional_decode = functional.dequantize_4bit
DEFECTS = [
    (zeros, "72 of 72 blocks of 64 differ, the first at row 0, column 0: 0 where "),
    (always_fp4, "72 of 72 blocks"),
    (one_scale_wrong, "1 of 72 blocks of 64 differ, the first at row 3, column 64"),
    (not_a_number, "1 of 72 blocks of 64 differ, the first at row 2, column 5: nan where"),
]


@pytest.mark.parametrize(("defect", "message"), DEFECTS, ids=[defect.__name__ for defect, _ in DEFECTS])
def test_each_defect_is_seen(defect, message, monkeypatch):
    model, _ = linear(36, 128)
    monkeypatch.setattr(functional, "dequantize_4bit", defect)
    with pytest.raises(AssertionError, match=message):
        assert_kernel_parity(model)


def test_a_kernel_that_raises_fails_and_says_what(monkeypatch):
    def raises(codes, state):
        raise RuntimeError("no kernel for this device\nat line 3")

    monkeypatch.setattr(functional, "dequantize_4bit", raises)
    with pytest.raises(AssertionError, match="bitsandbytes cannot decode it here: RuntimeError: no kernel for this"):
        assert_kernel_parity(linear(7, 64)[0])


# What cannot be compared is no pass.


def test_comparing_nothing_fails():
    with pytest.raises(AssertionError, match="no quantized layer was compared"):
        assert_kernel_parity(nn.Linear(3, 5))
    with pytest.raises(AssertionError, match="no quantized layer was compared"):
        assert_kernel_parity(linear(7, 64)[0], skip=["q_proj"])


def test_a_layer_that_no_library_decodes_fails_until_it_is_left_out():
    made = next(case for case in gemma.CASES if case.id == "gemma-embedding-int8").make()
    with pytest.raises(AssertionError, match=r"layer\.weight: no library is known to decode it"):
        assert_kernel_parity(made.live)


def test_a_layer_packed_by_its_first_forward_says_so():
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    model, _ = linear(64, 128)
    model.q_proj.eval()(torch.randn(2, 128))
    with pytest.raises(AssertionError, match="was repacked by its first forward"):
        assert_kernel_parity(model)


def test_a_path_cannot_be_run_and_a_reference_must_fit():
    with pytest.raises(TypeError, match=r"needs a live torch\.nn\.Module, not `str`"):
        assert_kernel_parity("checkpoint")
    model, reference = linear(7, 64)
    with pytest.raises(AssertionError, match=r"q_proj\.weight: is not in the reference"):
        assert_kernel_parity(model, nn.ModuleDict({"k_proj": reference.q_proj}))
    with pytest.raises(AssertionError, match="is 7 x 64, the reference has 8 x 64"):
        assert_kernel_parity(model, linear(8, 64)[1])


def test_windows_do_not_change_what_is_found(monkeypatch):
    model, reference = linear(96, 100)
    whole = assert_kernel_parity(model, reference)
    monkeypatch.setattr(kernel_parity, "WINDOW", 100 * 16)
    windowed = assert_kernel_parity(model, reference)
    assert windowed.layers[0].library_sqnr_db == pytest.approx(whole.layers[0].library_sqnr_db, abs=1e-9)
