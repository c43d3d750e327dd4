"""MLX: codes packed along each row in 32-bit words, for linear layers, embeddings and stacks of experts.

    part          dtype                        stored shape            packing
    weight        U32                          [..., N, K * bits / 32] lowest bits first, codes straddle words
    scales        model dtype (affine), else U8 [..., N, K / group]    E8M0 (mxfp4, mxfp8) or E4M3 (nvfp4)
    biases        model dtype (affine only)    [..., N, K / group]     not `bias`, which is the layer's own
    global_scale  F32 (nvfp4, optional)        [] or [experts]         largest absolute value

Formula: affine: w = code * scale + bias. mxfp4, nvfp4: w = E2M1[code] * scale; mxfp8: w = E4M3[code] * scale.
With `global_scale`: times global_scale / (448 * 6).
Source: mlx 0.32.4, mlx/nn/layers/quantized.py and `mx.dequantize`; mlx-lm 0.32.2, utils.py (`infer_quant_config`, the
per-module entries of config `quantization`) and models/switch_layers.py.

The header gives bits * group only. With U8 scales that product names the mode; with affine scales the module's entry
in the configuration or its default decides, and where it is not there the product must have one solution.

Departs from the library in one byte: scale 255 of E8M0 is NaN as in OCP Microscaling Formats 1.0; MLX reads infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.dtypes import DTYPES
from pytest_quantcheck.errors import FormatError, UnknownEncoding
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, Coded, LogicalTensor, Part, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch

KINDS: dict[str, ByteClass] = {"scales": "scales", "biases": "zero_points", "global_scale": "scales"}
BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
FULL_RANGE = 448 * 6  # what `global_scale` stands for: the largest scale times the largest code


class Layout(NamedTuple):
    """How one module is encoded."""

    mode: str
    group: int
    bits: int


# bits * group -> the layout, for scales of one byte.
SMALL_FLOATS = {
    layout.bits * layout.group: layout
    for layout in (Layout("nvfp4", 16, 4), Layout("mxfp4", 32, 4), Layout("mxfp8", 32, 8))
}
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
FLOORS_DB = {"nvfp4": 19.0, "mxfp4": 17.0, "mxfp8": 29.5, 8: 39.0, 4: 16.5, 3: 7.0}


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that `scales` or `biases` belong to, where it is packed in 32-bit words."""
    prefix, _, last = anchor.name.rpartition(".")
    weight_name = f"{prefix}.weight" if prefix else "weight"
    weight = namespace.tensors.get(weight_name)
    if last in KINDS and weight is None and _made_by_mlx(namespace):
        raise FormatError(f"has no `{weight_name}` beside it", tensor=anchor.name)
    if last not in KINDS or weight is None or weight.dtype != "U32":
        return None
    found = {part: namespace.tensors.get(f"{prefix}.{part}" if prefix else part) for part in KINDS}
    if f"{prefix}.qbiases" in namespace.tensors or namespace.quantization.get("quant_method") == "metal":
        return None
    scales = found["scales"]
    if scales is None:
        raise FormatError(f"has no `{prefix}.scales`", tensor=weight_name)
    layout = _layout(prefix, weight, scales, namespace)
    tensor = LogicalTensor(
        weight_name,
        (*weight.shape[:-1], scales.shape[-1] * layout.group),
        f"mlx-{layout.mode}-{layout.bits}bit" if layout.mode == "affine" else f"mlx-{layout.mode}",
        "parameter",
        (
            Part("weight", "codes", weight),
            *(Part(part, KINDS[part], stored) for part, stored in found.items() if stored is not None),
        ),
        decode,
        layout,
        block=layout.group,
        floor_db=FLOORS_DB.get(layout.bits if layout.mode == "affine" else layout.mode),
    )
    _check(tensor, layout)
    return tensor._replace(rounding=_rounding(layout, scales, scaled=found.get("global_scale") is not None))


def _rounding(layout: Layout, scales: StoredTensor, *, scaled: bool) -> Rounding | None:
    """Affine codes are often chosen by training (mlx-lm's DWQ), so nothing is said of their steps."""
    if layout.mode == "affine":
        if layout.bits < 2:
            return None
        to_code = rounding.from_edge(layout.bits, scale=rounding.kept_in(scales))
        return rounding.grouped(to_code, layout.group)
    if layout.mode == "mxfp8":
        to_float = rounding.small_float("float8_e4m3fn", scale="ceil")
        return rounding.grouped(to_float, layout.group, steps=steps.floats("float8_e4m3fn", clips=True))
    scale: rounding.ScaleKind = "ceil" if layout.mode == "mxfp4" else "e4m3-scaled" if scaled else "e4m3"
    gaps = steps.levels(packing.E2M1, 1.0, 0x22, clips=True)
    return rounding.grouped(rounding.codebook(packing.E2M1, scale=scale), layout.group, steps=gaps)


def _made_by_mlx(namespace: Namespace) -> bool:
    """Whether the configuration is one of MLX, which names no method."""
    return "quant_method" not in namespace.quantization and _settings(namespace) != {}


def _layout(prefix: str, weight: StoredTensor, scales: StoredTensor, namespace: Namespace) -> Layout:
    """Mode, group size and bits of one module: from the shapes as far as they go, then from the configuration."""
    product = _product(weight, scales)
    settings = _settings(namespace)
    own = settings.get(prefix)
    if own is False:
        raise FormatError("is packed, but the configuration leaves its module unquantized", tensor=weight.name)
    if scales.dtype == "U8":
        layout = SMALL_FLOATS.get(product)
    elif isinstance(own, Mapping):
        layout = _announced(own)
    else:
        layout = _announced(settings)
        if layout is None or layout.bits * layout.group != product:
            layout = _only_solution(product, weight)
    if layout is None or layout.bits * layout.group != product:
        raise FormatError(f"has {product} bits per group, which no mode and no setting has", tensor=weight.name)
    if isinstance(own, Mapping) and layout != _announced(own):
        raise FormatError(f"is {_words(layout)}, the configuration says {_words(_announced(own))}", tensor=weight.name)
    return layout


def _product(weight: StoredTensor, scales: StoredTensor) -> int:
    """Bits per group, which is all that the two shapes say."""
    if len(weight.shape) < 2 or scales.shape[:-1] != weight.shape[:-1] or not scales.shape[-1]:
        raise FormatError(f"{list(scales.shape)} does not match codes {list(weight.shape)}", tensor=scales.name)
    product, rest = divmod(32 * weight.shape[-1], scales.shape[-1])
    if rest:
        rule = f"{weight.shape[-1]} words do not divide into {scales.shape[-1]} groups"
        raise FormatError(rule, tensor=scales.name)
    return product


def _settings(namespace: Namespace) -> Mapping[str, Any]:
    """The block that mlx-lm writes: defaults beside one entry per module that departs from them."""
    for block in (namespace.config.get("quantization"), namespace.quantization):
        if isinstance(block, Mapping) and "bits" in block and "group_size" in block:
            return block
    return {}


def _announced(block: Mapping[str, Any]) -> Layout | None:
    """The layout that a block of the configuration names, gaps filled as `nn.quantize` fills them."""
    mode = block.get("mode", "affine")
    if not block or not isinstance(mode, str) or mode not in DEFAULTS:
        return None
    group, bits = block.get("group_size") or DEFAULTS[mode][0], block.get("bits") or DEFAULTS[mode][1]
    return Layout(mode, group, bits) if type(group) is int and type(bits) is int else None


def _only_solution(product: int, weight: StoredTensor) -> Layout | None:
    solutions = [Layout("affine", group, bits) for group in GROUPS for bits in BITS if group * bits == product]
    if len(solutions) > 1:
        choices = ", ".join(f"{layout.bits} bits in groups of {layout.group}" for layout in solutions)
        raise UnknownEncoding(f"may be {choices}: the configuration must say which", tensor=weight.name)
    return solutions[0] if solutions else None


def _words(layout: Layout | None) -> str:
    return f"{layout.mode}, {layout.bits} bits in groups of {layout.group}" if layout else "something else"


def _check(tensor: LogicalTensor, layout: Layout) -> None:
    affine = layout.mode == "affine"
    if not affine and tensor.part("scales").dtype != "U8":
        raise FormatError(f"{tensor.part('scales').dtype} scales, {_words(layout)} has U8", tensor=tensor.name)
    if affine and (layout.bits not in BITS or layout.group not in GROUPS):
        raise FormatError(f"is {_words(layout)} (MLX has {BITS} bits, groups of {GROUPS})", tensor=tensor.name)
    if affine != tensor.has("biases"):
        fault = "has no `biases`" if affine else "has `biases`"
        raise FormatError(f"{fault}, but its scales are {tensor.part('scales').dtype}", tensor=tensor.name)
    if affine and DTYPES[tensor.part("scales").dtype].kind != "float":
        raise FormatError(f"{tensor.part('scales').dtype} scales are neither U8 nor floats", tensor=tensor.name)
    if affine and tensor.part("biases").shape != tensor.part("scales").shape:
        shapes = f"{list(tensor.part('biases').shape)}, its scales {list(tensor.part('scales').shape)}"
        raise FormatError(f"has the shape {shapes}", tensor=tensor.part("biases").name)
    experts = prod(tensor.shape[:-2])
    if tensor.has("global_scale") and (layout.mode != "nvfp4" or tensor.part("global_scale").elements != experts):
        rule = f"nvfp4 has one for each of {experts} matrices"
        raise FormatError(f"is no global scale of {_words(layout)} ({rule})", tensor=tensor.part("global_scale").name)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    found = coded(tensor, start, stop, device)
    if found is not None:
        return packing.expand(found).view(stop - start, tensor.columns)
    layout = tensor.layout
    assert isinstance(layout, Layout)
    groups = tensor.columns // layout.group
    values = _values(tensor, layout, start * tensor.columns, stop * tensor.columns, device)
    values = values.view(stop - start, groups, layout.group)
    scales = _scales(tensor, layout, start * groups, stop * groups, device)
    values.mul_(scales.view(stop - start, groups, 1))
    if tensor.has("global_scale"):
        rows = torch.arange(start, stop, device=device) // tensor.shape[-2]
        whole = tensor.part("global_scale").load(device=device).to(torch.float32).view(-1)
        values.mul_(whole[rows].div_(FULL_RANGE).view(-1, 1, 1))
    return values.view(stop - start, tensor.columns)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where the mode is affine."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.mode != "affine":
        return None
    return packing.biased_rows(tensor, slice(start, stop), layout.bits, layout.group, device, biases="biases")


def _values(tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str) -> torch.Tensor:
    """The values of codes `first` up to `last` before scaling, flat."""
    import torch

    if layout.mode == "mxfp8":
        return tensor.stored.load_bytes(first, last, device).view(torch.float8_e4m3fn).to(torch.float32)
    codes = packing.bit_stream(tensor.stored, first, last, layout.bits, device)
    return packing.look_up(codes, torch.tensor(packing.E2M1, device=device).view(-1, 1)).view(-1)


def _scales(tensor: LogicalTensor, layout: Layout, first: int, last: int, device: str) -> torch.Tensor:
    import torch

    scales = tensor.part("scales").load(first, last, device)
    if layout.mode == "nvfp4":
        return scales.view(torch.float8_e4m3fn).to(torch.float32)
    return packing.powers_of_two(scales)


SCHEME = Scheme(
    name="mlx",
    title="MLX (affine 1 to 8 bits, mxfp4, nvfp4, mxfp8)",
    variants=(*(f"mlx-affine-{bits}bit" for bits in BITS), "mlx-mxfp4", "mlx-nvfp4", "mlx-mxfp8"),
    claim=claim,
    anchors=("scales", "biases"),
    coders={decode: coded},
    source="mlx 0.32.4, nn/layers/quantized.py; mlx-lm 0.32.2, utils.py",
    verified="mlx 0.32.4",
)
