"""The unquantized model against what a checkpoint holds: shapes only, so the checkpoints are sparse."""

from __future__ import annotations

import pytest

from pytest_quantcheck import FormatError, architecture, inspect, unquantized_model
from tests.layouts import Entry, write_folder

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, **SMALL}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_key_value_heads": 4,
    **SMALL,
}
ask_in_a_process = architecture._ask
MLX = {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The loader here, where transformers is imported already; its process has tests of its own."""
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "log_state_dict_report", modeling_utils.log_state_dict_report)
    monkeypatch.setattr(
        architecture,
        "_ask",
        lambda source, config, shapes: unquantized_model.loaded(unquantized_model.cleaned(config), shapes),
    )


def mlx(name: str, rows: int, columns: int, *, bits: int = 4, group: int = 32) -> list[Entry]:
    groups = columns // group
    return [
        Entry(f"{name}.weight", "I32", (rows, columns * bits // 32)),
        Entry(f"{name}.scales", "BF16", (rows, groups)),
        Entry(f"{name}.biases", "BF16", (rows, groups)),
    ]


def plain(name: str, *shape: int) -> list[Entry]:
    return [Entry(f"{name}.weight", "BF16", shape)]


def attention(layer: str, *, keys: int = 32) -> list[Entry]:
    return [
        *mlx(f"{layer}.self_attn.q_proj", 64, 64),
        *mlx(f"{layer}.self_attn.k_proj", keys, 64),
        *mlx(f"{layer}.self_attn.v_proj", keys, 64),
        *mlx(f"{layer}.self_attn.o_proj", 64, 64),
        *plain(f"{layer}.input_layernorm", 64),
        *plain(f"{layer}.post_attention_layernorm", 64),
    ]


def llama() -> list[Entry]:
    layers = []
    for number in range(2):
        layer = f"model.layers.{number}"
        layers += attention(layer)
        layers += mlx(f"{layer}.mlp.gate_proj", 96, 64) + mlx(f"{layer}.mlp.up_proj", 96, 64)
        layers += mlx(f"{layer}.mlp.down_proj", 64, 96)
    ends = [*mlx("model.embed_tokens", 131, 64), *plain("model.norm", 64), *mlx("lm_head", 131, 64)]
    return [*ends, *layers]


def mixtral() -> list[Entry]:
    """Experts one by one, as every checkpoint has them and transformers 5 does not."""
    layers = []
    for number in range(2):
        layer = f"model.layers.{number}"
        layers += attention(layer, keys=64) + plain(f"{layer}.block_sparse_moe.gate", 3, 64)
        for expert in range(3):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            layers += mlx(f"{name}.w1", 96, 64) + mlx(f"{name}.w2", 64, 96) + mlx(f"{name}.w3", 96, 64)
    ends = [*mlx("model.embed_tokens", 131, 64), *plain("model.norm", 64), *mlx("lm_head", 131, 64)]
    return [*ends, *layers]


def findings(folder, entries: list[Entry], config: dict) -> list[tuple[str, str | None, str]]:
    path = write_folder(folder / "checkpoint", [_unsigned(entry) for entry in entries], config)
    return [
        (found.severity, found.tensor, found.message)
        for found in inspect(path, verify_architecture=True).findings
        if found.check == "architecture"
    ]


def _unsigned(entry: Entry) -> Entry:
    return entry._replace(dtype="U32") if entry.dtype == "I32" else entry


def test_sound_checkpoints_have_no_findings(tmp_path):
    assert findings(tmp_path / "llama", llama(), LLAMA | {"quantization": MLX}) == []
    assert findings(tmp_path / "mixtral", mixtral(), MIXTRAL | {"quantization": MLX}) == []


def test_a_wrong_bit_width_shows_as_a_wrong_shape(tmp_path):
    """4 bits in groups of 32 are stored like 2 bits in groups of 64; the configuration says the wrong one."""
    name = "model.layers.1.mlp.up_proj"
    config = LLAMA | {"quantization": MLX | {name: {"group_size": 64, "bits": 2}}}
    [(severity, tensor, message)] = findings(tmp_path, llama(), config)
    assert (severity, tensor) == ("error", f"{name}.weight")
    assert "[96, 128] (read as mlx-affine-2bit), LlamaForCausalLM of transformers" in message
    assert message.endswith("has [96, 64]")


def test_one_expert_of_another_shape_is_named(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    config = MIXTRAL | {"quantization": MLX | {name: {"group_size": 64, "bits": 2}}}
    found = findings(tmp_path, mixtral(), config)
    assert [severity for severity, _, _ in found] == ["error"]
    assert f"`{name}.weight` has the shape [96, 128], its siblings [96, 64]" in found[0][2]


def test_missing_and_unexpected_tensors(tmp_path):
    entries = [entry for entry in llama() if entry.name != "model.norm.weight"] + plain("model.mtp", 7, 9)
    found = findings(tmp_path, entries, LLAMA | {"quantization": MLX})
    assert [(severity, tensor) for severity, tensor, _ in found] == [("warning", "model.norm.weight"), ("note", None)]
    assert "has no `model.mtp.weight`" in found[1][2]


def test_another_model_is_an_error_never_a_pass(tmp_path):
    [(severity, _, message)] = findings(tmp_path, plain("some.layer", 7, 9), LLAMA)
    assert (severity, message.partition(" is one of")[0]) == ("error", "none of 1 name")


def test_tied_head_may_be_absent(tmp_path):
    entries = [entry for entry in llama() if not entry.name.startswith("lm_head")]
    assert findings(tmp_path, entries, LLAMA | {"quantization": MLX, "tie_word_embeddings": True}) == []


def test_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Remote code is not run, and what the process says comes back as one line."""
    monkeypatch.setattr(architecture, "_ask", ask_in_a_process)
    config = {"model_type": "no_such_model", "auto_map": {"AutoModel": "code.Model"}}
    path = write_folder(tmp_path / "checkpoint", plain("some.layer", 7, 9), config)
    (path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FormatError, match="model_type `no_such_model` is not in the installed transformers"):
        inspect(path, verify_architecture=True)
    assert findings(tmp_path / "llama", llama(), LLAMA | {"quantization": MLX}) == []


def test_a_configuration_that_builds_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "_ask", ask_in_a_process)
    program = tmp_path / "program.py"
    program.write_text("raise TypeError('hidden_size\\nis a str')")
    monkeypatch.setattr(architecture, "PROGRAM", program)
    with pytest.raises(FormatError, match="its model cannot be built: ") as raised:
        findings(tmp_path, plain("some.layer", 7, 9), LLAMA | {"hidden_size": "x"})
    assert "\n" not in str(raised.value)


def test_without_a_configuration(tmp_path):
    path = write_folder(tmp_path / "checkpoint", plain("some.layer", 7, 9), LLAMA)
    (path / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config.json"):
        inspect(path, verify_architecture=True)
