"""What of the vision tower is refused, each by its own words; nearly all of it before any compute."""

# ruff: noqa: SIM117
from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from refusing import inputs_of, model_of, refused

import prunekit
from prunekit import Selection, Site, Sites, hookimpl
from prunekit.engine.tower.encoding import Encoding
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.view import TowerView
from prunekit.errors import SpecError
from prunekit.families import find
from prunekit.families.base import Modality
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.strategy.tower_requests import EncoderKeys, EncoderRows, EncoderValues, Features
from prunekit.testing.tiny_families import tiny_batch, tiny_model

EVERYWHERE = Sites(tower=True, end=True)


def said(phrase):
    return pytest.raises(prunekit.Unsupported, match=re.escape(phrase))


def strategy(argument="hidden", spec=None, **traits):
    """Scores by the norm of one argument, with its declaration."""
    space: dict = {}
    exec(f"def score_tokens(self, {argument}):\n    return {argument}.flatten(2).norm(dim=-1)", space)
    inputs = {} if spec is None else {"inputs": {argument: spec}}
    body = {"score_tokens": hookimpl(space["score_tokens"])}
    return prunekit.strategy(**{"sites": EVERYWHERE, **inputs, **traits})(type("Strategy", (), body))


def piped(cls, **keys):
    globals()["Chosen"] = cls
    registry = Registry()
    registry.strategy("s", f"{__name__}:Chosen")
    keep = {} if cls.__prunekit__.keep == "refused" else {"keep": 0.5}
    return build.build({"name": "tower", "stages": [{"use": "s", **keep, **keys}]}, registry=registry)


def bound_on(model, cls, at="encoder", **tower):
    """A stage at `at` on the numbers of `model`; tower: numbers of its tower that are simulated, or `none`."""
    shape = find(model).shape()
    changed = None if tower == {"none": True} else dataclasses.replace(shape.tower, **tower)
    return piped(cls, at=at).bind(dataclasses.replace(shape, tower=changed))


def at_once(phrase):
    """Within the block the pipeline is refused when it meets the numbers of the model."""
    return pytest.raises(SpecError, match=re.escape(phrase))


@pytest.fixture(scope="module")
def llava():
    return model_of()


def test_a_family_without_a_tower(llava):
    with at_once("this model's vision tower cannot be cut"):
        bound_on(llava, strategy(), "vision.0", none=True)
    with at_once(", but this model's vision tower cannot be read"):
        bound_on(llava, strategy("features"), none=True)


def test_a_block_that_is_not_there(llava):
    with at_once("there is no tower block 7: the tower has blocks 0 to 2"):
        bound_on(llava, strategy(), "vision.7")


def test_a_cut_behind_the_features(llava):
    phrase = "image features are taken after block 1, so a cut behind block 2 changes nothing that the decoder sees"
    with refused(phrase, llava, error=SpecError):
        with prunekit.apply(llava, piped(strategy(), at="vision.2")):
            pass


def test_a_tower_on_other_kernels():
    own = model_of()
    own.config.vision_config._attn_implementation = "flash_attention_2"
    with refused("', which takes no masks of single tokens", own, error=SpecError):
        with prunekit.apply(own, piped(strategy(), at="vision.0")):
            pass


def test_one_stage_in_the_tower_and_behind_it(llava):
    with refused("in the tower a sample is an image, behind it a prompt", llava, error=SpecError):
        with prunekit.apply(llava, piped(strategy(), at=["vision.0", 2])):
            pass


def test_what_the_prompt_has(llava):
    with at_once(", which is not there yet at 'vision.0'"):
        bound_on(llava, strategy("text_hidden"), "vision.0")
    with said(": inside the tower there is no prompt yet"):
        TowerView(None, SimpleNamespace(site=Site.parse("vision.0")), None, None, (), None).get("text_hidden")


def test_cls_tokens_of_a_tower_without():
    own = tiny_model("paligemma", dtype=torch.float32)
    with refused("this vision tower has no CLS token", own, error=SpecError):
        with prunekit.apply(own, piped(strategy("encoder_attention", EncoderRows(query="cls")), at="encoder")):
            pass
    with refused("takes extras (cls), but there is no CLS token in this vision tower", own, error=SpecError):
        with prunekit.apply(own, piped(strategy(extras=("cls",)), at="encoder")):
            pass


def test_extras_that_cannot_be_projected(llava):
    own = tiny_model("internvl", dtype=torch.float32)
    phrase = "the projector of this model does not map single tokens, so its CLS token cannot be projected"
    with refused(phrase, own, error=SpecError):
        with prunekit.apply(own, piped(strategy(extras=("cls",)), at="encoder")):
            pass
    with at_once("the projector gets the tower's input, which no block has made"):
        bound_on(llava, strategy(extras=("cls",)), feature_block=-1)
    with at_once("), which are there at 'encoder' only"):
        bound_on(llava, strategy(extras=("cls",)), at=2)


def test_projecting_what_a_strategy_merges(llava):
    projects = prunekit.strategy(sites=EVERYWHERE)(type("Strategy", (), {"score_tokens": hookimpl(_projecting)}))
    with at_once(", but what the projector makes goes in at 'encoder' only"):
        bound_on(llava, projects, at=2)
    with at_once(", but the projector gets what enters the tower, no features"):
        bound_on(llava, projects, feature_block=-1)
    own = tiny_model("internvl", dtype=torch.float32)
    with refused(", but there is no projector here that maps single tokens", own, error=SpecError):
        with prunekit.apply(own, piped(projects, at="encoder")):
            pass
    with at_once(" asks for cls_crops, but for no CLS token of which they could be"):
        bound_on(llava, strategy("cls_crops"))


def _projecting(self, features, project):
    return project(features).norm(dim=-1)


def test_extras_of_a_strategy_in_the_tower(llava):
    def select_tokens(self, hidden, valid):
        weights = torch.eye(hidden.shape[1], hidden.shape[1] + 1).expand(len(hidden), -1, -1)
        return Selection(valid, weights, extras=hidden[:, :1])

    body = {"select_tokens": hookimpl(select_tokens)}
    brings = prunekit.strategy(sites=EVERYWHERE, keep="refused")(type("Strategy", (), body))
    with prunekit.apply(llava, piped(brings, at="vision.0")):
        with refused(": extras are states of the decoder's width; there are none at 'vision.0'", llava):
            llava(**inputs_of())


def test_pooling_heads(llava):
    pooled = strategy("encoder_attention", EncoderRows(query="pool"))
    with refused("this vision tower has no pooling head", llava, error=SpecError):
        with prunekit.apply(llava, piped(pooled, at="encoder")):
            pass
    with at_once("the pooling head would also attend to what cuts in the tower have dropped"):
        bound_on(llava, pooled, "vision.0", pool=True)


@pytest.mark.parametrize(
    ("argument", "spec", "at", "phrase"),
    [
        ("features", Features(projected=True), "vision.0", "inside the tower nothing has been projected yet"),
        ("encoder_values", EncoderValues(7), "encoder", "there is no block 7: the vision tower has blocks 0 to 2"),
        ("encoder_keys", EncoderKeys(1), "vision.0", "block 1 has not run yet at 'vision.0'"),
        ("features", Features(0), "vision.0.mid", "block 0 has not run to its end at 'vision.0.mid'"),
    ],
)
def test_inputs_that_are_not_there(llava, argument, spec, at, phrase):
    with refused(phrase, llava, error=SpecError), prunekit.apply(llava, piped(strategy(argument, spec), at=at)):
        pass


def test_another_feature_layer_in_a_call(llava):
    reads = piped(strategy("encoder_keys"), at="encoder")
    with prunekit.apply(llava, reads), refused("in a call differs from the model's config, by which stages", llava):
        llava(**inputs_of(), vision_feature_layer=-1)


def test_features_from_elsewhere(llava):
    """Told once the first layer is about to run, with nothing encoded."""
    inputs = inputs_of()
    encoded = llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    reads = piped(strategy("encoder_keys"), at="encoder")
    with prunekit.apply(llava, reads), refused("features were encoded outside of this prunekit.apply block", llava):
        llava(**inputs, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("spec", [EncoderKeys(), EncoderKeys(of="cls")])
@pytest.mark.parametrize("read", [True, False])
def test_features_of_another_block(llava, spec, read):
    """Its pipeline read something else of the tower, or nothing."""
    inputs = inputs_of()
    pixels = inputs.pop("pixel_values")
    other = piped(strategy("encoder_attention" if read else "hidden"), at="encoder")
    with prunekit.apply(llava, other):
        encoded = llava.model.get_image_features(pixels, return_dict=True)
    with (
        prunekit.apply(llava, piped(strategy("encoder_keys", spec), at="encoder")),
        refused("features were encoded outside of this prunekit.apply block", llava),
    ):
        llava(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_decision_about_a_cache_that_is_not_there(llava):
    def select_tokens(self, valid):
        return Selection(valid, crop=True)

    body = {"select_tokens": hookimpl(select_tokens)}
    crops = prunekit.strategy(sites=EVERYWHERE, keep="refused", crops=True)(type("Strategy", (), body))
    with prunekit.apply(llava, piped(crops, at="vision.0")):
        with refused(": crop=True is about the KV cache; there is none at 'vision.0'", llava):
            llava(**inputs_of())


def test_sizes_in_a_tower_that_attends_picture_by_picture():
    own = tiny_model("qwen2_vl", dtype=torch.float32)

    def select_tokens(self, valid):
        return Selection(valid, sizes=1.0 + valid)

    body = {"select_tokens": hookimpl(select_tokens)}
    sized = prunekit.strategy(sites=EVERYWHERE, keep="refused")(type("Strategy", (), body))
    with prunekit.apply(own, piped(sized, at="vision.0")):
        with refused(": sizes add to attention logits, and this vision tower takes no masks for them", own):
            own(**tiny_batch(own))


def run_of(model, spec):
    parts = find(model)
    tower = dataclasses.replace(parts.tower, pool=torch.nn.Identity())
    bound = bound_on(model, strategy("encoder_attention", spec), pool=True)
    needs = TowerNeeds.of(bound, dataclasses.replace(parts, tower=tower))
    return Encoding(needs, parts.modalities[0], {})


def test_a_tower_that_did_not_run(llava):
    """No family has it: an encoding method that goes around the blocks, kernels from elsewhere, or an unused head."""
    run = run_of(llava, EncoderRows(query="pool"))
    with said("the vision tower's blocks have not run, so there is nothing to read of it or to cut"):
        _ = run.patches
    with said("the pooling head of the vision tower did not run, so there is no row of its query"):
        run.tokens(EncoderRows(query="pool"))
    with said("could not be read: the block's attention did not ask transformers' AttentionInterface"):
        run.tokens(EncoderRows(layer=0))


def test_pixels_that_cannot_be_told_apart(llava):
    run = run_of(llava, EncoderRows(query="pool"))
    modality: Modality = find(llava).modalities[0]
    run.visual = SimpleNamespace(modality=modality, checksums=None)
    with said("the pixels of each image cannot be told apart, so a stage in the tower has no `seed`"):
        _ = run.seeds


def test_visual_tokens_that_the_family_does_not_expect(llava, monkeypatch):
    """No family has it: simulated by a family file that counts wrongly."""

    def wrong(modality, arguments, rows, patches):
        return [torch.arange(patches - 1)[:, None] for _ in range(rows)]

    plan = piped(strategy(), at="vision.0")
    with prunekit.apply(llava, plan) as run:
        changed = dataclasses.replace(run._tower.tower, patch_groups=wrong)
        monkeypatch.setattr(run, "_tower", dataclasses.replace(run._tower, tower=changed))
        phrase = "of this tower; use stages that neither cut nor read the vision tower"
        with refused(phrase, llava):
            llava(**inputs_of())
