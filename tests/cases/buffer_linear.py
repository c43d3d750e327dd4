"""Stand-ins for the classes of libraries that keep a linear layer in buffers."""

from __future__ import annotations

from torch import nn


def live_layer(tensors, kernel: str, module: str, **attributes) -> nn.Module:
    """A model whose `layer` has the library's class name, module, buffers and attributes, and no parameters."""
    layer = type(kernel, (nn.Module,), {"__module__": module})()
    for name, tensor in tensors.items():
        layer.register_buffer(name.removeprefix("layer."), tensor)
    for name, value in attributes.items():
        setattr(layer, name, value)
    model = nn.Module()
    model.layer = layer
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    return model
