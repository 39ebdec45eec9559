"""Every pair of registered strategies that act in different parts of the model runs exactly, or is refused with why."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from compositions import Bench, alone, group, names, pairs, together

from prunekit.families import find
from prunekit.testing.tiny import tiny_inputs, tiny_llava

ROWS = {"images": (1, 2), "text": (9, 5)}
SOME = 40  # of the pairs that `make test` runs


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """A tower with CLS tokens that takes whole images, and one that takes any size and has none."""
    found = {}
    for tower in ("clip", "pixtral"):
        model, folder = tiny_llava(tower=tower), tmp_path_factory.mktemp(tower)
        found[tower] = Bench(model, find(model), {"two": tiny_inputs(**ROWS, sizes=tower == "pixtral")}, folder)
    return found


def judged(benches, first, second):
    """How a pair was met on each tower; what is refused is refused for one of the two as well, or names both."""
    met = Counter()
    for tower, bench in benches.items():
        pipeline = together(bench, first, second)
        why = bench.refusal(pipeline, "two")
        met["refused" if why else "exact"] += 1
        if why and not any(bench.refusal(one, "two") for one in alone(pipeline)):
            named = [stage["use"] in why or f"stages[{at}]" in why for at, stage in enumerate(pipeline["stages"])]
            assert all(named) or re.search("another stage|other stages", why), (tower, why)  # of two it is the other
            met["against each other"] += 1
    return met


def test_a_seeded_part_of_the_pairs(benches):
    every = list(pairs(benches["clip"]))
    chosen = random.Random(0).sample(every, SOME)
    met = sum((judged(benches, *pair) for pair in chosen), Counter())
    assert met["exact"] > SOME, met  # of two towers each


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", names())
def test_all_pairs(benches, first):
    met = sum((judged(benches, *pair) for pair in pairs(benches["clip"]) if pair[0] == first), Counter())
    print(first, dict(met))


def test_every_strategy_is_in_a_group(benches):
    """A new one is met by the pairs without being named here."""
    met = {use for pair in pairs(benches["clip"]) for use in pair}
    assert met == set(names())
    groups = Counter(group(benches["clip"], use) for use in names())
    assert set(groups) == {"pixels", "tower", "encoder", "decoder", "router", "layers"} and min(groups.values()) > 0
