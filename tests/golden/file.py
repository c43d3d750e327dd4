"""Golden files: small weights that a library packed, beside what the same library decodes from them.

One file per family: `<case>/<stored name>` is a tensor of the case, `<case>/values` the library's own decode, and the
header metadata holds the versions of the libraries and a JSON record per case.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch

FOLDER = Path(__file__).parent


class Golden(NamedTuple):
    """One case: its tensors as a checkpoint has them, the library's values, and what the script noted."""

    tensors: dict[str, Any]
    values: Any
    record: dict[str, Any]


def write(family: str, libraries: str, cases: dict[str, Golden]) -> None:
    tensors = {}
    for name, case in cases.items():
        tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in case.tensors.items()}
        tensors[f"{name}/values"] = case.values.contiguous()
    records = json.dumps({name: case.record for name, case in cases.items()})
    path = FOLDER / f"{family}.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"libraries": libraries, "cases": records})
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size:,} bytes, {libraries}")


@cache
def read(family: str) -> dict[str, Golden]:
    with safetensors.safe_open(FOLDER / f"{family}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the object is no mapping
        records = json.loads(file.metadata()["cases"])
    found = {}
    for name, record in records.items():
        own = {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
        found[name] = Golden(own, own.pop("values"), record)
    return found
