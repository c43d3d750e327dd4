"""SmolLM2-135M as its ONNX export has it, with random weights: the embedding looked up, its transposed copy multiplied.

    model.embed_tokens.weight     [vocab, hidden]                     Gather
    onnx::MatMul_*                [in, out] of each linear            MatMul, named by the path of its node
    onnx::MatMul_* of the head    [hidden, vocab], the same values    MatMul
    cos_cache, sin_cache          [positions, head / 2]               GroupQueryAttention

q4 is onnxruntime's MatMulNBits quantizer with blocks of 32, symmetric; q4f16 is q4 with its floats in 16 bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

PUBLISHED_MB = {"fp32": 654, "fp16": 327, "q4": 200, "q4f16": 134}


@dataclass(frozen=True)
class Sizes:
    """What config.json says; by default of HuggingFaceTB/SmolLM2-135M-Instruct."""

    vocab: int = 49_152
    hidden: int = 576
    intermediate: int = 1_536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    positions: int = 8_192

    @property
    def table(self) -> int:
        """The values of the embedding."""
        return self.vocab * self.hidden

    @property
    def kv(self) -> int:
        """The outputs of k and of v."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> int:
        """The values of the linears of all layers."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def norms(self) -> int:
        """The values of all norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def params(self) -> int:
        """The parameters, the tied head counted once."""
        return self.table + self.linears + self.norms

    @property
    def rope(self) -> int:
        """The values of the tables of angles."""
        return 2 * self.positions * (self.hidden // self.heads // 2)


# As much of it is the embedding as of the real one.
SMALL = Sizes(vocab=1_093, hidden=96, intermediate=256, layers=4, heads=3, kv_heads=1, positions=64)


@dataclass
class _Graph:
    sizes: Sizes
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, name: str, values: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name, **attributes))
        return outputs[0]

    def noise(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def linear(self, at: str, path: str, columns: int, rows: int, weight: np.ndarray | None = None) -> str:
        values = self.noise(columns, rows) if weight is None else weight
        name = self.constant(f"onnx::MatMul_{5000 + len(self.tensors)}", values)
        return self.node("MatMul", [at, name], [f"{path}/MatMul_output_0"], f"{path}/MatMul")

    def norm(self, at: str, path: str) -> str:
        gain = self.constant(path[1:].replace("/", ".") + ".weight", 1 + self.noise(self.sizes.hidden))
        name = f"{path}/SimplifiedLayerNormalization"
        return self.node("SimplifiedLayerNormalization", [at, gain], [f"{path}/output_0"], name, epsilon=1e-5)

    def binary(self, operator: str, left: str, right: str, path: str, name: str = "") -> str:
        place = f"{path}/{name or operator}"
        return self.node(operator, [left, right], [f"{place}_output_0"], place)


def fp32(sizes: Sizes) -> ModelProto:
    """Return the model in 32 bit, which onnxruntime runs."""
    graph = _Graph(sizes)
    table = graph.noise(sizes.vocab, sizes.hidden)
    graph.constant("model.embed_tokens.weight", table)
    _angles(graph)
    _mask(graph)
    at = graph.node(
        "Gather", ["model.embed_tokens.weight", "input_ids"], ["/model/embed_tokens/output_0"],
        "/model/embed_tokens/Gather",
    )  # fmt: skip
    for index in range(sizes.layers):
        at = _layer(graph, at, index)
    at = graph.norm(at, "/model/norm")
    graph.linear(at, "/lm_head", sizes.hidden, sizes.vocab, np.ascontiguousarray(table.T))
    graph.nodes[-1].output[0] = "logits"
    outputs = [("logits", TensorProto.FLOAT, ["batch", "length", sizes.vocab]), *_cache(sizes, "present", "total")]
    inputs = [
        ("input_ids", TensorProto.INT64, ["batch", "length"]),
        ("attention_mask", TensorProto.INT64, ["batch", "total"]),
        *_cache(sizes, "past_key_values", "past"),
    ]
    values = [[helper.make_tensor_value_info(*value) for value in group] for group in (inputs, outputs)]
    made = helper.make_graph(graph.nodes, "main_graph", *values, graph.tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def _cache(sizes: Sizes, name: str, length: str) -> Iterator[tuple[str, int, list[Any]]]:
    shape = ["batch", sizes.kv_heads, length, sizes.hidden // sizes.heads]
    for index in range(sizes.layers):
        yield f"{name}.{index}.key", TensorProto.FLOAT, shape
        yield f"{name}.{index}.value", TensorProto.FLOAT, shape


def _angles(graph: _Graph) -> None:
    half = graph.sizes.hidden // graph.sizes.heads // 2
    frequencies = 1e5 ** -(np.arange(half) / half)
    angles = np.outer(np.arange(graph.sizes.positions), frequencies)
    graph.constant("cos_cache", np.cos(angles).astype(np.float32))
    graph.constant("sin_cache", np.sin(angles).astype(np.float32))


def _mask(graph: _Graph) -> None:
    """The lengths that GroupQueryAttention takes, out of the mask."""
    path = "/model/attn_mask_reformat"
    one = graph.constant("/model/constants/INT64/[1]", np.array([1]))
    summed = graph.node("ReduceSum", ["attention_mask", one], [f"{path}/sum"], f"{path}/ReduceSum", keepdims=1)
    last = graph.binary("Sub", summed, one, path)
    graph.node("Cast", [last], ["seqlens_k"], f"{path}/Cast", to=TensorProto.INT32)
    shape = graph.node("Shape", ["attention_mask"], [f"{path}/shape"], f"{path}/Shape")
    scalar = graph.constant("/model/constants/INT64/1", np.array(1))
    total = graph.node("Gather", [shape, scalar], [f"{path}/total"], f"{path}/Gather", axis=0)
    graph.node("Cast", [total], ["total_length"], f"{path}/Cast_1", to=TensorProto.INT32)


def _layer(graph: _Graph, at: str, index: int) -> str:
    sizes, path = graph.sizes, f"/model/layers.{index}"
    normed = graph.norm(at, f"{path}/input_layernorm")
    widths = {"q": sizes.hidden, "k": sizes.kv, "v": sizes.kv}
    inside = [graph.linear(normed, f"{path}/self_attn/{n}_proj", sizes.hidden, w) for n, w in widths.items()]
    names = ["key", "value"]
    graph.node(
        "GroupQueryAttention",
        [*inside, *(f"past_key_values.{index}.{name}" for name in names), "seqlens_k", "total_length",
         "cos_cache", "sin_cache"],
        [f"{path}/self_attn/output_0", *(f"present.{index}.{name}" for name in names)],
        f"{path}/self_attn/GroupQueryAttention",
        domain="com.microsoft", num_heads=sizes.heads, kv_num_heads=sizes.kv_heads, do_rotary=1,
    )  # fmt: skip
    out = graph.linear(f"{path}/self_attn/output_0", f"{path}/self_attn/o_proj", sizes.hidden, sizes.hidden)
    at = graph.binary("Add", at, out, path)
    normed = graph.norm(at, f"{path}/post_attention_layernorm")
    gate, up = (
        graph.linear(normed, f"{path}/mlp/{name}_proj", sizes.hidden, sizes.intermediate) for name in ("gate", "up")
    )
    sigmoid = graph.node("Sigmoid", [gate], [f"{path}/mlp/sigmoid"], f"{path}/mlp/act_fn/Sigmoid")
    silu = graph.binary("Mul", gate, sigmoid, f"{path}/mlp/act_fn")
    hidden = graph.binary("Mul", silu, up, f"{path}/mlp")
    down = graph.linear(hidden, f"{path}/mlp/down_proj", sizes.intermediate, sizes.hidden)
    return graph.binary("Add", at, down, path, "Add_1")


def four_bits(model: ModelProto, block: int = 32, *, symmetric: bool = True) -> ModelProto:
    """Return what onnxruntime's quantizer makes of a model."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    quantizer.logger.setLevel(logging.WARNING)  # a line for each node
    made = quantizer.MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric)
    made.process()
    return made.model.model


def in_16_bit(model: ModelProto) -> ModelProto:
    """Return a model with its floats in 16 bit, scales included; onnxruntime's converter changes it in place."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, disable_shape_infer=True)


def all_four(sizes: Sizes) -> Iterator[tuple[str, ModelProto]]:
    """Yield fp32, fp16, q4 and q4f16, each made anew."""
    yield "fp32", fp32(sizes)
    yield "fp16", in_16_bit(fp32(sizes))
    yield "q4", four_bits(fp32(sizes))
    yield "q4f16", in_16_bit(four_bits(fp32(sizes)))
