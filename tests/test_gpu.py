"""The same promises on a CUDA device: counts, values, and memory that is given back."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch

from pytest_quantcheck import (
    assert_dequant_fidelity,
    assert_kernel_parity,
    assert_logits_close,
    assert_module_output,
    assert_same_weights,
    count_params,
    inspect,
)
from tests import models
from tests.cases import ggml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA device"),
]

SHAPES = [(96, 160), (64, 512), (7, 34), (1024, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "double-quant"])
def test_four_bit_decodes_what_the_cuda_kernel_decodes(shape, kind, nested):
    torch.manual_seed(0)
    rows, columns = shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested).cuda()
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    tensor = inspect(layer).tensor("weight")
    assert torch.equal(tensor.decode(device="cuda"), theirs)
    assert torch.equal(tensor.decode(device="cuda").cpu(), tensor.decode(device="cpu"))


def test_int8_decodes_the_same_on_both_devices():
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(160, 96, bias=False, has_fp16_weights=False).cuda()
    tensor = inspect(layer).tensor("weight")
    assert torch.equal(tensor.decode(device="cuda").cpu(), tensor.decode(device="cpu"))
    layer(torch.randn(2, 160, device="cuda", dtype=torch.float16))
    assert torch.equal(inspect(layer).tensor("weight").decode(), tensor.decode())


@pytest.mark.parametrize("case", ggml.CASES, ids=[case.id for case in ggml.CASES])
def test_ggml_decodes_the_same_on_both_devices(tmp_path, case):
    tensor = inspect(case.make().write(tmp_path)).tensor(case.name)
    assert torch.equal(tensor.decode(device="cuda").cpu(), tensor.decode())


def test_a_model_on_the_gpu_counts_and_compares_as_its_files_do(tmp_path):
    reference = models.save("llama", tmp_path / "llama")
    model = models.load(reference, **models.NF4).cuda()
    model.save_pretrained(tmp_path / "nf4")
    assert count_params(model) == count_params(tmp_path / "nf4") == models.parameters("llama")
    on_gpu = assert_dequant_fidelity(model, reference, device="cuda")
    on_cpu = assert_dequant_fidelity(tmp_path / "nf4", reference)
    assert on_gpu.sqnr_db == pytest.approx(on_cpu.sqnr_db, abs=1e-6)


def linear(kind: str, rows: int, columns: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "int8":
        return bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False)
    return bnb.nn.Linear4bit(columns, rows, quant_type=kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_cuda_kernels_compute_what_is_stored(kind, shape):
    """The shape (96, 160) too, which the AVX-512 kernel gets wrong."""
    layer = linear(kind, *shape).cuda()
    assert assert_kernel_parity(layer).layers[0].place.startswith("cuda:0, ")
    assert len(assert_module_output(layer).runs) == 9


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_are_the_same_after_moves_both_ways(kind):
    on_cpu = linear(kind, 33, 100).to("cpu")
    moved = copy.deepcopy(on_cpu)
    for device in ("cuda", "cuda", "cpu", "cuda:0", "cpu"):
        moved = moved.to(device)
        assert_same_weights(on_cpu, moved)


def test_logits_on_the_gpu_are_those_of_the_cpu(tmp_path):
    reference = models.save("llama", tmp_path / "llama")
    ids = torch.randint(131, (3, 17), generator=torch.Generator().manual_seed(2))
    agreement = assert_logits_close(models.load(reference).cuda(), reference, ids, max_kl=1e-3, min_top1=0.9)
    assert agreement.tokens == 51
    assert assert_logits_close(reference, models.load(reference), ids, max_kl=1e-3, device="cuda").kl < 1e-3


def test_memory_is_given_back_between_models(pytester):
    pytester.makepyfile(
        """
        import pytest, torch

        def large(device):
            return torch.nn.Linear(8192, 8192, device=device)

        def small(device):
            assert torch.cuda.memory_reserved() < 64 << 20
            return torch.nn.Linear(2, 2, device=device)

        @pytest.mark.quantized(factory=large)
        def test_1(quantized_model):
            assert torch.cuda.memory_allocated() > 256e6

        @pytest.mark.quantized(factory=small)
        def test_2(quantized_model):
            assert torch.cuda.memory_allocated() < 256e6
        """
    )
    pytester.runpytest_subprocess("--quantcheck-device=cuda", "--quantcheck-require-gpu").assert_outcomes(passed=2)
