"""TransformerEngine, by the names and attributes of its classes: the library itself needs a GPU.

What is expected is worked from its Python source; its own decode never ran here.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.cases import Case, Made

U8 = torch.uint8


def tensor_of(kind: str, shape: tuple[int, ...], **held) -> torch.Tensor:
    """A wrapper tensor of a class that is named and placed like the library's."""

    def make(cls):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    def dispatch(cls, function, types, args=(), kwargs=None):
        return args[0]

    members = {"__new__": staticmethod(make), "__torch_dispatch__": classmethod(dispatch)}
    members["__tensor_flatten__"] = lambda self: ([], None)
    tensor = type(kind, (torch.Tensor,), {"__module__": "transformer_engine.pytorch.tensor", **members})()
    for name, value in held.items():
        setattr(tensor, name, value)
    return tensor


def _made(values, kind: str, shape: tuple[int, ...], **held) -> Made:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(tensor_of(kind, shape, **held), requires_grad=False)
    return Made(values, model)


def per_tensor(dtype: torch.dtype):
    """One scale, and a transposed copy for the backward pass."""

    def make() -> Made:
        torch.manual_seed(1)
        values = torch.randn(3, 5).to(dtype)
        data, scale = values.view(U8), torch.tensor([0.25])
        name = "kFloat8E5M2" if dtype == torch.float8_e5m2 else "kFloat8E4M3"
        held = {"_data": data, "_transpose": data.t().contiguous(), "_scale_inv": scale, "_fp8_dtype": f"DType.{name}"}
        return _made(values.float() * 0.25, "Float8Tensor", (3, 5), **held)

    return make


def blocks(*, square: bool):
    """Ragged blocks of 128 x 128, or of 1 x 128 with transposed scales; both padded to 4."""

    def make() -> Made:
        torch.manual_seed(2)
        codes = torch.randn(130, 300).to(torch.float8_e4m3fn)
        scale = torch.rand(2, 4) if square else torch.rand(3, 132)
        by_row = scale.repeat_interleave(128, 0)[:130] if square else scale.t()[:130]
        values = codes.float() * by_row.repeat_interleave(128, 1)[:, :300]
        held = {"_rowwise_data": codes.view(U8), "_rowwise_scale_inv": scale, "_is_2D_scaled": square}
        return _made(values, "Float8BlockwiseQTensor", (130, 300), **held)

    return make


def transposed_only() -> Made:
    """After `update_usage` only the copy for the backward pass may be left."""
    held = {"_columnwise_data": torch.zeros(300, 130, dtype=U8), "_columnwise_scale_inv": torch.ones(3, 4)}
    return _made(None, "Float8BlockwiseQTensor", (130, 300), **held)


def mxfp8() -> Made:
    held = {
        "_rowwise_data": torch.zeros(128, 64, dtype=U8), "_rowwise_scale_inv": torch.zeros(128, 4, dtype=U8),
        "_columnwise_data": torch.zeros(128, 64, dtype=U8), "_columnwise_scale_inv": torch.zeros(4, 128, dtype=U8),
    }  # fmt: skip
    return _made(None, "MXFP8Tensor", (128, 64), **held)


def nvfp4() -> Made:
    held = {
        "_rowwise_data": torch.zeros(128, 32, dtype=U8), "_rowwise_scale_inv": torch.zeros(128, 4, dtype=U8),
        "_amax_rowwise": torch.ones(1),
    }  # fmt: skip
    return _made(None, "NVFP4Tensor", (128, 64), **held)


CASES = [
    Case("te-float8", per_tensor(torch.float8_e4m3fn), "te-float8", (3, 5), bytes={"codes": 30, "scales": 4}),
    Case("te-float8-e5m2", per_tensor(torch.float8_e5m2), "te-float8", (3, 5)),
    Case("te-float8-square-blocks", blocks(square=True), "te-float8-blockwise", (130, 300)),
    Case("te-float8-row-blocks", blocks(square=False), "te-float8-blockwise", (130, 300)),
    Case("te-float8-transposed-only", transposed_only, "te-float8-blockwise", (130, 300), bytes={"codes": 39000}),
    Case("te-mxfp8", mxfp8, "te-mxfp8", (128, 64), bytes={"codes": 2 * 8192, "scales": 1024}),
    Case("te-nvfp4", nvfp4, "te-nvfp4", (128, 64), bytes={"codes": 4096, "scales": 512 + 4}),
]
