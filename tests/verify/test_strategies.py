"""Proofs and the contract of a strategy need no strategy but their own."""

from __future__ import annotations

import os
import subprocess
import sys

from prunekit import plugins
from prunekit.families import find
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.testing.tiny import tiny_llava
from prunekit.verify import proof
from prunekit.verify.strategies import with_own

# What an author's package does, where none of the built-in strategies is loaded.
ALONE = """
import prunekit.families
from prunekit import hookimpl, plugins, strategy
from prunekit.testing.contract import contract
from prunekit.testing.tiny import tiny_llava
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.families import find
from prunekit.testing.tiny import tiny_llava
from prunekit.verify import proof

@strategy()
class Last:
    "Baseline: the last visual tokens."

    @hookimpl
    def score_tokens(self, valid):
        return valid.cumsum(1).double()

class Plugin:
    @hookimpl
    def prunekit_register(self, registry):
        registry.strategy("last", "__main__:Last", summary="the last tokens")

plugins.register(Plugin(), name="author")
assert [entry.name for entry in plugins.registry().strategies()] == ["last"]
made = contract("last")
assert len(made.rules()) > 15
for rule in made.rules():
    made().hold(rule)
prunekit.families.families = lambda: ()
assert proof.proved_parts(tiny_llava()).family == "generic:llava"
print("held")
"""


def test_an_installation_without_the_built_in_strategies_proves_as_much() -> None:
    environment = {**os.environ, "PRUNEKIT_DISABLE_PLUGINS": "strategies,evals"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.split() == ["held"], done.stderr


def test_the_proof_prunes_with_its_own() -> None:
    """Every case builds from a registry of nothing else, and the names clash with nobody's."""
    for name, stages in proof._cases(find(tiny_llava())):
        assert len(build({"name": "case", "stages": list(stages)}, registry=with_own(Registry())).stages) == len(stages)
        assert all(stage["use"].startswith("verify.") for stage in stages), name
    assert {entry.origin for entry in with_own(Registry()).strategies()} == {"prunekit"}
    assert len(with_own(plugins.registry()).strategies()) == len(plugins.registry().strategies()) + 4
