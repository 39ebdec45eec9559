"""Caches of fixed size, and compiled decoding on them: equal to the masked reference, and as small as promised."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import BATCHES, pipeline
from transformers import StaticCache
from twins import pool_merges

import prunekit
from prunekit.engine.cache.static import RaggedStaticLayer
from prunekit.testing.tiny import IMAGE, tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.equivalence import generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

EXACT, LENGTH = 1e-9, 7
model_of = cache(tiny_llava)
NAMES = ["dense", "fastv", "divprune-fastv-skip", "random-pool-divprune", "pool-pool-mlp", "fastv-fastv-attention"]


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def static(model, inputs, **options):
    return generate(model, inputs, max_new_tokens=LENGTH, cache_implementation="static", **options)


def check(model, name, inputs, output, report):
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    merges = pool_merges(pipeline(name)["stages"])(report)
    reference = MaskedReference(model, inputs, report, merges).logits(tokens)
    assert (torch.stack(output.logits, 1) - reference).abs().max() < EXACT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["one", "ragged", "text-row"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_masked_reference(name, batch, attention):
    model, inputs = model_of(attention), tiny_inputs(*BATCHES[batch])
    with prunekit.apply(model, pipeline(name)) as run:
        output = static(model, inputs)
    assert type(output[CACHE]) is StaticCache
    check(model, name, inputs, output, run.report)


def test_buffers_are_as_long_as_what_was_kept():
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    length = inputs["input_ids"].shape[1]
    with prunekit.apply(model, pipeline("divprune-fastv-skip")) as run:
        output = static(model, inputs)
    slots = [0 if layer.keys is None else layer.keys.shape[2] for layer in output[CACHE].layers]
    room = output[CACHE].layers[0].max_cache_len - length
    assert slots == [held and held + room for held in run.report.kv_tokens[0]]
    assert slots[3] == 0 < slots[5] < slots[0] < length + room


def test_a_static_cache_of_ones_own_is_filled_again_after_reset():
    model, inputs, second = model_of(), tiny_inputs(*BATCHES["one"]), tiny_inputs((2,), (11,), seed=3)
    own = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    with prunekit.apply(model, pipeline("fastv")) as run:
        outputs = []
        for prompt in (inputs, second):
            outputs.append((generate(model, prompt, max_new_tokens=LENGTH, **{CACHE: own}), run.report))
            own.reset()
    for prompt, (output, report) in zip((inputs, second), outputs, strict=True):
        check(model, "fastv", prompt, output, report)


def test_three_beams_find_the_same_as_on_a_growing_cache():
    model, inputs = model_of(), tiny_inputs((1, 1), (9, 14))
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "suppress_tokens": [IMAGE]}
    with prunekit.apply(model, pipeline("divprune-fastv-skip")):
        fixed = static(model, inputs, **options)
        growing = generate(model, inputs, max_new_tokens=LENGTH, **options)
    assert torch.equal(fixed.sequences, growing.sequences)
    assert (fixed.sequences_scores - growing.sequences_scores).abs().max() < EXACT


def test_afterwards_the_model_knows_nothing_of_it():
    model, inputs = model_of(), tiny_inputs(*BATCHES["ragged"])
    before = static(model, inputs)
    with prunekit.apply(model, pipeline("fastv")):
        static(model, inputs)
        static(model, inputs)
    after = static(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert not any(isinstance(layer, RaggedStaticLayer) for layer in after[CACHE].layers)


def test_a_prompt_that_does_not_fit_is_refused():
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    small = StaticCache(config=model.config.get_text_config(), max_cache_len=10)
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match="does not fit"):
        model(**inputs, **{CACHE: small})


def test_prompt_lookup_is_refused_where_nothing_can_be_cropped():
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    with prunekit.apply(model, pipeline("fastv")):
        cache = static(model, inputs)[CACHE]
        with pytest.raises(prunekit.Unsupported, match="static KV cache cannot be cropped"):
            cache.crop(-1)


def test_masks_of_ones_own_are_refused_beside_a_static_cache():
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    size = inputs["input_ids"].shape[1]
    own = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    square = torch.ones(1, 1, size, 80, dtype=torch.bool)
    with prunekit.apply(model, pipeline("fastv")), pytest.raises(prunekit.Unsupported, match="2-D attention_mask"):
        model(**(inputs | {"attention_mask": square}), **{CACHE: own})


class Graphs:
    """A dynamo backend that runs eagerly and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


def decode(model, inputs, step):
    """A loop by hand as `generate` does it: the prefill as it is, then `step` for every token."""
    own = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    output = model(**inputs, **{CACHE: own})
    logits, tokens = [output.logits[:, -1]], []
    for _ in range(LENGTH):
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        seen = torch.nn.functional.pad(mask, (0, 80 - mask.shape[1])).bool()[:, None, None]
        positions = torch.full_like(tokens[-1], mask.shape[1] - 1)
        output = step(tokens[-1], attention_mask=seen, position_ids=positions, **{CACHE: own})
        logits.append(output.logits[:, -1])
    assert int(own.get_seq_length()) == length + LENGTH
    return torch.stack(logits, 1), torch.cat([*tokens, tokens[-1]], 1)


@pytest.mark.parametrize("name", ["fastv", "divprune-fastv-skip", "random-pool-divprune"])
@pytest.mark.parametrize("batch", ["one", "ragged"])
def test_compiled_decoding_is_one_graph(name, batch):
    model, inputs, graphs = model_of(), tiny_inputs(*BATCHES[batch]), Graphs()
    torch._dynamo.reset()
    with torch.no_grad(), prunekit.apply(model, pipeline(name)) as run:
        step = torch.compile(model.forward, backend=graphs, fullgraph=True)
        logits, tokens = decode(model, inputs, step)
        uncompiled, _ = decode(model, inputs, model)
    assert graphs.count == 1, "fullgraph allows no break, and no step may be traced again"
    # Tracing leaves `Float64Throughout` out of what it compiles, so norms round to float32 there.
    assert (logits - uncompiled).abs().max() < 1e-4
    merges = pool_merges(pipeline(name)["stages"])(run.report)
    reference = MaskedReference(model, inputs, run.report, merges).logits(tokens)
    assert (uncompiled - reference).abs().max() < EXACT
    assert (logits - reference).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (pipeline("skip-attention"), "skip_attention|cannot be compiled"),
        ({"positions": "renumber", **pipeline("fastv")}, "renumbered"),
    ],
    ids=["attention-alone", "renumber"],
)
def test_what_cannot_be_compiled_is_refused(spec, reason):
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    torch._dynamo.reset()
    with torch.no_grad(), prunekit.apply(model, spec):
        step = torch.compile(model.forward, backend=Graphs(), fullgraph=True)
        with pytest.raises(Exception, match=reason):
            decode(model, inputs, step)


def test_a_compiled_prefill_is_refused():
    model, inputs = model_of(), tiny_inputs(*BATCHES["one"])
    torch._dynamo.reset()
    with torch.no_grad(), prunekit.apply(model, pipeline("fastv")):
        step = torch.compile(model.forward, backend=Graphs(), fullgraph=True)
        with pytest.raises(Exception, match="only decoding steps"):
            step(**inputs)
