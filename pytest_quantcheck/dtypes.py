"""The number formats of stored tensors, under their safetensors names.

Source: safetensors 0.8 `Dtype` (safetensors/src/tensor.rs). Sub-byte types are bit streams, lowest bits first,
and their header shape counts values, not bytes. Formats that only torch has keep torch's name and are in no file:
its small integers are shells of one byte each.
"""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One number format.

    `torch` is the attribute of `torch` that has the same bytes, or None where torch has no such dtype.
    """

    name: str
    bits: int
    kind: str  # float, int, bool, complex
    torch: str | None


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
        *LIVE_ONLY,
    )
}

BITS = {dtype.name: dtype.bits for dtype in DTYPES.values()}
SAFETENSORS = frozenset(BITS) - {dtype.name for dtype in LIVE_ONLY}

# `str(tensor.dtype)` of a live tensor -> the name above. A packed torch dtype holds two values per element.
OF_TORCH = {f"torch.{dtype.torch}": dtype.name for dtype in DTYPES.values() if dtype.torch} | {
    "torch.float4_e2m1fn_x2": "F4"
}
