"""Where a checkpoint says how it is quantized: ten places, one answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = ("quantization_config", "compression_config", "quantization")
_OWN_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}


def find(configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the quantization block of a checkpoint, `{}` where it declares none.

    Looked for in config.json, in its `text_config`, then in the files that quantizers write of their own; those carry
    no `quant_method`, so the method their file name stands for is filled in.
    """
    return next(_candidates(configs), {})


def _candidates(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    config = configs.get("config.json", {})
    for level in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(level, Mapping):
            yield from (level[key] for key in _KEYS if isinstance(level.get(key), Mapping) and level[key])
    for name, method in _OWN_FILES.items():
        if isinstance(configs.get(name), Mapping):
            yield {"quant_method": method, **configs[name]}


def each(quantization: Mapping[str, Any], *keys: str) -> frozenset[int]:
    """Return every whole number that a quantization block says under one of `keys`, its per-module overrides included.

    Overrides (`dynamic` of GPTQModel, `extra_config` of auto-round) are keyed by patterns that a stranger wrote: they
    are not matched, only read; which of the numbers a module has follows from its shapes.

    >>> sorted(each({"bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8}, "-:lm_head": {}}}, "bits"))
    [4, 8]
    """
    blocks = [quantization]
    for group in ("dynamic", "extra_config"):
        if isinstance(quantization.get(group), Mapping):
            blocks.extend(block for block in quantization[group].values() if isinstance(block, Mapping))
    return frozenset(block[key] for block in blocks for key in keys if type(block.get(key)) is int)
