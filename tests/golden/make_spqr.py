"""Write spqr.safetensors: small SpQR layers, packed and decoded by the library's own host functions.

    python tests/golden/make_spqr.py spqr_quant-0.2.0-py3-none-any.whl

The package builds itself on import and wants a GPU for that. Its packer and its decoder are plain C++, so they are
taken from the wheel as they are, torch::Tensor replaced by pointers, and compiled with nvcc. None of it is kept.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch

ACCESS = {r"\.data_ptr\(\)": "", r"\.data_ptr<int>\(\)": "", r"\.sizes\(\)\[0\]": "_len"}
ROWS = {"csr": 32, "ptcsr": 48}  # multiples of 16: in a shorter last row of tiles the decoder loses its place
COLUMNS = 38


def source(folder: Path) -> str:
    """The two functions of the library with raw pointers in their signatures."""
    text = (folder / "spqr_cuda.cpp").read_text()
    helpers = text[text.index("// Function to convert an integer to half") : text.index("void torch_mul_timer")]
    decoder = text[text.index("void dequantize_compressed") : text.index("void spqr_mul_timer")]
    packer = text[text.index("enum class SparseCompressionStrategy") : text.index("void spqr_mul_fused")]
    packer = re.sub(r"TORCH_CHECK\(.*\n", "\n", packer)
    both = decoder + packer
    for pattern, replacement in ACCESS.items():
        both = re.sub(pattern, replacement, both)
    both = re.sub(r"const torch::Tensor &(\w+)", r"void *\1", both)
    both = both.replace("void *row_offsets,", "void *row_offsets, int row_offsets_len,", 1)
    both = both.replace("int row_offsets_len = row_offsets_len;", "").replace(
        "int *_row_offsets = row_offsets;", "int *_row_offsets = static_cast<int *>(row_offsets);"
    )
    both = re.sub(r"void (dequantize_compressed|tensor_compress_interleaved)\(", r'extern "C" void \1(', both)
    return f'#include "common.cuh"\n#include <vector>\n#include <algorithm>\n{helpers}{both}'


def build(folder: Path) -> ctypes.CDLL:
    (folder / "host.cu").write_text(source(folder))
    command = ["nvcc", "-shared", "-O1", "-std=c++20", "-Xcompiler", "-fPIC", "-o", "host.so", "host.cu"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def layer(library: ctypes.CDLL, sparse_util, strategy: str) -> dict[str, torch.Tensor]:
    rows, columns = ROWS[strategy], COLUMNS
    tiles = -(-rows // 16) * -(-columns // 16)
    torch.manual_seed(rows)
    codes = torch.randint(0, 8, (rows, columns), dtype=torch.int8)
    first = [torch.randint(0, 8, (tiles * 16,), dtype=torch.int8) for _ in range(2)]
    second = [torch.rand(tiles).add(0.1).half() for _ in range(4)]
    dense_outliers = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.05)
    csr = dense_outliers.half().to_sparse_csr()
    offsets = csr.crow_indices().to(torch.int32)
    pairs = sparse_util.merge_col_val(csr.col_indices().to(torch.int16), csr.values()).contiguous()
    stored_offsets, stored_pairs = (offsets, pairs) if strategy == "csr" else sparse_util.init_ptcsr(offsets)
    words = torch.zeros(tiles * 16, dtype=torch.int64)
    library.tensor_compress_interleaved(
        rows, columns, 3, pointer(codes), 16, 16, *map(pointer, first + second), pointer(offsets),
        pointer(stored_offsets), pointer(pairs), pointer(stored_pairs), int(strategy == "ptcsr"), pointer(words),
    )  # fmt: skip
    values = torch.zeros(rows, columns, dtype=torch.float16)
    library.dequantize_compressed(
        rows, columns, 3, 16, 16, pointer(words), pointer(stored_offsets), len(stored_offsets), pointer(stored_pairs),
        len(stored_pairs), pointer(values),
    )  # fmt: skip
    found = {"dense_weights": words, "row_offsets": stored_offsets, "col_vals": stored_pairs, "values": values}
    return {f"{strategy}.{name}": tensor for name, tensor in found.items()}


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        zipfile.ZipFile(wheel).extractall(name)
        package = Path(name, "spqr_quant")
        spec = importlib.util.spec_from_file_location("sparse_util", package / "sparse_util.py")
        sparse_util = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sparse_util)
        library = build(package / "inference_kernels")
        tensors = layer(library, sparse_util, "csr") | layer(library, sparse_util, "ptcsr")
    version = Path(wheel).name.split("-")[1]
    target = Path(__file__).with_name("spqr.safetensors")
    safetensors.torch.save_file(tensors, target, {"spqr_quant": version, "torch": torch.__version__})
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
