"""quantcheck.toml: what is read, where each key stands, and what is refused with a line that helps."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_quantcheck import config
from pytest_quantcheck.checks.baseline import Allowed, parse_growth
from pytest_quantcheck.checks.fidelity import Limits
from pytest_quantcheck.keys import CHECKS
from pytest_quantcheck.toml_lines import key_lines

LINES = '''\
# a comment with [brackets] and = signs
[[artifact]]   # first
path = "a]"
must_be_quantized = [
  "x]", # ]
  """y""",
]
message = """
[[artifact]]
size = 3
"""
size = 5

[artifact.fidelity]
gain.of = 0.1
min_sqnr_db = {"*" = 3}
[[artifact]]
"path" = 'b'
'''
EXPECTED = {
    ("artifact", 0): 2,
    ("artifact", 0, "path"): 3,
    ("artifact", 0, "must_be_quantized"): 4,
    ("artifact", 0, "message"): 8,
    ("artifact", 0, "size"): 12,
    ("artifact", 0, "fidelity"): 14,
    ("artifact", 0, "fidelity", "gain"): 15,
    ("artifact", 0, "fidelity", "gain", "of"): 15,
    ("artifact", 0, "fidelity", "min_sqnr_db"): 16,
    ("artifact", 0, "fidelity", "min_sqnr_db", "*"): 16,
    ("artifact", 1): 17,
    ("artifact", 1, "path"): 18,
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["unix", "windows"])
def test_every_key_is_found_on_its_line(ending):
    assert key_lines(LINES.replace("\n", ending)) == EXPECTED


KEYS = st.text("abc-_", min_size=1, max_size=3)
VALUES = st.sampled_from(["1", '"]"', "'''\n[x]\n'''", "[\n1,\n]", "{ a = 1 }", '"""\na = 1\n"""', "[[1], [2]]"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), KEYS, VALUES), max_size=8, unique_by=lambda row: row[1]))
def test_lines_are_those_of_any_file_we_write(rows):
    text, expected = "", {}
    for blank, key, value in rows:
        text += "# x = 1\n\n" * blank
        expected[(key,)] = text.count("\n") + 1
        text += f"{key} = {value}\n"
    tomllib.loads(text)
    assert {path: line for path, line in key_lines(text).items() if len(path) == 1} == expected


VALUES_READ = [
    ("logical_params", "22_713_216", 22713216),
    ("logical_params", '"22.7M"', "22.7M"),
    ("logical_params", "7.24e9", 7.24e9),
    ("size", '"90 MB"', 90_000_000),
    ("size", "17", 17),
    ("size_per_class", '{ scales = "1 KiB", dead = 0 }', {"scales": 1024, "dead": 0}),
    ("bits_per_weight", "4.6", {"max": 4.6}),
    ("bits_per_weight", '{ max = 8, min = 4, of = "model" }', {"max": 8.0, "min": 4.0, "of": "model"}),
    ("quantized_fraction", "0.96", {"min": 0.96}),
    ("quantized_fraction", "{ max = 1 }", {"max": 1.0}),
    ("must_be_quantized", '"*.mlp.*"', ["*.mlp.*"]),
    ("must_not_be_quantized", '["lm_head", "re:^model"]', ["lm_head", "re:^model"]),
    ("integrity", '"headers"', {"values": False, "allow": []}),
    ("integrity", '{ allow = ["orphan-file"] }', {"values": True, "allow": ["orphan-file"]}),
    ("fidelity", '"auto"', Limits()),
    ("fidelity", "18", Limits(min_sqnr_db=18.0)),
    ("fidelity", "{ gain = 0.1, bias = 1 }", Limits(gain=0.1, bias=1.0)),
    ("fidelity", "{ equal = false }", Limits(equal=False)),
    ("fidelity", '{ min_sqnr_db = { "*.mlp.*" = 18, "*" = "auto" } }', Limits({"*.mlp.*": 18.0, "*": "auto"})),
    ("host", '"github"', ["github"]),
    ("baseline", "true", Allowed()),
    ("baseline", '"2 %"', Allowed(parse_growth("2 %"))),
    ("baseline", '{ growth = "1 MB", sqnr_drop_db = 2 }', Allowed(parse_growth(1_000_000), 2.0)),
]


@pytest.mark.parametrize(("key", "value", "read"), VALUES_READ, ids=[f"{key}={value}" for key, value, _ in VALUES_READ])
def test_a_setting_is_read_as_it_is_meant(tmp_path, key, value, read):
    (tmp_path / "quantcheck.toml").write_text(f'[[artifact]]\npath = "a"\nreference = "b"\n{key} = {value}\n')
    (entry,) = config.load(str(tmp_path / "quantcheck.toml")).entries
    assert entry.settings[key] == read
    assert entry.where[key] == f"{tmp_path}/quantcheck.toml:4"


def test_every_key_has_a_row():
    assert {check.key for check in CHECKS} == {key for key, _, _ in VALUES_READ}


REFUSED = [
    ("sise = 3", ":3: unknown key `sise` (did you mean `size`? known: "),
    ("quantized = 1", ":3: unknown key `quantized` (did you mean `must_be_quantized`? "),
    ("zzzzzz = 1", ":3: unknown key `zzzzzz` (known: baseline, bits_per_weight, "),
    ("trainable_params = 3", ":3: `trainable_params`: what is trainable is known for live models only: use assert_"),
    ("logical_params = true", ":3: `logical_params`: is neither a count nor text such as `7.24B`"),
    ('logical_params = "7.24 billion"', ":3: `logical_params`: count `7.24 billion` is not a number"),
    ('size = "4.3 G"', ":3: `size`: size `4.3 G` is not a number with a unit"),
    ("size = -1", ":3: `size`: is -1 bytes, under none"),
    ("size_per_class = { scale = 1 }", ":3: `size_per_class`: unknown byte class `scale` (did you mean `scales`?"),
    ("size_per_class = {}", ":3: `size_per_class`: is not a table with some of: codes"),
    ('bits_per_weight = { of = "all" }', ":3: `bits_per_weight`: of `all` is neither"),
    ("bits_per_weight = nan", ":3: `bits_per_weight`: `nan` is not a number"),
    ("quantized_fraction = 96", ":3: `quantized_fraction`: is 96, and a share is from 0 to 1"),
    ("must_be_quantized = []", ":3: `must_be_quantized`: is neither text nor a list of texts"),
    ('must_be_quantized = ["re:("]', ":3: `must_be_quantized`: pattern `re:(` is not one (missing )"),
    ('integrity = "all"', ":3: `integrity`: `all` is neither `headers`, `values` nor a table"),
    ('fidelity = "auto"', ":3: `fidelity` needs a `reference`"),
    ('reference = "b"\nfidelity = { gian = 1 }', ":4: `fidelity`: unknown limit `gian` (did you mean `gain`?"),
    ('reference = "b"\nfidelity = { equal = 1 }', ":4: `fidelity`: `equal` is not true or false"),
    ('reference = "b"\nfidelity = { bias = "auto" }', ":4: `fidelity`: `auto` is not a number"),
    ('host = "githab"', ":3: `host`: unknown host `githab` (did you mean `github`?"),
    ('baseline = "2"', ":3: `baseline`: growth `2` is neither a share such as `2 %` nor a size"),
    ("baseline = { grow = 1 }", ":3: `baseline`: unknown key `grow` (did you mean `growth`?"),
    ('path2 = "x"', ":3: unknown key `path2` (did you mean `path`?"),
    ('name = ""\nsize = 1', ":3: `name` is not a text"),
    ('marks = "slow"\nsize = 1', ":3: `marks` is not a list of texts"),
    (
        'reference = "hf://org/model"',
        ":3: `reference`: hf://org/model: is a URL of the scheme `hf`",
    ),
    ("", ":1: checks nothing (give at least one of logical_params, size, "),
    (
        'reference = "https://me:s3cret@x/y"',
        ":3: `reference`: https://x/y: is a URL with a user name or",
    ),
    ("size = [", ": is not TOML: "),
    ("size = 1\n[defaults]\nsize = 2", ":4: unknown key `defaults` (known: artifact)"),
    ("size = 1\nsize = 2", ": is not TOML: "),
]


@pytest.mark.parametrize(("written", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_makes_no_sense_is_one_line_with_file_and_line(tmp_path, monkeypatch, written, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quantcheck.toml").write_text(f'[[artifact]]\npath = "a"\n{written}\n')
    with pytest.raises(ValueError) as error:
        config.load("quantcheck.toml")
    assert str(error.value).startswith(f"quantcheck.toml{said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no [[artifact]]"),
        ("artifact = 3", "has no [[artifact]]"),
        ("[artifact]\nsize = 3", "has no [[artifact]]"),
        ("[[artifact]]\nsize = 3", ":1: an artifact needs a `path`"),
        (
            '[[artifact]]\npath = "x/a"\nsize = 1\n[[artifact]]\npath = "x/a"\nsize = 2',
            ":2: 2 artifacts are called `x/a`",
        ),
        ("\xff", "is not UTF-8"),
    ],
    ids=["empty", "a-number", "one-table", "no-path", "twice", "latin-1"],
)
def test_a_file_without_artifacts_is_refused(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quantcheck.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="quantcheck") as error:
        config.load("quantcheck.toml")
    assert said in str(error.value)


@pytest.mark.parametrize("at", ["", "sub[1]"], ids=["here", "in-another-folder"])
def test_globs_and_names(tmp_path, monkeypatch, at):
    """Names, which records of the lock have too, are the same from wherever the configuration is read."""
    monkeypatch.chdir(tmp_path)
    for name in ("m/a-nf4", "m/b-nf4", "n/b-nf4", "m/odd[1]"):
        (tmp_path / at / name).mkdir(parents=True)
    path = (tmp_path / at / "quantcheck.toml").relative_to(tmp_path)
    path.write_text(
        '[[artifact]]\npath = "m/*-nf4"\nsize = 1\n[[artifact]]\npath = "n/b-nf4"\nsize = 1\n'
        '[[artifact]]\npath = "m/odd[1]"\nname = "odd"\nsize = 1\n[[artifact]]\npath = "o/*"\nsize = 1\n'
    )
    entries = config.load(str(path)).entries
    assert [(entry.name, str(Path(entry.path).relative_to(at))) for entry in entries] == [
        ("a-nf4", "m/a-nf4"),
        ("m/b-nf4", "m/b-nf4"),
        ("n/b-nf4", "n/b-nf4"),
        ("odd", "m/odd[1]"),
        ("o/*", "o/*"),
    ]
    assert [entry.error for entry in entries if entry.error] == [f"`o/*` matches nothing ({path}:12)"]


def test_pyproject_has_its_own_table_and_the_linters_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = '[project]\nname = "x"\n[tool.quantcheck.lint]\nselect = ["QC001"]\n'
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ValueError, match="no quantcheck"):
        config.find()
    (tmp_path / "pyproject.toml").write_text(text + '[[tool.quantcheck.artifact]]\npath = "a"\nsize = 9\n')
    assert config.find() == "pyproject.toml"
    (entry,) = config.load("pyproject.toml").entries
    assert (entry.where["size"], entry.settings) == ("pyproject.toml:7", {"size": 9})
