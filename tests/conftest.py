"""Shared by all tests. Heavy packages are imported inside fixtures, so that tests of the light parts stay light."""

from __future__ import annotations

import os

from hypothesis import settings

# One thread: tiny tensors gain nothing from more, and results are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every machine, however busy it is.
settings.register_profile("prunekit", deadline=None, derandomize=True)
settings.load_profile("prunekit")
