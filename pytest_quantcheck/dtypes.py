"""The number formats of stored tensors, under their safetensors names, and ggml's block types under ggml's.

Source: safetensors 0.8 `Dtype` (safetensors/src/tensor.rs). Sub-byte types are bit streams, lowest bits first,
and their header shape counts values, not bytes. Formats that only torch has keep torch's name and are in no file:
its small integers are shells of one byte each. Block types: ggml-common.h; codes and scales of a block are written
together, so the shape counts values there too.
"""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One number format.

    `torch` is the attribute of `torch` that has the same bytes, or None where torch has no such dtype.
    `block` values are written together, in `bits` bits.
    """

    name: str
    bits: int
    kind: str  # float, int, bool, complex, block
    torch: str | None
    block: int = 1


def _blocks(name: str, values: int, nbytes: int) -> Dtype:
    return Dtype(name, 8 * nbytes, "block", None, values)


LIVE_ONLY = (
    *(Dtype(f"{sign}{bits}", 8, "int", f"{sign}{bits}") for sign in ("uint", "int") for bits in range(1, 8)),
    Dtype("bits8", 8, "int", "bits8"),
    Dtype("bits16", 16, "int", "bits16"),
    Dtype("complex32", 32, "complex", "complex32"),
    Dtype("complex128", 128, "complex", "complex128"),
)

DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 8, "bool", "bool"),
        Dtype("F4", 4, "float", None),
        Dtype("F6_E2M3", 6, "float", None),
        Dtype("F6_E3M2", 6, "float", None),
        Dtype("U8", 8, "int", "uint8"),
        Dtype("I8", 8, "int", "int8"),
        Dtype("F8_E5M2", 8, "float", "float8_e5m2"),
        Dtype("F8_E4M3", 8, "float", "float8_e4m3fn"),
        Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        Dtype("I16", 16, "int", "int16"),
        Dtype("U16", 16, "int", "uint16"),
        Dtype("F16", 16, "float", "float16"),
        Dtype("BF16", 16, "float", "bfloat16"),
        Dtype("I32", 32, "int", "int32"),
        Dtype("U32", 32, "int", "uint32"),
        Dtype("F32", 32, "float", "float32"),
        Dtype("C64", 64, "complex", "complex64"),
        Dtype("F64", 64, "float", "float64"),
        Dtype("I64", 64, "int", "int64"),
        Dtype("U64", 64, "int", "uint64"),
        _blocks("Q1_0", 128, 18),
        _blocks("Q2_0", 64, 18),
        _blocks("Q4_0", 32, 18),
        _blocks("Q4_1", 32, 20),
        _blocks("Q5_0", 32, 22),
        _blocks("Q5_1", 32, 24),
        _blocks("Q8_0", 32, 34),
        _blocks("Q2_K", 256, 84),
        _blocks("Q3_K", 256, 110),
        _blocks("Q4_K", 256, 144),
        _blocks("Q5_K", 256, 176),
        _blocks("Q6_K", 256, 210),
        _blocks("IQ1_S", 256, 50),
        _blocks("IQ1_M", 256, 56),
        _blocks("IQ2_XXS", 256, 66),
        _blocks("IQ2_XS", 256, 74),
        _blocks("IQ2_S", 256, 82),
        _blocks("IQ3_XXS", 256, 98),
        _blocks("IQ3_S", 256, 110),
        _blocks("IQ4_NL", 32, 18),
        _blocks("IQ4_XS", 256, 136),
        _blocks("TQ1_0", 256, 54),
        _blocks("TQ2_0", 256, 66),
        _blocks("MXFP4", 32, 17),
        _blocks("NVFP4", 64, 36),
        _blocks("GGML_UNKNOWN", 1, 1),  # a type id that is not in the table: only its tensor's bytes are known
        *LIVE_ONLY,
    )
}

# Bits per value, of the formats that write each value for itself.
BITS = {dtype.name: dtype.bits for dtype in DTYPES.values() if dtype.kind != "block"}
SAFETENSORS = frozenset(BITS) - {dtype.name for dtype in LIVE_ONLY}

# `str(tensor.dtype)` of a live tensor -> the name above. A packed torch dtype holds two values per element.
OF_TORCH = {f"torch.{dtype.torch}": dtype.name for dtype in DTYPES.values() if dtype.torch} | {
    "torch.float4_e2m1fn_x2": "F4"
}


def nbytes(dtype: str, elements: int) -> int:
    """Return the bytes that `elements` values take, a multiple of the block where values come in blocks.

    >>> nbytes("F4", 6), nbytes("Q4_0", 64)
    (3, 36)
    """
    return elements // DTYPES[dtype].block * DTYPES[dtype].bits // 8
