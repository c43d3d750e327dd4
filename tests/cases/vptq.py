"""VPTQ: layers of the real library, packed and decoded by its own functions."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.cases import Case, Made


def _vptq():
    """The library, which imports sentence_transformers for one `isinstance`."""
    name = "sentence_transformers.SentenceTransformer"
    if "sentence_transformers" not in sys.modules:
        stand_in = ModuleType(name)
        stand_in.SentenceTransformer = type("SentenceTransformer", (), {})
        sys.modules |= {"sentence_transformers": ModuleType("sentence_transformers"), name: stand_in}
    return pytest.importorskip("vptq", reason="vptq is not installed: `pip install --no-deps vptq`")


def _fill(linear: nn.Module, unpacked: dict[str, torch.Tensor]) -> None:
    from vptq.utils.pack import pack_index

    with torch.no_grad():
        for book in (linear.centroids, linear.res_centroids, linear.outlier_centroids):
            if book is not None:
                book.weight.normal_()
        if linear.is_indice_packed:
            bits = [
                size.bit_length() - 1 if size > 0 else 0 for size in (linear.num_centroids, linear.num_res_centroids)
            ]
            linear.indices.data = pack_index(unpacked["indices"], bits[0], unpacked.get("res_indices"), bits[1])
        else:
            linear.indices.copy_(unpacked["indices"].view(torch.int16))
        if linear.enable_outlier:
            linear.outlier_indices.copy_(torch.randint(0, linear.num_outlier_centroids, linear.outlier_indices.shape))
        if linear.enable_norm:
            linear.weight_scale.uniform_(0.5, 2)
            linear.weight_bias.normal_()
        if linear.enable_perm:
            linear.perm.copy_(torch.randperm(linear.in_features))


def _dequant(linear: nn.Module) -> torch.Tensor:
    from vptq.ops.quant_gemm import dequant

    def book(module: nn.Module | None, count: int, entries: int, vector: int) -> torch.Tensor | None:
        return None if module is None else module.weight.detach().view(count, entries, vector)

    groups = linear.num_codebooks
    return dequant(
        indices=linear.indices,
        centroids=book(linear.centroids, groups, linear.num_centroids, linear.vector_len),
        outlier_indices=linear.outlier_indices,
        outlier_centroids=book(
            linear.outlier_centroids, 1, linear.num_outlier_centroids, linear.outlier_vector_len
        ),
        res_indices=linear.res_indices,
        res_centroids=book(linear.res_centroids, groups, linear.num_res_centroids, linear.vector_len),
        perm=getattr(linear, "perm", None),
        weight_scale=linear.weight_scale,
        weight_bias=linear.weight_bias,
        **{
            name: getattr(linear, name)
            for name in (
                "is_indice_packed", "enable_outlier", "enable_residual", "enable_perm", "enable_norm", "num_centroids",
                "num_outlier_centroids", "num_res_centroids", "padding", "outlier_padding", "num_codebooks",
                "group_size", "outlier_size", "vector_len", "outlier_vector_len",
            )
        },
    ).detach()  # fmt: skip


def layer(
    rows: int, columns: int, *, vector=4, entries=16, residual=-1, groups=1, outliers=0, perm=True, norm=True,
    packed=True, sizes=True, model_config: dict | None = None, name="layer",
):  # fmt: skip
    def make() -> Made:
        _vptq()
        from vptq.layers.vqlinear import VQuantLinear

        torch.manual_seed(rows * columns)
        settings = {
            "vector_lens": [3 if outliers else -1, vector],
            "num_centroids": [32 if outliers else -1, entries],
            "num_res_centroids": [-1, residual],
            "group_num": groups,
            "group_size": (columns - outliers) // groups,
            "outlier_size": outliers,
            "indices_as_float": False,
            "enable_norm": norm,
            "enable_perm": perm,
            "is_indice_packed": packed,
        }
        linear = VQuantLinear(columns, rows, **settings, dtype=torch.float32, enable_proxy_error=False)
        shape = (groups, linear.num_indices, linear.group_size)
        unpacked = {"indices": torch.randint(0, entries, shape).to(torch.uint16)}
        if residual > 0:
            unpacked["res_indices"] = torch.randint(0, residual, shape).to(torch.uint16)
        _fill(linear, unpacked)
        model = nn.Module()
        model.layer = linear
        if sizes:
            settings |= {"in_features": columns, "out_features": rows}
        config = {"quantization_config": {"quant_method": "vptq", "config_for_layers": {name: settings}}}
        tensors = {key.replace("layer", name, 1): value for key, value in model.state_dict().items()}
        live = model if name == "layer" else None
        return Made(_dequant(linear), live, tensors, config | (model_config or {}), tolerance=1e-6)

    return make


def by_hand() -> Made:
    """Three rows in vectors of two, so one row of padding; two-bit codes 1, 3, 2 in a word: 0b10_11_01."""
    block = {
        "vector_lens": [-1, 2], "num_centroids": [-1, 4], "num_res_centroids": [-1, -1], "group_num": 1,
        "group_size": 3, "outlier_size": 0, "enable_norm": False, "enable_perm": True, "out_features": 3,
    }  # fmt: skip
    tensors = {
        "layer.indices": torch.tensor([[[0b10_11_01], [0b00_00_00]]], dtype=torch.int32),
        "layer.centroids.weight": torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]]),
        "layer.perm": torch.tensor([2, 0, 1], dtype=torch.int16),  # column 0 was quantized second
    }
    values = torch.tensor([[3.0, 2.0, 1.0], [3.5, 2.5, 1.5], [0.0, 0.0, 0.0]])
    config = {"quantization_config": {"quant_method": "vptq", "config_for_layers": {"layer": block}}}
    return Made(values, None, tensors, config)


UP = "model.layers.0.mlp.up_proj"
SIZES = {"hidden_size": 20, "intermediate_size": 30}
CASES = [
    Case("vptq-by-hand", by_hand, "vptq", (3, 3), bytes={"codes": 8, "codebooks": 32, "index": 6}),
    Case("vptq", layer(24, 20), "vptq", (24, 20),
         bytes={"codes": 6 * 3 * 4, "codebooks": 16 * 4 * 4, "index": 40, "scales": 80, "zero_points": 80}),
    Case("vptq-30-rows-in-vectors-of-4", layer(30, 20), "vptq", (30, 20)),
    Case("vptq-residual", layer(24, 20, entries=64, residual=32), "vptq", (24, 20)),
    Case("vptq-8192-with-residual-256", layer(13, 37, vector=6, entries=8192, residual=256), "vptq", (13, 37)),
    Case("vptq-residual-longer-than-main", layer(24, 20, entries=4, residual=4), "vptq", (24, 20)),
    Case("vptq-two-groups-no-perm-no-norm", layer(24, 20, groups=2, perm=False, norm=False), "vptq", (24, 20)),
    Case("vptq-outliers", layer(25, 23, groups=2, outliers=3, residual=16), "vptq", (25, 23)),
    Case("vptq-not-packed", layer(24, 20, perm=False, packed=False), "vptq", (24, 20)),
    Case("vptq-30-rows-by-model-config", layer(30, 20, sizes=False, model_config=SIZES, name=UP), "vptq", (30, 20),
         f"{UP}.weight"),
]  # fmt: skip
