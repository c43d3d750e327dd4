"""Rounding a weight to nearest, for what to expect, beside the library that quantizes and decodes it: two cores."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.quantizers import QUANTIZERS

ROWS, COLUMNS = 512, 2048
ROUNDS = 3
NAMES = ("bnb-nf4-64", "bnb-int8", "ct-int4-128-asym", "gguf-q4_0", "torchao-mxfp4", "float8-e4m3-row", "quanto-qint4")


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    values = torch.randn(ROWS, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'':20}  {'ours, ms/M':>10}  {'library, ms/M':>13}  {'times':>6}")
        for quantizer in QUANTIZERS:
            if quantizer.id in NAMES:
                _compare(quantizer.id, lambda chosen=quantizer: chosen.quantize(values, Path(folder)), values)


def _compare(name: str, quantize: Callable, values: torch.Tensor) -> None:
    tensor = quantize()
    ours, library = [], []
    for _ in range(ROUNDS):
        ours.append(_milliseconds(lambda: tensor.rounding.nearest(tensor, values, None)))
        library.append(_milliseconds(lambda: quantize().decode()))
    first, second = statistics.median(ours), statistics.median(library)
    print(f"{name:20}  {first:10.1f}  {second:13.1f}  {second / first:6.1f}", flush=True)


def _milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e9 / (ROWS * COLUMNS)


if __name__ == "__main__":
    main()
