"""ONNX: graphs built with the onnx package, quantized and decoded by onnxruntime; bytes worked by hand."""

from __future__ import annotations

import shutil
import tempfile
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


def _float(rows: int, columns: int, values=None):
    """A linear as exported: the weight as [in, out] under a name that says nothing."""
    onnx = _onnx()
    weight = np.random.default_rng(rows).standard_normal((columns, rows)).astype(np.float32)
    weight = weight if values is None else np.ascontiguousarray(values.numpy().T)
    node = onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_12"], ["y"], NODE)
    tensors = [onnx.numpy_helper.from_array(weight, "onnx::MatMul_12")]
    return model_of([node], tensors, [("x", 1, ["n", columns])], [("y", 1, ["n", rows])])


def matmul_nbits(
    bits: int, block: int, columns: int, *, symmetric: bool = True, rows: int = 7, values=None, **external
):
    """Quantized by onnxruntime; its own product with the identity is the weight."""

    def make() -> Made:
        _onnx()
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

        made = quantizer.MatMulNBitsQuantizer(
            _float(rows, columns, values), bits=bits, block_size=block, is_symmetric=symmetric
        )
        made.process()
        decoded = run(made.model.model, {"x": np.eye(columns, dtype=np.float32)}).T
        return Made(decoded, write=_write(made.model.model, **external), tolerance=1e-6)

    return make


def nbits_node(
    bits: int, block: int, columns: int, rows: int = 5, *, scales: str = "float32", zeros: str | None = None, **more
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
            **more,
        )
        kind = {"float32": 1, "float16": 10}[scales]
        model = model_of([node], tensors, [("x", kind, ["n", columns])], [("y", kind, ["n", rows])])
        values = run(model, {"x": np.eye(columns, dtype=scales)}).T if block <= 256 else None  # what the CPU takes
        return Made(values, write=_write(model), tolerance=1e-6 if scales == "float32" else 2e-3)

    return make


def _codes(kind: str, shape: tuple[int, ...], *, raw: bool = True, name: str = "w"):
    """A tensor of random codes of a type, in raw_data or in the typed field."""
    onnx = _onnx()
    random = np.random.default_rng(len(kind) + sum(shape))
    if kind.startswith("FLOAT"):
        values = random.standard_normal(shape).astype(np.float32) * 3
    else:
        bits = min(int(kind.strip("UINT")), 20)
        low = 0 if kind.startswith("U") else -(1 << (bits - 1))
        values = random.integers(low, low + (1 << bits), shape)
    number = onnx.TensorProto.DataType.Value(kind)
    values = values.astype(onnx.helper.tensor_dtype_to_np_dtype(number))
    if raw:
        return onnx.numpy_helper.from_array(values, name)
    return onnx.helper.make_tensor(name, number, shape, values.flatten())


def _scales(shape: tuple[int, ...], dtype: str = "float32"):
    values = np.random.default_rng(9).random(shape) + 0.25
    return _onnx().numpy_helper.from_array(np.asarray(values, dtype=dtype), "s")


def dequantize(kind, shape, scales=(), *, zeros=False, raw=True, opset=21, half=False, **attributes):
    """A DequantizeLinear of a constant; onnxruntime computes it."""

    def make() -> Made:
        onnx = _onnx()
        tensors = [_codes(kind, shape, raw=raw), _scales(scales, "float16" if half else "float32")]
        if zeros:
            tensors.append(_codes(kind, scales, raw=raw, name="z"))
        node = onnx.helper.make_node("DequantizeLinear", [tensor.name for tensor in tensors], ["y"], **attributes)
        model = model_of([node], tensors, [], [("y", 10 if half else 1, shape)], opset)
        return Made(run(model, {}), write=_write(model), tolerance=2e-3 if half else 1e-6)

    return make


def gathered(kind: str, shape, scales, *, zeros=None, **attributes):
    """All rows of a table that GatherBlockQuantized looks up."""

    def make() -> Made:
        onnx = _onnx()
        tensors = [_codes(kind, shape), _scales(scales)]
        if zeros:
            tensors.append(_codes(kind, zeros, name="z"))
        names = ["w", "rows", *(tensor.name for tensor in tensors[1:])]
        rows = onnx.numpy_helper.from_array(np.arange(shape[0]), "rows")
        node = onnx.helper.make_node("GatherBlockQuantized", names, ["y"], domain="com.microsoft", **attributes)
        model = model_of([node], [*tensors, rows], [], [("y", 1, None)])
        return Made(run(model, {}), write=_write(model), tolerance=1e-6)

    return make


def product(
    operator: str, inputs: list[str], *, scales=(), kind: str = "INT8", domain: str = "com.microsoft", **attributes
):
    """The product of the identity and an encoded [in, out], which is the weight; `b` and its parts are constants."""

    def make() -> Made:
        onnx = _onnx()
        n = 12
        shape = (9, n) if attributes.get("transB") else (n, 9)
        tensors = [_codes("INT8", shape), _scales(scales), _codes("INT8", scales, name="z")]
        integer = onnx.TensorProto.UINT8
        others = {"one": np.float32(1), "zero": np.uint8(0)}
        tensors += [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in others.items()]
        floats = "a" in inputs
        nodes = [onnx.helper.make_node(operator, inputs, ["y"], "node", domain=domain, **attributes)]
        if operator == "MatMulInteger":
            nodes[0].output[0] = "int"
            nodes.append(onnx.helper.make_node("Cast", ["int"], ["cast"], to=1))
            nodes.append(onnx.helper.make_node("Mul", ["step", "s"], ["scale"]))
            nodes.append(onnx.helper.make_node("Mul", ["cast", "scale"], ["y"]))
        name, dtype = ("a", np.float32) if floats else ("q", np.uint8)
        feeds = {name: np.eye(n, dtype=dtype)}
        given = [(name, 1 if floats else integer, [n, n])]
        if operator == "MatMulInteger":  # the scale of what is multiplied is computed
            feeds["step"] = np.array(1, dtype=np.float32)
            given.append(("step", 1, []))
        model = model_of(nodes, tensors, given, [("y", 1, [n, 9])])
        values = run(model, feeds)
        return Made(values.T if attributes.get("transB") else values, write=_write(model), tolerance=1e-6)

    return make


def as_qdq() -> Made:
    """onnxruntime's quantizer writing DequantizeLinear in blocks of rows instead of MatMulNBits."""
    onnx = _onnx()
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    made = quantizer.MatMulNBitsQuantizer(_float(7, 96), block_size=32, is_symmetric=True, quant_format=QuantFormat.QDQ)
    made.process()
    model = made.model.model
    for opset in model.opset_import:
        opset.version = max(opset.version, 21) if opset.domain in ("", "ai.onnx") else opset.version
    onnx.checker.check_model(model)
    return Made(run(model, {"x": np.eye(96, dtype=np.float32)}), write=_write(model), tolerance=1e-6)


def small_floats() -> Made:
    """Two to the byte, the first in the low bits; onnxruntime does not run them."""
    onnx = _onnx()
    weight = onnx.helper.make_tensor("w", 23, (2, 3), bytes([0x21, 0xF3, 0x79]), raw=True)
    tensors = [weight, onnx.numpy_helper.from_array(np.float32([2, 4, 10]), "s")]
    node = onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    model = model_of([node], tensors, [], [("y", 1, (2, 3))], 23)
    return Made(torch.tensor([[1.0, 4, 15], [-12, -2, 60]]), write=_write(model))


def embedding_by_onnxruntime() -> Made:
    onnx = _onnx()
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    table = np.random.default_rng(3).standard_normal((11, 96)).astype(np.float32)
    node = onnx.helper.make_node("Gather", ["model.embed_tokens.weight", "rows"], ["y"], "/model/embed_tokens/Gather")
    tensors = [onnx.numpy_helper.from_array(table, "model.embed_tokens.weight")]
    model = model_of([node], tensors, [("rows", 7, ["n"])], [("y", 1, ["n", 96])])
    made = quantizer.MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, op_types_to_quantize=("Gather",))
    made.process()
    values = run(made.model.model, {"rows": np.arange(11)})
    return Made(values, write=_write(made.model.model), tolerance=1e-6)


def bnb4(quant_type: int, rows: int, columns: int, block: int, transposed: int = 1):
    """Random codes; onnxruntime's product with the identity is the weight."""

    def make() -> Made:
        onnx = _onnx()
        random, values = np.random.default_rng(rows), rows * columns
        arrays = {
            "w": random.integers(0, 256, -(-values // 2), dtype=np.uint8),
            "absmax": random.random(-(-values // block)).astype(np.float32),
        }
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
        sizes = {"K": columns, "N": rows, "block_size": block, "quant_type": quant_type, "transB": transposed}
        node = onnx.helper.make_node("MatMulBnb4", ["x", "w", "absmax"], ["y"], NODE, domain="com.microsoft", **sizes)
        model = model_of([node], tensors, [("x", 1, ["n", columns])], [("y", 1, ["n", rows])])
        values = run(model, {"x": np.eye(columns, dtype=np.float32)}).T
        return Made(values, write=_write(model), tolerance=1e-6)

    return make


def experts(bits: int, block: int = 0, *, zeros: bool = False, prepacked: int = 0):
    """The first matrices of three experts, each token sent to one of them; the second ones hand on what they take."""

    def make() -> Made:
        onnx = _onnx()
        count, columns, rows, zero = 3, 32, 16, 1 << (bits - 1)
        random = np.random.default_rng(bits + block)
        handed_on = np.full((count, columns, rows), zero)
        handed_on[:, range(rows), range(rows)] += 1
        arrays = {
            "w": random.integers(0, 256, (count, rows, columns * bits // 8)),
            "s": random.random((count, rows, columns // block) if block else (count, rows)) + 0.25,
            "w2": _packed(handed_on, bits),
            "s2": np.ones((count, columns, rows // block) if block else (count, columns)),
        }
        names = ["x", "p", "w", "s", "", "w2", "s2"]
        if zeros:
            row = (count, rows, -(-columns // block * bits // 8)) if block else (count, rows * bits // 8)
            arrays["z"] = random.integers(0, 256, row)
            arrays["z2"] = _packed(np.full((count, columns, rows // block) if block else (count, columns), zero), bits)
            names += ["", "", "", "", "z", "z2"]
        tensors = [onnx.numpy_helper.from_array(array.astype(_kind(name)), name) for name, array in arrays.items()]
        options = {"block_size": block} if block else {}
        options |= {"k": 1, "activation_type": "identity", "normalize_routing_weights": 1}
        options |= {"expert_weight_bits": bits, "weights_prepacked": prepacked}
        node = onnx.helper.make_node("QMoE", names, ["y"], "experts", domain="com.microsoft", **options)
        inputs = [("x", 1, ["t", columns]), ("p", 1, ["t", count])]
        model = model_of([node], tensors, inputs, [("y", 1, ["t", columns])])
        tokens = np.tile(np.eye(columns, dtype=np.float32), (count, 1))
        routes = np.repeat(100 * np.eye(count, dtype=np.float32), columns, 0)
        values = run(model, {"x": tokens, "p": routes}).view(count, columns, columns)[:, :, :rows].transpose(1, 2)
        # Blocks of eight bits are multiplied with activations in eight bits.
        return Made(None if prepacked else values, write=_write(model), tolerance=5e-3 if bits == 8 and block else 1e-6)

    return make


def _kind(name: str) -> str:
    return "float32" if name.startswith("s") else "uint8"


def _packed(codes, bits: int):
    """Codes along the last dimension in bytes, the lowest bits first; the last byte is filled up."""
    per = 8 // bits
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    groups = filled.reshape(*codes.shape[:-1], -1, per)
    return sum(groups[..., at] << (bits * at) for at in range(per))


def linear_integers(operator: str):
    """The product of the identity with an encoded matrix in whole steps, each column in one or two of them."""

    def make() -> Made:
        onnx = _onnx()
        random = np.random.default_rng(5)
        shape = (12, 9) if operator == "QLinearMatMul" else (9, 12, 1, 1)
        per_column = random.integers(1, 3, 9)
        arrays = {
            "w": random.integers(-20, 21, shape).astype(np.int8),
            "s": np.float32(0.5 * per_column),
            "z": np.zeros(9, np.int8) if operator == "QLinearConv" else random.integers(-5, 6, 9).astype(np.int8),
            "one": np.float32(1), "half": np.float32(0.5), "zero": np.uint8(0), "middle": np.uint8(128),
        }  # fmt: skip
        tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
        inputs = ["q", "one", "zero", "w", "s", "z", "half", "middle"]
        node = onnx.helper.make_node(operator, inputs, ["y"], "node")
        eye = np.eye(12, dtype=np.uint8)
        given = eye if operator == "QLinearMatMul" else eye[None, :, :, None]
        model = model_of([node], tensors, [("q", 2, given.shape)], [("y", 2, None)])
        values = (run(model, {"q": given}) - 128) * 0.5
        return Made(values if operator == "QLinearMatMul" else values.view(9, 12, 1, 1), write=_write(model))

    return make


def integer_convolution() -> Made:
    """ConvInteger, its scale two nodes behind."""
    onnx = _onnx()
    random = np.random.default_rng(6)
    arrays = {"w": random.integers(0, 256, (9, 12, 1, 1)).astype(np.uint8), "s": np.float32(0.25), "z": np.uint8(100),
              "zero": np.uint8(0)}  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    nodes = [
        onnx.helper.make_node("ConvInteger", ["q", "w", "zero", "z"], ["int"], "node"),
        onnx.helper.make_node("Cast", ["int"], ["cast"], to=1),
        onnx.helper.make_node("Mul", ["step", "s"], ["scale"]),
        onnx.helper.make_node("Mul", ["cast", "scale"], ["y"]),
    ]
    eye = np.eye(12, dtype=np.uint8)[None, :, :, None]
    model = model_of(nodes, tensors, [("q", 2, eye.shape), ("step", 1, [])], [("y", 1, None)])
    values = run(model, {"q": eye, "step": np.array(1, dtype=np.float32)})
    return Made(values.view(9, 12, 1, 1), write=_write(model), tolerance=1e-6)


def attention(scales: tuple[int, ...]):
    """QAttention hands on its values where there is one token; so each third of the matrix is put in their place."""

    def make() -> Made:
        onnx = _onnx()
        width, random = 8, np.random.default_rng(7)
        arrays = {"w": random.integers(-128, 128, (12, 3 * width)).astype(np.int8), "bias": np.zeros(3 * width),
                  "s": random.random(scales) + 0.25, "z": random.integers(-9, 9, scales).astype(np.int8),
                  "one": np.float32(1), "zero": np.uint8(0)}  # fmt: skip

        def model(turns: int):
            turned = {
                name: np.roll(array, turns * width, -1) if np.ndim(array) and np.shape(array) != (1,) else array
                for name, array in arrays.items()
            }
            made = {n: np.asarray(a, "float32" if n in ("s", "bias", "one") else None) for n, a in turned.items()}
            tensors = [onnx.numpy_helper.from_array(array, name) for name, array in made.items()]
            node = onnx.helper.make_node("QAttention", ["x", "w", "bias", "one", "s", "", "zero", "z"], ["y"], "node",
                                         domain="com.microsoft", num_heads=2)  # fmt: skip
            return model_of([node], tensors, [("x", 2, [12, 1, 12])], [("y", 1, None)])

        eye = np.eye(12, dtype=np.uint8)[:, None]
        thirds = [run(model(turns), {"x": eye}).view(12, width) for turns in (2, 1, 0)]
        return Made(torch.cat(thirds, 1), write=_write(model(0)), tolerance=1e-6)

    return make


def fused_nbits(operator: str, sizes: dict[str, int], inputs: list[str]):
    """A weight of a fusion that no processor runs, as onnxruntime decodes it in a MatMulNBits of its own."""

    def make() -> Made:
        onnx = _onnx()
        made = nbits_node(4, 32, 96)()
        folder = Path(tempfile.mkdtemp())
        alone = onnx.load(made.write(folder))
        shutil.rmtree(folder)
        options = {"K": 96, "bits": 4, "block_size": 32} | sizes
        weight, scales = alone.graph.initializer
        names = [{"w": weight.name, "s": scales.name}.get(name, name) for name in inputs]
        node = onnx.helper.make_node(operator, names, ["y"], NODE, domain="com.microsoft", **options)
        model = model_of([node], [weight, scales], [("x", 1, ["n", 96])], [("y", 1, None)])
        return Made(made.values, write=_write(model), tolerance=1e-6)

    return make


def small_float_blocks() -> Made:
    """MatMulBlockQuantizedFp8Weight, which no processor runs, decoded by onnxruntime's DequantizeLinear in blocks."""
    onnx = _onnx()
    weight, scales = _codes("FLOAT8E4M3FN", (5, 70)), _scales((5, 3))
    decoded = onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=1, block_size=32)
    values = run(model_of([decoded], [weight, scales], [], [("y", 1, (5, 70))], 23), {})
    node = onnx.helper.make_node("MatMulBlockQuantizedFp8Weight", ["x", "w", "s"], ["y"], domain="com.microsoft",
                                 block_size=32)  # fmt: skip
    return Made(values, write=_write(model_of([node], [weight, scales], [("x", 10, ["n", 70])], [("y", 10, None)])))


def packed_for_a_processor() -> Made:
    onnx = _onnx()
    arrays = {"w": np.zeros(36 * 20, np.uint8), "shape": np.array([64, 18])}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    node = onnx.helper.make_node("MatMulFpQ4", ["x", "w", "shape"], ["y"], domain="com.microsoft")
    return Made(None, write=_write(model_of([node], tensors, [("x", 1, ["n", 64])], [("y", 1, None)])))


def convolution() -> Made:
    """QLinearConv worked by hand: a scale for each output channel, a bias in steps of both scales."""
    onnx = _onnx()
    weight = onnx.helper.make_tensor(
        "w", onnx.TensorProto.INT8, (2, 1, 1, 3), bytes([1, 2, 3, 255, 254, 128]), raw=True
    )
    arrays = {
        "x_scale": np.float32(0.5), "x_zero": np.uint8(3), "s": np.float32([2, 4]), "z": np.int8([0, 1]),
        "y_scale": np.float32(1), "y_zero": np.uint8(0), "bias": np.int32([7, -3]),
    }  # fmt: skip
    tensors = [weight, *(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items())]
    inputs = ["x", "x_scale", "x_zero", "w", "s", "z", "y_scale", "y_zero", "bias"]
    node = onnx.helper.make_node("QLinearConv", inputs, ["y"])
    model = model_of([node], tensors, [("x", 2, [1, 1, 1, 3])], [("y", 2, None)])
    return Made(torch.tensor([[2.0, 4, 6], [-8, -12, -516]]), write=_write(model))


def convolution_bias() -> Made:
    return Made(torch.tensor([7 * 0.5 * 2, -3 * 0.5 * 4]), write=convolution().write)


def _sparse(values, dims, *, by_dimension: bool = False, typed: bool = False, name: str = "w"):
    """What is not zero of an array, as onnx keeps it."""
    onnx = _onnx()
    places = np.flatnonzero(values)
    indices = np.stack(np.unravel_index(places, dims), axis=1) if by_dimension else places
    stored = onnx.numpy_helper.from_array(values.flat[places], name)
    if typed:
        stored = onnx.helper.make_tensor(name, stored.data_type, places.shape, values.flat[places])
        indices = onnx.helper.make_tensor(f"{name}_indices", 7, indices.shape, indices.flatten())
    else:
        indices = onnx.numpy_helper.from_array(indices.astype(np.int64), f"{name}_indices")
    return onnx.helper.make_sparse_tensor(stored, indices, dims)


def _pruned(shape: tuple[int, ...], stored: int, dtype: str):
    """Zeros but for so many values."""
    random = np.random.default_rng(sum(shape) + stored)
    values = np.zeros(shape, dtype)
    places = random.choice(values.size, stored, replace=False)
    signs = random.choice([-1, 1], stored)
    values.flat[places] = signs * (random.integers(1, 100, stored) if dtype == "int8" else 0.5 + random.random(stored))
    return values


def pruned(shape: tuple[int, ...], stored: int, *, dtype: str = "float32", constant: bool = False, **written):
    """A sparse matrix that onnxruntime multiplies with the identity, as an initializer or as a `Constant` node."""

    def make() -> Made:
        onnx = _onnx()
        sparse = _sparse(_pruned(shape, stored, dtype), shape, **written)
        kind = sparse.values.data_type
        nodes = [onnx.helper.make_node("MatMul", ["w", "x"], ["y"])]
        if constant:
            nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse))
        model = model_of(nodes, [], [("x", kind, [shape[-1], "n"])], [("y", kind, ["m"] * len(shape))])
        if not constant:
            model.graph.sparse_initializer.append(sparse)
        onnx.checker.check_model(model)
        return Made(run(model, {"x": np.eye(shape[-1], dtype=dtype)}), write=_write(model))

    return make


def pruned_codes(shape: tuple[int, ...], stored: int, **written):
    """Codes that are stored where they are not zero; onnxruntime decodes them by column."""

    def make() -> Made:
        onnx = _onnx()
        sparse = _sparse(_pruned(shape, stored, "int8"), shape, **written)
        tensors = [_scales((shape[-1],)), _codes("INT8", (shape[-1],), name="z")]
        node = onnx.helper.make_node("DequantizeLinear", ["w", "s", "z"], ["y"], axis=-1)
        model = model_of([node], tensors, [], [("y", 1, shape)])
        model.graph.sparse_initializer.append(sparse)
        onnx.checker.check_model(model)
        return Made(run(model, {}), write=_write(model), tolerance=1e-6)

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
    Case("onnx-dequantize-int8", dequantize("INT8", (7, 33)), "onnx-int8", (7, 33), "w",
         bytes={"codes": 231, "scales": 4}),
    Case("onnx-dequantize-uint8-axis-1-is-the-default", dequantize("UINT8", (7, 33), (33,), zeros=True), "onnx-uint8",
         (7, 33), "w", bytes={"codes": 231, "scales": 132, "zero_points": 33}),
    Case("onnx-dequantize-int8-axis-0", dequantize("INT8", (3, 5, 7), (3,), zeros=True, axis=0), "onnx-int8", (3, 5, 7),
         "w"),
    Case("onnx-dequantize-int8-axis-1-of-3", dequantize("INT8", (3, 5, 7), (5,), axis=-2), "onnx-int8", (3, 5, 7), "w"),
    Case("onnx-dequantize-int4-blocks-of-rows", dequantize("INT4", (70, 9), (3, 9), zeros=True, axis=0, block_size=32),
         "onnx-int4", (70, 9), "w", bytes={"codes": 315, "scales": 108, "zero_points": 14}),
    Case("onnx-dequantize-uint4-blocks-of-columns", dequantize("UINT4", (5, 70), (5, 3), zeros=True, block_size=32),
         "onnx-uint4", (5, 70), "w"),
    Case("onnx-dequantize-int4-odd", dequantize("INT4", (3, 5)), "onnx-int4", (3, 5), "w", bytes={"codes": 8}),
    Case("onnx-dequantize-blocks-of-3", dequantize("INT8", (2, 6, 5), (2, 2, 5), axis=1, block_size=3), "onnx-int8",
         (2, 6, 5), "w"),
    Case("onnx-dequantize-int2", dequantize("INT2", (3, 7), (7,), zeros=True, opset=25), "onnx-int2", (3, 7), "w",
         bytes={"codes": 6, "zero_points": 2}),
    Case("onnx-dequantize-uint2", dequantize("UINT2", (3, 7), opset=25), "onnx-uint2", (3, 7), "w"),
    Case("onnx-dequantize-int16", dequantize("INT16", (3, 7)), "onnx-int16", (3, 7), "w"),
    Case("onnx-dequantize-uint16", dequantize("UINT16", (3, 7), zeros=True), "onnx-uint16", (3, 7), "w"),
    Case("onnx-dequantize-int32", dequantize("INT32", (7,), (7,), axis=0), "onnx-int32", (7,), "w"),
    Case("onnx-dequantize-half-scales", dequantize("INT8", (7, 9), (9,), half=True), "onnx-int8", (7, 9), "w"),
    *(Case(f"onnx-dequantize-{kind.lower()}", dequantize(kind, (7, 9), (9,)), f"onnx-{kind.lower()}", (7, 9), "w")
      for kind in ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")),
    *(Case(f"onnx-typed-{kind.lower()}", dequantize(kind, (7, 9), zeros=zeros, raw=False), f"onnx-{kind.lower()}",
           (7, 9), "w") for kind, zeros in (("INT8", True), ("UINT8", True), ("INT4", True), ("FLOAT8E5M2", False))),
    Case("onnx-gather-int4", gathered("INT4", (7, 96), (7, 3), block_size=32), "onnx-int4", (7, 96), "w"),
    Case("onnx-gather-uint4-zeros", gathered("UINT4", (7, 96), (7, 3), zeros=(7, 3), block_size=32), "onnx-uint4",
         (7, 96), "w"),
    Case("onnx-gather-uint8-default-zero", gathered("UINT8", (7, 48), (7, 3), block_size=32), "onnx-uint4", (7, 96),
         "w"),
    Case("onnx-gather-uint8-padded-zeros", gathered("UINT8", (7, 48), (7, 3), zeros=(7, 2), block_size=32),
         "onnx-uint4", (7, 96), "w"),
    Case("onnx-gather-uint8-8-bits", gathered("UINT8", (7, 96), (7, 3), block_size=32, bits=8), "onnx-uint8", (7, 96),
         "w"),
    Case("onnx-integer-to-float", product("MatMulIntegerToFloat", ["q", "w", "one", "s", "zero", "z"], scales=(9,)),
         "onnx-int8", (12, 9), "w"),
    Case("onnx-dynamic-quantize", product("DynamicQuantizeMatMul", ["a", "w", "s", "z"], scales=()), "onnx-int8",
         (12, 9), "w"),
    Case("onnx-matmul-integer", product("MatMulInteger", ["q", "w", "zero", "z"], domain=""), "onnx-int8", (12, 9),
         "w"),
    Case("onnx-qgemm", product("QGemm", ["q", "one", "zero", "w", "s", "z"], scales=(9,)), "onnx-int8", (12, 9), "w"),
    Case("onnx-qgemm-transposed", product("QGemm", ["q", "one", "zero", "w", "s", "z"], scales=(9,), transB=1),
         "onnx-int8", (9, 12), "w"),
    Case("onnx-matmul-as-qdq", as_qdq, "onnx-int4", (96, 7), NAME, bytes={"codes": 336, "scales": 84}),
    Case("onnx-float4-by-hand", small_floats, "onnx-float4e2m1", (2, 3), "w", bytes={"codes": 3, "scales": 12}),
    Case("onnx-gather-by-onnxruntime", embedding_by_onnxruntime, "onnx-int4", (11, 96), "model.embed_tokens.weight"),
    Case("onnx-bnb-nf4", bnb4(1, 9, 40, 64), "onnx-bnb-nf4", (9, 40), "w", bytes={"codes": 180, "scales": 24}),
    Case("onnx-bnb-nf4-odd", bnb4(1, 5, 33, 16), "onnx-bnb-nf4", (5, 33), "w", bytes={"codes": 83, "scales": 44}),
    Case("onnx-bnb-fp4", bnb4(0, 9, 96, 32), "onnx-bnb-fp4", (9, 96), "w"),
    *(Case(f"onnx-experts-{bits}-{block}{'-zeros' * zeros}", experts(bits, block, zeros=zeros), f"onnx-qmoe-{bits}",
           (3, 16, 32), "w", total=3 * 16 * 32 * 2)
      for bits in (4, 8, 2) for block in (0, 16) for zeros in (False, True)),
    Case("onnx-experts-of-a-device", experts(4, prepacked=-1), "onnx-qmoe-4", (3, 16, 32), "w", total=3 * 16 * 32 * 2,
         bytes={"codes": 3 * 16 * 16, "scales": 3 * 16 * 4}),
    Case("onnx-linear-integers", linear_integers("QLinearMatMul"), "onnx-int8", (12, 9), "w",
         bytes={"codes": 108, "scales": 36, "zero_points": 9}),
    Case("onnx-linear-convolution", linear_integers("QLinearConv"), "onnx-int8", (9, 12, 1, 1), "w"),
    Case("onnx-integer-convolution", integer_convolution, "onnx-uint8", (9, 12, 1, 1), "w"),
    Case("onnx-attention", attention(()), "onnx-int8", (12, 24), "w", total=12 * 24 + 24),
    Case("onnx-attention-by-column", attention((24,)), "onnx-int8", (12, 24), "w", total=12 * 24 + 24,
         bytes={"codes": 288, "scales": 96, "zero_points": 24}),
    Case("onnx-fused-mlp", fused_nbits("MatMulNBitsMlp", {"N": 5}, ["x", "", "", "", "", "", "w", "s"]),
         "onnx-matmulnbits-4", (5, 96), "onnx::w_1"),
    Case("onnx-fused-q", fused_nbits("MatMulNBitsQkv", {"Nq": 5, "Nkv": 3}, ["x", "", "", "w", "s"]),
         "onnx-matmulnbits-4", (5, 96), "onnx::w_1"),
    Case("onnx-fused-v", fused_nbits("MatMulNBitsQkv", {"Nq": 9, "Nkv": 5}, ["x", "", "", *[""] * 6, "w", "s"]),
         "onnx-matmulnbits-4", (5, 96), "onnx::w_1"),
    Case("onnx-float8-blocks", small_float_blocks, "onnx-float8e4m3fn", (5, 70), "w",
         bytes={"codes": 350, "scales": 60}),
    Case("onnx-fpq4", packed_for_a_processor, "onnx-fpq4", (64, 18), "w",
         bytes={"codes": 720, "bookkeeping": 16}),
    Case("onnx-convolution", convolution, "onnx-int8", (2, 1, 1, 3), "w", total=8,
         bytes={"codes": 6, "scales": 8, "zero_points": 2}),
    Case("onnx-convolution-bias", convolution_bias, "onnx-int32", (2,), "bias", total=8),
    Case("onnx-sparse", pruned((5, 7), 9), "plain", (5, 7), "w", bytes={"unquantized": 36, "index": 72}),
    Case("onnx-sparse-by-dimension", pruned((3, 5, 7), 11, by_dimension=True), "plain", (3, 5, 7), "w",
         bytes={"unquantized": 44, "index": 264}),
    Case("onnx-sparse-constant", pruned((5, 7), 9, constant=True), "plain", (5, 7), "w",
         bytes={"unquantized": 36, "index": 72}),
    Case("onnx-sparse-half", pruned((9, 70), 31, dtype="float16"), "plain", (9, 70), "w",
         bytes={"unquantized": 62, "index": 248}),
    Case("onnx-sparse-typed-fields", pruned((5, 7), 9, typed=True), "plain", (5, 7), "w",
         bytes={"unquantized": 36, "index": 72 - 63, "metadata": 0}),
    Case("onnx-sparse-one-value", pruned((5, 7), 1), "plain", (5, 7), "w", bytes={"unquantized": 4, "index": 8}),
    Case("onnx-sparse-nothing-stored", pruned((5, 7), 0), "plain", (5, 7), "w", bytes={"unquantized": 0, "index": 0}),
    Case("onnx-sparse-codes", pruned_codes((9, 70), 31), "onnx-int8", (9, 70), "w",
         bytes={"codes": 31, "index": 248, "scales": 280, "zero_points": 70}),
    Case("onnx-sparse-codes-typed", pruned_codes((5, 7), 9, typed=True, by_dimension=True), "onnx-int8", (5, 7), "w",
         bytes={"codes": 9, "index": 18, "scales": 28, "zero_points": 7}),
]  # fmt: skip
