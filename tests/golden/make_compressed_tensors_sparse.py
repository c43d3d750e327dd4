"""Write compressed_tensors_sparse.safetensors: the sparse formats that compressed-tensors has removed since 0.10.

Run with `compressed-tensors==0.10.2` installed: python tests/golden/make_compressed_tensors_sparse.py
"""

from __future__ import annotations

from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from safetensors.torch import save_file


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    keep = weight.view(-1, 4).abs().topk(2, dim=1).indices
    return torch.zeros_like(weight).view(-1, 4).scatter(1, keep, weight.view(-1, 4).gather(1, keep)).view_as(weight)


def bitmask() -> dict[str, torch.Tensor]:
    weight = torch.randn(5, 21) * (torch.rand(5, 21) > 0.6)
    weight[2] = 0
    sparse = BitmaskTensor.from_dense(weight.to(torch.bfloat16))
    return {**sparse.dict("bitmask.layer"), "bitmask.values": sparse.decompress().float()}


def bitmask_24() -> dict[str, torch.Tensor]:
    sparse = Sparse24BitMaskTensor.from_dense(two_of_four(6, 20).to(torch.bfloat16))
    return {**sparse.dict("bitmask-24.layer"), "bitmask-24.values": sparse.decompress().float()}


def marlin_24(rows: int, columns: int, bits: int, group: int | None) -> dict[str, torch.Tensor]:
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group" if group else "channel", group_size=group
    )
    weight = two_of_four(rows, columns).half()
    groups = weight.view(rows, -1, group or columns)
    scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    state = {"layer.weight": weight, "layer.weight_scale": scale, "layer.weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    name = f"marlin-24-{bits}-{group or 'channel'}"
    tensors = Marlin24Compressor().compress(state, {"layer": scheme})
    codes = quantize(weight, scale, zero, args).to(torch.int8)
    return {
        **{f"{name}.{key}": tensor for key, tensor in tensors.items()},
        f"{name}.codes": codes,
        f"{name}.scale": scale,
    }


def main() -> None:
    torch.manual_seed(0)
    tensors = {**bitmask(), **bitmask_24()}
    for case in ((128, 128, 4, None), (64, 384, 4, 128), (64, 128, 8, None)):
        tensors |= marlin_24(*case)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path = Path(__file__).with_name("compressed_tensors_sparse.safetensors")
    save_file(tensors, path, metadata={"library": f"compressed-tensors {compressed_tensors.__version__}"})


if __name__ == "__main__":
    main()
