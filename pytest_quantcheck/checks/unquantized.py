"""The unquantized model that a prediction starts from: of a configuration, or of an unquantized checkpoint.

A configuration is built by transformers on the meta device, in a process of its own, which knows every layer by its
class. A checkpoint is known by the names of its tensors alone, so one whose names are not in the tables is refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_quantcheck import architecture, containers, schemes
from pytest_quantcheck.artifact import Artifact, of_container
from pytest_quantcheck.containers import files
from pytest_quantcheck.dtypes import DTYPES, OF_TORCH
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.recipes.recipe import Kind, Unquantized, Weight
from pytest_quantcheck.tensor import DEAD, Container, LogicalTensor
from pytest_quantcheck.ties import EMBEDDINGS, HEADS

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHORT = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

# The last modules of linears that are known by their names.
LINEARS = frozenset(
    {
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
        "gate_up_proj", "fc1", "fc2", "c_attn", "c_proj", "c_fc", "q_attn", "query_key_value", "dense_h_to_4h",
        "dense_4h_to_h", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "shared_expert_gate",
    }
)  # fmt: skip
TABLES = frozenset({"wpe", "embed_positions", "position_embeddings", "token_type_embeddings"})
ROUTERS = frozenset({"gate", "router"})
_WIDE = re.compile(r"e_score_correction_bias$")


def unquantized(path: str | os.PathLike[str], dtype: str | None = None) -> Unquantized:
    """Return the unquantized model at a path: a config.json, a folder with one, or an unquantized checkpoint.

    `dtype` (fp32, fp16 or bf16) is the one to load it in; else config.json says it, or most values of the checkpoint.
    Raises `FormatError` for a quantized checkpoint, or one with a tensor of which the name does not say what it is, and
    `ValueError` where nothing says the dtype.
    """
    path = os.fspath(path)
    config = _configuration(path)
    if config is not None:
        return _of_config(path, config, dtype)
    container = containers.open_path(path)
    return _of_artifact(of_container(container), container, dtype)


def _configuration(path: str) -> Mapping[str, Any] | None:
    """The configuration at a path where there is nothing else to read."""
    if os.path.isdir(path):
        weights = any(container.accepts(path) for container in containers.CONTAINERS)
        return None if weights else files.read_json(path, "config.json")
    if path.endswith(".index.json") or not path.endswith(".json"):
        return None
    return files.read_json(os.path.dirname(path) or ".", os.path.basename(path))


def _of_config(path: str, config: Mapping[str, Any], dtype: str | None) -> Unquantized:
    said = _dtype(config)
    if dtype is None and said is None:
        raise ValueError(f"{path}: names no dtype of 16 or 32 bits: give --dtype")
    answer = architecture.described(path, config)
    weights = tuple(
        Weight(name, tuple(shape), kind, tuple(wide), OF_TORCH.get(own))
        for name, shape, kind, own, wide in answer["tensors"]
    )
    chosen = SHORT[dtype] if dtype else str(said)
    return Unquantized(path, config, chosen, answer["parameters"], weights, answer["tied_head"])


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a configuration names, its text model's where it has one."""
    text = config.get("text_config")
    levels = (config, text) if isinstance(text, Mapping) else (config,)
    named = (str(level.get(key)) for level in levels for key in ("dtype", "torch_dtype"))
    return next((FLOATS[name] for name in named if name in FLOATS), None)


def _of_artifact(artifact: Artifact, container: Container, dtype: str | None) -> Unquantized:
    for tensor in artifact.tensors:
        if tensor.quantized:
            what = f"is quantized already ({tensor.scheme}): predict from the unquantized model, or its config.json"
            raise FormatError(what, file=artifact.source, tensor=tensor.name)
    config = artifact.configs.get("config.json", {})
    is_ggml = container.kind == "gguf"
    return Unquantized(
        artifact.source,
        config,
        SHORT[dtype] if dtype else _dtype(config) or _most_common(artifact),
        artifact.logical_params,
        _all_weights(artifact, config, strict=not is_ggml),
        _tied_head(artifact, config),
        tuple(container.tensors.values()) if is_ggml else (),
        container.metadata if is_ggml else {},
    )


def _all_weights(artifact: Artifact, config: Mapping[str, Any], *, strict: bool) -> tuple[Weight, ...]:
    """Every weight; where one is unknown a `FormatError`, or none of them if not `strict`."""
    kept = [tensor for tensor in artifact.tensors if tensor.role not in DEAD]
    try:
        return tuple(weight for tensor in kept for weight in _weights(tensor, config, artifact.source))
    except FormatError:
        if strict:
            raise
        return ()


def _most_common(artifact: Artifact) -> str:
    values: Counter[str] = Counter()
    for tensor in artifact.parameters:
        values[tensor.stored.dtype] += tensor.params
    dtype = values.most_common(1)[0][0] if values else ""
    if dtype not in FLOATS.values():
        raise ValueError(f"{artifact.source}: most of its values are {dtype or 'nothing'}: give --dtype")
    return dtype


def _tied_head(artifact: Artifact, config: Mapping[str, Any]) -> str | None:
    """The name of the output head where it is no tensor of its own: told by config.json, or always so in a GGUF."""
    tied = [*artifact.aliases, *(tensor.name for tensor in artifact.tensors if tensor.role == "tied")]
    named = next((name for name in tied if name.endswith(HEADS)), None)
    if named or any(tensor.name.endswith(HEADS) for tensor in artifact.parameters):
        return named
    classes = config.get("architectures")
    writes = isinstance(classes, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    return "lm_head.weight" if writes or artifact.container == "gguf" else None


def _weights(tensor: LogicalTensor, config: Mapping[str, Any], source: str) -> Iterator[Weight]:
    """The tensor as a checkpoint of its own model has it; the stacked experts of a GGUF are single matrices there."""
    kind = _kind(tensor, config)
    if kind is None:
        what = f"{list(tensor.shape)}: its name does not say what it is; predict from config.json"
        raise FormatError(what, file=source, tensor=tensor.name)
    wide = ("F16", "BF16") if _WIDE.search(tensor.name) else ()
    layers, dot, last = tensor.name.partition(".experts.")
    if kind == "stack" and last.endswith(".weight") and dot:
        for number in range(tensor.shape[0]):
            yield Weight(f"{layers}.experts.{number}.{last}", tensor.shape[1:], "expert")
        return
    own = tensor.stored.dtype
    yield Weight(tensor.name, tensor.shape, kind, wide, None if DTYPES[own].kind == "float" else own)


def _kind(tensor: LogicalTensor, config: Mapping[str, Any]) -> Kind | None:
    layer = tensor.name.rpartition(".")[0].rpartition(".")[2]
    if tensor.role == "buffer":
        return "buffer"
    if len(tensor.shape) < 2:
        return "other"
    if tensor.name.endswith(HEADS):
        return "head"
    if tensor.name.endswith(EMBEDDINGS) or layer in TABLES:
        return "embedding"
    if ".experts." in tensor.name:
        return "expert" if len(tensor.shape) == 2 and tensor.name.endswith(".weight") else "stack"
    if layer in ROUTERS:
        return "other"
    if layer not in LINEARS or not tensor.name.endswith(".weight") or len(tensor.shape) != 2:
        return None
    turned = tensor.transposed or config.get("model_type") in schemes.CONV1D_MODELS
    return "conv1d" if turned and layer in schemes.CONV1D_LAYERS else "linear"
