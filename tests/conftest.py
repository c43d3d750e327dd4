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
