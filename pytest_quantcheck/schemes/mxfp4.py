"""MXFP4 as gpt-oss writes it: E2M1 codes in blocks of 32 with one power of two each.

    part            dtype  stored shape     packing
    X_blocks        U8     [E, O, G, 16]    32 codes in 16 bytes, low nibble first; O outputs, G = inputs / 32
    X_scales        U8     [E, O, G]        an exponent, 2**(e - 127)
    X_blocks        U8     [O, G, 16]       one matrix
    X.blocks        U8     [E, O, G, 16]    OpenAI's own files, with X.scales

Formula: w[e, 32 * g + i, o] = E2M1[code[e, o, g, i]] * 2**(scales[e, o, g] - 127). transformers keeps its experts as
[E, inputs, outputs], so a stack of `X_blocks` is transposed on decode; one matrix and OpenAI's own stacks are not.
Source: transformers 5.17, integrations/mxfp4.py; openai/gpt-oss, gpt_oss/torch/weights.py.

Live, `Mxfp4GptOssExperts` first has codes as parameters, without scales: counted, not decodable. Once loaded on a GPU,
`X` is a Triton tensor and no parameter: the codes are `X.storage.data`, the scales are in `X_precision_config`. With
`StridedLayout` only strides differ; the layouts that permute for Hopper and Blackwell are counted and not decodable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck import strict_json
from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing, rounding, steps
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import Coded, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

GROUP = 32
FLOOR_DB = 17.0
LIVE = "_mxfp4_layout"  # what a live module says about its experts, see `expose`
LIVE_LIMIT = 1 << 10
STRIDED = "StridedLayout"


class Layout(NamedTuple):
    """Outputs and bytes of codes per output of one matrix, and what permuted them, if anything did."""

    outputs: int
    width: int
    transposed: bool
    permuted: str | None


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the experts that `X_blocks`, or a live module's record, belongs to."""
    if anchor.name.endswith(LIVE):
        return _claim_live(anchor, namespace)
    name, ending = anchor.name[: -len("_blocks")], anchor.name[-len("_blocks") :]
    scales = namespace.tensors.get(f"{name}{ending[0]}scales")
    if ending not in ("_blocks", ".blocks") or anchor.dtype != "U8":
        return None
    if scales is None:
        raise FormatError(f"has no `{name}{ending[0]}scales`", tensor=anchor.name)
    if len(anchor.shape) not in (3, 4) or anchor.shape[-1] != GROUP // 2:
        raise FormatError(f"{list(anchor.shape)} is not [E, O, G, 16] or [O, G, 16]", tensor=anchor.name)
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != anchor.shape[:-1]:
        rule = f"U8 {list(anchor.shape[:-1])}"
        raise FormatError(f"{scales.dtype} {list(scales.shape)} are not its scales ({rule})", tensor=scales.name)
    *stack, outputs, groups, _ = anchor.shape
    transposed = bool(stack) and ending == "_blocks"
    matrix = (groups * GROUP, outputs) if transposed else (outputs, groups * GROUP)
    layout = Layout(outputs, groups * GROUP // 2, transposed, None)
    parts = (Part("blocks", "codes", anchor), Part("scales", "scales", scales))
    return _logical(name, (*stack, *matrix), parts, layout)


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.permuted:
        raise NotDecodable(f"its codes are permuted for the GPU (`{layout.permuted}`)", tensor=tensor.name)
    if not tensor.has("scales"):
        raise NotDecodable("its module was built, but not loaded: there are no scales", tensor=tensor.name)
    if not layout.transposed:
        return packing.expand(_rows(tensor, start, stop, device), tensor.columns)
    found = [
        _outputs(tensor, layout, slice(matrix * layout.outputs, (matrix + 1) * layout.outputs), inputs, device).t()
        for matrix, inputs in packing.matrix_windows(start, stop, tensor.shape[-2])
    ]
    return torch.cat(found) if found else torch.zeros((0, tensor.columns), device=device)


def coded(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded | None:
    """Return rows `start` up to `stop` as codes, where rows are outputs."""
    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.permuted or layout.transposed or not tensor.has("scales"):
        return None
    return _rows(tensor, start, stop, device)


def _rows(tensor: LogicalTensor, start: int, stop: int, device: str) -> Coded:
    codes = packing.e2m1_codes(tensor.stored, start * tensor.columns, stop * tensor.columns, device)
    groups = tensor.columns // GROUP
    scales = tensor.part("scales").load(start * groups, stop * groups, device).view(-1, groups)
    return Coded(*codes, packing.powers_of_two(scales), GROUP)


def _outputs(tensor: LogicalTensor, layout: Layout, outputs: slice, inputs: slice, device: str) -> torch.Tensor:
    """The values of some outputs and inputs, as [outputs, inputs]."""
    first, last = inputs.start // GROUP, -(-inputs.stop // GROUP)
    raw = tensor.stored.load_bytes(outputs.start * layout.width, outputs.stop * layout.width, device)
    codes = raw.view(-1, layout.width)[:, first * GROUP // 2 : last * GROUP // 2]
    values = packing.e2m1_values(codes.reshape(-1)).view(len(codes), (last - first) * GROUP)
    groups = layout.width * 2 // GROUP
    scales = tensor.part("scales").load(outputs.start * groups, outputs.stop * groups, device).view(-1, groups)
    packing.scale_groups(values, packing.powers_of_two(scales[:, first:last].contiguous()), GROUP)
    return values[:, inputs.start - first * GROUP : inputs.stop - first * GROUP]


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the experts of a live module, as parameters or as the Triton tensors they become."""
    shown: dict[str, Any] = {}
    sizes = (owner.num_experts, owner.hidden_size, owner.intermediate_size)
    for projection, shape in (("gate_up_proj", (sizes[1], 2 * sizes[2])), ("down_proj", (sizes[2], sizes[1]))):
        held: Any = getattr(owner, projection, None)
        record: dict[str, Any] = {"shape": [sizes[0], *shape], "permuted": None}
        if hasattr(held, "storage") and hasattr(held.storage, "layout"):  # a Triton tensor
            config = getattr(owner, f"{projection}_precision_config", None)
            layout = _layout_name(held)
            record["permuted"] = None if layout == STRIDED else layout
            shown[projection] = held.storage.data if record["permuted"] else held.storage.data.transpose(-1, -2)
            scale = getattr(config, "weight_scale", None)
            if scale is not None:
                shown[f"{projection}_scales"] = scale.storage.data.transpose(-1, -2)
        elif held is not None:
            shown[projection] = held
        shown[f"{projection}{LIVE}"] = json.dumps(record).encode()
    return shown


def _layout_name(held: Any) -> str:
    layout = held.storage.layout
    return str(getattr(layout, "name", None) or type(layout).__name__)


def _claim_live(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    name = anchor.name.removesuffix(LIVE)
    codes, scales = namespace.tensors.get(name), namespace.tensors.get(f"{name}_scales")
    if codes is None:  # tied to experts seen before
        return None
    record = strict_json.parse_object(anchor.read(limit=LIVE_LIMIT), limit=LIVE_LIMIT)
    stack, inputs, outputs = record["shape"]
    if not record["permuted"] and codes.nbytes != stack * outputs * inputs // 2:
        raise FormatError(f"{list(codes.shape)} bytes do not hold {record['shape']} 4-bit codes", tensor=name)
    parts = [Part("blocks", "codes", codes), Part("layout", "bookkeeping", anchor)]
    if scales is not None:
        parts.append(Part("scales", "scales", scales))
    layout = Layout(outputs, inputs // 2, True, record["permuted"])
    return _logical(name, (stack, inputs, outputs), tuple(parts), layout)


def _logical(name: str, shape: tuple[int, ...], parts: tuple[Part, ...], layout: Layout) -> LogicalTensor:
    to_level, gaps = rounding.codebook(packing.E2M1, scale="floor"), steps.levels(packing.E2M1, 1.0, 0x22, clips=True)
    expected = rounding.placed(to_level, shape, *((GROUP, 1) if layout.transposed else (1, GROUP)), steps=gaps)
    tensor = LogicalTensor(name, shape, "mxfp4", "parameter", parts, decode, layout, block=GROUP, floor_db=FLOOR_DB)
    return tensor._replace(rounding=expected)


SCHEME = Scheme(
    name="mxfp4",
    title="MXFP4 (gpt-oss)",
    variants=("mxfp4",),
    claim=claim,
    anchors=("_blocks", "blocks", LIVE),
    methods=("mxfp4",),
    live={"transformers.Mxfp4GptOssExperts": expose},
    coders={decode: coded},
    source="transformers 5.17.0, integrations/mxfp4.py",
    verified="transformers 5.17.0",
)
