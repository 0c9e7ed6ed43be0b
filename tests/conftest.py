"""Settings that must stand before anything imports transformers or torch."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in a test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warnings about forks
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a process already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are shared: how long a test takes says nothing
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
