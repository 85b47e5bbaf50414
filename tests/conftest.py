"""Shared by all tests: quiet, deterministic, on as many threads as pytest-xdist leaves each worker."""

import os
import signal

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What a shell runs in the background starts with Ctrl-C ignored; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# Shared machines stall: a slow example is no failing one.
settings.register_profile("newllm", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("newllm")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The folder of an excerpt to train on, for `tiny_runs.tiny`."""
    from tiny_runs import excerpt  # loads transformers: not for every test

    return excerpt(tmp_path_factory.mktemp("text"))
