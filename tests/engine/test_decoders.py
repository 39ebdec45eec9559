"""LLaVA with the decoder of every causal language model of transformers: exact, or refused with a true reason.

`make test` runs those in which each kind of special shows, `make test-full` all, and puts them into docs/families.md.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from decoders import kinds, line, llava, on_meta, verdict
from examples import registered
from matrix import PIPELINES
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.errors import PrunekitError, Unsupported
from prunekit.families import find, is_vouched_for
from prunekit.families.decoders import PROVED
from prunekit.testing.tiny_families import RECIPES, tiny_batch
from prunekit.verify.equivalence import assert_equivalent
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.proof import proved_parts
from prunekit.verify.stock import stock_run_of
from prunekit.verify.twin import twin_of

# Positions read by attention, one complex rotation with latent keys and unequal heads, chunks, sinks and an MLP that
# returns more, scales by position, norms behind.
SPECIAL = ("ministral3", "deepseek_v2", "llama4_text", "gpt_oss", "beam", "olmo2")
REFUSED = ("bert", "bart", "bloom", "openai-gpt")
# Cut at their input only: layers of another make.
AROUND = ("biogpt", "falcon")
# Refused for what they themselves raise: caches of their own.
OWN_WORDS = ("kimi_linear", "minimax")
# Exact, and proved again on each version of transformers, as older ones keep recurrent states otherwise.
ANEW = ("lara_mini", "lfm2", "lfm2_moe", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
# Whose configs need numbers that only a checkpoint has, or which are part of something else.
NONE = ("dbrx", "trocr")
PRUNE = {"name": "p", "stages": [{"use": "random", "at": 1, "keep": 0.5}]}
STEPS = 2
# Their rotations are made by each layer, or by several modules, so that positions cannot be renumbered.
FIXED = ("moshi", "granite_swa", "granitemoe_swa")
# What the proof leaves to the matrix of families.
FURTHER = ("renumber-twice", "sizes-twice", "freeze", "fill-kv", "plans-and-cuts")


def some_first(quick):
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in kinds()]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with registered():
        yield


@pytest.mark.parametrize("kind", some_first((*SPECIAL, *REFUSED, *AROUND)))
def test_a_decoder_is_exact_or_refused(kind):
    found = verdict(kind)
    if path := os.environ.get("PRUNEKIT_DECODERS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line(found))
    assert (found.status == "none") == (kind in NONE), found
    if found.status == "none":
        return
    model = on_meta(llava(kind))
    assert found.error < 1e-9
    if found.status == "refused":
        assert kind not in PROVED and "\n" not in found.reason, found
        assert len(re.findall(r"Error\b", found.reason)) == (kind in OWN_WORDS), found
        with pytest.raises(Unsupported, match=re.escape(found.reason[:80])), prunekit.apply(model, PRUNE):
            pass
        return
    parts = proved_parts(model)
    assert (parts.mlp_norm is not None) == found.inside
    assert (kind in PROVED) == is_vouched_for(model)
    if parts.opaque is None:
        assert (kind in PROVED) == (find(model).mlp_norm == parts.mlp_norm and kind not in ANEW)
    else:
        assert kind not in PROVED


@pytest.mark.parametrize("kind", some_first(("ministral3", "deepseek_v2")))
def test_more_than_the_proof_asks_for(kind):
    if kind not in PROVED and kind not in SPECIAL:
        return
    model = twin_of(on_meta(llava(kind))).model
    inputs = tiny_batch(model, recipe=RECIPES["llava"])
    with Float64Throughout():
        stock_run = stock_run_of(model, inputs, STEPS + 1)
    for name in FURTHER:
        pipeline = {"name": name, **PIPELINES[name]}
        if name.startswith("renumber") and kind in FIXED:
            with pytest.raises(PrunekitError, match="renumber"):
                assert_equivalent(model, pipeline, inputs, STEPS, 1e-9, stock_run=stock_run)
            continue
        found = assert_equivalent(model, pipeline, inputs, STEPS, 1e-9, stock_run=stock_run)
        assert found.error < 1e-9
    every = {"name": "e", "stages": [{"use": "random", "keep": 1.0}]}
    cache = assert_equivalent(model, every, inputs, STEPS, stock_run=stock_run).cache
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    rows, tokens = inputs["input_ids"].shape
    shape = find(model).shape()
    assert held / rows / (tokens + STEPS) == pytest.approx(shape.kv_width * shape.layers, abs=shape.layers)


@pytest.mark.parametrize("kind", ["deepseek_v2", "ministral3", "olmo2", "gpt_oss"])
def test_costs_are_what_is_computed(kind):
    """Products of matrices, counted while the decoder runs, against the numbers of the shape."""
    model = twin_of(on_meta(llava(kind))).model
    parts, shape = find(model), find(model).shape()
    counter = FlopCounterMode(display=False)
    with counter, Float64Throughout():
        model(input_ids=torch.arange(20, 30)[None])
    names = {id(module): name for name, module in model.named_modules()}
    counts = counter.get_flop_counts()
    total = sum(
        flops
        for layer in parts.layers
        for part in (parts.attention, parts.mlp)
        for flops in counts[f"{type(model).__name__}.{names[id(getattr(layer, part))]}"].values()
    )
    per_layer = 2 * (shape.attention_params + shape.mlp_params) * 10 + 4 * 100 * shape.heads * shape.head_dim
    assert total / shape.layers == pytest.approx(per_layer, rel=0.02)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_mlp_that_returns_more_than_states(kind, rows):
    """Two rows would be taken for the states and what stands beside them."""
    model = twin_of(on_meta(llava(kind))).model
    inputs = tiny_batch(model, [("image",)] * rows, recipe=RECIPES["llava"])
    skip = {"name": "s", "stages": [{"use": "skip_layers", "layers": [1, 2], "what": "mlp"}]}
    inside = {"name": "i", "stages": [{"use": "random", "at": "1.mid", "keep": 0.5}]}
    for pipeline in (skip, inside):
        assert assert_equivalent(model, pipeline, inputs, STEPS).error < 1e-9
