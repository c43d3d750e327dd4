"""Write eetq.safetensors: small layers quantized and laid out by EETQ's own host functions.

    python tests/golden/make_eetq.py PATH/TO/EETQ   (a checkout; version 1.0.1 was used)

EETQ needs a GPU to install, but quantizes on the host: `symmetric_quantize` is taken from the checkout as it is,
CUTLASS replaced by the few names it uses, and compiled with nvcc. None of it is kept. Beside the laid-out weight it
returns the codes as they were before, which is what ours are held against.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch

STAND_INS = """
#include <cuda_fp16.h>
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#define CUTLASS_HOST_DEVICE
#define FT_CHECK(x) if (!(x)) throw std::runtime_error("check failed")
#define FT_CHECK_WITH_INFO(x, info) if (!(x)) throw std::runtime_error("check failed")
template <class... T> std::string fmtstr(const char*, T...) { return ""; }
namespace fastertransformer { int arch = 80; int getSMVersion() { return arch; } }
namespace cutlass {
struct half_t; struct bfloat16_t; struct uint4b_t;
template <class T> struct sizeof_bits { static constexpr int value = 8; };
template <> struct sizeof_bits<half_t> { static constexpr int value = 16; };
template <> struct sizeof_bits<bfloat16_t> { static constexpr int value = 16; };
template <> struct sizeof_bits<uint4b_t> { static constexpr int value = 4; };
namespace layout { struct RowMajor {}; struct ColumnMajor {}; }
namespace platform { template <bool B, class T = void> using enable_if = std::enable_if<B, T>; }
namespace arch {
struct Sm70 { static constexpr int kMinComputeCapability = 70; };
struct Sm75 { static constexpr int kMinComputeCapability = 75; };
struct Sm80 { static constexpr int kMinComputeCapability = 80; };
struct OpMultiplyAdd; struct OpMultiplyAddDequantizeInterleavedBToA;
}
}
"""
ENTRY = """
extern "C" void quantize(const float* weight, size_t rows, size_t columns, int arch, int8_t* laid_out, int8_t* codes,
                         void* scales) {
  fastertransformer::arch = arch;
  fastertransformer::symmetric_quantize<half, float>(laid_out, codes, static_cast<half*>(scales), weight,
                                                     {rows, columns}, fastertransformer::QuantType::INT8_WEIGHT_ONLY);
}
"""


def build(checkout: Path, folder: Path) -> ctypes.CDLL:
    kernels = checkout / "csrc" / "cutlass_kernels"
    extensions = checkout / "csrc" / "cutlass_extensions" / "include" / "cutlass_extensions"
    layouts = [extensions / "tile_interleaved_layout.h", extensions / "gemm" / "kernel" / "mixed_gemm_B_layout.h"]
    files = [*layouts, kernels / "cutlass_preprocessors.h", kernels / "cutlass_preprocessors.cc"]
    own = "\n".join(re.sub(r'#include "[^"]*"|#pragma once', "", file.read_text()) for file in files)
    (folder / "host.cu").write_text(STAND_INS + own + ENTRY)
    command = ["nvcc", "-w", "-shared", "-O1", "-std=c++17", "-Xcompiler", "-fPIC", "-o", "host.so", "host.cu"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def layer(library: ctypes.CDLL, rows: int, columns: int, arch: int) -> dict[str, torch.Tensor]:
    """One layer of `columns` inputs and `rows` outputs, as the library stores it: transposed."""
    torch.manual_seed(rows)
    weight = torch.randn(columns, rows)
    laid_out, codes = torch.zeros(columns, rows, dtype=torch.int8), torch.zeros(columns, rows, dtype=torch.int8)
    scales = torch.zeros(rows, dtype=torch.float16)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, laid_out, codes, scales)]
    library.quantize(pointers[0], ctypes.c_size_t(columns), ctypes.c_size_t(rows), arch, *pointers[1:])
    return {"weight": laid_out, "weight_scales": scales, "codes": codes}


def main(checkout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(checkout), Path(folder))
        layers = {"sm80": layer(library, 64, 128, 80), "sm75": layer(library, 64, 64, 75)}
    tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    target = Path(__file__).with_name("eetq.safetensors")
    safetensors.torch.save_file(tensors, target, {"eetq": "1.0.1", "torch": torch.__version__})
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
