"""EXL3: trellis-coded weights in a rotated basis, a fixed number of bits each.

    part      dtype  stored shape         packing
    trellis   I16    [K/16, N/16, 16*b]   per tile of 16x16 a ring of 256 b-bit steps, 32-bit words, highest bits first
    suh, svh  F16    [K], [N]             scale of each input and output; old files: su, sv, I16 signs, a bit each
    mcg, mul1 I32    []                   which of three codebooks: present or not (neither: 3INST)

Formula: w = (H (c H_K)) with: c[k, n] the value of the 16 bits of the ring that end with its step; then over inputs and
outputs in blocks of 128 the Hadamard matrix (1/sqrt(128)), each followed by its scales: inputs and suh first.
Source: GPTQModel 7.6.0, nn_modules/exllamav3_torch.py; exllamav3, modules/quant/exl3.py and modules/linear.py.

The steps of a tile are in the order of a tensor core's fragment. K and N are rounded up to multiples of 128 in the
file; only for `lm_head` does the configuration say the true number of outputs (`vocab_size`). Rates of half a bit are
counted and not decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.errors import FormatError, NotDecodable
from pytest_quantcheck.schemes import packing
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

if TYPE_CHECKING:
    import torch

PARTS: dict[str, ByteClass] = {
    "trellis": "codes",
    "suh": "scales",
    "svh": "scales",
    "su": "scales",
    "sv": "scales",
    "mcg": "codebooks",
    "mul1": "codebooks",
}
SHOWN = (*PARTS, "bias")


class Layout(NamedTuple):
    """Half bits per weight, so that every rate is a whole number; the codebook; the names of the scales."""

    half_bits: int
    codebook: str
    inputs: str
    outputs: str


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `trellis` belongs to."""
    stem, _, last = anchor.name.rpartition(".")
    if last != "trellis":
        return None
    prefix = f"{stem}." if stem else ""
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    if anchor.dtype not in ("I16", "U16") or len(anchor.shape) != 3 or anchor.shape[2] % 8 or not anchor.shape[2]:
        raise FormatError(f"{anchor.dtype} {list(anchor.shape)} is not I16 [K/16, N/16, 16*bits]", tensor=anchor.name)
    inputs, outputs = 16 * anchor.shape[0], 16 * anchor.shape[1]
    names = (_check_scales(found, "su", inputs), _check_scales(found, "sv", outputs))
    codebook = next((name for name in ("mcg", "mul1") if name in found), "3inst")
    return LogicalTensor(
        f"{prefix}weight",
        (_outputs(stem, outputs, namespace), inputs),
        "exl3",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        decode,
        Layout(anchor.shape[2] // 8, codebook, *names),
        block=128,
    )


def decode(tensor: LogicalTensor, start: int, stop: int, device: str) -> torch.Tensor:
    """Return rows `start` up to `stop` as float32; whole blocks of 128 outputs are decoded around them."""
    import torch

    layout = tensor.layout
    assert isinstance(layout, Layout)
    if layout.half_bits % 2 or layout.half_bits > 16:
        raise NotDecodable(
            f"has {layout.half_bits / 2} bits per weight: only whole rates are decoded", tensor=tensor.name
        )
    first, last = start // 128 * 128, -(-stop // 128) * 128
    inner = _inner(tensor.stored, layout, first, max(first, last), device)  # (K, N)
    inner = packing.hadamard(inner.t().contiguous(), 128)  # over inputs
    inner *= _scales(tensor.part(layout.inputs), 0, tensor.columns, device)
    inner = packing.hadamard(inner.t().contiguous(), 128).t()  # over outputs
    inner = inner * _scales(tensor.part(layout.outputs), first, max(first, last), device).view(-1, 1)
    return inner[start - first : stop - first].to(torch.float32).contiguous()


def _inner(stored: StoredTensor, layout: Layout, start: int, stop: int, device: str) -> torch.Tensor:
    """The weights in the rotated basis, outputs `start` up to `stop`."""
    import torch

    tiles, width, bits = stored.shape[0], stored.shape[2], layout.half_bits // 2
    flat = stored._replace(shape=(tiles, stored.shape[1] * width))
    words = packing.load_columns(flat, start // 16 * width, stop // 16 * width, device)
    raw = words.contiguous().view(-1, width).view(torch.uint8).view(-1, width // 2, 4).flip(-1)  # highest bits first
    raw = raw.reshape(-1, 2 * width).to(torch.int32)
    end = (torch.arange(256, device=device) + 1) * bits  # the 16 bits before it are the state after each step
    low, within = (end - 16) // 8, ((end - 16) % 8).to(torch.int32)
    three = (raw[:, low] << 16) | (raw[:, (low + 1) % (2 * width)] << 8) | raw[:, (low + 2) % (2 * width)]
    states = (three >> (8 - within)) & 0xFFFF  # (tiles, 256)
    values: torch.Tensor = _codebook(layout.codebook, device)[states.long()]
    values = values[:, torch.tensor(_FROM_FRAGMENT, device=device)]
    return values.view(tiles, -1, 16, 16).transpose(1, 2).reshape(16 * tiles, stop - start)


def _fragment_order() -> list[int]:
    """Where each value of a tile, row by row, is among the 256 steps."""
    order = [
        (pair + down) * 16 + thread // 4 + right
        for thread in range(32)
        for pair in [2 * (thread % 4)]
        for right in (0, 8)
        for down in (0, 1, 8, 9)
    ]
    return sorted(range(256), key=order.__getitem__)


_FROM_FRAGMENT = _fragment_order()


def _codebook(name: str, device: str) -> torch.Tensor:
    """The value of each 16-bit state: computed, not stored."""
    import torch

    states = torch.arange(1 << 16, device=device)
    if name == "mul1":
        product = (states * 0x83DCD12D) & 0xFFFFFFFF
        total = 0x6400 + (product & 0xFF) + (product >> 8 & 0xFF) + (product >> 16 & 0xFF) + (product >> 24)
        scale, offset = _halves(torch.tensor([0x1EEE, 0xC931], device=device))
        return _halves(total).mul_(scale).add_(offset)
    product = states * 0xCBAC1FED if name == "mcg" else states * 89226354 + 64248484
    pairs = (product & 0x8FFF8FFF) ^ 0x3B603B60
    return _halves(pairs & 0xFFFF) + _halves((pairs >> 16) & 0xFFFF)


def _halves(bits: torch.Tensor) -> torch.Tensor:
    import torch

    return bits.to(torch.int32).to(torch.uint16).view(torch.float16).to(torch.float32)


def _scales(stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
    import torch

    if stored.dtype == "F16":
        return stored.load(start, stop, device).to(torch.float32)
    bits = packing.unpack_words(stored.load(device=device).view(1, -1), 1, stored.elements * 16)[0]
    return bits[start:stop].to(torch.float32).mul(-2).add(1)  # a set bit is a minus


def _check_scales(parts: Mapping[str, StoredTensor], name: str, count: int) -> str:
    """The name of the scales that are there: floats, or signs."""
    for part, dtype, elements in ((f"{name}h", "F16", count), (name, "I16", count // 16)):
        stored = parts.get(part)
        if stored is not None:
            if stored.dtype != dtype or stored.elements != elements:
                what = f"{stored.dtype} {list(stored.shape)} is not {dtype} [{elements}]"
                raise FormatError(what, tensor=stored.name)
            return part
    trellis = parts["trellis"].name
    raise FormatError(f"has no `{trellis.removesuffix('trellis')}{name}h` beside it", tensor=trellis)


def _outputs(layer: str, padded: int, namespace: Namespace) -> int:
    """The true number of outputs, where the configuration knows it."""
    for config in (namespace.config, namespace.config.get("text_config")):
        size = config.get("vocab_size") if isinstance(config, Mapping) else None
        if isinstance(size, int) and layer.endswith("lm_head") and -(-size // 128) * 128 == padded:
            return size
    return padded


def expose(owner: Any, name: str) -> Mapping[str, Any] | None:
    """Show the buffers of an EXL3 layer as they would be saved."""
    if name:
        return None
    return {part: owner._buffers[part] for part in SHOWN if owner._buffers.get(part) is not None}


SCHEME = Scheme(
    name="exl3",
    title="EXL3 (ExLlamaV3's trellis-coded weights)",
    variants=("exl3",),
    claim=claim,
    anchors=("trellis",),
    methods=("exl3",),
    live={":trellis": expose},
    source="GPTQModel 7.6.0, nn_modules/exllamav3_torch.py; exllamav3, modules/quant/exl3.py",
    verified="GPTQModel 7.6.0",
)
