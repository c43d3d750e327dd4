"""The table of what is verified: every scheme, live and on disk, and how far off the counters people use are.

`python -m tests.scheme_table` writes docs/reference/verified.md; `tests/test_schemes.py` holds it to the truth.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from peft import PeftModel
from transformers import PreTrainedModel

from pytest_quantcheck import NotDecodable, inspect
from pytest_quantcheck.artifact import Artifact
from pytest_quantcheck.schemes import SCHEMES
from tests.cases import Case, Made, all_cases

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "verified.md"


def saved(made: Made, folder: Path) -> Path:
    """Write what a row makes as a checkpoint, and return where."""
    if made.write is not None:
        return made.write(folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in (made.tensors or {}).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"} | made.metadata)
    for name, content in {"config.json": made.config, **made.files}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


class Verified(NamedTuple):
    """What holds for one row in one place."""

    count: bool
    bytes: bool
    values: bool | None  # None where the values are counted and weighed only


def verify(case: Case, made: Made, artifact: Artifact) -> Verified:
    """Check one row in one place."""
    tensor = artifact.tensor(case.name)
    counts = (tensor.scheme, tensor.shape) == (case.scheme, case.shape)
    counts &= artifact.logical_params == (case.total or tensor.params)
    adds_up = sum(artifact.bytes.values()) == artifact.file_bytes
    if case.bytes is not None:
        adds_up &= {kind: tensor.bytes.get(kind, 0) for kind in case.bytes} == case.bytes
    return Verified(counts, adds_up, None if made.values is None else decodes(case, made, artifact))


def decodes(case: Case, made: Made, artifact: Artifact) -> bool:
    """Whether our decode is the library's, within the tolerance of the row."""
    expected = made.values.to(torch.float32).reshape(-1, case.shape[-1])
    try:
        decoded = artifact.tensor(case.name).decode()
    except NotDecodable:
        return False
    if decoded.dtype != torch.float32 or not torch.equal(decoded.isnan(), expected.isnan()):
        return False
    limit = made.tolerance * expected.nan_to_num().abs().max()
    return bool((decoded.nan_to_num() - expected.nan_to_num()).abs().max() <= limit)


# The counters people use, each on what it is meant for.


def naive(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def of_transformers(model: Any) -> int:
    model.is_loaded_in_4bit = True
    return PreTrainedModel.num_parameters(model)


def of_peft(model: Any) -> int:
    return PeftModel.get_nb_trainable_parameters(model)[1]


def of_the_hub(folder: Path) -> int:
    """What huggingface_hub's `get_safetensors_metadata` adds up for a file."""
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    tensors = {name: TensorInfo(**entry) for name, entry in header.items()}
    return sum(SafetensorsFileMetadata(metadata={}, tensors=tensors).parameter_count.values())


LIVE_COUNTERS: dict[str, Callable[[Any], int]] = {
    "sum(numel())": naive,
    "num_parameters()": of_transformers,
    "PEFT": of_peft,
}
HEADER = ("scheme", "rows", "live", "disk", *LIVE_COUNTERS, "Hub")


def lines(cases: Iterable[Case]) -> dict[str, str]:
    """Return the Markdown line of each scheme."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.scheme, []).append(case)
    return {scheme: _line(scheme, groups.get(scheme, [])) for scheme in variants()}


def variants() -> list[str]:
    """Return every name that a scheme gives to what it claims, in the order of the table of schemes."""
    return [variant for scheme in SCHEMES for variant in scheme.variants]


def _line(scheme: str, group: list[Case]) -> str:
    live: list[Verified] = []
    disk: list[Verified] = []
    factors: dict[str, list[float]] = {name: [] for name in HEADER[4:]}
    made_here = 0
    for case in group:
        try:
            made = case.make()
        except pytest.skip.Exception:
            continue  # its library is not installed
        made_here += 1
        if made.live is not None:
            artifact = inspect(made.live)
            live.append(verify(case, made, artifact))
            for name, counter in LIVE_COUNTERS.items():
                factors[name].append(counter(made.live) / artifact.logical_params)
        if made.tensors is not None or made.write is not None:
            with tempfile.TemporaryDirectory() as name:
                path = saved(made, Path(name))
                artifact = inspect(path)
                disk.append(verify(case, made, artifact))
                if made.write is None:
                    factors["Hub"].append(of_the_hub(path) / artifact.logical_params)
    rows = str(made_here) if made_here == len(group) else f"{made_here} of {len(group)}"
    cells = [f"`{scheme}`", rows, _place(live), _place(disk), *map(_factor, factors.values())]
    return "| " + " | ".join(cells) + " |"


def _place(found: list[Verified]) -> str:
    if not found:
        return "-"
    if not all(one.count and one.bytes and one.values is not False for one in found):
        return "**wrong**"
    return "count, bytes, values" if any(one.values for one in found) else "count, bytes"


def _factor(found: list[float]) -> str:
    if not found:
        return "-"
    low, high = f"{min(found):.3g}", f"{max(found):.3g}"
    return low if low == high else f"{low} to {high}"


INTRODUCTION = """\
# What is verified

Each scheme is held against the library that writes it: the count against the library's own shape, every byte in
exactly one class, and our decode against the library's (`tests/cases`, one row per layout). *live* and *disk* say what
holds there. The last four columns show what other counters say, as a multiple of the truth: 1 is right, 0 means that
the layer counts as nothing. They are `sum(p.numel() for p in model.parameters())`, transformers' `num_parameters()`
with its correction for 4 bits switched on, PEFT's `get_nb_trainable_parameters()`, and huggingface_hub's metadata of a
file. A range is over rows of different bit widths, storage types and sizes.

*0* rows: what the library's source says, or held by tests of its own (TFLite, unknown ggml types, activation scales).
*3 of 5* rows says that two need a library that does not install beside the others; the tests take them where it is.

This page is written by `python -m tests.scheme_table`, and a test holds it to what is measured.
"""


def page(table: dict[str, str]) -> str:
    """Return the page of the documentation."""
    head = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    return "\n".join([INTRODUCTION, *head, *table.values()]) + "\n"


if __name__ == "__main__":
    table = lines(all_cases())
    PAGE.write_text(page(table))
    print(PAGE.read_text())
