"""The tiny model that budgets of risk are tried on, and its numbers."""

from __future__ import annotations

import pytest

from prunekit.testing.tiny import tiny_llava
from prunekit.verify.proof import proved_parts


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def shape(model):
    return proved_parts(model).shape()
