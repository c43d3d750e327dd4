"""What all tests share."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    """Mistral-7B in NF4, sparse: real headers, no weights."""
    from tests import layouts

    folder = tmp_path_factory.mktemp("mistral") / "mistral-7b-nf4"
    return layouts.write_folder(folder, layouts.mistral_7b(), layouts.MISTRAL_CONFIG)


@pytest.fixture
def one_thread():
    """For small tensors: more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that returns the folder of a small unquantized model, saved once for all tests of a module."""
    from tests import models

    folders = {}

    def save(kind: str):
        if kind not in folders:
            folders[kind] = models.save(kind, tmp_path_factory.mktemp(kind) / "model")
        return folders[kind]

    return save
