"""The documentation says what the code does: everything public is on a page, and what is quoted is true."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
from click.testing import CliRunner

import pytest_quantcheck
from pytest_quantcheck import cli, plugin
from pytest_quantcheck.checks.hosts import HOSTS
from pytest_quantcheck.keys import CHECKS
from pytest_quantcheck.report import json as json_report
from pytest_quantcheck.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in DOCS.rglob("*.md") if "_build" not in path.parts}


def test_readme_quotes_the_test_file_of_the_demo():
    demo = (DOCS / "examples/minilm/test_minilm.py").read_text()
    assert f"```python\n{demo}```\n" in README


@pytest.mark.parametrize("name", pytest_quantcheck.__all__)
def test_every_public_name_has_a_docstring_and_a_place_in_the_reference(name):
    assert inspect.getdoc(getattr(pytest_quantcheck, name)), f"{name} has no docstring"
    assert re.search(rf"^\.\. auto\w+:: pytest_quantcheck\.{name}(\(\))?$", PAGES["reference/api.md"], re.MULTILINE)


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_every_command_has_a_section(name):
    assert f"## quantcheck {name}\n" in PAGES["reference/cli.md"]


@pytest.mark.parametrize("name", ["inspect", "why", "diff", "predict", "compare", "check", "check-size", "init"])
def test_every_option_of_a_command_is_shown(name):
    usage = CliRunner().invoke(cli.cli, [name, "--help"], prog_name="quantcheck", terminal_width=80).output
    for option in re.findall(r"--[\w-]+", usage):
        assert option in PAGES["reference/cli.md"]


def test_every_option_and_setting_of_the_plugin_is_described():
    source = ast.parse(inspect.getsource(plugin.pytest_addoption))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    named = {kind: {call.args[0].value for call in calls if call.func.attr == kind} for kind in ("addoption", "addini")}
    assert len(named["addoption"]) >= 2
    assert len(named["addini"]) >= 2
    for option in named["addoption"]:
        assert f"```{{option}} {option}" in PAGES["reference/plugin.md"]
    for setting in named["addini"]:
        assert f"\n`{setting}`\n: " in PAGES["reference/plugin.md"]


@pytest.mark.parametrize("name", plugin.__all__)
def test_every_fixture_is_described(name):
    assert f"\n`{name}`\n: " in PAGES["reference/plugin.md"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_has_a_section_with_its_layout(scheme):
    pages = _load("scheme_pages", DOCS / "_ext/scheme_pages.py")
    section = pages.section(scheme)
    assert f"## {scheme.title}\n" in section
    assert all(f"`{variant}`" in section for variant in scheme.variants)
    assert scheme.source, "a scheme says where its layout comes from"
    assert "```text\n" in section, "the docstring of its module opens with its layout"
    assert all(f"`{variant}`" in pages.markdown().partition("\n\n")[0] for variant in scheme.variants)


def test_json_keys_of_inspect_are_those_documented(tmp_path):
    from pytest_quantcheck.artifact import inspect as inspect_artifact

    checkpoint = _checkpoint(tmp_path / "broken-total")
    produced = _keys(
        json_report.of_artifact(inspect_artifact(checkpoint)), variable={"schemes": "NAME", "tensors[].bytes": "CLASS"}
    )
    assert produced == _documented("quantcheck inspect --json")


def test_json_keys_of_compare_are_those_documented(tmp_path):
    from pytest_quantcheck.checks.fidelity import compare
    from tests.test_engine import pairs

    comparison = compare(*pairs(tmp_path, spoil=0))
    produced = _keys(json_report.of_comparison(comparison))
    assert produced == _documented("quantcheck compare --json")


def test_json_keys_of_why_are_those_documented(tmp_path):
    from pytest_quantcheck.artifact import inspect as inspect_artifact
    from pytest_quantcheck.checks.tree import tree
    from pytest_quantcheck.checks.why import explain

    artifact = inspect_artifact(_checkpoint(tmp_path))
    produced = _keys(json_report.of_explanation(explain(artifact), tree(artifact)))
    assert {key for key in produced if not key.startswith("tree.children[]")} == _documented("quantcheck why --json")


def test_json_keys_of_diff_are_those_documented(tmp_path):
    from pytest_quantcheck.artifact import inspect as inspect_artifact
    from pytest_quantcheck.checks.diff import difference

    old, new = (inspect_artifact(_checkpoint(tmp_path / f"{rows}-rows", rows)) for rows in (2, 3))
    produced = _keys(json_report.of_difference(difference(old, new), 5), variable={"bytes": "CLASS"})
    of_totals = {
        f"{total}.{key}"
        for total in ("file_bytes", "logical_params", "outside_tensors", "bytes.CLASS")
        for key in ("old", "new", "growth")
    }
    assert produced - of_totals == _documented("quantcheck diff --json")


def test_json_keys_of_check_are_those_documented(tmp_path):
    from pytest_quantcheck import config, runner

    _checkpoint(tmp_path / "model")
    path = tmp_path / "quantcheck.toml"
    path.write_text('[[artifact]]\npath = "model"\nreference = "model"\nintegrity = "headers"\n')
    run = runner.run(runner.plan(config.load(str(path))))
    for artifact in run["artifacts"]:
        for document in ("inspect", "why", "compare", "baseline"):
            artifact[document] = None
    findings = {f"artifacts[].checks[].findings[].{key}" for key in ("check", "severity", "tensor", "message")}
    assert _keys(run) - findings == _documented("quantcheck check --json")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.key)
def test_every_key_of_the_configuration_is_in_the_table_and_in_the_example(check):
    page = PAGES["reference/config.md"]
    assert f"| `{check.key}` | {check.value} | {check.about} |\n" in page
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert re.search(rf"^{check.key} = ", example, re.MULTILINE) or check.key == "baseline"


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_every_host_is_in_the_table(host):
    assert re.search(rf"^\| `{host.name}` \| [^|]+ \| {re.escape(host.source)} \|$", PAGES["reference/config.md"], re.M)


def test_json_keys_of_predict_are_those_documented(tmp_path):
    from pytest_quantcheck.checks.predict import predict
    from tests.test_predict import llama_file

    produced = _keys(json_report.of_prediction(predict(llama_file(tmp_path))), variable={"recipes[].bytes": "CLASS"})
    assert produced == _documented("quantcheck predict --json")


def test_every_recipe_is_described():
    from pytest_quantcheck import recipes
    from pytest_quantcheck.recipes import ggml

    page = PAGES["howto/predict.md"]
    described = re.findall(r"`([a-z0-9_-]+)`", page)
    families = {
        recipes.named(name)[0].title for name in described if any(r.names.fullmatch(name) for r in recipes.RECIPES)
    }
    assert families == {recipe.title for recipe in recipes.RECIPES}
    assert ggml.DEFAULTS.keys() <= set(described)


def test_json_has_null_where_there_is_no_finite_value(tmp_path):
    from pytest_quantcheck.artifact import inspect as inspect_artifact
    from pytest_quantcheck.checks.fidelity import compare

    artifact = inspect_artifact(_checkpoint(tmp_path))
    document = json_report.of_comparison(compare(artifact, artifact))
    assert document["sqnr_db"] is None
    assert document["tensors"][0]["sqnr_db"] is None
    assert json_report.of_artifact(artifact)["bits_per_weight"]["quantized"] is None
    json.dumps(document, allow_nan=False)


def test_floors_in_the_table_are_those_applied():
    from pytest_quantcheck.schemes import bnb_4bit, bnb_8bit, plain

    page = PAGES["howto/fidelity.md"]
    for kind, floors in bnb_4bit.FLOORS_DB.items():
        for block, floor in floors:
            assert f"{kind.upper()}, block {block} | {floor} |" in page
    assert f"LLM.int8 | {bnb_8bit.FLOOR_DB} |" in page
    assert f"bfloat16, float16 | {plain.FLOORS_DB['BF16']} |" in page
    assert f"float32, float64 | {plain.FLOORS_DB['F32']} |" in page
    assert f"float8 e4m3 / e5m2 | {plain.FLOORS_DB['F8_E4M3']} / {plain.FLOORS_DB['F8_E5M2']} |" in page


def test_pages_build_without_torch():
    """What the documentation imports is the light half."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'docs/_ext');"
        "import scheme_pages, pytest_quantcheck; scheme_pages.markdown();"
        "[getattr(pytest_quantcheck, name) for name in pytest_quantcheck.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_page_is_in_a_table_of_contents():
    listed = set(re.findall(r"^(?!lint/)[\w/]+$", PAGES["index.md"], re.MULTILINE))
    pages = {name.removesuffix(".md") for name in PAGES if not name.startswith(("lint/", "examples/"))}
    assert pages - {"index"} == listed


def _checkpoint(folder: Path, rows: int = 2) -> Path:
    """A plain checkpoint whose index says a wrong total, so that there is a finding."""
    import safetensors.torch
    import torch

    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({"layer.weight": torch.arange(3.0 * rows).view(rows, 3)}, folder / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"layer.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _keys(value, path="", variable=MappingProxyType({})):
    """Every key of a document as a path: `tensors[].stored.dtype`."""
    if isinstance(value, list):
        return set().union(*(_keys(entry, f"{path}[]", variable) for entry in value if isinstance(entry, dict)))
    if not isinstance(value, dict):
        return set()
    found = set()
    for key, child in value.items():
        name = variable.get(path, key)
        inner = f"{path}.{name}" if path else name
        found |= ({inner} if path != "schemes" else set()) | _keys(child, inner, variable)
    return found


def _documented(title):
    section = PAGES["reference/json.md"].partition(f"## `{title}`\n")[2].partition("\n## ")[0]
    keys = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(keys) == len(set(keys))
    return set(keys)


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
