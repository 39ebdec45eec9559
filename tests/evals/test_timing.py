"""The prefill ratio is taken from neighbours, so a slow moment of the machine cancels."""

import itertools

import pytest
from prunekit_evals.bench import prefill

import prunekit


def test_a_slow_stretch_hits_both_alike():
    calls = itertools.count()

    def once(pipeline):
        slow = 10.0 if 6 <= next(calls) < 12 else 1.0
        return (0.04 if pipeline else 0.08) * slow

    taken = prefill.summary(once, "fastv", batch=8)
    assert taken.ratio == pytest.approx(0.5)
    assert taken.rounds >= prefill.LEAST_ROUNDS
    assert taken.batch == 8


def test_they_take_turns_and_the_first_turn_does_not_count():
    order = []

    def once(pipeline):
        order.append(pipeline)
        return 99.0 if len(order) <= 2 else 1.0

    taken = prefill.summary(once, "p", batch=1)
    assert (taken.ms, taken.dense_ms) == (1000.0, 1000.0)
    turns = [order[place : place + 2] for place in range(2, len(order), 2)]
    assert all(sorted(turn, key=str) == [None, "p"] for turn in turns)
    assert turns[0] != turns[1]


def test_it_measures_a_model(loaded):
    from PIL import Image
    from prunekit_evals.run.prompts import from_visuals

    prompts = [from_visuals([Image.new("RGB", (60, 60))], "Is it?", loaded.processor, "")] * 2
    taken = prefill.measure_prefill(loaded, prunekit.load({"name": "b", "stages": [{"use": "blind"}]}), prompts)
    assert taken.ms > 0 and taken.dense_ms > 0 and taken.batch == 2
    assert prefill.measure_prefill(loaded, prunekit.load({"name": "d", "stages": [{"use": "dense"}]}), []) is None
