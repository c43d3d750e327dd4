"""What a scheme is: one way to write numbers, seen through stored tensors whatever container they are in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pytest_quantcheck.tensor import Coder, Decoder, LogicalTensor, StoredTensor


class Namespace(NamedTuple):
    """All stored tensors of an artifact by name, what its configuration says, and the metadata of its headers.

    `files` are the JSON files beside the weights, by name.
    `endings` are the last components of the names: what is not among them need not be looked for, tensor by tensor.
    """

    tensors: Mapping[str, StoredTensor]
    quantization: Mapping[str, Any]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    endings: Collection[str]


# Makes a logical tensor of the group that an anchor belongs to, or None where the anchor is somebody else's.
# A group that is this scheme's but broken is a `FormatError` that names what is missing.
Claim = Callable[[StoredTensor, Namespace], LogicalTensor | None]

# Shows a live object (a module, or a parameter and its name) as the stored tensors it would be saved as, by name
# within the module: torch tensors, or bytes for a record that is no tensor. None where there is nothing to show.
Expose = Callable[[Any, str], Mapping[str, Any] | None]

# Says why a stored tensor that nobody claimed cannot be plain, given that this scheme's method is configured.
Refuse = Callable[[StoredTensor, Namespace], str | None]


class Reading(NamedTuple):
    """The same stored parts under another convention: what a diagnosis tries.

    `name` is short and stable, `words` complete "with ...", `advice` says what to change where it decodes right.
    `along`: what is missing is some multiple of the difference to this reading.
    """

    name: str
    words: str
    tensor: LogicalTensor
    advice: str = ""
    along: bool = False


# Yields a logical tensor of this scheme as other conventions would have written it.
Alternatives = Callable[[LogicalTensor], Iterable[Reading]]


@dataclass(frozen=True)
class Scheme:
    """One row of the table of schemes.

    `anchors` are endings of the last component of a stored name: a tensor so named starts a claim. So does one whose
    dtype is in `dtypes`.
    `methods` are the `quant_method` values of a configuration that announce the scheme.
    `live` maps `package.Class`, or `:buffer` for any module that has such a buffer, to how the object is shown; no
    library is imported for it. A buffer that is shown stands for a parameter.
    `alternatives` are the mistakes that this format knows, for the diagnosis of a tensor that decodes wrong.
    `coders` maps a decoder to what gives the same rows as codes, where they are no more than a table and scales.
    """

    name: str
    title: str
    variants: tuple[str, ...]
    claim: Claim
    anchors: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    live: Mapping[str, Expose] = field(default_factory=dict)
    refuse: Refuse | None = None
    alternatives: Alternatives | None = None
    coders: Mapping[Decoder, Coder] = field(default_factory=dict)
    source: str = ""
    verified: str = ""
    decoded: str = "CPU"


def joined(prefix: str, last: str) -> str:
    """Return the name of a tensor of a module, which may be the model itself.

    >>> joined("layer", "weight"), joined("", "weight")
    ('layer.weight', 'weight')
    """
    return f"{prefix}.{last}" if prefix else last
