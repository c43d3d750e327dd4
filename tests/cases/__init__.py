"""The test table of schemes: one module per scheme, one row per layout, the real library behind each.

A row makes a quantized weight with the library and says what must come out. `tests/test_schemes.py` holds every row
to the same promises: exact count live and on disk, bytes that add up, and our decode equal to the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Made:
    """What one row makes. `live` holds the weight as a module, `tensors` as a checkpoint would; either may be absent.

    `values` is what the library itself decodes (float32), equal to ours within `tolerance` times its largest value:
    0 means bit for bit. None where only a GPU can decode: ours must refuse.
    """

    values: Any
    live: Any = None
    tensors: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # further JSON files beside the weights, by name
    tolerance: float = 0.0
    write: Callable[[Path], Path] | None = None  # writes the artifact where it is no safetensors folder


@dataclass(frozen=True)
class Case:
    """One row: what is made, and what is known about it without looking."""

    id: str
    make: Callable[[], Made]
    scheme: str
    shape: tuple[int, ...]
    name: str = "layer.weight"
    total: int | None = None  # all logical parameters; the weight alone where None
    bytes: dict[str, int] | None = None  # of the weight's parts by class, worked by hand


def all_cases() -> list[Case]:
    from tests.cases import (
        aqlm,
        awq,
        bitnet,
        bnb,
        compressed_tensors,
        eetq,
        exllama,
        fbgemm,
        fouroversix,
        fp8,
        fp_quant,
        gemma,
        ggml,
        gptq,
        higgs,
        hqq,
        metal,
        mlx,
        modelopt,
        mxfp4,
        onnx,
        plain,
        quanto,
        quark,
        sinq,
        spqr,
        torch_ao,
        torchao,
        transformer_engine,
        vptq,
    )

    # One row per scheme.
    return [
        *plain.CASES,
        *bnb.CASES,
        *mlx.CASES,
        *bitnet.CASES,
        *aqlm.CASES,
        *vptq.CASES,
        *metal.CASES,
        *gemma.CASES,
        *spqr.CASES,
        *eetq.CASES,
        *higgs.CASES,
        *gptq.CASES,
        *awq.CASES,
        *exllama.CASES,
        *hqq.CASES,
        *sinq.CASES,
        *fp8.CASES,
        *compressed_tensors.CASES,
        *quanto.CASES,
        *torchao.CASES,
        *torch_ao.CASES,
        *transformer_engine.CASES,
        *mxfp4.CASES,
        *fbgemm.CASES,
        *modelopt.CASES,
        *quark.CASES,
        *fouroversix.CASES,
        *fp_quant.CASES,
        *ggml.CASES,
        *onnx.CASES,
    ]
