"""How each library decodes a weight at run time: one line per class, by `package.Class` of a module or a parameter.

A row calls what the library's own forward calls, on the device where the weight is. No library is imported before one
of its objects is met.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import schemes
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.containers import live_module
from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import NotDecodable
from pytest_quantcheck.tensor import LogicalTensor

if TYPE_CHECKING:
    import torch


ANY = ("float32", "bfloat16", "float16")


class Kernel(NamedTuple):
    """What a library computes of one class of layers.

    `dequantize` takes the module, or the parameter, and returns its weight as the library sees it; None where this one
    is not quantized. `call` is what it calls, as one would write it.
    `computes_in` takes a module that has run and returns the dtype of its matrix product, None for that of the input.
    `takes` are the dtypes of inputs that the forward takes, where that is not the dtype of the layer alone.
    `rounds` takes a module and its input and returns how far each activation may be rounded, where the forward does.
    `reproduce` writes a script that shows the library's decode beside the formula of its format.
    """

    dequantize: Callable[[Any], torch.Tensor | None]
    call: str
    computes_in: Callable[[Any], torch.dtype | None] | None = None
    takes: tuple[str, ...] = ()
    rounds: Callable[[Any, torch.Tensor], torch.Tensor | None] | None = None
    reproduce: Callable[[LogicalTensor, str], str] | None = None


class Layer(NamedTuple):
    """A quantized tensor of a live model, what holds it (a module, or the parameter itself), and its library."""

    tensor: LogicalTensor
    owner: Any
    package: str
    kernel: Kernel


def layers(model: Any, artifact: Artifact) -> Iterator[Layer]:
    """Yield the quantized tensors of a live model whose library is known, each once."""
    by_name = {tensor.name: tensor for tensor in artifact.tensors if tensor.quantized}
    for owner, tensor in _owners(model, by_name):
        known = _kernel(owner)
        if known is not None and by_name.pop(tensor.name, None) is not None:
            yield Layer(tensor, owner, *known)


def linears(model: Any, artifact: Artifact) -> Iterator[tuple[LogicalTensor, Any]]:
    """Yield the quantized matrices and the modules that multiply by them; of wrappers the innermost module."""
    found: dict[str, tuple[LogicalTensor, Any]] = {}
    by_name = {tensor.name: tensor for tensor in artifact.tensors if tensor.quantized and len(tensor.shape) == 2}
    for module, named in live_module.weights_of_modules(model, schemes.exposers()):
        tensor = by_name.get(named("weight"))
        if tensor is not None and "embedding" not in type(module).__name__.lower():
            found[tensor.name] = (tensor, module)
    return iter(found.values())


def kernel_of(module: Any) -> Kernel | None:
    """Return the row of a module, or of its weight."""
    for owner in (getattr(module, "weight", None), module):
        known = _kernel(owner)
        if known is not None:
            return known[1]
    return None


def precisions(tensor: LogicalTensor) -> set[torch.dtype]:
    """Return the dtypes of 32 and 16 bits that the scales and tables of an encoded weight have."""
    import torch

    names = {part.stored.dtype for part in tensor.parts[1:]} & {"F32", "F16", "BF16"}
    return {getattr(torch, str(DTYPES[name].torch)) for name in names}


def version(package: str) -> str:
    """Return the distribution that a package comes from, and its version: `bitsandbytes 0.50.2`; else the package."""
    names = metadata.packages_distributions().get(package)
    return f"{names[0]} {metadata.version(names[0])}" if names else package


def place(device: torch.device) -> str:
    """Return a device as a bug report names it: with what the CPU or the GPU can do."""
    import torch

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else str(device)


def _owners(model: Any, by_name: dict[str, LogicalTensor]) -> Iterator[tuple[Any, LogicalTensor]]:
    """What may hold each tensor: the parameter, which may be a tensor class that decodes itself, then its module."""
    for module, named in live_module.weights_of_modules(model, schemes.exposers()):
        for name, parameter in [*module._parameters.items(), *module._buffers.items()]:
            tensor = by_name.get(named(name))
            if parameter is not None and tensor is not None:
                yield parameter, tensor
        for name in ("weight", "original"):
            tensor = by_name.get(named(name))
            if tensor is not None:
                yield module, tensor


def _kernel(owner: Any) -> tuple[str, Kernel] | None:
    for cls in type(owner).__mro__:
        package = cls.__module__.partition(".")[0]
        kernel = KERNELS.get(f"{package}.{cls.__name__}")
        if kernel is not None:
            return package, kernel
    return None


def _bnb_4bit(module: Any) -> torch.Tensor:
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        what = (
            "was repacked by its first forward on a CPU with AVX512-BF16, and dequantize_4bit does not know that layout"
        )
        raise NotDecodable(f"{what}: compare before the first forward, or use assert_module_output")
    return _tensor(functional.dequantize_4bit(module.weight.data, state))


def _bnb_4bit_computes_in(module: Any) -> torch.dtype | None:
    """The first forward on a CPU with AVX512-BF16 packs the weight for products in bfloat16."""
    import torch

    state = module.weight.quant_state
    dtype: torch.dtype | None = module.compute_dtype
    return torch.bfloat16 if getattr(state, "packing_format_for_cpu", False) else dtype


def _bnb_4bit_script(tensor: LogicalTensor, device: str) -> str:
    rows, columns = tensor.shape[-2:]
    kind = tensor.scheme.removeprefix("bnb-")
    return f"""\
import torch, bitsandbytes.functional as F
weight = torch.randn({rows}, {columns}, device="{device}")
codes, state = F.quantize_4bit(weight, blocksize={tensor.block}, quant_type="{kind}")
values = state.code[torch.cat((codes >> 4, codes & 15), 1).view(-1)[:weight.numel()].int()]
stored = (values * state.absmax.repeat_interleave({tensor.block})[:weight.numel()]).view_as(weight)
print((F.dequantize_4bit(codes, state) - stored).abs().max())  # 0 up to rounding"""


def _bnb_int8(module: Any) -> torch.Tensor:
    from bitsandbytes import functional

    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return _tensor(functional.int8_vectorwise_dequant(module.weight.data, scale))


def _float16(module: Any) -> torch.dtype:
    import torch

    return torch.float16


def _rows_to_int8(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Half a step of 127 between zero and the largest magnitude of each row."""
    return (x.abs().amax(dim=1, keepdim=True) / 254).expand_as(x)


def _to_float8(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Half a step of three bits of mantissa, and of the smallest exponent, with each row scaled to 448."""
    return x.abs() / 16 + x.abs().amax(dim=1, keepdim=True) / 448 * 2**-10


def _torch_rounds(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Dynamic quantization of torch: half of 127 steps over the whole input."""
    if "dynamic" not in type(module).__module__:
        return None
    return ((x.max().clamp(min=0) - x.min().clamp(max=0)) / 254).expand_as(x)


def _torchao_rounds(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    dynamic = getattr(module.weight, "act_quant_kwargs", None) or getattr(
        module.weight, "activation_quantization", None
    )
    if dynamic is None:
        return None
    return _to_float8(module, x) if "float8" in f"{dynamic}".lower() else _rows_to_int8(module, x)


def _compute_dtype(module: Any) -> torch.dtype | None:
    dtype: torch.dtype | None = getattr(module, "compute_dtype", None)
    return dtype


def _parametrized(module: Any) -> torch.Tensor:
    return _tensor(module())


def _dequantized(owner: Any) -> torch.Tensor:
    return _tensor(owner.dequantize())


def _original(parameter: Any) -> torch.Tensor:
    return _tensor(parameter.get_original_weight())


def _unknown(owner: Any) -> None:
    """No decode to call: the forward computes from the codes."""


def _torchao(parameter: Any) -> torch.Tensor:
    """`dequantize()` leaves out the factors that the forward puts on the activations."""
    values, factors = parameter.dequantize(), getattr(parameter, "act_pre_scale", None)
    return _tensor(values if factors is None else values * factors)


def _torch(module: Any) -> torch.Tensor | None:
    """A quantized module of torch itself, or one that compressed-tensors has compressed in place."""
    if callable(getattr(module, "weight", None)):
        return _tensor(module.weight().dequantize())
    if getattr(module, "quantization_scheme", None) is None:
        return None
    from compressed_tensors.compressors import decompress_module

    plain = copy.deepcopy(module)
    decompress_module(plain)
    return _tensor(plain.weight)


def _gemma(module: Any) -> torch.Tensor:
    return _tensor(module._dequantize_weights())


def _tensor(values: Any) -> torch.Tensor:
    values = values.detach()
    assert hasattr(values, "dtype")
    return values  # type: ignore[no-any-return]  # libraries are not typed


_BNB_4BIT = Kernel(
    _bnb_4bit,
    "bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)",
    _bnb_4bit_computes_in,
    ANY,
    reproduce=_bnb_4bit_script,
)
_BNB_INT8 = Kernel(
    _bnb_int8,
    "bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)",
    _float16,
    ANY,
    rounds=_rows_to_int8,
)

_BITNET = Kernel(_unknown, "", rounds=_rows_to_int8)
_TORCH = Kernel(
    _torch, "layer.weight().dequantize(), or decompress_module(layer) of compressed-tensors", rounds=_torch_rounds
)

KERNELS = {
    "bitsandbytes.Linear4bit": _BNB_4BIT,
    "bitsandbytes.Embedding4bit": _BNB_4BIT,
    "bitsandbytes.Linear8bitLt": _BNB_INT8,
    "torch.ParametrizationList": Kernel(_parametrized, "layer()"),
    "torch.Linear": _TORCH,
    "torch.Conv1d": _TORCH,
    "torch.Conv2d": _TORCH,
    "torch.Embedding": _TORCH,
    "torch.EmbeddingBag": _TORCH,
    "torchao.NF4Tensor": Kernel(_original, "layer.weight.get_original_weight()"),
    "torchao.TorchAOBaseTensor": Kernel(_torchao, "layer.weight.dequantize()", rounds=_torchao_rounds),
    "optimum.QTensor": Kernel(_dequantized, "layer.weight.dequantize()"),
    "hqq.HQQLinear": Kernel(_dequantized, "layer.dequantize()", _compute_dtype),
    "transformers.BitLinear": _BITNET,
    "transformers.AutoBitLinear": _BITNET,
    "transformers.CompressedTensorsFP8Linear": Kernel(_unknown, "", rounds=_to_float8),
    "transformers.QuantizedLinear": Kernel(_gemma, "layer._dequantize_weights()"),
}
