"""One live tensor: where its values are, and which part of it this process holds.

    kind                       shape          bytes        values
    a torch tensor             its own        its own      here
    DeepSpeed ZeRO-3           `ds_shape`     `ds_tensor`  here while gathered
    DTensor (FSDP2, TP)        the global     its local    here where the local tensor is the whole
    FSDP1 `FlatParameter`      `_shapes`      its share    here where nothing is sharded

Source: torch 2.13, distributed/fsdp/_flat_param.py, distributed/tensor/_api.py; DeepSpeed, partition_parameters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_quantcheck.dtypes import OF_TORCH
from pytest_quantcheck.errors import FormatError, NotDecodable, UnknownEncoding
from pytest_quantcheck.tensor import Role, Source, StoredTensor

if TYPE_CHECKING:
    import torch


class LiveTensor(NamedTuple):
    """A `Source` over a torch tensor that is already in memory."""

    tensor: torch.Tensor

    def read(self, start: int, stop: int) -> bytearray:
        """Return bytes of the tensor, copied to the host."""
        import torch

        if self.tensor.is_meta:
            raise FormatError("a small tensor that decides a shape is on the meta device: it has no values")
        flat = _flat(self.tensor).view(torch.uint8)[start:stop]
        return bytearray(flat.cpu().numpy().tobytes())

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return elements of the tensor, or its bytes where `stored` asks for another dtype, on `device`."""
        import torch

        if self.tensor.is_meta:
            raise FormatError("is on the meta device: it has a shape and no values", tensor=stored.name)
        flat = _flat(self.tensor)
        if OF_TORCH.get(str(flat.dtype)) != stored.dtype or stored.elements != flat.numel():
            flat = flat.view(torch.uint8)
        return flat[start:stop].to(device)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values one after the other; of a single value torch keeps whatever stride it had, and then refuses a view."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.as_strided((flat.numel(),), (1,))


class Record(NamedTuple):
    """A `Source` over bytes that are no tensor: what a library keeps as Python attributes."""

    content: bytes

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes."""
        return bytearray(self.content[start:stop])

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Return the bytes as uint8."""
        import torch

        return torch.frombuffer(bytearray(self.content), dtype=torch.uint8)[start:stop].to(device)


class Elsewhere(NamedTuple):
    """A `Source` that is not here: this process holds a shard, and the rest is on other ranks."""

    held: int
    total: int

    def read(self, start: int, stop: int) -> bytearray:
        """Raise `NotDecodable`."""
        raise NotDecodable(f"is sharded: this process holds {self.held:,} of {self.total:,} bytes")

    def load(self, stored: StoredTensor, start: int, stop: int, device: str) -> torch.Tensor:
        """Raise `NotDecodable`."""
        what = f"is sharded: this process holds {self.held:,} of {self.total:,} bytes (gather it first)"
        raise NotDecodable(what, tensor=stored.name)


class Placed(NamedTuple):
    """A tensor as the whole of all ranks has it; `held` is the whole tensor where this process has it all."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    held: torch.Tensor | None
    requires_grad: bool


def place(tensor: Any) -> Placed:
    """Return what all ranks together have where this tensor is."""
    if isinstance(tensor, Placed):
        return tensor
    dtype, grad = str(tensor.dtype), bool(tensor.requires_grad)
    if hasattr(tensor, "ds_shape"):
        shape, mine = tuple(tensor.ds_shape), tensor if tensor.numel() == prod(tensor.ds_shape) else tensor.ds_tensor
        return Placed(dtype, shape, _nbytes(mine), tensor if mine is tensor else None, grad)
    if is_dtensor(tensor):
        local, shape = tensor._local_tensor, tuple(tensor.shape)
        whole = tuple(local.shape) == shape and not any(placement.is_partial() for placement in tensor.placements)
        return Placed(dtype, shape, _nbytes(local), local if whole else None, grad)
    return Placed(dtype, tuple(tensor.shape), _nbytes(tensor), tensor, grad)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`."""
    return any(cls.__name__ == "DTensor" and cls.__module__.startswith("torch.") for cls in type(tensor).__mro__)


def flat_parameters(module: Any) -> Iterator[tuple[Any, str, Placed]]:
    """Yield what the `FlatParameter` of an FSDP1 unit manages: the module it belongs to, its name there, and it."""
    flat = getattr(getattr(module, "_handle", None), "flat_param", None)
    if flat is None or not hasattr(flat, "_fqns"):
        return
    found: dict[tuple[int, str], Placed] = {}
    for index, (info, part) in enumerate(zip(flat._param_infos, _parts(flat), strict=True)):
        originals = getattr(flat, "_params", None)
        grad = bool((originals[index] if originals else flat).requires_grad)
        found[id(info.module), info.param_name] = part._replace(requires_grad=grad)
        yield info.module, info.param_name, found[id(info.module), info.param_name]
    for shared in flat._shared_param_infos:
        yield shared.module, shared.param_name, found[id(shared.prim_module), shared.prim_param_name]


def _parts(flat: Any) -> Iterator[Placed]:
    dtype, itemsize = str(flat.dtype), flat.element_size()
    runs = list(zip(flat._numels_with_padding, flat._is_padding_mask, strict=True))
    whole = flat.numel() >= sum(numel for numel, _ in runs)
    offset, index = 0, 0
    for numel, padding in runs:
        if not padding:
            shape, share = tuple(flat._shapes[index]), flat._shard_param_infos[index].numel_in_shard or 0
            held = flat.detach()[offset : offset + numel].view(shape) if whole else None
            yield Placed(dtype, shape, (numel if whole else share) * itemsize, held, False)
            index += 1
        offset += numel


def store(name: str, tensor: Any, role: Role, trainable: bool | None) -> StoredTensor:
    """Return a live tensor as a stored tensor. Raises `UnknownEncoding` for a dtype we do not know."""
    placed = place(tensor)
    dtype = OF_TORCH.get(placed.dtype)
    if dtype is None:
        raise UnknownEncoding(f"{placed.dtype} is a dtype we do not know", tensor=name)
    shape = placed.shape
    if dtype == "F4":  # torch counts pairs
        shape = (*shape[:-1], 2 * shape[-1])
    total = placed.nbytes if placed.held is not None else prod(placed.shape) * _itemsize(placed.dtype)
    source: Source = Elsewhere(placed.nbytes, total) if placed.held is None else LiveTensor(placed.held)
    return StoredTensor(name, dtype, shape, placed.nbytes, source, 0, role, trainable)


def identity(tensor: Any) -> object:
    """What two names of one tensor share: the object or, where there is memory, the same elements of it."""
    if isinstance(tensor, Placed):
        return id(tensor)
    if is_dtensor(tensor):
        return identity(tensor._local_tensor)
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, _footprint(tensor.shape, tensor.stride()))


def _footprint(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The elements that a view covers, whatever the order and the split of its dimensions.

    >>> _footprint((2, 3), (3, 1)) == _footprint((3, 2), (1, 3)) == _footprint((6,), (1,))
    True
    """
    merged: list[tuple[int, int]] = []
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    return tuple(merged)


def refuse(tensor: Any, name: str) -> None:
    """Raise where a tensor has no values to come, or a storage of its own that only a scheme knows."""
    if isinstance(tensor, Placed):
        return
    kinds = {cls.__name__ for cls in type(tensor).__mro__ if cls.__module__.startswith("torch.")}
    if kinds & {"UninitializedParameter", "UninitializedBuffer"}:
        raise FormatError("has no shape yet: it belongs to a lazy module that never ran", tensor=name)
    if "FakeTensor" in kinds:
        raise FormatError("is a FakeTensor: a stand-in of a tracer, not a weight", tensor=name)
    if str(tensor.layout) != "torch.strided":
        raise UnknownEncoding(
            f"is a {str(tensor.layout).removeprefix('torch.')} tensor, not a strided one", tensor=name
        )
    if hasattr(tensor, "__tensor_flatten__") and not is_dtensor(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise UnknownEncoding(f"`{kind}` is a tensor class that no scheme knows", tensor=name)


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _itemsize(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype.removeprefix("torch.")).itemsize)
