"""What a report claims really happened: tokens gone from the layers, modules not called, KV entries not written."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from functools import cache

import pytest
from cases import BATCHES, COMPOSED, PIPELINES, pipeline

import prunekit
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import Site
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.equivalence import generate
from prunekit.verify.precision import Float64Throughout

DECODED = 4
model_of = cache(tiny_llava)
ACTIONS = {"layer": LayerAction.SKIP, "attention": LayerAction.SKIP_ATTENTION, "mlp": LayerAction.SKIP_MLP}


@pytest.fixture(autouse=True)
def _exact():
    """Eager attention in float64 makes NaN of rows that are padding, unless its softmax stays in float64."""
    with Float64Throughout():
        yield


@contextmanager
def watched(model):
    """For each module that holds weights of its own, (layer, name), the shapes (B, tokens) of its inputs, in order.

    Calls are counted where the arithmetic is: a skipped module may be asked for nothing, but none of its weights may.
    """
    seen, handles = defaultdict(list), []
    for number, layer in enumerate(model.get_decoder().layers):
        for name, module in layer.named_modules():
            if name and next(module.parameters(recurse=False), None) is not None:
                key = (number, name)

                def hook(_, given, key=key):
                    seen[key].append(tuple(given[0].shape[:2]))

                handles.append(module.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expected_tokens(report, layers):
    """Tokens that enter each layer per row, from the events alone."""
    rows = []
    for row in range(report.samples):
        tokens, counts = report.prompt_tokens[row], []
        for layer in range(layers):
            for event in report.events:
                if max(Site.parse(event.site).depth, 0) == layer:
                    tokens -= event.entered[row] - len(event.kept[row])
            counts.append(tokens)
        rows.append(tuple(counts))
    return tuple(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["one", "ragged", "text-row"])
@pytest.mark.parametrize("name", PIPELINES)
def test_tokens_calls_and_kv_are_what_the_report_says(name, batch, attention):
    model, inputs, spec = model_of(attention), tiny_inputs(*BATCHES[batch]), pipeline(name)
    layers = len(model.get_decoder().layers)
    with watched(model) as seen, prunekit.apply(model, spec) as run:
        output = generate(model, inputs, max_new_tokens=DECODED + 1)
    report = run.report
    actions = {
        layer: ACTIONS[stage.get("what", "layer")]
        for stage in spec["stages"]
        if stage["use"] == "skip_layers"
        for layer in stage["layers"]
    }
    assert [dict(plan.actions) for plan in report.plans] == [actions] * report.samples
    assert report.prompt_tokens == tuple(inputs["attention_mask"].sum(1).tolist())
    assert report.layer_tokens == expected_tokens(report, layers)

    for layer in range(layers):
        action = actions.get(layer, LayerAction.RUN)
        no_attention = action in (LayerAction.SKIP, LayerAction.SKIP_ATTENTION)
        no_mlp = action in (LayerAction.SKIP, LayerAction.SKIP_MLP)
        widest = max(row[layer] for row in report.layer_tokens)
        called = [(len(inputs["input_ids"]), widest)] + [(len(inputs["input_ids"]), 1)] * DECODED
        for name in (f"self_attn.{one}_proj" for one in "qkvo"):
            assert seen[layer, name] == ([] if no_attention else called), f"layer {layer} {name}"
        for name in (f"mlp.{one}_proj" for one in ("gate", "up", "down")):
            assert seen[layer, name] == ([] if no_mlp else called), f"layer {layer} {name}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert seen[layer, name] == ([] if action is LayerAction.SKIP else called), f"layer {layer} {name}"
        written = tuple(0 if no_attention else row[layer] for row in report.layer_tokens)
        assert tuple(row[layer] for row in report.kv_tokens) == written
        assert kv_length(output[CACHE], layer) == (max(written) + DECODED if not no_attention else 0)


def kv_length(cache, layer):
    """Physical KV entries of a layer; both tensors hold as many."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    if keys is None or keys.numel() == 0:
        return 0
    assert keys.shape[:-1] == values.shape[:-1]
    return keys.shape[-2]


@pytest.mark.parametrize("name", ["fastv", "pool-3", *COMPOSED])
def test_compute_and_memory_really_fall(name):
    """The bytes of the cache and the FLOPs that torch itself counts are those of the report's token counts."""
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = model_of("eager"), tiny_inputs((2,), (9,))  # torch does not count the CPU kernel behind sdpa

    def measured(spec):
        with FlopCounterMode(display=False) as counter, prunekit.apply(model, spec) as run:
            output = model(**inputs, logits_to_keep=1)
        size = sum(kv_length(output[CACHE], layer) for layer in range(6))
        return counter.get_total_flops(), size, run.report

    dense_flops, dense_kv, _ = measured({"name": "dense", "stages": [{"use": "dense"}]})
    flops, kv, report = measured(pipeline(name))
    assert kv / dense_kv == pytest.approx(report.cost.kv_fraction)
    assert kv < dense_kv or all(action is LayerAction.SKIP_MLP for _, action in report.plans[0])
    saved = report.cost.dense_prefill_flops[0] - report.cost.prefill_flops[0]
    visual, hidden = report.visual_tokens[0], model.config.text_config.hidden_size
    choosing = len(report.events) * 2 * visual * visual * hidden  # all pairs of visual tokens, at most
    assert saved - choosing <= dense_flops - flops <= saved


def test_a_fraction_keeps_what_it_says():
    inputs = tiny_inputs((1, 2, 0), (5, 5, 5))
    spec = {"name": "two", "stages": [{"use": "random", "keep": 0.47}, {"use": "random", "at": 2, "keep": 0.03}]}
    with prunekit.apply(model_of("sdpa"), spec) as run:
        model_of("sdpa")(**inputs)
    assert [tuple(map(len, event.kept)) for event in run.report.events] == [(8, 15, 0), (1, 1, 0)]
    assert run.report.kept_tokens == (1, 1, 0)
