"""ONNX: graphs built with the onnx package, quantized and decoded by onnxruntime; bytes worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cases import Case, Made

WHY = "onnx and onnxruntime make these models and decode them"
NAME = "model.layers.0.mlp.up_proj.weight"
NODE = "/model/layers.0/mlp/up_proj/MatMul"


def _onnx():
    pytest.importorskip("onnxruntime", reason=WHY)
    return pytest.importorskip("onnx", reason=WHY)


def _write(model, **external):
    def write(folder: Path) -> Path:
        onnx = _onnx()
        onnx.save_model(onnx.ModelProto.FromString(model.SerializeToString()), folder / "model.onnx", **external)
        return folder / "model.onnx"

    return write


def model_of(nodes, initializers, inputs, outputs, opset: int = 21):
    """Return a model; inputs and outputs are (name, dtype, shape)."""
    onnx = _onnx()
    values = [[onnx.helper.make_tensor_value_info(*value) for value in group] for group in (inputs, outputs)]
    graph = onnx.helper.make_graph(nodes, "graph", *values, initializers)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model, feeds) -> torch.Tensor:
    """Return what onnxruntime computes, nothing of the graph changed by it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.array(session.run(None, feeds)[0]).astype(np.float32))


def _float(rows: int, columns: int):
    """A linear as exported: the weight as [in, out] under a name that says nothing."""
    onnx = _onnx()
    weight = np.random.default_rng(rows).standard_normal((columns, rows)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_12"], ["y"], NODE)
    tensors = [onnx.numpy_helper.from_array(weight, "onnx::MatMul_12")]
    return model_of([node], tensors, [("x", 1, ["n", columns])], [("y", 1, ["n", rows])])


def matmul_nbits(bits: int, block: int, columns: int, *, symmetric: bool = True, rows: int = 7, **external):
    """Quantized by onnxruntime; its own product with the identity is the weight."""

    def make() -> Made:
        _onnx()
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

        made = quantizer.MatMulNBitsQuantizer(
            _float(rows, columns), bits=bits, block_size=block, is_symmetric=symmetric
        )
        made.process()
        values = run(made.model.model, {"x": np.eye(columns, dtype=np.float32)}).T
        return Made(values, write=_write(made.model.model, **external), tolerance=1e-6)

    return make


def nbits_node(
    bits: int, block: int, columns: int, rows: int = 5, *, scales: str = "float32", zeros: str | None = None
):
    """A node made by hand of random codes: float zero points, scales in a row, half precision."""

    def make() -> Made:
        onnx = _onnx()
        random = np.random.default_rng(bits + columns)
        blocks = -(-columns // block)
        codes = random.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8)
        parts = [codes, random.random(rows * blocks).astype(scales)]
        if zeros == "packed":
            parts.append(random.integers(0, 256, (rows, -(-blocks * bits // 8)), dtype=np.uint8))
        elif zeros == "float":
            parts.append((random.random((rows, blocks)) * 2**bits).astype(scales))
        names = ["onnx::w_1", "s", "z"][: len(parts)]
        tensors = [onnx.numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=True)]
        node = onnx.helper.make_node(
            "MatMulNBits",
            ["x", *names],
            ["y"],
            NODE,
            domain="com.microsoft",
            bits=bits,
            block_size=block,
            K=columns,
            N=rows,
        )
        kind = {"float32": 1, "float16": 10}[scales]
        model = model_of([node], tensors, [("x", kind, ["n", columns])], [("y", kind, ["n", rows])])
        values = run(model, {"x": np.eye(columns, dtype=scales)}).T
        return Made(values, write=_write(model), tolerance=1e-6 if scales == "float32" else 2e-3)

    return make


CASES = [
    Case("onnx-matmulnbits-4", matmul_nbits(4, 32, 96), "onnx-matmulnbits-4", (7, 96), NAME,
         bytes={"codes": 7 * 48, "scales": 7 * 3 * 4}),
    Case("onnx-matmulnbits-4-asymmetric", matmul_nbits(4, 32, 160, symmetric=False), "onnx-matmulnbits-4", (7, 160),
         NAME, bytes={"codes": 7 * 80, "scales": 7 * 5 * 4, "zero_points": 7 * 3}),
    Case("onnx-matmulnbits-4-padded", matmul_nbits(4, 128, 200), "onnx-matmulnbits-4", (7, 200), NAME,
         bytes={"codes": 7 * 100, "padding": 7 * 28, "scales": 7 * 2 * 4}),
    Case("onnx-matmulnbits-8-padded", matmul_nbits(8, 64, 100, symmetric=False), "onnx-matmulnbits-8", (7, 100), NAME,
         bytes={"codes": 7 * 100, "padding": 7 * 28, "zero_points": 14}),
    Case("onnx-matmulnbits-beside", matmul_nbits(4, 32, 96, save_as_external_data=True, size_threshold=0,
         location="w.data"), "onnx-matmulnbits-4", (7, 96), NAME),
    Case("onnx-matmulnbits-2", nbits_node(2, 32, 100, zeros="packed"), "onnx-matmulnbits-2", (5, 100), NAME),
    Case("onnx-matmulnbits-2-default-zero", nbits_node(2, 16, 96), "onnx-matmulnbits-2", (5, 96), NAME),
    Case("onnx-matmulnbits-4-odd-blocks", nbits_node(4, 16, 40, zeros="packed"), "onnx-matmulnbits-4", (5, 40), NAME),
    Case("onnx-matmulnbits-4-float-zeros", nbits_node(4, 32, 64, zeros="float"), "onnx-matmulnbits-4", (5, 64), NAME),
    Case("onnx-matmulnbits-8-default-zero", nbits_node(8, 32, 70), "onnx-matmulnbits-8", (5, 70), NAME),
    Case("onnx-matmulnbits-4-half-scales", nbits_node(4, 32, 96, scales="float16"), "onnx-matmulnbits-4", (5, 96),
         NAME, bytes={"codes": 5 * 48, "scales": 5 * 3 * 2}),
]  # fmt: skip
