"""optimum-quanto, quantized by optimum-quanto on the CPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from tests.cases import Case, Made


def _library():
    return pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")


def _values(weight) -> torch.Tensor:
    """The library's decode with scales in float32: it multiplies in the dtype of the scale and rounds."""
    quanto = _library()
    scale = weight._scale.float()
    if hasattr(weight, "_shift"):
        shift = weight._shift.float() if weight._shift.is_floating_point() else weight._shift
        return quanto.WeightQBitsTensor(
            weight.qtype, weight.axis, weight._group_size, weight.size(), weight.stride(), weight._data, scale, shift
        ).dequantize()
    return quanto.WeightQBytesTensor(
        weight.qtype, weight.axis, weight.size(), weight.stride(), weight._data, scale, None
    ).dequantize()


def _made(model, config=None, weight=None) -> Made:
    quanto = _library()
    weight = model.layer.weight if weight is None else weight
    own = {"quanto_qmap.json": quanto.quantization_map(model)}
    return Made(_values(weight), model, model.state_dict(), config or {}, files=own)


def _quantized(layer: nn.Module, qtype: str, optimizer=None) -> nn.Module:
    quanto = _library()
    model = nn.Module()
    model.layer = layer
    quanto.quantize(model, weights=qtype, optimizer=optimizer)
    quanto.freeze(model)
    return model


def linear(qtype: str, rows: int, columns: int, dtype=torch.float32, *, bias=False):
    def make() -> Made:
        torch.manual_seed(rows + columns)
        return _made(_quantized(nn.Linear(columns, rows, bias=bias).to(dtype), qtype))

    return make


def zero_points() -> Made:
    """Integer shifts, which are subtracted before the scale."""
    quanto = _library()

    class ZeroPoints(quanto.MaxOptimizer):
        def __call__(self, base, qtype, axis, group_size=None):
            return super().__call__(base, qtype, axis, group_size, zeropoint=True)

    torch.manual_seed(8)
    model = _quantized(nn.Linear(100, 33, bias=False), "qint4", ZeroPoints())
    assert model.layer.weight._shift.dtype == torch.uint8
    return _made(model)


def convolution(qtype: str):
    def make() -> Made:
        torch.manual_seed(9)
        return _made(_quantized(nn.Conv2d(3, 7, (3, 5), bias=False), qtype))

    return make


def named_by_config() -> Made:
    """A grouped weight without a bias: only the model's configuration knows its rows and columns."""
    torch.manual_seed(10)
    model = _quantized(nn.Linear(192, 20, bias=False), "qint4")
    assert model.layer.weight._group_size == 96
    renamed = nn.Module()
    renamed.down_proj = model.layer
    config = {"text_config": {"hidden_size": 20, "intermediate_size": 192}}
    return _made(renamed, config, renamed.down_proj.weight)


def not_frozen() -> Made:
    """Before `freeze()` nothing is quantized, and the two scales of the module are buffers."""
    quanto = _library()
    torch.manual_seed(11)
    model = nn.Module()
    model.layer = nn.Linear(33, 12, bias=False)
    quanto.quantize(model, weights="qint4")
    files = {"quanto_qmap.json": quanto.quantization_map(model)}
    return Made(model.layer.weight.data, model, model.state_dict(), files=files)


def norm() -> Made:
    """Quantized activations alone: quanto wraps a LayerNorm and leaves its weight as it is."""
    quanto = _library()
    model = nn.Module()
    model.layer = nn.LayerNorm(12, bias=False)
    quanto.quantize(model, weights="qint8", activations="qint8")
    quanto.freeze(model)
    files = {"quanto_qmap.json": quanto.quantization_map(model)}
    return Made(model.layer.weight.data, model, model.state_dict(), files=files)


def tied() -> Made:
    """One quantized Parameter in two modules."""
    made = linear("qint4", 33, 100)()
    made.live.head = nn.Module()
    made.live.head.weight = made.live.layer.weight
    return Made(made.values, made.live)


def by_hand(files: dict | None = None):
    """3 rows of 2 columns: the first slab (2 rows) in the low nibbles, the second (1 row) in the high ones."""

    def make() -> Made:
        tensors = {
            "layer.weight._data._data": torch.tensor([[0x51, 0x62], [0x03, 0x04]], dtype=torch.uint8),
            "layer.weight._scale": torch.tensor([[1.0], [2.0], [0.5]]),
            "layer.weight._shift": torch.tensor([[0.0], [1.0], [8.0]]),
            "layer.input_scale": torch.tensor(1.0),
            "layer.output_scale": torch.tensor(1.0),
        }
        values = torch.tensor([[1.0, 2.0], [2 * 3 - 1.0, 2 * 4 - 1.0], [0.5 * 5 - 8.0, 0.5 * 6 - 8.0]])
        return Made(values, None, tensors, files=files or {})

    return make


def tinygemm(rows: int, columns: int, *, saved: bool):
    """In bfloat16 with groups of 128 quanto packs for torch's kernel, on the CPU too; saved, it is turned back."""

    def make() -> Made:
        torch.manual_seed(12)
        model = _quantized(nn.Linear(columns, rows, bias=False).to(BF16), "qint4")
        weight = model.layer.weight
        assert type(weight).__name__ == "TinyGemmWeightQBitsTensor"
        config = {"hidden_size": rows, "intermediate_size": columns}
        files = {"quanto_qmap.json": _library().quantization_map(model)}
        renamed = nn.Module()
        renamed.down_proj = model.layer
        values = weight.dequantize()
        if saved:
            return Made(values, None, renamed.state_dict(), config, files=files, tolerance=2**-6)
        return Made(values, renamed, tolerance=2**-6)

    return make


def awq() -> Made:
    """Packed by the library's own Python, which only asserts that it runs on CUDA."""
    _library()
    from optimum.quanto.tensor.weights.awq import packed
    from optimum.quanto.tensor.weights.awq.qbits import AWQWeightQBitsTensor

    def on_cpu(function):
        source = inspect.getsource(function)
        without = "".join(line for line in source.splitlines(keepends=True) if "device.type ==" not in line)
        scope = dict(vars(packed))
        exec(without, scope)
        return scope[function.__name__]

    def instance(cls, like, **held):
        tensor = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)
        for name, value in held.items():
            setattr(tensor, name, value)
        return tensor

    torch.manual_seed(13)
    codes = torch.randint(0, 16, (8, 256), dtype=torch.uint8)
    data = on_cpu(packed.pack_v2)(codes)
    assert torch.equal(on_cpu(packed.unpack_v2)(data), codes)
    scale, shift = torch.rand(2, 8).half(), torch.randn(2, 8).half()
    holder = instance(packed.AWQPackedTensor, codes, _data=data)
    weight = instance(AWQWeightQBitsTensor, codes.half(), _data=holder, _scale=scale, _shift=shift, _group_size=128)
    model = nn.Module()
    model.layer = nn.Module()
    model.layer._parameters["weight"] = weight
    spread = [part.float().t().repeat_interleave(128, dim=1) for part in (scale, shift)]
    return Made(codes * spread[0] + spread[1], model)


BF16 = torch.bfloat16

CASES = [
    Case("quanto-qint8", linear("qint8", 33, 20), "quanto-qint8", (33, 20), bytes={"codes": 660, "scales": 33 * 4 + 8}),
    Case("quanto-qint8-bf16-bias", linear("qint8", 33, 20, BF16, bias=True), "quanto-qint8", (33, 20), total=693),
    Case("quanto-qfloat8", linear("qfloat8", 7, 36), "quanto-qfloat8_e4m3fn", (7, 36)),
    Case("quanto-qfloat8-e5m2", linear("qfloat8_e5m2", 7, 36), "quanto-qfloat8_e5m2", (7, 36)),
    Case("quanto-qint8-one-row", linear("qint8", 1, 36), "quanto-qint8", (1, 36)),
    Case("quanto-qint8-convolution", convolution("qint8"), "quanto-qint8", (7, 3, 3, 5)),
    Case("quanto-qint4-odd-rows", linear("qint4", 33, 100), "quanto-qint4", (33, 100),
         bytes={"codes": 17 * 100, "scales": 33 * 4 + 8, "zero_points": 33 * 4}),
    Case("quanto-qint2-odd-rows", linear("qint2", 33, 100), "quanto-qint2", (33, 100), bytes={"codes": 9 * 100}),
    Case("quanto-qint2-five-rows-in-three-slabs", linear("qint2", 5, 12), "quanto-qint2", (5, 12)),
    Case("quanto-qint4-one-row", linear("qint4", 1, 36), "quanto-qint4", (1, 36)),
    Case("quanto-qint4-bf16", linear("qint4", 33, 100, BF16), "quanto-qint4", (33, 100)),
    Case("quanto-qint4-ungrouped-200", linear("qint4", 9, 200), "quanto-qint4", (9, 200)),
    Case("quanto-qint4-group-128", linear("qint4", 9, 256, bias=True), "quanto-qint4", (9, 256), total=9 * 256 + 9,
         bytes={"codes": 9 * 128, "scales": 18 * 4 + 8, "zero_points": 18 * 4}),
    Case("quanto-qint2-group-64", linear("qint2", 9, 320, bias=True), "quanto-qint2", (9, 320), total=9 * 320 + 9),
    Case("quanto-qint4-group-96-shape-from-config", named_by_config, "quanto-qint4", (20, 192),
         name="down_proj.weight"),
    Case("quanto-qint4-zero-points", zero_points, "quanto-qint4", (33, 100)),
    Case("quanto-qint4-convolution", convolution("qint4"), "quanto-qint4", (7, 3, 3, 5)),
    Case("quanto-not-frozen", not_frozen, "plain", (12, 33)),
    Case("quanto-layer-norm", norm, "plain", (12,)),
    Case("quanto-tied", tied, "quanto-qint4", (33, 100)),
    Case("quanto-tinygemm", tinygemm(80, 256, saved=False), "quanto-qint4-tinygemm", (80, 256), "down_proj.weight"),
    Case("quanto-tinygemm-saved", tinygemm(80, 256, saved=True), "quanto-qint4", (80, 256), "down_proj.weight"),
    Case("quanto-awq", awq, "quanto-qint4-awq", (8, 256), bytes={"codes": 1024, "scales": 32, "zero_points": 32}),
    Case("quanto-qint4-by-hand", by_hand(), "quanto-qint4", (3, 2),
         bytes={"codes": 4, "scales": 20, "zero_points": 12}),
]  # fmt: skip
