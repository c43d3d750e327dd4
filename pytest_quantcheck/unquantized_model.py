"""The unquantized model of a configuration, on the meta device: a process of its own.

Reads `{"config", "shapes"}` as JSON from stdin and writes what transformers has to say to stdout: of tensors of these
shapes what its loader says, and where `shapes` is null the tensors that its checkpoint holds. So its renames, its
merges of experts and its ties are not done a second time here. Run by `architecture`, never imported: a configuration
comes from strangers, so it is built offline, without remote code, in bounded time and memory.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from typing import Any

MEMORY = 8 << 30
# transformers imports them where they are installed; no model is built of them.
SLOW = ("torchao", "scipy")
NOT_HERE = "is not in the installed transformers (remote code is never run)"
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
    sys.modules.update(dict.fromkeys(SLOW))  # type: ignore[arg-type]  # None: not to be imported
    request = json.load(sys.stdin)
    try:
        config, shapes = cleaned(request["config"]), request["shapes"]
        answer = described(config) if shapes is None else loaded(config, shapes)
    except Unknown as error:
        answer = {"unknown": str(error)}
    with os.fdopen(answer_to, "w") as file:
        json.dump(answer, file)


class Unknown(Exception):
    """A model that the installed transformers does not have, or does not let us take apart."""


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


def described(config: dict[str, Any]) -> dict[str, Any]:
    """Return every tensor that a checkpoint of the model holds: name, shape, kind, dtypes.

    Kinds: linear, conv1d, head (what transformers' quantizers leave out), embedding, expert, stack (experts in one
    tensor), other, buffer. The dtypes are its own where it is no float, and those that are asked for but where it stays
    in float32. `tied_head` is the output head that is no tensor of its own.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    cls = _class(config)
    with torch.device("meta"), torch.no_grad():
        model = cls._from_config(cls.config_class.from_dict(config), attn_implementation="eager")
        tensors = _distinct(model)
        kinds, wide = _kinds(model), _wide(model)
        saved = _as_saved(model, tensors)
    names = {id(tensor): name for name, tensor in tensors.items()}
    rows = [_row(name, tensor, names.get(id(tensor)), kinds, wide) for name, tensor in saved.items()]
    return {
        "model": cls.__name__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": rows,
        "tied_head": _tied_head(model),
    }


def _distinct(model: Any) -> dict[str, Any]:
    """The tensors of the state dict, shared ones once, without those that are never saved."""
    ignored = set(model._keys_to_ignore_on_save or ())
    found: dict[int, tuple[str, Any]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _as_saved(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors under the names of a checkpoint, where the model keeps them otherwise."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps them as a checkpoint has them
        return tensors
    saved: dict[str, Any] = revert_weight_conversion(model, dict(tensors))
    return saved


def _row(name: str, tensor: Any, known: str | None, kinds: dict[str, str], wide: dict[str, list[str]]) -> list[Any]:
    own = None if tensor.is_floating_point() else str(tensor.dtype)
    if known is not None:
        return [name, list(tensor.shape), kinds[known], own, [dtype for dtype in wide if known in wide[dtype]]]
    if ".experts." not in name or tensor.dim() != 2:
        raise Unknown(f"transformers makes `{name}` of other tensors")
    return [name, list(tensor.shape), "expert", own, []]


def _kinds(model: Any) -> dict[str, str]:
    """What each tensor of the state dict is."""
    kept = _kept_modules(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = dict.fromkeys(model.state_dict(), "buffer") | dict.fromkeys(parameters, "other")
    for path, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module, path in kept)
        if kind and f"{path}.weight" in parameters:
            found[f"{path}.weight"] = kind
    stacked = {name: "stack" for name, tensor in parameters.items() if tensor.dim() == 3 and "expert" in name}
    return found | stacked


def _kind(module: Any, kept: bool) -> str | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, Conv1D):
        return "head" if kept else "conv1d"
    if type(module) is nn.Linear:
        return "head" if kept else "linear"
    return None


def _kept_modules(model: Any) -> set[str]:
    """The modules that transformers' quantizers leave as they are unless they are told otherwise."""
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:
        from transformers.integrations import get_keys_to_not_convert
    kept = get_keys_to_not_convert(model)
    paths = (path for path, _ in model.named_modules())
    return {path for path in paths if any(re.match(key, path) or path.endswith(key) for key in kept)}


def _wide(model: Any) -> dict[str, list[str]]:
    """The names of the tensors that the loader keeps in float32 where it is asked for 16 bits."""
    strict, halves = model._keep_in_fp32_modules_strict or (), model._keep_in_fp32_modules or ()
    asked = {"F16": (*strict, *halves), "BF16": tuple(strict)}
    names = list(model.state_dict())
    return {
        dtype: [name for name in names if any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)]
        for dtype, patterns in asked.items()
    }


def _tied_head(model: Any) -> str | None:
    """The name of the output head's weight where it is the input embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return None
    return next(f"{path}.weight" for path, module in model.named_modules() if module is head)


def _class(config: dict[str, Any]) -> Any:
    """The model class of transformers itself that a configuration names, or the one of its type for text."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    model_type = config.get("model_type")
    if model_type not in configuration_auto.CONFIG_MAPPING:
        raise Unknown(f"model_type `{model_type}` {NOT_HERE}")
    for name in config.get("architectures") or ():
        cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        kind = configuration_auto.CONFIG_MAPPING[model_type]
        if kind in mapping:
            return mapping[kind]
    raise Unknown(f"architecture of model_type `{model_type}` {NOT_HERE}")


if __name__ == "__main__":
    main()
