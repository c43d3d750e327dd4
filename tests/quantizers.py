"""Real quantizers, each asked to quantize a given weight: what a library makes of it, as a logical tensor."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from pytest_quantcheck import inspect
from pytest_quantcheck.tensor import LogicalTensor
from tests import gguf_files
from tests.cases import Made, compressed_tensors, mlx, onnx
from tests.scheme_table import saved

# Given the weight, and a folder for what is written.
Quantize = Callable[[torch.Tensor, Path], LogicalTensor]


class Quantizer(NamedTuple):
    """A quantizer, and the SQNR in dB that fidelity-metrics has of Gaussian, Student-t and outlier weights.

    `multiple` divides the columns that it takes, and `rows` the rows.
    """

    id: str
    quantize: Quantize
    gaussian: float | None = None
    student_t: float | None = None
    outliers: float | None = None
    multiple: int = 1
    rows: int = 1


def holder(**members) -> nn.Module:
    model = nn.Module()
    for name, member in members.items():
        setattr(model, name, member)
    return model


def linear(values: torch.Tensor, dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=dtype)
    layer.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    return layer


def live(model: nn.Module) -> LogicalTensor:
    (tensor,) = inspect(model).parameters
    return tensor


def on_disk(made: Made, folder: Path) -> LogicalTensor:
    """The quantized tensor of what is written to a folder of its own within another."""
    path = saved(made, Path(tempfile.mkdtemp(dir=folder)))
    return next(tensor for tensor in inspect(path).parameters if tensor.quantized)


def bnb_4bit(quant_type: str, blocksize: int = 64, *, nested: bool = False) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        layer = bnb.nn.Linear4bit(
            values.shape[1], values.shape[0], bias=False, quant_type=quant_type, compress_statistics=nested
        )
        layer.weight.data, layer.weight.blocksize = values.clone(), blocksize
        return live(layer.to("cpu"))

    return quantize


def bnb_8bit(values: torch.Tensor, folder: Path) -> LogicalTensor:
    layer = bnb.nn.Linear8bitLt(values.shape[1], values.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False)
    return live(layer.to("cpu"))


def gguf(kind: str) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        library = pytest.importorskip("gguf", reason="the gguf package quantizes")
        raw = library.quants.quantize(values.numpy(), library.GGMLQuantizationType[kind])
        return gguf_tensor(kind, tuple(values.shape), raw.tobytes(), folder)

    return quantize


def gguf_tensor(kind: str, shape: tuple[int, ...], raw: bytes, folder: Path) -> LogicalTensor:
    """The tensor of a GGUF file that has only one."""
    content = gguf_files.gguf([gguf_files.Tensor("layer.weight", kind, shape, raw)])
    return on_disk(Made(None, write=lambda within: _write(within / "model.gguf", content)), folder)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def quanto(qtype: str) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        model = holder(layer=linear(values))
        library.quantize(model, weights=qtype)
        library.freeze(model)
        return live(model)

    return quantize


def torchao(configuration: str, **options) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        logging.getLogger("torchao").setLevel(logging.ERROR)
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        made = {name: option(library) if callable(option) else option for name, option in options.items()}
        model = nn.Sequential(linear(values))
        library.quantize_(model, getattr(library, configuration)(**made))
        return live(model)

    return quantize


def torchao_float8(granularity: str, *sizes: tuple[int, int], dtype=torch.float8_e4m3fn) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        kind = getattr(library, granularity)(*sizes)
        weight = library.Float8Tensor.from_hp(values, float8_dtype=dtype, granularity=kind)
        return live(holder(weight=nn.Parameter(weight, requires_grad=False)))

    return quantize


def torchao_mx(element) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        return live(holder(weight=nn.Parameter(MXTensor.to_mx(values, element), requires_grad=False)))

    return quantize


def torchao_nvfp4(values: torch.Tensor, folder: Path) -> LogicalTensor:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(values.abs().max())
    weight = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=scale, is_swizzled_scales=False)
    return live(holder(weight=nn.Parameter(weight, requires_grad=False)))


def torchao_nf4(values: torch.Tensor, folder: Path) -> LogicalTensor:
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return live(holder(weight=nn.Parameter(to_nf4(values, 64, 256), requires_grad=False)))


def compressed(form: str, **weights) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        return on_disk(compressed_tensors.compressed(form, *values.shape, values=values, **weights)(), folder)

    return quantize


def packed(bits: int, group: int | None, *, symmetric: bool) -> Quantize:
    strategy = "group" if group else "channel"
    return compressed(
        "pack-quantized", num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )


MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "dtype": torch.bfloat16}
NV = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn", "dtype": torch.bfloat16}


def floats(form: str, bits: int, **weights) -> Quantize:
    return compressed(form, num_bits=bits, type="float", symmetric=True, **weights)


def mlx_of(mode: str, group: int, bits: int) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        return on_disk(mlx.quantized(tuple(values.shape), mode, group, bits, values=values)(), folder)

    return quantize


def matmul_nbits(bits: int, block: int, *, symmetric: bool) -> Quantize:
    def quantize(values: torch.Tensor, folder: Path) -> LogicalTensor:
        rows, columns = values.shape
        return on_disk(onnx.matmul_nbits(bits, block, columns, symmetric=symmetric, rows=rows, values=values)(), folder)

    return quantize


def torch_ao(values: torch.Tensor, folder: Path) -> LogicalTensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(holder(layer=linear(values)), {nn.Linear})
    return live(model)


QUANTIZERS = [
    Quantizer("bnb-nf4-32", bnb_4bit("nf4", 32), 21.18, 20.65, 20.72),
    Quantizer("bnb-nf4-64", bnb_4bit("nf4"), 20.73, 19.60, 19.68),
    Quantizer("bnb-nf4-64-double", bnb_4bit("nf4", nested=True), 20.72, 19.59, 19.67),
    Quantizer("bnb-nf4-128", bnb_4bit("nf4", 128), 20.39, 18.58, 18.42),
    Quantizer("bnb-nf4-256", bnb_4bit("nf4", 256), 20.11, 17.54, 16.85),
    Quantizer("bnb-nf4-4096", bnb_4bit("nf4", 4096), 19.17, 13.07, 8.89),
    Quantizer("bnb-fp4-64", bnb_4bit("fp4"), 18.28, 16.24, 16.56),
    Quantizer("bnb-fp4-64-double", bnb_4bit("fp4", nested=True), 18.28, 16.24, 16.56),
    Quantizer("bnb-int8", bnb_8bit, 41.22, 33.95, 29.59),
    Quantizer("ct-int8-128-sym", packed(8, 128, symmetric=True), 43.78, 40.44, 40.39, multiple=128),
    Quantizer("ct-int8-128-asym", packed(8, 128, symmetric=False), 44.56, 42.12, 43.01, multiple=128, rows=16),
    Quantizer("ct-int6-128-asym", packed(6, 128, symmetric=False), 32.41, 29.98, 30.86, multiple=128, rows=16),
    Quantizer("ct-int5-128-asym", packed(5, 128, symmetric=False), 26.25, 23.82, 24.71, multiple=128, rows=16),
    Quantizer("ct-int4-128-sym", packed(4, 128, symmetric=True), None, None, None, multiple=128),
    Quantizer("ct-int4-128-asym", packed(4, 128, symmetric=False), 19.95, 17.51, 18.41, multiple=128, rows=16),
    Quantizer("ct-int4-64-sym", packed(4, 64, symmetric=True), None, None, None, multiple=64),
    Quantizer("ct-int4-64-asym", packed(4, 64, symmetric=False), 20.81, 19.02, 19.95, multiple=64, rows=16),
    Quantizer("ct-int4-32-sym", packed(4, 32, symmetric=True), None, None, None, multiple=32),
    Quantizer("ct-int4-32-asym", packed(4, 32, symmetric=False), 21.85, 20.65, 21.42, multiple=32, rows=16),
    Quantizer("ct-int4-row-sym", packed(4, None, symmetric=True), None, None, None),
    Quantizer("ct-int4-row-asym", packed(4, None, symmetric=False), 17.07, 10.86, 7.68, rows=16),
    Quantizer("ct-int3-128-sym", packed(3, 128, symmetric=True), None, None, None, multiple=128),
    Quantizer("ct-int3-128-asym", packed(3, 128, symmetric=False), 13.33, 10.95, 12.00, multiple=128, rows=16),
    Quantizer("ct-int2-128-asym", packed(2, 128, symmetric=False), 5.97, 4.49, 5.61, multiple=128, rows=16),
    Quantizer("ct-float8-channel", floats("float-quantized", 8, strategy="channel"), 31.55),
    Quantizer("ct-float8-tensor", floats("float-quantized", 8, strategy="tensor"), 31.55),
    Quantizer("ct-mxfp8", floats("mxfp8-quantized", 8, **MX), multiple=32),
    Quantizer("ct-mxfp4", floats("mxfp4-pack-quantized", 4, **MX), multiple=32),
    Quantizer("ct-nvfp4", floats("nvfp4-pack-quantized", 4, **NV), multiple=16),
    Quantizer("gguf-q8_0", gguf("Q8_0"), 45.4, 43.4, 44.0, multiple=32),
    Quantizer("gguf-q5_1", gguf("Q5_1"), 28.44, 27.23, 27.99, multiple=32),
    Quantizer("gguf-q5_0", gguf("Q5_0"), 27.39, 25.39, 26.02, multiple=32),
    Quantizer("gguf-q4_1", gguf("Q4_1"), 22.13, 20.93, 21.69, multiple=32),
    Quantizer("gguf-q4_0", gguf("Q4_0"), 21.31, 19.35, 20.02, multiple=32),
    Quantizer("gguf-mxfp4", gguf("MXFP4"), 18.79, multiple=32),
    Quantizer("gguf-tq2_0", gguf("TQ2_0"), multiple=256),
    Quantizer("float8-e4m3-tensor", torchao_float8("PerTensor"), 31.55, 31.55, 31.65),
    Quantizer("float8-e4m3-row", torchao_float8("PerRow"), 31.55, 31.55, 31.65),
    Quantizer("float8-e4m3-block", torchao_float8("PerBlock", (128, 128)), 31.55, 31.55, 31.65, multiple=128, rows=128),
    Quantizer("float8-e5m2-row", torchao_float8("PerRow", dtype=torch.float8_e5m2), 25.57, 25.6, 25.6),
    Quantizer("torchao-mxfp4", torchao_mx(torch.float4_e2m1fn_x2), 18.78, 17.99, 18.16, multiple=32),
    Quantizer("torchao-mxfp8-e4m3", torchao_mx(torch.float8_e4m3fn), 30.65, multiple=32),
    Quantizer("torchao-mxfp8-e5m2", torchao_mx(torch.float8_e5m2), 25.37, multiple=32),
    Quantizer("torchao-nvfp4", torchao_nvfp4, 20.44, 20.70, 20.46, multiple=16),
    Quantizer("torchao-nf4", torchao_nf4, 20.72, 19.59, 19.67, multiple=64, rows=256),
    Quantizer("torchao-int8wo", torchao("Int8WeightOnlyConfig"), 41.25, 33.98),
    Quantizer("torchao-intx4-32", torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda library: library.PerGroup(32)
    ), 20.46, 18.44, multiple=32),
    Quantizer("torchao-intx4-128", torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda library: library.PerGroup(128)
    ), 19.10, 15.79, multiple=128),
    Quantizer("quanto-qint8", quanto("qint8"), 41.22, 33.95),
    Quantizer("quanto-qint4", quanto("qint4"), 20.01, 17.58, multiple=128),
    Quantizer("quanto-qint2", quanto("qint2"), 6.00, 3.58, multiple=128),
    Quantizer("quanto-qfloat8", quanto("qfloat8"), 31.55),
    Quantizer("mlx-4bit-64", mlx_of("affine", 64, 4), multiple=64),
    Quantizer("mlx-mxfp4", mlx_of("mxfp4", 32, 4), multiple=32),
    Quantizer("mlx-nvfp4", mlx_of("nvfp4", 16, 4), multiple=32),
    Quantizer("mlx-mxfp8", mlx_of("mxfp8", 32, 8), multiple=32),
    Quantizer("onnx-nbits-4-32-sym", matmul_nbits(4, 32, symmetric=True), multiple=32),
    Quantizer("onnx-nbits-4-32-asym", matmul_nbits(4, 32, symmetric=False), multiple=32),
    Quantizer("onnx-nbits-8-64-sym", matmul_nbits(8, 64, symmetric=True), multiple=64),
    Quantizer("torch-ao-dynamic", torch_ao),
]  # fmt: skip


def lines() -> list[str]:
    """Return the table of docs/reference/expectation.md: what each quantizer keeps of 256 x 4096 values."""
    from tests.test_expectation import DISTRIBUTIONS, db
    from tests.test_fidelity import weights

    references = [weights(distribution, 256, 4096) for distribution in DISTRIBUTIONS]
    rows = ["| quantizer | bits per weight | Gaussian | Student-t | outliers |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for quantizer in QUANTIZERS:
            made = [quantizer.quantize(reference, Path(folder)) for reference in references]
            kept = [f"{db(tensor.decode(), values):.2f}" for tensor, values in zip(made, references, strict=True)]
            bits = f"{made[0].bits_per_weight:.2f}"
            rows.append("| " + " | ".join([f"`{quantizer.id}`", bits, *kept]) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join(lines()))
