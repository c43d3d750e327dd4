"""The forward of a quantized layer is x @ W.T + bias of what is stored, in every library that runs here."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from bitsandbytes import functional
from torch import nn

from pytest_quantcheck import assert_kernel_parity, assert_module_output, assert_same_weights
from pytest_quantcheck.checks import module_output
from tests import models
from tests.cases import bitnet, gemma, hqq, quanto, torch_ao

BATCHES = (1, 2, 33)


def nf4(rows: int, columns: int, *, bias: bool = True, nested: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias, quant_type="nf4", compress_statistics=nested)
    layer.weight.data = torch.randn(rows, columns)
    return layer.to("cpu")


def int8(rows: int, columns: int) -> nn.Module:
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False).to("cpu")


def packed(rows: int, columns: int) -> nn.Module:
    """As `from_pretrained` leaves it: the first forward repacks the weight where the CPU has AVX512-BF16."""
    return nf4(rows, columns).eval()


LAYERS = [
    (nf4, 33, 100), (nf4, 7, 3), (nf4, 64, 1024), (nf4, 1, 64), (packed, 64, 128), (packed, 96, 1024),
    (int8, 33, 100), (int8, 64, 1024),
]  # fmt: skip


@pytest.mark.parametrize(("make", "rows", "columns"), LAYERS, ids=lambda value: getattr(value, "__name__", value))
def test_healthy_layers_of_bitsandbytes_pass_in_every_dtype(make, rows, columns):
    outputs = assert_module_output(make(rows, columns))
    assert {(run.batch, run.dtype) for run in outputs.runs} == {
        (batch, dtype) for batch in BATCHES for dtype in ("float32", "bfloat16", "float16")
    }
    assert max(run.excess for run in outputs.runs) > 0.001  # the bound is not out of reach


def torchao(config: str, rows: int, columns: int, dtype: torch.dtype, **options: object) -> nn.Module:
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows).to(dtype))
    library.quantize_(model, getattr(library, config)(**options))
    return model


TORCHAO = [
    ("Int8WeightOnlyConfig", torch.float32, {"version": 2}),
    ("Int8WeightOnlyConfig", torch.bfloat16, {"version": 2}),
    ("Int8DynamicActivationInt8WeightConfig", torch.bfloat16, {"version": 2}),
    ("Float8WeightOnlyConfig", torch.bfloat16, {}),
]


@pytest.mark.parametrize(("config", "dtype", "options"), TORCHAO, ids=lambda value: str(value)[:40])
def test_healthy_layers_of_torchao_pass(config, dtype, options):
    assert len(assert_module_output(torchao(config, 48, 96, dtype, **options)).runs) == len(BATCHES)


# Rows of the table of schemes whose layer is a linear one that runs on a CPU. quanto's int8 kernel for bfloat16 crashes
# the process on odd sizes, so that row is not among them.
CASES = [
    case
    for module, known in (
        (bitnet, lambda name: "plain" not in name),
        (gemma, lambda name: "embedding" not in name),
        (hqq, lambda name: "library" in name),
        (quanto, lambda name: not name.endswith(("frozen", "norm", "awq", "convolution", "bf16-bias", "tied"))),
        (torch_ao, lambda name: name == "torch-ao-dynamic-linear"),
    )
    for case in module.CASES
    if known(case.id)
]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_healthy_layers_of_other_libraries_pass(case):
    made = case.make()
    if made.live is None:
        pytest.skip("this layout has no live form here")
    assert len(assert_module_output(made.live).runs) >= len(BATCHES)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_models_run_layer_by_layer_and_are_left_as_they_were(kind, tmp_path):
    model = models.load(models.save(kind, tmp_path), **models.INT8)
    before = copy.deepcopy(model)
    outputs = assert_module_output(model, batches=[1, 5], dtypes=["bfloat16"])
    assert len({run.name for run in outputs.runs}) >= 8
    assert_same_weights(before, model)


def test_layers_under_an_adapter_are_those_of_the_base(tmp_path):
    model = models.load(models.save("llama", tmp_path), **models.INT8)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    outputs = assert_module_output(model, batches=[3], dtypes=["bfloat16"])
    parities = assert_kernel_parity(model)
    names = {run.name for run in outputs.runs}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert names == {row.name for row in parities.layers}


# What must be seen.


def test_the_defect_of_bitsandbytes_on_avx512_reaches_the_output():
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        pytest.skip(f"the defect needs AVX-512, this CPU has {capability} (/proc/cpuinfo)")
    with pytest.raises(AssertionError) as caught:
        assert_module_output(nf4(96, 160), batches=[2], dtypes=["float32"])
    assert "weight (bnb-nf4 96 x 160), batch 2, float32: relative error 0.2" in str(caught.value)


def test_a_forward_that_raises_is_wrong():
    """In eval mode the same layer cannot be packed for AVX512-BF16, and every forward raises."""
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    with pytest.raises(
        AssertionError, match=r"batch 1, float32: forward raises RuntimeError: shape '\[96, 2\]' is inv"
    ):
        assert_module_output(nf4(96, 160).eval())


class Faulty(bnb.nn.Linear4bit):
    """A layer whose forward has one of the defects that kernels had."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fault(super().forward(x), x)


def broken(fault) -> nn.Module:
    torch.manual_seed(0)
    layer = Faulty(100, 33, quant_type="nf4")
    layer.fault = fault
    return layer.to("cpu")


FAULTS = [
    ("zeros", lambda y, x: y * 0, "batch 33, float32: relative error 1,"),
    ("one-percent", lambda y, x: y * 1.01, "relative error 0.01,"),
    ("bias-lost", lambda y, x: y - 0.05, "relative error"),
    ("only-the-vector-kernel", lambda y, x: y.flip(1) if len(x) == 1 else y, "batch 1, "),
    ("only-the-matrix-kernel", lambda y, x: y.roll(1, 0) if len(x) > 1 else y, "batch 33, "),
    ("one-output", lambda y, x: torch.cat((y[:, :-1], y[:, -1:] + 1), 1), "relative error"),
    ("nan", lambda y, x: y / 0 * 0, "relative error nan"),
]


@pytest.mark.parametrize(("fault", "message"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_each_fault_is_seen(fault, message):
    with pytest.raises(AssertionError, match=message) as caught:
        assert_module_output(broken(fault), dtypes=["float32"])
    assert "1 layer not x @ W.T + bias of the stored W" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [64, 4096])
def test_a_fault_of_one_decibel_in_ten_is_seen_at_any_width(columns, dtype):
    """Weights at 20 dB of what is stored, which the noise of 16 bits does not hide."""
    layer = nf4(33, columns)
    stored = copy.deepcopy(layer)
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    noise = torch.randn_like(weight) * weight.std() / 10
    stored.forward = lambda x: (x.float() @ (weight + noise).t() + layer.bias).to(x.dtype)
    with pytest.raises(AssertionError, match=r"relative error 0\.1"):
        assert_module_output(stored, dtypes=[dtype])


def test_what_cannot_be_run_fails_until_it_is_left_out():
    model = nn.ModuleDict({"a": nf4(33, 100), "e": bnb.nn.Embedding4bit(40, 64, quant_type="nf4").to("cpu")})
    with pytest.raises(AssertionError, match=r"e\.weight: is no linear layer: skip it"):
        assert_module_output(model)
    assert_module_output(model, skip=["e"])
    with pytest.raises(AssertionError, match="no quantized linear layer was run"):
        assert_module_output(model, skip=["*"])
    with pytest.raises(AssertionError, match="no quantized linear layer was run"):
        assert_module_output(nn.Linear(3, 5))


def test_nonsense_is_a_bad_call():
    with pytest.raises(ValueError, match="at least one batch size"):
        assert_module_output(nf4(7, 3), batches=[])
    with pytest.raises(ValueError, match="dtype `float12` is not one of torch's"):
        assert_module_output(nf4(7, 3), dtypes=["float12"])
    with pytest.raises(TypeError, match=r"needs a live torch\.nn\.Module"):
        assert_module_output("checkpoint")


def test_windows_do_not_change_the_result(monkeypatch):
    layer = nf4(33, 100)
    whole = assert_module_output(layer, dtypes=["float32"])
    monkeypatch.setattr(module_output, "WINDOW", 500)
    windowed = assert_module_output(layer, dtypes=["float32"])
    assert [run.excess for run in whole.runs] == pytest.approx([run.excess for run in windowed.runs], rel=1e-9)
