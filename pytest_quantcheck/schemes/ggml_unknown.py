"""ggml types that are not in our table: those of forks, and those that are newer than we are.

    part    dtype          stored shape    packing
    blocks  GGML_UNKNOWN   logical shape   unknown

The shape is in the file whatever the type, so the tensor is counted; its bytes go up to where the next tensor starts.
The container reports the type's number.
"""

from __future__ import annotations

from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import LogicalTensor, Part, StoredTensor


def claim(stored: StoredTensor, namespace: Namespace) -> LogicalTensor:
    """Return the tensor without a way to its values."""
    part = Part("blocks", "codes", stored)
    return LogicalTensor(stored.name, stored.shape, "ggml-unknown", stored.role or "parameter", (part,), None)


SCHEME = Scheme(
    name="ggml-unknown",
    title="ggml types of forks",
    variants=("ggml-unknown",),
    claim=claim,
    dtypes=("GGML_UNKNOWN",),
    source="llama.cpp gguf.cpp: shape and offset are in the file whatever the type",
    verified="by hand",
    decoded="no",
)
