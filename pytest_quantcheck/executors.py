"""Where work can be spread: processes of this machine, and Dask clusters.

Nothing here decides what a result is: whatever is chosen, it is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def chosen(workers: int | None, dask: str | None) -> Iterator[Executor | None]:
    """Yield the executor that the options name, closed at the end; None where there is none."""
    if workers is not None and dask is not None:
        raise ValueError("--workers and --dask exclude each other: give one")
    if dask is not None:
        with cluster(dask) as executor:
            yield executor
    elif workers is not None:
        with processes(workers) as executor:
            yield executor
    else:
        yield None


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Yield an executor over so many processes of this machine, each with one thread of torch."""
    # A forked child of a process whose torch has threads may hang in its first sum.
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Yield an executor over the Dask cluster whose scheduler has this address; its workers must see the same files."""
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("a Dask cluster needs distributed: pip install pytest-quantcheck[distributed]") from None
    try:
        client = Client(address, timeout="30s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no Dask scheduler at `{address}`: {error}") from None
    with client:
        yield client.get_executor()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
