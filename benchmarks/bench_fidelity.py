"""Fidelity of a whole NF4 checkpoint against its bfloat16 original, beside the script that people write; other formats.

The script takes each tensor whole: bitsandbytes' `dequantize_4bit`, `.float()`, the difference, the cosine. It gives
two numbers for a tensor; ours gives those of the JSON document, with `auto` also what rounding to nearest would keep.
The bound is what it takes to copy all bytes of both files out of the page cache, on as many threads. The first run in
a process imports numba; the very first compiles, here in an empty folder.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import measure
from pytest_quantcheck import compiled

HIDDEN, INNER, LAYERS = 2048, 5632, 7
ROWS, COLUMNS = 4096, 4096
ROUNDS = 7
CHUNK = 1 << 20

OURS = """
import sys
from pytest_quantcheck import inspect
from pytest_quantcheck.checks.fidelity import compare
compare(inspect(sys.argv[1]), inspect(sys.argv[2]))
"""
UNCOMPILED = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ["NUMBA_CACHE_DIR"] = folder.name
"""
THEIRS = """
import sys
from benchmarks.bench_fidelity import script
script(sys.argv[1], sys.argv[2])
"""
IMPORTS = "import torch, bitsandbytes.functional, safetensors"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what a process inherits counts as its peak memory.
        measure.run(measure.python(f"from benchmarks.bench_fidelity import write; write({folder!r})"))
        quantized, reference = (os.path.join(folder, f"{name}.safetensors") for name in ("nf4", "reference"))
        _processes(quantized, reference)
        _whole(quantized, reference)
        _formats(Path(folder))


def script(quantized: str, reference: str) -> dict[str, tuple[float, float]]:
    """Return the SQNR and the cosine of each tensor, as people compute them."""
    import bitsandbytes.functional
    import torch
    from safetensors import safe_open

    found = {}
    with safe_open(reference, "pt") as original, safe_open(quantized, "pt") as stored:
        names = list(stored.keys())
        for name in list(original.keys()):
            wanted = original.get_tensor(name).float()
            parts = {
                key.removeprefix(name + "."): stored.get_tensor(key) for key in names if key.startswith(name + ".")
            }
            state = bitsandbytes.functional.QuantState.from_dict(parts, device="cpu")
            decoded = bitsandbytes.functional.dequantize_4bit(stored.get_tensor(name), state).float()
            error = decoded - wanted
            cosine = torch.nn.functional.cosine_similarity(decoded.flatten(), wanted.flatten(), dim=0)
            found[name] = float(10 * torch.log10(wanted.square().sum() / error.square().sum())), float(cosine)
    return found


def write(folder: str) -> None:
    """Write the checkpoint and its reference."""
    import bitsandbytes.functional
    import safetensors.torch
    import torch

    shapes = {"q_proj": (HIDDEN, HIDDEN), "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN)}
    shapes |= {"down_proj": (HIDDEN, INNER), "o_proj": (HIDDEN, HIDDEN)}
    torch.manual_seed(0)
    original, stored = {}, {}
    for layer in range(LAYERS):
        for kind, shape in shapes.items():
            name = f"model.layers.{layer}.{kind}.weight"
            original[name] = (0.02 * torch.randn(shape)).to(torch.bfloat16)
            codes, state = bitsandbytes.functional.quantize_4bit(
                original[name], quant_type="nf4", compress_statistics=True
            )
            stored |= {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    safetensors.torch.save_file(original, f"{folder}/reference.safetensors")
    safetensors.torch.save_file(stored, f"{folder}/nf4.safetensors")


def _processes(quantized: str, reference: str) -> None:
    commands = {
        "imports only": measure.python(IMPORTS),
        "ours, auto": [sys.executable, "-c", OURS, quantized, reference],
        "ours, nothing compiled yet": [sys.executable, "-c", UNCOMPILED + OURS, quantized, reference],
        "the script": [sys.executable, "-c", THEIRS, quantized, reference],
    }
    measure.table(measure.in_turns(commands, rounds=1))


def _whole(quantized: str, reference: str) -> None:
    import torch

    from pytest_quantcheck import inspect
    from pytest_quantcheck.checks.fidelity import Limits, compare

    ours, theirs = inspect(quantized), inspect(reference)
    values = ours.logical_params
    print(f"\nNF4, {values / 1e6:.0f}M values in {len(ours.tensors)} tensors, {torch.get_num_threads()} threads")
    expected = script(quantized, reference)
    for row in compare(ours, theirs).tensors:
        assert abs(row.sqnr_db - expected[row.name][0]) < 1e-2, (row, expected[row.name])
        assert abs(row.cosine - expected[row.name][1]) < 1e-3, (row, expected[row.name])  # theirs is float32
    given = Limits(min_sqnr_db=18.5)
    _table(
        {
            "ours, with a limit given": lambda: compare(inspect(quantized), inspect(reference), given),
            "ours, auto": lambda: compare(inspect(quantized), inspect(reference)),
            "ours, auto, without numba": lambda: _by_torch(lambda: compare(inspect(quantized), inspect(reference))),
            "the script": lambda: script(quantized, reference),
            "copying the bytes": lambda: _copy([quantized, reference], torch.get_num_threads()),
        },
        values,
    )


def _by_torch(run: Callable[[], object]) -> None:
    """Run as where numba is not installed."""
    least, compiled.FROM = compiled.FROM, sys.maxsize
    try:
        run()
    finally:
        compiled.FROM = least


def _copy(paths: list[str], threads: int) -> None:
    """Copy all bytes of the files into buffers that stay in the cache."""
    chunks = iter([(path, at) for path in paths for at in range(0, os.path.getsize(path), CHUNK)])
    lock = threading.Lock()

    def work() -> None:
        buffer = bytearray(CHUNK)
        descriptors = {path: os.open(path, os.O_RDONLY) for path in paths}
        while True:
            with lock:
                path, at = next(chunks, (None, 0))
            if path is None:
                break
            os.preadv(descriptors[path], [buffer], at)
        for descriptor in descriptors.values():
            os.close(descriptor)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _formats(folder: Path) -> None:
    """One matrix in each format, its codes random: in windows, and as a script that decodes it whole."""
    import safetensors.torch
    import torch

    from pytest_quantcheck import inspect
    from pytest_quantcheck.checks.engine import measure as measure_pair
    from pytest_quantcheck.tensor import LogicalTensor

    compiled.FROM = ROWS * COLUMNS  # as in a model of them
    torch.manual_seed(0)
    original = (0.02 * torch.randn(ROWS, COLUMNS)).to(torch.bfloat16)
    safetensors.torch.save_file({"layer.weight": original}, folder / "original.safetensors")
    reference = inspect(folder / "original.safetensors").tensor("layer.weight")

    def whole(tensor: LogicalTensor) -> None:
        decoded, wanted = tensor.decode(), reference.decode()
        error = decoded - wanted
        torch.nn.functional.cosine_similarity(decoded.flatten(), wanted.flatten(), dim=0)
        error.square().sum(), wanted.square().sum()

    for kind, path in _written(folder).items():
        (tensor,) = (tensor for tensor in inspect(path).parameters if tensor.quantized)
        plain = tensor._replace(rounding=None)
        print(f"\n{kind}, {ROWS} x {COLUMNS}, one thread")
        torch.set_num_threads(1)
        _table(
            {
                "ours, with a limit given": lambda plain=plain: measure_pair(plain, reference),
                "ours, auto": lambda tensor=tensor: measure_pair(tensor, reference),
                "decoded whole, then the script": lambda tensor=tensor: whole(tensor),
            },
            tensor.params,
        )


def _written(folder: Path) -> dict[str, Path]:
    import torch

    from tests import gguf_files

    def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randint(0, 100, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)

    half = torch.full((COLUMNS // 128, ROWS), 0.01, dtype=torch.float16)
    gptq = {
        "layer.qweight": codes(torch.int32, COLUMNS // 8, ROWS),
        "layer.qzeros": codes(torch.int32, COLUMNS // 128, ROWS // 8),
        "layer.scales": half,
        "layer.g_idx": torch.arange(COLUMNS, dtype=torch.int32) // 128,
    }
    int8 = {
        "layer.weight": codes(torch.int8, ROWS, COLUMNS),
        "layer.SCB": torch.full((ROWS,), 0.1),
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    fp8 = {
        "layer.weight": codes(torch.float8_e4m3fn, ROWS, COLUMNS),
        "layer.weight_scale_inv": torch.full((ROWS // 128, COLUMNS // 128), 0.01),
    }
    kinds = {
        "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}),
        "LLM.int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "FP8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    }
    found = {kind: _saved(folder / kind, tensors, config) for kind, (tensors, config) in kinds.items()}
    values, width = gguf_files.SIZES["Q4_K"]
    raw = codes(torch.uint8, ROWS, COLUMNS // values * width).numpy().tobytes()
    found["Q4_K"] = folder / "q4_k.gguf"
    found["Q4_K"].write_bytes(gguf_files.gguf([gguf_files.Tensor("layer.weight", "Q4_K", (ROWS, COLUMNS), raw)]))
    return found


def _saved(folder: Path, tensors: Mapping[str, object], config: Mapping[str, object]) -> Path:
    import safetensors.torch

    folder.mkdir()
    safetensors.torch.save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def _table(rows: Mapping[str, Callable[[], object]], values: int) -> None:
    """Print the median wall and processor time of each row, in turns, as multiples of the first.

    On a machine that others use as well, processor time says more.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for number in range(ROUNDS + 1):
        for name, run in rows.items():
            started = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    medians = {name: [statistics.median(kind) for kind in zip(*taken, strict=True)] for name, taken in times.items()}
    first = next(iter(medians.values()))
    print(f"{'':32}  {'seconds':>8}  {'times':>6}  {'processor':>9}  {'times':>6}  {'M values/s':>10}")
    for name, (wall, processor) in medians.items():
        shares = f"{wall:8.3f}  {wall / first[0]:6.2f}  {processor:9.3f}  {processor / first[1]:6.2f}"
        print(f"{name:32}  {shares}  {values / wall / 1e6:10.0f}", flush=True)
