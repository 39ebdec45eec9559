"""`torch.compile` around a model or its parts: graphs break where a pipeline acts, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from examples import Loud
from reading import piped

import prunekit
from prunekit import EncoderRows, Rows, Sites, hookimpl, strategy
from prunekit.engine import tracing
from prunekit.testing.tiny import tiny_inputs, tiny_llava

INPUTS = tiny_inputs((1, 2), (9, 14))


@strategy(inputs={"attention": Rows("next")})
class Ahead:
    """Baseline: keep what the last token will look at in the layer that follows."""

    @hookimpl
    def score_tokens(self, attention):
        return attention


@strategy(sites=Sites(decoder=False), inputs={"encoder_attention": EncoderRows(0)})
class Seen:
    """Baseline: keep what CLS looks at in the tower."""

    @hookimpl
    def score_tokens(self, encoder_attention):
        return encoder_attention


PIPELINES = {
    "look-ahead": (Ahead, {"at": 2, "keep": 0.5}),
    "freeze": ("freeze_layers", {"layers": [1, 3]}),
    "read-tower": (Seen, {"keep": 0.5}),
    "fastv": ("fastv", {"at": 2, "keep": 0.4}),
    "skip": ("skip_layers", {"layers": [3]}),
    "skip-attention": ("skip_layers", {"layers": [3], "what": "attention"}),
    "skip-mlp": ("skip_layers", {"layers": [3], "what": "mlp"}),
    "mid": ("random", {"at": "2.mid", "keep": 0.5}),
    "tower": (Loud, {"at": "vision.0.mid", "keep": 0.5}),
}


def spec(name, **options):
    return piped(PIPELINES[name], **options)


def whole(model):
    model.compile(backend="eager")


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def base(model):
    model.model.compile(backend="eager")


def decoder(model):
    model.get_decoder().compile(backend="eager")


def layers(model):
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")


def forwards_of_layers(model):
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, backend="eager")


def parts_of_layers(model):
    for layer in model.get_decoder().layers:
        for part in (layer.self_attn, layer.mlp, layer.post_attention_layernorm):
            part.compile(backend="eager")


def tower(model):
    model.model.vision_tower.compile(backend="eager")
    model.model.multi_modal_projector.compile(backend="eager")


WAYS = (whole, forward, base, decoder, layers, forwards_of_layers, parts_of_layers, tower)
# Cheap ones that between them go through every override.
OFTEN = {("skip-mlp", parts_of_layers), ("fastv", forwards_of_layers), ("tower", tower)}
CASES = [
    pytest.param(name, way, id=f"{name}-{way.__name__}", marks=() if (name, way) in OFTEN else pytest.mark.slow)
    for name in PIPELINES
    for way in WAYS
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "way"), CASES)
def test_equals_the_uncompiled_run(name, way):
    """Also where the model was traced before the block, whose trace must not be used in it, nor the other way round."""
    model = tiny_llava(layers=4)
    dense = model(**INPUTS).logits
    with prunekit.apply(model, spec(name)) as run:
        pruned, tokens = model(**INPUTS).logits, model.generate(**INPUTS, max_new_tokens=3, do_sample=False)
        report = run.report
    assert not torch.equal(pruned, dense)
    way(model)
    assert torch.equal(model(**INPUTS).logits, dense)
    with prunekit.apply(model, spec(name)) as run:
        assert torch.equal(model(**INPUTS).logits, pruned)
        assert torch.equal(model.generate(**INPUTS, max_new_tokens=3, do_sample=False), tokens)
        assert run.report == report
    assert torch.equal(model(**INPUTS).logits, dense)


def test_compiled_inside_the_block():
    model = tiny_llava(layers=4)
    with prunekit.apply(model, spec("fastv")):
        pruned = model(**INPUTS).logits
        parts_of_layers(model)
        assert torch.equal(model(**INPUTS).logits, pruned)


def test_renumbered_positions():
    model = tiny_llava(layers=4)
    with prunekit.apply(model, spec("fastv", positions="renumber")):
        pruned = model(**INPUTS).logits
        whole(model)
        assert torch.equal(model(**INPUTS).logits, pruned)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at all tensors
def test_gradients():
    model = tiny_llava(layers=4).requires_grad_(True)
    found = []
    for way in (lambda _: None, whole):
        way(model)
        with torch.enable_grad(), prunekit.apply(model, spec("fastv")):
            model.zero_grad()
            model(**INPUTS, use_cache=False).logits.sum().backward()
        found.append([parameter.grad.clone() for parameter in model.get_decoder().parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_one_graph_is_refused():
    """What stands in the way is said, by dynamo together with its own words."""
    model = tiny_llava(layers=4)
    with prunekit.apply(model, spec("fastv")):
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="prunekit decides while the model runs, which cannot be traced"):
            step(**INPUTS)
    assert not tracing.STEP.traced


def test_export_is_refused():
    model = tiny_llava(layers=4)
    given = {name: INPUTS[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    with (
        prunekit.apply(model, spec("fastv")),
        pytest.raises(prunekit.Unsupported, match="this call cannot be exported: "),
    ):
        torch.export.export(model, (), given, strict=False)


def test_where_nothing_is_pruned_a_graph_stays_whole():
    model, graphs = tiny_llava(layers=4), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    text = {"inputs_embeds": torch.zeros(1, 5, model.config.text_config.hidden_size, dtype=torch.float64)}
    with prunekit.apply(model, {"stages": [{"use": "dense"}]}):
        torch.compile(model.forward, backend=count, fullgraph=True)(**text)
    assert len(graphs) == 1
