"""Shared by all tests: one thread, fixed seeds, and `gpu` tests only where there is a GPU."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples in every run, and none that fails only because the machine is busy.
settings.register_profile("spikelm", derandomize=True, deadline=None, database=None)
settings.load_profile("spikelm")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
