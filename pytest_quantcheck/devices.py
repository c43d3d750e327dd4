"""Which device a test runs on, and why it cannot."""

from __future__ import annotations

from typing import NamedTuple

AUTO = "auto"
# What `auto` tries, best first; every other device torch knows can be asked for by name.
ACCELERATORS = ("cuda", "xpu")


class Device(NamedTuple):
    """A torch device, or the reason there is none."""

    name: str
    missing: str | None = None

    @property
    def is_accelerator(self) -> bool:
        """Whether it is anything but the CPU."""
        return not self.name.startswith("cpu")


def choose(wanted: str, *, worker: int | None = None) -> Device:
    """Return the device for a wish such as `auto`, `cpu`, `cuda` or `cuda:1`; a word torch does not know is an error.

    An xdist worker without an index of its own gets the visible GPUs in turn: worker 5 of 4 GPUs gets `cuda:1`. The
    caller's CUDA_VISIBLE_DEVICES is respected, since torch numbers what is visible.
    """
    import torch

    if wanted == AUTO:
        wanted = next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    try:
        kind, index = torch.device(wanted).type, torch.device(wanted).index
    except RuntimeError:
        raise ValueError(f"device `{wanted}` is not one that torch knows (cpu, cuda, cuda:1, xpu ...)") from None
    if kind == "cpu":
        return Device(wanted)
    count = _count(kind)
    if not count:
        return Device(wanted, f"device `{wanted}` is not available: torch {torch.__version__} sees no {kind} device")
    if index is not None and index >= count:
        return Device(wanted, f"device `{wanted}` is not available: torch sees {count} {kind} device(s)")
    if index is None and worker is not None:
        return Device(f"{kind}:{worker % count}")
    return Device(wanted)


def _count(kind: str) -> int:
    import torch

    backend = getattr(torch, kind, None)
    if backend is None or not backend.is_available():
        return 0
    return int(backend.device_count()) if hasattr(backend, "device_count") else 1


def release() -> None:
    """Collect garbage and give cached device memory back."""
    import gc
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    for kind in ACCELERATORS if torch is not None else ():
        if _count(kind):
            getattr(torch, kind).empty_cache()
