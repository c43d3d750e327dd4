"""The unquantized model of a configuration, on the meta device, given tensors to load: a process of its own.

Reads `{"config", "shapes"}` as JSON from stdin and writes what transformers' own loader has to say to stdout, so its
renames, its merges of experts and its ties are not done a second time here. Run by `architecture`, never
imported: a configuration comes from strangers, so it is built offline, without remote code, in bounded time and memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

MEMORY = 8 << 30
# What could run other code, reach for the network, or quantize again.
LEFT_OUT = (
    "auto_map",
    "quantization_config",
    "quantization",
    "compression_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_name_or_path",
    "use_kernels",
)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answer_to = os.dup(1)
    os.dup2(2, 1)  # libraries print
    request = json.load(sys.stdin)
    try:
        answer = loaded(cleaned(request["config"]), request["shapes"])
    except Unknown as error:
        answer = {"unknown": str(error)}
    with os.fdopen(answer_to, "w") as file:
        json.dump(answer, file)


class Unknown(Exception):
    """A model that the installed transformers does not have."""


def cleaned(value: Any) -> Any:
    """Return a configuration without what must not be asked for, at any depth."""
    if isinstance(value, dict):
        return {key: cleaned(entry) for key, entry in value.items() if key not in LEFT_OUT}
    return [cleaned(entry) for entry in value] if isinstance(value, list) else value


def loaded(config: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Return what the loader says of tensors of these shapes."""
    import torch
    import transformers
    from transformers import modeling_utils

    said: dict[str, Any] = {}
    if hasattr(modeling_utils, "log_state_dict_report"):  # it raises where experts cannot be merged
        modeling_utils.log_state_dict_report = lambda **report: said.update(_conversions(**report))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cls = _class(config)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class.from_dict(config),
        state_dict=tensors,
        device_map={"": "meta"},
        dtype=torch.bfloat16,
        attn_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return said | {
        "model": cls.__name__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "missing": {name: list(parameters[name].shape) for name in info["missing_keys"] if name in parameters},
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": [[name, list(theirs), list(model)] for name, theirs, model in info["mismatched_keys"]],
    }


def _conversions(**report: Any) -> dict[str, Any]:
    return {"unmerged": sorted(getattr(report.get("loading_info"), "conversion_errors", {}))}


def _class(config: dict[str, Any]) -> Any:
    """The model class of transformers itself that a configuration names, or the one of its type for text."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    model_type = config.get("model_type")
    if model_type not in configuration_auto.CONFIG_MAPPING:
        raise Unknown(f"model_type `{model_type}`")
    for name in config.get("architectures") or ():
        cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        kind = configuration_auto.CONFIG_MAPPING[model_type]
        if kind in mapping:
            return mapping[kind]
    raise Unknown(f"architecture of model_type `{model_type}`")


if __name__ == "__main__":
    main()
