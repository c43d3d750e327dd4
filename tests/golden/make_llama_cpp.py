"""Write tests/golden/llama_cpp.json: what llama.cpp converts and quantizes small models to, tensor by tensor.

    python -m tests.golden.make_llama_cpp SOURCE LIBRARIES

SOURCE is a source tree of llama.cpp (its converter runs), LIBRARIES a folder with its shared libraries
(`llama_model_quantize` runs, through ctypes). Neither is a package that a test could install, so the tests read what
this script wrote: made with the tree in llama-cpp-python 0.3.36, and with the libraries of llama.cpp v0.5.0 in the npm
package @node-llama-cpp/linux-x64 3.22.1.

Every model is made by transformers with random weights; a vocabulary is not needed and left out. Cases that the file
has already are kept. A mixture that llama.cpp refuses for a model has no types.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.golden.file import FOLDER

SMALL = {"vocab_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **SMALL}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "dtype": "bfloat16", **SMALL}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def text(model_type: str, architecture: str, **other: object) -> dict[str, object]:
    return {"model_type": model_type, "architectures": [architecture], **TEXT, **other}


def llama(hidden: int, inner: int, *, layers: int, keys: int, **other: object) -> dict[str, object]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_key_value_heads": keys, **other}


MODELS = {
    # Architectures: names, shapes and dtypes of the F16 file.
    "llama-3-rope": text("llama", "LlamaForCausalLM", rope_parameters=LLAMA3, head_dim=24),
    "mistral": text("mistral", "MistralForCausalLM"),
    "qwen2-tied": text("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": text("qwen3", "Qwen3ForCausalLM", head_dim=32),
    "qwen2-moe": text("qwen2_moe", "Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=80),
    "gemma": text("gemma", "GemmaForCausalLM", head_dim=16),
    "gemma2": text("gemma2", "Gemma2ForCausalLM", head_dim=16),
    "starcoder2": text("starcoder2", "Starcoder2ForCausalLM", use_bias=True),
    "olmo": text("olmo", "OlmoForCausalLM"),
    "olmo2": text("olmo2", "Olmo2ForCausalLM"),
    "cohere": text("cohere", "CohereForCausalLM"),
    "granite": text("granite", "GraniteForCausalLM"),
    "smollm3": text("smollm3", "SmolLM3ForCausalLM", pad_token_id=0),
    "arcee": text("arcee", "ArceeForCausalLM"),
    # Mixtures: whole blocks of 256, layers enough for every rule; heads that share keys by two, by four, not at all.
    "llama-17-layers": llama(256, 512, layers=17, keys=2),
    "llama-tied-gqa": llama(256, 256, layers=9, keys=1, tie_word_embeddings=True),
    "llama-odd-columns": llama(96, 136, layers=9, keys=4),
    "llama-70b": llama(64, 32, layers=80, keys=2),
    "llama-65b": llama(64, 32, layers=80, keys=4),
    "qwen2-72b": text("qwen2", "Qwen2ForCausalLM", num_hidden_layers=80, intermediate_size=32),
    "mixtral-8": text("mixtral", "MixtralForCausalLM", hidden_size=256, intermediate_size=256, num_hidden_layers=9,
                      num_local_experts=8),
    "qwen3-moe": text("qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=256, num_hidden_layers=9, **EXPERTS, head_dim=64),
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "bfloat16", "n_embd": 256,
             "n_layer": 9, "n_head": 4, "n_inner": 512, "vocab_size": 160, "n_positions": 64, "n_ctx": 64},
    "phi3": text("phi3", "Phi3ForCausalLM", hidden_size=256, intermediate_size=512, num_hidden_layers=9, pad_token_id=0,
                 original_max_position_embeddings=64),
    "falcon": {"model_type": "falcon", "architectures": ["FalconForCausalLM"], "dtype": "bfloat16", "hidden_size": 256,
               "num_hidden_layers": 17, "num_attention_heads": 4, "num_kv_heads": 1, "vocab_size": 160},
}  # fmt: skip

FTYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21,
    "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29,
    "iq4_xs": 30, "iq1_m": 31, "tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38, "q1_0": 40, "q2_0": 41,
}  # fmt: skip
ALWAYS_WITH_IMATRIX = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"}
ALSO_WITH_IMATRIX = {"q4_0", "q5_0", "iq4_nl", "iq4_xs", "q4_k_m", "q2_k"}


class Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("values", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "ftype", "output_type", "token_type")),
        *((name, ctypes.c_bool) for name in ("again", "output", "copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "overrides", "types", "prune")),
        ("buffer", ctypes.c_size_t),
    )


def load_library(folder: Path) -> ctypes.CDLL:
    for pattern in ("libggml-base.so*", "libggml-cpu-x64.so*", "libggml.*so*"):
        ctypes.CDLL(str(next(folder.glob(pattern))), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    library.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *said: None)
    library.llama_log_set(library.silent, None)
    library.llama_backend_init()
    return library


def quantize(library: ctypes.CDLL, source: Path, target: Path, ftype: int, sizes: dict[str, int] | None) -> bool:
    """Run `llama_model_quantize`: False where it refuses. `sizes`: the values of an importance matrix, by tensor."""
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.threads = ftype, 2
    entries = [
        Importance(name.encode(), (ctypes.c_float * size)(*[1.0] * size), size) for name, size in (sizes or {}).items()
    ]
    table = (Importance * (len(entries) + 1))(*entries)
    if sizes:
        parameters.imatrix = ctypes.cast(table, ctypes.c_void_p)
    return not library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))


def make(config: dict[str, object], folder: Path) -> None:
    """Write the unquantized checkpoint with random weights."""
    import torch
    import transformers

    (folder / "config.json").write_text(json.dumps(config))
    cls = getattr(transformers, config["architectures"][0])
    torch.manual_seed(0)
    cls(cls.config_class.from_dict(config)).to(torch.bfloat16).save_pretrained(folder)


def convert(folder: Path, target: Path) -> None:
    """Run llama.cpp's converter, the vocabulary left out."""
    gguf = importlib.import_module("gguf")
    conversion = importlib.import_module("conversion")
    base = importlib.import_module("conversion.base")
    said = base.ModelBase.load_hparams(folder, False)
    name = base.get_model_architecture(said, base.ModelType.TEXT)
    cls = conversion.get_model_class(name)
    cls = type(cls.__name__, (cls,), {"set_vocab": lambda self: None, "model_arch": cls.model_arch})
    cls(folder, gguf.LlamaFileType.MOSTLY_F16, target).write()


def read(path: Path) -> list[list[object]]:
    """Return name, type and shape of every tensor, read by the gguf package, in the order of llama.cpp."""
    from gguf import GGUFReader

    found = [[t.name, t.tensor_type.name, [int(size) for size in reversed(t.shape)]] for t in GGUFReader(path).tensors]
    return sorted(found, key=lambda row: (int(row[0].split(".")[1]) if row[0].startswith("blk.") else -1, row[0]))


def record(config: dict[str, object], library: ctypes.CDLL) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(config, folder)
        convert(folder, folder / "f16.gguf")
        unquantized = read(folder / "f16.gguf")
        rows = {row[0]: row[2][-1] * (row[2][-3] if len(row[2]) > 2 else 1) for row in unquantized if len(row[2]) > 1}
        quantized = {}
        for recipe, imatrix in recipes(config):
            written = quantize(
                library, folder / "f16.gguf", folder / "out.gguf", FTYPES[recipe], rows if imatrix else None
            )
            suffix = "-imat" if imatrix and recipe not in ALWAYS_WITH_IMATRIX else ""
            quantized[recipe + suffix] = [row[1] for row in read(folder / "out.gguf")] if written else []
        keys = metadata(folder / "f16.gguf")
    return {
        "config": config,
        "keys": keys,
        "unquantized": without_layers(unquantized),
        "quantized": shortened(quantized),
    }


def without_layers(rows: list[list[object]]) -> list[list[object]]:
    """Return each tensor of the layers once, as `blk.*`; layers that differ stay as they are."""
    layers = {row[0].split(".")[1] for row in rows if row[0].startswith("blk.")}
    times = Counter(json.dumps(starred(row)) for row in rows)
    if any(number not in (1, len(layers)) for number in times.values()):
        return rows
    return [json.loads(row) for row in times]


def starred(row: list[object]) -> list[object]:
    return [re.sub(r"^blk\.[0-9]+\.", "blk.*.", row[0]), *row[1:]]


def metadata(path: Path) -> dict[str, object]:
    """Return the keys that the mixtures depend on."""
    from gguf import GGUFReader

    wanted = ("general.architecture", ".block_count", ".head_count", ".head_count_kv", ".expert_count")
    fields = GGUFReader(path).fields.items()
    return {name: field.contents() for name, field in fields if name.endswith(wanted)}


def recipes(config: dict[str, object]) -> list[tuple[str, bool]]:
    """Return the mixtures to make and whether with an importance matrix: few of a model of two layers."""
    if config.get("num_hidden_layers") == SMALL["num_hidden_layers"]:
        return [("q8_0", False), ("q4_k_m", False), ("q1_0", False)]
    plain = [(name, name in ALWAYS_WITH_IMATRIX) for name in FTYPES]
    return [*plain, *((name, True) for name in sorted(ALSO_WITH_IMATRIX))]


def shortened(quantized: dict[str, list[str]]) -> dict[str, object]:
    """One letter per tensor."""
    names = sorted({name for types in quantized.values() for name in types})
    letter = {name: chr(ord("A") + at) for at, name in enumerate(names)}
    return {"types": names, **{recipe: "".join(map(letter.get, types)) for recipe, types in quantized.items()}}


def main() -> None:
    source, libraries = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    library = load_library(libraries)
    path = FOLDER / "llama_cpp.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    cases = {name: case for name, case in known.items() if case["config"] == MODELS.get(name)}
    for name, config in MODELS.items():
        if name in cases:
            continue
        try:
            cases[name] = record(config, library)
        except Exception as error:
            print(f"{name}: {error!r}")
            continue
        print(name, len(cases[name]["unquantized"]))
    cases = {name: cases[name] for name in MODELS if name in cases}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    path.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
