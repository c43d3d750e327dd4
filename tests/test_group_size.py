"""What small groups cost: the compression ratios of LUT-GEMM, and those of files that quantizers wrote."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pytest_quantcheck import grouped_bits_per_weight, inspect
from pytest_quantcheck.containers import open_path

ROW = 12_288  # of OPT-175B: one group is the whole row

# LUT-GEMM (arXiv 2206.09557; nQWeight_fp16.h): 16 bit over what is stored, an fp16 scale for each bit plane of a group
BINARY_CODES = [
    (4, {32: 2.67, 64: 3.20, 128: 3.56, 256: 3.76, 512: 3.88, ROW: 3.99}),
    (3, {32: 3.56, 64: 4.27, 128: 4.74, 256: 5.02, 512: 5.17, ROW: 5.33}),
]
# One scale in fp16 for a group, as GPTQ and most others have it.
ONE_SCALE = [(4, {32: 3.56, 64: 3.76, 128: 3.88, ROW: 4.00}), (3, {32: 4.57, 64: 4.92, 128: 5.12, ROW: 5.33})]


def cases(table, planes):
    return [(bits, group, ratio, 16 * planes(bits)) for bits, row in table for group, ratio in row.items()]


@pytest.mark.parametrize(
    ("bits", "group", "ratio", "beside"),
    [*cases(BINARY_CODES, lambda bits: bits), *cases(ONE_SCALE, lambda bits: 1)],
)
def test_the_compression_ratios_of_group_sizes(bits, group, ratio, beside):
    assert 16 / grouped_bits_per_weight(bits, group, beside) == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [32, 128, 640])
def test_binary_codes_with_a_scale_for_each_plane_weigh_that_much(tmp_path, bits, group):
    """The tensors of LUT-GEMM's kernels (nQWeight_fp16.h): bits of 32 columns in a word, scales of a group by plane."""
    rows, columns = 48, 640
    tensors = {
        "bWeight": torch.zeros(columns // 32, bits, rows, dtype=torch.int32),
        "alpha": torch.zeros(columns // group, bits, rows, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = open_path(tmp_path).tensors.values()
    measured = 8 * sum(tensor.nbytes for tensor in stored) / (rows * columns)
    assert measured == grouped_bits_per_weight(bits, group, 16 * bits)


@pytest.mark.parametrize("symmetric", [True, False], ids=["scales", "scales-and-zero-points"])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_what_onnxruntime_writes_weighs_that_much(tmp_path, block, symmetric):
    pytest.importorskip("onnxruntime", reason="onnxruntime quantizes this")
    from tests import smollm2

    sizes = smollm2.Sizes(vocab=32, hidden=512, intermediate=512, layers=1, heads=4, kv_heads=4, positions=1)
    model = smollm2.in_16_bit(smollm2.four_bits(smollm2.fp32(sizes), block, symmetric=symmetric))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    measured = inspect(tmp_path / "m.onnx").tensor("model.layers.0.self_attn.q_proj.weight").bits_per_weight
    assert measured == grouped_bits_per_weight(4, block, 16 if symmetric else 20)


@pytest.mark.parametrize(("bits", "group", "beside"), [(0, 32, 16), (4, 0, 16), (4, -1, 16), (4, 32, -1)])
def test_what_is_no_group_is_refused(bits, group, beside):
    with pytest.raises(ValueError, match="in groups of"):
        grouped_bits_per_weight(bits, group, beside)
