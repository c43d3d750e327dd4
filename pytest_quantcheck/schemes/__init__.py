"""The schemes, in the order they are asked, and the one way from stored to logical tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding
from pytest_quantcheck.schemes import (
    activation_scales,
    aqlm,
    awq_activation,
    awq_gemm,
    awq_gemv,
    awq_gemv_fast,
    bitblas,
    bitnet,
    bnb_4bit,
    bnb_8bit,
    ct_float_packed,
    ct_marlin_24,
    ct_naive_quantized,
    ct_pack_quantized,
    ct_sparse_bitmask,
    eetq,
    exl2,
    exl3,
    fbgemm_fp8,
    fouroversix,
    fp8_fine_grained,
    fp_quant,
    gemma,
    ggml_codebook,
    ggml_fp4,
    ggml_iq4,
    ggml_k,
    ggml_legacy,
    ggml_low_bit,
    ggml_ternary,
    ggml_unknown,
    gptq,
    higgs,
    hqq,
    marlin,
    metal,
    mlx,
    modelopt,
    modelopt_live,
    mxfp4,
    nvfp4_live,
    onnx_affine,
    onnx_bnb4,
    onnx_fpq4,
    onnx_matmulnbits,
    onnx_qmoe,
    onnx_sparse,
    plain,
    qqq,
    quantization_config,
    quanto_kernels,
    quanto_qbits,
    quanto_qbytes,
    quark,
    sinq,
    spqr,
    tflite_affine,
    torch_ao,
    torchao_affine,
    torchao_int4,
    torchao_int4_cpu,
    torchao_mx,
    torchao_nf4,
    torchao_opaque,
    transformer_engine,
    vptq,
)
from pytest_quantcheck.schemes.scheme import Expose, Namespace, Scheme
from pytest_quantcheck.tensor import Coder, Container, Decoder, LogicalTensor, Origin, StoredTensor

if TYPE_CHECKING:
    import torch

# The first scheme that claims a group of stored tensors keeps it; `plain` takes what is left.
SCHEMES: tuple[Scheme, ...] = (
    tflite_affine.SCHEME,
    onnx_matmulnbits.SCHEME,
    onnx_affine.SCHEME,
    onnx_bnb4.SCHEME,
    onnx_qmoe.SCHEME,
    onnx_fpq4.SCHEME,
    onnx_sparse.SCHEME,
    bnb_4bit.SCHEME,
    bnb_8bit.SCHEME,
    mlx.SCHEME,
    bitnet.SCHEME,
    aqlm.SCHEME,
    vptq.SCHEME,
    metal.SCHEME,
    gemma.SCHEME,
    spqr.SCHEME,
    eetq.SCHEME,
    higgs.SCHEME,
    exl2.SCHEME,
    exl3.SCHEME,
    bitblas.SCHEME,
    qqq.SCHEME,
    marlin.SCHEME,
    awq_gemv_fast.SCHEME,
    awq_gemv.SCHEME,
    awq_gemm.SCHEME,
    awq_activation.SCHEME,
    gptq.SCHEME,
    sinq.SCHEME,
    hqq.SCHEME,
    ct_marlin_24.SCHEME,
    ct_sparse_bitmask.SCHEME,
    ct_pack_quantized.SCHEME,
    ct_float_packed.SCHEME,
    ct_naive_quantized.SCHEME,
    transformer_engine.SCHEME,
    fp8_fine_grained.SCHEME,
    fbgemm_fp8.SCHEME,
    mxfp4.SCHEME,
    modelopt.SCHEME,
    modelopt_live.SCHEME,
    quark.SCHEME,
    fouroversix.SCHEME,
    fp_quant.SCHEME,
    nvfp4_live.SCHEME,
    quanto_kernels.SCHEME,
    quanto_qbits.SCHEME,
    quanto_qbytes.SCHEME,
    torchao_affine.SCHEME,
    torchao_mx.SCHEME,
    torchao_int4.SCHEME,
    torchao_int4_cpu.SCHEME,
    torchao_nf4.SCHEME,
    torchao_opaque.SCHEME,
    torch_ao.SCHEME,
    ggml_legacy.SCHEME,
    ggml_k.SCHEME,
    ggml_iq4.SCHEME,
    ggml_ternary.SCHEME,
    ggml_fp4.SCHEME,
    ggml_low_bit.SCHEME,
    ggml_codebook.SCHEME,
    ggml_unknown.SCHEME,
    activation_scales.SCHEME,
    plain.SCHEME,
)

# By decoder, so that a tensor that is decoded in another way has other codes, or none.
CODERS: Mapping[Decoder | None, Coder] = {
    decoder: coder for scheme in SCHEMES for decoder, coder in scheme.coders.items()
}

# The models whose linears are transformers' Conv1D, and the names of those layers.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def exposers() -> Mapping[str, Expose]:
    """Return how live objects are shown as stored tensors, by `package.Class`; of several schemes the first answers."""
    asked: dict[str, list[Expose]] = {}
    for scheme in SCHEMES:
        for name, expose in scheme.live.items():
            asked.setdefault(name, []).append(expose)
    return {name: each[0] if len(each) == 1 else partial(_first_answer, each) for name, each in asked.items()}


def _first_answer(asked: Iterable[Expose], owner: Any, name: str) -> Mapping[str, Any] | None:
    return next((shown for expose in asked if (shown := expose(owner, name)) is not None), None)


def logical_tensors(container: Container) -> list[LogicalTensor]:
    """Return what the unquantized model has, in the order of the container, every stored tensor used exactly once.

    Raises `UnknownEncoding` for a tensor or a `quant_method` that no scheme knows, `FormatError` for a broken group.
    """
    by_ending = _by_ending(container.tensors)
    namespace = Namespace(
        container.tensors,
        quantization_config.find(container.configs),
        container.configs.get("config.json", {}),
        container.metadata,
        container.configs,
        by_ending.keys(),
    )
    configured = _configured(namespace)
    found: dict[str, LogicalTensor] = {}  # stored name -> the logical tensor that uses it
    by_dtype = _by_dtype(container.tensors)
    for scheme in SCHEMES:
        for anchor in (*_anchors(scheme, by_ending), *_written_as(scheme, by_dtype)):
            if anchor.name not in found:
                _take(scheme.claim(anchor, namespace), found, namespace)
    for name, stored in container.tensors.items():
        if name not in found:
            _refuse(stored, configured, namespace)
            found[name] = _of_all_ranks(plain.claim(stored, namespace))
    primary = (tensor for name in container.tensors if (tensor := found[name]).parts[0].stored.name == name)
    if not container.origins:
        return list(primary)
    return [_as_it_was(tensor, container.origins.get(tensor.stored.name)) for tensor in primary]


def _by_ending(tensors: Mapping[str, StoredTensor]) -> Mapping[str, list[StoredTensor]]:
    """The stored tensors by the last component of their names: there are few, however many tensors."""
    found: dict[str, list[StoredTensor]] = defaultdict(list)
    for name, stored in tensors.items():
        found[name[name.rfind(".") + 1 :]].append(stored)
    return found


def _anchors(scheme: Scheme, by_ending: Mapping[str, list[StoredTensor]]) -> Iterable[StoredTensor]:
    for ending, group in by_ending.items():
        if scheme.anchors and ending.endswith(scheme.anchors):
            yield from group


def _by_dtype(tensors: Mapping[str, StoredTensor]) -> Mapping[str, list[StoredTensor]]:
    found: dict[str, list[StoredTensor]] = {}
    for stored in tensors.values():
        found.setdefault(stored.dtype, []).append(stored)
    return found


def _written_as(scheme: Scheme, by_dtype: Mapping[str, list[StoredTensor]]) -> Iterable[StoredTensor]:
    for dtype in scheme.dtypes:
        yield from by_dtype.get(dtype, ())


def _as_it_was(tensor: LogicalTensor, origin: Origin | None) -> LogicalTensor:
    """The tensor under the name of the unquantized model, with what `decode` has to undo."""
    if origin is None:
        return tensor
    changed = origin.paired_rows or origin.shift
    return tensor._replace(
        name=origin.name,
        paired_rows=origin.paired_rows,
        transposed=origin.transposed,
        shift=origin.shift,
        cells=None if changed else tensor.cells,
    )


def _take(tensor: LogicalTensor | None, found: dict[str, LogicalTensor], namespace: Namespace) -> None:
    if tensor is None:
        return
    if _was_conv1d(tensor, namespace):
        tensor = tensor._replace(transposed=True)
    if tensor.stored.role in ("adapter", "shadow", "tied"):
        tensor = tensor._replace(role=tensor.stored.role)
    tensor = _of_all_ranks(tensor)
    for part in tensor.parts:
        other = found.setdefault(part.stored.name, tensor)
        if other is not tensor:
            raise FormatError(f"belongs to `{other.name}` and to `{tensor.name}` at once", tensor=part.stored.name)


def _of_all_ranks(tensor: LogicalTensor) -> LogicalTensor:
    """The tensor as all ranks together have it, where its parts are a shard."""
    if tensor.stored.whole is None:
        return tensor
    return tensor._replace(shape=tensor.stored.whole, decoder=_decode_shard)


def _decode_shard(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    raise NotDecodable("is sharded: this process holds only a part of it (gather it first)", tensor=tensor.name)


def _was_conv1d(tensor: LogicalTensor, namespace: Namespace) -> bool:
    """Whether the unquantized model keeps this matrix as [in, out]; every quantizer makes a [out, in] linear of it."""
    if namespace.config.get("model_type") not in CONV1D_MODELS:
        return False
    return tensor.name.rpartition(".")[0].rpartition(".")[2] in CONV1D_LAYERS


def _configured(namespace: Namespace) -> tuple[Scheme, ...]:
    """The schemes that the checkpoint's `quant_method` announces."""
    method = namespace.quantization.get("quant_method")
    if method is None:
        return ()
    announced = tuple(scheme for scheme in SCHEMES if method in scheme.methods)
    if not announced:
        known = ", ".join(sorted({name for scheme in SCHEMES for name in scheme.methods}))
        raise UnknownEncoding(f"quant_method `{method}` is not one we know ({known})")
    return announced


def _refuse(stored: StoredTensor, configured: tuple[Scheme, ...], namespace: Namespace) -> None:
    for scheme in configured:
        reason = scheme.refuse(stored, namespace) if scheme.refuse else None
        if reason:
            raise UnknownEncoding(reason, tensor=stored.name)
