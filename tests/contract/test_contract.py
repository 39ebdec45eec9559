"""Every registered strategy meets the contract of `prunekit.testing.contract`, built-in or not."""

from __future__ import annotations

import pytest
from strategy_options import OPTIONS, options_for

from prunekit import plugins
from prunekit.families import shape_of
from prunekit.testing.contract import contract
from prunekit.testing.tiny import tiny_llava

AT_MOST = {"pool"}
NAMES = [entry.name for entry in plugins.registry().strategies()]

globals().update({f"Test_{name}": contract(name, OPTIONS.get(name), at_most=name in AT_MOST) for name in NAMES})


@pytest.fixture(autouse=True, scope="module")
def _with_files(tmp_path_factory):
    """Strategies that need a calibration get one of the contract's model; others the CLIP model of its tower."""
    for name, options in options_for(shape_of(tiny_llava()), tmp_path_factory.mktemp("files")).items():
        globals()[f"Test_{name}"].options = options


def test_the_strategies_of_this_version_are_all_here():
    assert {"downsample", "pixelprune", "evs"} <= set(NAMES)
    assert {"dense", "blind", "random", "stride", "pool", "fastv", "divprune", "vtw", "skip_layers"} <= set(NAMES)
