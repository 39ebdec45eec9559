"""What decoding does in Python: masks and rotations once a step for layers that share tokens, and little beside."""

from __future__ import annotations

import cProfile
import pstats
from functools import cache

import pytest
import torch

import prunekit
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.positions import Rotations
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.upstream import CACHE

LAYERS, STEPS = 6, 4
model_of = cache(tiny_llava)


def decoding(stages, batch, positions="keep"):
    """A function that makes decoding steps after a prefill under these stages; None: of the stock model."""
    model = model_of()
    attached = None if stages is None else prunekit.apply(model, {"stages": stages, "positions": positions})
    if attached is not None:
        attached.__enter__()
    cache, mask = model(**batch)[CACHE], batch["attention_mask"]
    token = torch.full((len(mask), 1), 5)

    def run(steps):
        nonlocal mask
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            model(input_ids=token, attention_mask=mask, **{CACHE: cache})

    return run, attached


@torch.no_grad()
def counted(monkeypatch, stages, batch, positions="keep"):
    """How often a step makes a mask, and rotations."""
    made = {"masks": 0, "rotations": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            made[name] += 1
            return function(*args, **kwargs)

        return call

    run, attached = decoding(stages, batch, positions)
    try:
        monkeypatch.setattr(masks, "decode_mask", counting("masks", masks.decode_mask))
        monkeypatch.setattr(Rotations, "local", counting("rotations", Rotations.local))
        run(STEPS)
    finally:
        attached.__exit__(None, None, None)
    return {name: count / STEPS for name, count in made.items()}


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_layers_that_share_tokens_share_masks_and_rotations(monkeypatch, positions):
    batch = tiny_inputs((1, 2), (9, 14))
    at_two = [{"use": "random", "at": 2, "keep": 0.5}]
    assert counted(monkeypatch, at_two, batch, positions) == {"masks": 1, "rotations": 1}
    twice = [{"use": "random", "at": [1, 3], "keep": [0.5, 0.25]}]
    assert counted(monkeypatch, twice, batch, positions) == {"masks": 2, "rotations": 2}


def test_layers_that_hold_everything_make_nothing(monkeypatch):
    """Only the layer that the prefill skipped, which holds nothing of the prompt, has a mask of its own."""
    skips = [{"use": "skip_layers", "layers": [1], "phase": "prefill"}]
    assert counted(monkeypatch, skips, tiny_inputs((1, 2), (9, 14))) == {"masks": 1, "rotations": 1}


@torch.no_grad()
def calls(stages, batch):
    """Python calls of a step."""
    run, attached = decoding(stages, batch)
    run(1)
    try:
        profiler = cProfile.Profile()
        profiler.runcall(run, STEPS)
    finally:
        if attached is not None:
            attached.__exit__(None, None, None)
    return pstats.Stats(profiler).total_calls / STEPS


@pytest.mark.parametrize(
    "stages",
    [[{"use": "random", "at": 2, "keep": 0.5}], [{"use": "fastv", "at": 2, "keep": 0.5}],
     [{"use": "random", "keep": 0.5}, {"use": "skip_layers", "layers": [3]}]],
    ids=["random", "fastv", "skip"],
)  # fmt: skip
def test_a_step_adds_few_calls_to_a_layer(stages):
    """Some 20 each, and some 100 for the step; a dense layer makes over 200."""
    batch = tiny_inputs((1,), (9,))
    assert calls(stages, batch) - calls(None, batch) < 100 + 25 * LAYERS
