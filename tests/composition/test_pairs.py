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


# What may not be put together, and what may: both stages, and a piece of the refusal.
RULES = {
    "a CLS score on a tower without CLS": ("pixtral", [("random", {"keep": 0.8}), ("fastervlm", {"keep": 0.4})],
                                           "no CLS token"),
    "a column mean there": ("pixtral", [("random", {"keep": 0.8}), ("hiprune", {"keep": 0.4})], ""),
    "rows of a layer that is skipped": ("clip", [("fastv", {"at": 2, "keep": 0.4}), ("skip_layers", {"layers": [1]})],
                                        "reads the attention of layer 1, which another stage skips"),
    "a look ahead into a layer that is skipped": (
        "clip", [("vscan_decoder", {"at": 3, "keep": 0.4}), ("skip_layers", {"layers": [3]})],
        "looks ahead at the attention of layer 3, which another stage skips"),
    "a look ahead into a layer that is frozen": (
        "clip", [("vscan_decoder", {"at": 3, "keep": 0.4}), ("freeze_layers", {"layers": [3]})], ""),
    "freezing what a stage leaves": ("clip", [("fastv", {"at": 2, "keep": 0.4}), ("shortv", {"freeze": 3})], ""),
    "grids behind other stages": ("clip", [("random", {"keep": 0.7}), ("feather", {"keep": 0.3})], ""),
    "windows behind other stages": ("clip", [("random", {"keep": 0.7}), ("vscan", {"keep": 0.3})], ""),
    "sizes, then attention": ("clip", [("tome", {"keep": 0.5}), ("fastv", {"at": 2, "keep": 0.2})], ""),
    "counts of each row, then the same": ("clip", [("prumerge", {}), ("fastv", {"at": 2, "keep_tokens": 1})], ""),
    "more than there is": ("clip", [("random", {"keep": 0.3}), ("fastv", {"at": 2, "keep": 0.5})],
                           "asks for 0.5 of original, but stages[0] random leaves only 0.3"),
    "out of order": ("clip", [("fastv", {"at": 2, "keep": 0.5}), ("divprune", {"keep": 0.2})], "out of order"),
    "two actions for one layer": ("clip", [("skip_layers", {"layers": [2]}), ("freeze_layers", {"layers": [2]})],
                                  "plans disagree"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_composition(name, benches):
    tower, stages, wanted = RULES[name]
    bench = benches[tower]
    why = bench.refusal({"stages": [bench.stage(use, **keys) for use, keys in stages]}, "two")
    assert (wanted in why) if wanted else not why, why


def test_every_strategy_is_in_a_group(benches):
    """A new one is met by the pairs without being named here."""
    met = {use for pair in pairs(benches["clip"]) for use in pair}
    assert met == set(names())
    groups = Counter(group(benches["clip"], use) for use in names())
    assert set(groups) == {"pixels", "tower", "encoder", "decoder", "router", "layers"} and min(groups.values()) > 0
