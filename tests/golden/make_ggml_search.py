"""Write ggml_search.safetensors and ggml_codebook.safetensors: a small weight by ggml's own C code, where it searches.

    python -m tests.golden.make_ggml_search PATH/TO/ggml   (a checkout; the one in ggml-python 0.0.45 was used)

`gguf` has no quantizers for these types, and ggml-python brings no wheel: src/ggml-quants.c is compiled by itself,
with stand-ins for the few functions that it calls. None of it is kept.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch

from tests.golden import file
from tests.test_fidelity import weights

STAND_INS = """
#include <stdlib.h>
void ggml_abort(const char * file, int line, const char * fmt, ...) { abort(); }
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
void ggml_log_internal(int level, const char * fmt, ...) {}
size_t ggml_row_size(int type, long long n) { SIZES abort(); }
size_t ggml_type_size(int type) { abort(); }
const char * ggml_type_name(int type) { return ""; }
float ggml_table_f32_f16[1 << 16];
float ggml_table_f32_e8m0_half[1 << 8];
"""
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
SHAPE = (4, 512)
# Types whose tables are made first, and what that is asked for; those of IQ1 and IQ2 need an importance matrix.
CODEBOOKS = {
    **{kind: ("iq2xs_init_impl", gguf.GGMLQuantizationType[kind].value)
       for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")},
    "IQ3_XXS": ("iq3xs_init_impl", 256),
    "IQ3_S": ("iq3xs_init_impl", 512),
}  # fmt: skip


def main(ggml: Path) -> None:
    values = weights("student-t", *SHAPE)
    importance = torch.rand(SHAPE[1]) ** 4 + 1e-3
    with tempfile.TemporaryDirectory() as folder:
        library = _library(ggml, Path(folder))
        cases = {}
        for kind in TYPES:
            for name, matrix in ((kind, None), (f"{kind}-imatrix", importance)):
                cases[name] = _case(library, kind, values, matrix)
        codebooks = {}
        for kind, (make_tables, which) in CODEBOOKS.items():
            getattr(library, make_tables)(which)
            case = _case(library, kind, values, importance)
            codebooks[kind] = case._replace(tensors=case.tensors | {"reference": values.clone()})
    file.write("ggml_codebook", "ggml of ggml-python 0.0.45", codebooks)
    file.write("ggml_search", "ggml of ggml-python 0.0.45", cases)


def _library(ggml: Path, folder: Path) -> ctypes.CDLL:
    sizes = " ".join(
        f"if (type == {number.value}) return n / {block} * {size};"
        for number, (block, size) in gguf.GGML_QUANT_SIZES.items()
    )
    (folder / "stand_ins.c").write_text(STAND_INS.replace("SIZES", sizes))
    sources = [str(ggml / "src" / "ggml-quants.c"), str(folder / "stand_ins.c")]
    includes = [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    target = str(folder / "quants.so")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", *includes, "-o", target, *sources, "-lm"], check=True)
    library = ctypes.CDLL(target)
    table = np.frombuffer((ctypes.c_float * 65536).in_dll(library, "ggml_table_f32_f16"), dtype=np.float32)
    table[:] = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    return library


def _case(library: ctypes.CDLL, kind: str, values: torch.Tensor, importance: torch.Tensor | None) -> file.Golden:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.zeros((SHAPE[0], SHAPE[1] // block * size), dtype=np.uint8)
    quantize = getattr(library, f"quantize_{kind.lower().replace('_k', '_K')}")
    matrix = ctypes.c_void_p(importance.data_ptr()) if importance is not None else None
    quantize(
        ctypes.c_void_p(values.data_ptr()),
        raw.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(SHAPE[0]),
        ctypes.c_int64(SHAPE[1]),
        matrix,
    )
    decoded = torch.from_numpy(gguf.quants.dequantize(raw, number).copy())
    return file.Golden({"blocks": torch.from_numpy(raw)}, decoded, {"type": kind})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
