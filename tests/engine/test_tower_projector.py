"""Behind a cut in the tower the projector runs on what visual tokens still need, and nothing that is read changes."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tower_cases import ANYWHERE, AppendCls, ClsTopK, Merging, Norms, Skewed, piped

import prunekit
from prunekit import hookimpl, strategy
from prunekit.engine.tower.encoding import Encoding
from prunekit.families import find
from prunekit.strategy.tower_requests import Features
from prunekit.testing.tiny import row_of, tiny_inputs, tiny_llava
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_from_config, tiny_model, tiny_names
from prunekit.upstream import CACHE
from prunekit.verify.precision import Float64Throughout

HALF = (Norms, {"at": "vision.0", "keep": 0.5})
LATER = (Norms, {"at": ["vision.0.mid", "vision.1"], "keep": [0.7, 0.3]})
BATCHES = {"one": ((1,), 9), "several": ((1, 2), (12, 9)), "no image in one": ((2, 0, 1), (9, 7, 12))}
model_of = cache(tiny_model)
llava_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout(), torch.no_grad():
        yield


def projects(name):
    tower = find(model_of(name)).tower
    return tower is not None and tower.projector is not None


MAPPED = [name for name in tiny_names() if projects(name)]
KINDS = [(name, kind) for name in MAPPED for kind in ("image", "video") if kind == "image" or takes_video(name)]


@contextmanager
def in_full(model):
    """The projector's own class on all that it gets, in the place of what ran. Yields pairs of what ran and this."""
    outputs = []

    def hook(module, args, output):
        outputs.append((output, type(module).forward(module, *args)))
        return outputs[-1][1]

    handle = model.model.multi_modal_projector.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def ran(model, pipeline, inputs):
    """Logits of the last token, keys and values of every layer in slots that hold a token, and the report."""
    with prunekit.apply(model, pipeline) as run:
        output = model(**inputs, use_cache=True)
    states = [
        state.transpose(1, 2)[layer.layout.present]
        for layer in output[CACHE].layers
        for state in (layer.keys, layer.values)
    ]
    return output.logits[:, -1], states, run.report


def flops(model, pipeline, inputs):
    """FLOPs of the projector's products in one prefill, and the report."""
    counter = FlopCounterMode(display=False)
    with prunekit.apply(model, pipeline) as run, counter:
        model(**inputs)
    (name,) = {name for name in counter.get_flop_counts() if name.endswith("model.multi_modal_projector")}
    return sum(counter.get_flop_counts()[name].values()), run.report


def flops_of_one(model):
    """Of one token: two for each weight of a matrix."""
    return sum(2 * weight.numel() for weight in model.model.multi_modal_projector.parameters() if weight.ndim == 2)


def same_prefill(model, pipeline, inputs):
    logits, states, report = ran(model, pipeline, inputs)
    with in_full(model) as outputs:
        expected, reference, of_full = ran(model, pipeline, inputs)
    assert report.events == of_full.events and 0 < sum(report.kept_tokens) < sum(report.visual_tokens)
    assert (logits - expected).abs().max() < 1e-9
    assert len(states) == len(reference)
    for state, other in zip(states, reference, strict=True):
        assert state.shape == other.shape and (state - other).abs().max() < 1e-9
    return outputs, report


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("stages", [[HALF], [LATER]], ids=["half", "later"])
def test_logits_and_the_cache_are_those_of_the_full_projector(name, kind, stages):
    """Tiles, newlines, frames that are pooled before or behind the projector; rows with several images."""
    model = model_of(name)
    rows = (("image",), ("image", "image")) if kind == "image" else (("video",), ("video",))
    outputs, _ = same_prefill(model, piped(*stages), tiny_batch(model, rows))
    for partial, full in outputs:
        projected = partial.abs().sum(-1) > 0
        assert partial.shape == full.shape
        assert (partial[projected] - full[projected]).abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["rows", "merged", "ragged"])
def test_merges_ragged_images_and_rows_without_images(name, batch, attention):
    stages = {
        "rows": [(ClsTopK, {"at": "vision.0", "keep": 0.4}), (Norms, {"at": 2, "keep": 0.2})],
        "merged": [(Merging, {"at": ["vision.0.mid", "vision.1.mid"], "r": 3})],
        "ragged": [(Skewed, {"at": "vision.0"})],
    }[name]
    same_prefill(llava_of(attention), piped(*stages), tiny_inputs(*BATCHES[batch]))


@pytest.mark.parametrize(("tower", "chosen"), [("clip", "full"), ("siglip", "default"), ("siglip", "full")])
def test_whichever_tokens_the_tower_hands_on(tower, chosen):
    """With "full" the CLS token is a visual token that no cut can drop; "default" drops SigLIP's first patch."""
    config = CONFIGS["llava"](6)
    config.vision_feature_select_strategy = chosen
    if tower == "siglip":
        config.vision_config = CONFIGS["paligemma"](6).vision_config
    model = tiny_from_config(config, "sdpa", torch.float64, 0)
    count = find(model).visual_tokens
    image = model.config.image_token_id
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[1, *[image] * count, 50, 51], [1, *[image] * count, 60, 70]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    _, report = same_prefill(model, piped(HALF), inputs)
    spent, _ = flops(model, piped(HALF), inputs)
    assert spent == sum(report.kept_tokens) * flops_of_one(model)


@pytest.mark.parametrize(("keep", "kept"), [(1.0, 16), (0.5, 8), (0.25, 4)])
def test_the_projector_costs_what_visual_tokens_are_left(keep, kept):
    model, inputs = llava_of("sdpa"), tiny_inputs((1, 2), (12, 9))
    spent, _ = flops(model, piped((Norms, {"at": "vision.0", "keep": keep})), inputs)
    assert spent == 3 * kept * flops_of_one(model)


def test_padding_of_tiles_is_not_projected():
    """Neither patches that make no visual token nor newlines, which are put between the projected tokens."""
    model = model_of("llava_next")
    inputs = tiny_batch(model, (("image",), ("image",)))
    spent, report = flops(model, piped(HALF), inputs)
    coords = find(model).modalities[0].coords(inputs, report.visual_tokens)
    made = [int((one[list(kept), 1] >= 0).sum()) for one, kept in zip(coords, report.events[0].kept, strict=True)]
    assert sum(made) < sum(report.kept_tokens), "newlines are kept"
    assert spent == sum(made) * flops_of_one(model)


def test_a_projector_that_reads_several_layers_runs_in_full():
    model = model_of("vipllava")
    inputs = tiny_batch(model)
    spent, report = flops(model, piped(HALF), inputs)
    assert spent == sum(report.visual_tokens) * flops_of_one(model)


def test_pooled_frames_are_projected_in_full():
    """LLaVA-NeXT-Video pools frames in front of the projector, which then does not get the tower's tokens."""
    model = model_of("llava_next_video")
    inputs = tiny_batch(model, (("video",),))
    spent, report = flops(model, piped(HALF), inputs)
    assert spent == sum(report.visual_tokens) * flops_of_one(model)


def test_no_read_back_says_how_many_tokens_are_projected(monkeypatch):
    """Fake tensors have no values, so that whatever depends on them to know a shape raises."""
    original = Encoding.to_project
    shapes = []

    def faked(encoding, skipped):
        index = original(encoding, skipped)
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes.append((original(encoding, skipped).shape, index.shape))
        return index

    monkeypatch.setattr(Encoding, "to_project", faked)
    with prunekit.apply(llava_of("sdpa"), piped((Skewed, {"at": "vision.0"}))):
        llava_of("sdpa")(**tiny_inputs((1, 2), (12, 9)))
    assert [faked == real for faked, real in shapes] == [True]


def test_without_a_cut_in_the_tower_it_is_only_watched():
    model, inputs, seen = llava_of("sdpa"), tiny_inputs(), []
    handle = model.model.multi_modal_projector.linear_1.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    for pipeline, tokens in ((piped((ClsTopK, {"at": "encoder", "keep": 0.5})), 16), (piped(HALF), 8)):
        with prunekit.apply(model, pipeline), torch.no_grad():
            model(**inputs)
        assert seen.pop().shape[1] == tokens
    handle.remove()
    assert "forward" not in vars(model.model.multi_modal_projector)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_beams_and_single_rows(beams):
    model, inputs = llava_of("sdpa"), tiny_inputs((1, 1, 1), (12, 9, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with prunekit.apply(model, piped(HALF, (Norms, {"at": 2, "keep": 0.25}))):
        texts = model.generate(**inputs, **options)
        alone = [model.generate(**row_of(inputs, row), **options)[0, -5:] for row in range(3)]
        with in_full(model):
            expected = model.generate(**inputs, **options)
    assert torch.equal(texts, expected)
    assert torch.equal(texts[:, -5:], torch.stack(alone))


@strategy(sites=ANYWHERE, inputs={"features": (Features(projected=True), Features())})
class Projected:
    """Keeps the longest projected features that are not the first."""

    @hookimpl
    def score_tokens(self, features):
        return features[0].norm(dim=-1) + features[1].norm(dim=-1)


@pytest.mark.parametrize("at", ["encoder", 2])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "paligemma"])
def test_projected_features_of_what_remains(name, at):
    """`same_prefill` compares the choices, which follow from the features."""
    model = model_of(name)
    same_prefill(model, piped(HALF, (Projected, {"at": at, "keep": 0.25})), tiny_batch(model))


def test_cls_tokens_go_through_it_as_well():
    stages = [HALF, (AppendCls, {"at": "encoder", "keep": 0.25})]
    same_prefill(llava_of("sdpa"), piped(*stages), tiny_inputs((1, 2), (12, 9)))


def test_gradients_are_those_of_the_full_projector():
    inputs, gradients = tiny_inputs((1, 2), (12, 9)), []
    for full in (False, True):
        model = tiny_llava().requires_grad_(True)
        with torch.enable_grad(), prunekit.apply(model, piped(HALF)):
            if full:
                with in_full(model):
                    model(**inputs).logits[:, -1].square().mean().backward()
            else:
                model(**inputs).logits[:, -1].square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-9, name
