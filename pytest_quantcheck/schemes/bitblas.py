"""BitBLAS: GPTQ's codes rearranged for one GPU's tensor cores.

    part     dtype   stored shape          packing
    qweight  I8      any, N * K * b bits   rearranged by a schedule that the kernel's compiler chose
    scales   F16     [N, G]
    qzeros   I8      any, may be empty     (older: zeros)

Formula: not decoded here. The order depends on the layout that BitBLAS searched for, which the file does not name.
Source: GPTQModel 7.6.0, nn_modules/qlinear/bitblas.py.

Its tensors look like GPTQ's, so only a configuration that says `bitblas` makes one, and it has to say the bits too.
"""

from __future__ import annotations

from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.schemes import buffer_linear, quantization_config
from pytest_quantcheck.schemes.scheme import Namespace, Scheme
from pytest_quantcheck.tensor import ByteClass, LogicalTensor, Part, StoredTensor

PARTS: dict[str, ByteClass] = {
    "qweight": "codes",
    "scales": "scales",
    "qzeros": "zero_points",
    "zeros": "zero_points",
    buffer_linear.RECORD: "bookkeeping",  # live only
}


def claim(anchor: StoredTensor, namespace: Namespace) -> LogicalTensor | None:
    """Return the weight that a `qweight` belongs to, where the configuration says that it is BitBLAS's."""
    said = namespace.quantization
    labels = (said.get("quant_method"), said.get("checkpoint_format"), said.get("format"))
    prefix = anchor.name.removesuffix("qweight")
    if "bitblas" not in labels or prefix[-1:] not in ("", "."):
        return None
    found = {part: stored for part in PARTS if (stored := namespace.tensors.get(prefix + part)) is not None}
    scales = found.get("scales")
    if scales is None or len(scales.shape) != 2:
        raise FormatError(f"has no matrix `{prefix}scales` beside it", tensor=anchor.name)
    inputs = _inputs(anchor, scales, quantization_config.each(said, "bits"))
    return LogicalTensor(
        f"{prefix}weight",
        (scales.shape[0], inputs),
        "bitblas",
        "parameter",
        tuple(Part(part, PARTS[part], stored) for part, stored in found.items()),
        None,
        block=inputs // scales.shape[1],
    )


def _inputs(codes: StoredTensor, scales: StoredTensor, said: frozenset[int]) -> int:
    """The number of inputs that the bytes hold; one width must be said, since shapes do not tell."""
    outputs, groups = scales.shape
    if len(said) != 1 or not 1 <= min(said) <= 8:
        raise FormatError(
            f"needs one number of bits from the configuration, which says {sorted(said)}", tensor=codes.name
        )
    bits = min(said)
    inputs = 8 * codes.nbytes // bits // max(1, outputs)
    if not inputs or not groups or inputs * outputs * bits != 8 * codes.nbytes or inputs % groups:
        rule = f"whole rows of {bits} bits for {outputs:,} outputs in {groups:,} groups"
        raise FormatError(f"has {codes.nbytes:,} bytes ({rule})", tensor=codes.name)
    return inputs


SCHEME = Scheme(
    name="bitblas",
    title="BitBLAS (GPTQ's kernel format)",
    variants=("bitblas",),
    claim=claim,
    anchors=("qweight",),
    methods=("bitblas",),
    source="GPTQModel 7.6.0, nn_modules/qlinear/bitblas.py",
    verified="shapes only",
    decoded="no",
)
