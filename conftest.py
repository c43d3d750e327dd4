"""Runs what the documentation shows: Python blocks, test files, shell sessions and docstrings.

In README.md and docs/**/*.md, in a folder with the checkpoints of `checkpoints`:

    ```python    run in one namespace per page; a doctest where it starts with >>>. A block that defines tests is
                 saved as a file (its first line may name it: `# test_release.py`) and run by pytest, and must pass
                 unless a shell session of the page runs it by name. The demo's own test file is left to `make demo`
    ```console   each `$ quantcheck ...` and `$ pytest ...` is run in a terminal of 80 columns, and its output must
                 be what is shown; a line `...` stands for any lines. Other commands are not run, nor is pytest
                 without a file of the page
    ```toml      must parse; saved where its first line names it: `# quantcheck.toml`
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.myst import CodeBlockParser
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).parent
DEMO = ROOT / "docs/examples/minilm/test_minilm.py"
MODULES = {"quantcheck": "pytest_quantcheck", "quantcheck-lint": "quantcheck_lint", "pytest": "pytest"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny-llama` (bfloat16), `tiny-llama-nf4`, the layout of Mistral-7B in NF4, and `tiny-onnx`."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from tests import layouts, smollm2

    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder / "tiny-llama")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        folder / "tiny-llama", quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.bfloat16
    ).save_pretrained(folder / "tiny-llama-nf4")
    layouts.write_folder(folder / "mistral-7b-nf4", layouts.mistral_7b(), layouts.MISTRAL_CONFIG)
    (folder / "tiny-onnx").mkdir()
    for name, model in (("", smollm2.fp32(smollm2.SMALL)), ("_q4", smollm2.four_bits(smollm2.fp32(smollm2.SMALL)))):
        (folder / f"tiny-onnx/model{name}.onnx").write_bytes(model.SerializeToString())
    return folder


def run_python(example: Example) -> str | None:
    """Run a block of Python, or the tests it defines."""
    source = str(example.parsed)
    if source == DEMO.read_text():
        return None
    with contextlib.chdir(example.namespace["checkpoints"]):
        if re.search(r"^def test_", source, re.MULTILINE):
            return run_tests(source, example)
        if source.startswith(">>>"):
            return run_doctests(source, example)
        return PythonEvaluator()(example)


def run_doctests(source: str, example: Example) -> str | None:
    """Run the examples of a block one after the other and return the first failure."""
    for region in DocTestStringParser(DocTestEvaluator())(source, example.document.path):
        example.parsed = region.parsed
        failure = region.evaluator(example)
        if failure:
            return failure
    return None


def run_tests(source: str, example: Example) -> str | None:
    """Save the block as a test file and run it in this process, where torch is imported already."""
    named = re.match(r"# (test_\w+\.py)\n", source)
    path = Path(named.group(1) if named else f"test_{Path(example.path).stem}_{example.line}.py")
    path.write_text(source)
    if f"$ pytest {path}" in example.document.text:
        return None
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir=.", "-c", os.devnull, path]
    )
    return f"pytest ended with {code!r}" if code else None


def run_console(example: Example) -> str | None:
    """Run the commands of a shell session and compare what they print with what is shown."""
    for session in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
        command, _, shown = session.partition("\n")
        program, *arguments = shlex.split(command, comments=True)
        module = MODULES.get(program)
        if module is None or ">" in arguments or importlib.util.find_spec(f"{module}.__main__") is None:
            continue
        if program == "pytest" and not any(argument.endswith((".py", ".toml")) for argument in arguments):
            continue
        printed = in_terminal([sys.executable, "-m", module, *arguments], cwd=example.namespace["checkpoints"])
        if not matches(shown, printed):
            return f"$ {command}\nprinted:\n{printed}\nshown:\n{shown}"
    return None


def in_terminal(command: list[str], cwd: Path) -> str:
    """Return what a command prints in a terminal of 80 columns that knows no colours."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    hidden = ("PYTEST_", "COLUMNS", "LINES", "CI", "GITHUB_")
    known = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    paths = [str(ROOT), str(ROOT / "lint"), os.environ.get("PYTHONPATH", "")]
    environment = known | {"TERM": "dumb", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while chunk := os.read(ours, 1 << 16):
            chunks.append(chunk)
    os.close(ours)
    process.wait()
    return b"".join(chunks).decode().replace("\r\n", "\n")


def matches(shown: str, printed: str) -> bool:
    """Whether the printed lines are those shown, `...` lines standing for any number of them, times for any time."""
    wanted = [re.sub(r"in \d+\.\d+s", "in #s", line.rstrip()) for line in shown.strip().splitlines()]
    pattern = "\n".join(r"(?:.*\n)*?.*" if line == "..." else re.escape(line) for line in wanted)
    lines = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    return re.fullmatch(pattern, re.sub(r"in \d+\.\d+s", "in #s", lines)) is not None


def parse_toml(example: Example) -> None:
    """Fail where a configuration is not TOML, and save one that is named."""
    source = str(example.parsed)
    tomllib.loads(source)
    named = re.match(r"# ([\w.]+\.toml)\n", source)
    if named:
        (example.namespace["checkpoints"] / named.group(1)).write_text(source)


pages = Sybil(
    parsers=[
        CodeBlockParser("python", run_python),
        CodeBlockParser("console", run_console),
        CodeBlockParser("toml", parse_toml),
    ],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    excludes=["docs/_build/**", "docs/lint/rules/**"],
    fixtures=["checkpoints"],
)
docstrings = Sybil(
    parsers=[DocTestParser()],
    patterns=["pytest_quantcheck/*.py", "pytest_quantcheck/**/*.py"],
    document_types={".py": PythonDocStringDocument},
)

pytest_collect_file = (pages + docstrings).pytest()
