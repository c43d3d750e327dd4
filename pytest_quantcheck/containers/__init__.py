"""The containers of files. Live modules are opened by `live_module.open_module`."""

from __future__ import annotations

import os
from types import ModuleType

from pytest_quantcheck.containers import gguf, onnx, remote, safetensors, tflite, torch_zip
from pytest_quantcheck.errors import FormatError
from pytest_quantcheck.tensor import Container

# One module per container, each with `accepts(path) -> bool` and `open_container(path) -> Container`; those that have
# `read_file(file, path) -> Container` need one file and no folder, so they read a URL as well.
CONTAINERS: tuple[ModuleType, ...] = (
    safetensors,
    gguf,
    torch_zip,
    onnx,
    tflite,
)

# What people try and what it is, by the ending of its name.
OTHERS = {
    ".mlmodel": "a Core ML model (a protobuf of layers and weights); coremltools reads it",
    ".mlpackage": "a Core ML package (a program and its weight.bin); coremltools reads it",
    ".mlmodelc": "a compiled Core ML model; only Core ML itself reads it",
    ".ort": "an ONNX Runtime model (a flatbuffer of an optimized graph); check the .onnx file it was made from",
    ".pte": "an ExecuTorch program; check the checkpoint it was exported from",
    ".pt2": "an exported torch program; check the checkpoint it was exported from",
    ".engine": "a TensorRT engine, which belongs to one GPU; check the checkpoint it was built from",
}


def open_path(path: str | os.PathLike[str]) -> Container:
    """Return the container at a path or URL; what none of `CONTAINERS` accepts is a `FormatError`."""
    path = os.fspath(path)
    if remote.is_url(path):
        return _open_url(path)
    if not os.path.lexists(path):
        raise FormatError("no such file or folder", file=path)
    for container in CONTAINERS:
        if container.accepts(path):
            opened: Container = container.open_container(path)
            return opened
    for ending, what in OTHERS.items():
        if path.rstrip("/").endswith(ending):
            raise FormatError(f"is {what}", file=path)
    if os.path.isdir(path):
        raise FormatError(
            "holds no weights (looked for *.safetensors, *.gguf, *.bin, *.pt, *.pth, *.ckpt, *.onnx)", file=path
        )
    raise FormatError("not a container we read (safetensors, GGUF, torch, ONNX, TFLite)", file=path)


def _open_url(url: str) -> Container:
    """The container in one file of a server, which its name tells."""
    remote.checked(url)
    shown = remote.shown(url)
    for container in CONTAINERS:
        if not container.accepts(shown):
            continue
        if not hasattr(container, "read_file") or shown.endswith(".json"):
            raise FormatError("may be in several files, and of a URL one file is read: download it", file=shown)
        opened: Container = container.read_file(remote.RemoteFile(url), shown)
        return opened
    raise FormatError("does not end like one file that we read (.safetensors, .gguf, .bin, .pt, .tflite)", file=shown)
