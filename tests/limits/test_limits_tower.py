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


def plan_of(model, cls, at="encoder", site=None, **tower):
    """The engine's own check, past that of the pipeline; site and tower: what is simulated."""
    parts = find(model)
    bound = piped(cls, at=at).bind(parts.shape())
    cut = bound.cuts[0]
    if site is not None:
        there = Site.parse(site)
        cut = dataclasses.replace(cut, site=there, stage=dataclasses.replace(cut.stage, sites_given=(there,)))
    changed = None if tower == {"none": True} else dataclasses.replace(parts.tower, **tower)
    return TowerNeeds.of(SimpleNamespace(cuts=[cut]), dataclasses.replace(parts, tower=changed))


@pytest.fixture(scope="module")
def llava():
    return model_of()


def test_a_family_without_a_tower(llava):
    with said("can neither be cut nor read: its family file declares no"):
        plan_of(llava, strategy(), "vision.0", none=True)


def test_a_block_that_is_not_there(llava):
    with said("cannot act at 'vision.7': the vision tower ends with block 2"):
        plan_of(llava, strategy(), "vision.0", site="vision.7")


def test_a_cut_behind_the_features(llava):
    with refused("so a later cut changes nothing that the decoder sees; cut earlier, or at 'encoder'", llava):
        with prunekit.apply(llava, piped(strategy(), at="vision.2")):
            pass


def test_a_tower_on_other_kernels():
    own = model_of()
    own.config.vision_config._attn_implementation = "flash_attention_2"
    with refused("', which takes no masks of single tokens; use sdpa or eager", own):
        with prunekit.apply(own, piped(strategy(), at="vision.0")):
            pass


def test_one_stage_in_the_tower_and_behind_it(llava):
    with refused("inside the tower a sample is an image, later it is a row of the prompt: split the stage", llava):
        with prunekit.apply(llava, piped(strategy(), at=["vision.0", 2])):
            pass


def test_what_the_prompt_has(llava):
    with said(", which the prompt or the decoder has, and not the vision tower"):
        plan_of(llava, strategy("text_hidden"), site="vision.0")
    with said(": inside the tower there is no prompt yet"):
        TowerView(None, SimpleNamespace(site="vision.0"), None, None, (), None).get("text_hidden")


def test_cls_tokens_of_a_tower_without():
    own = tiny_model("paligemma", dtype=torch.float32)
    with refused("this vision tower has no CLS token; use query='mean', or inputs of the patches", own):
        with prunekit.apply(own, piped(strategy("encoder_attention", EncoderRows(query="cls")), at="encoder")):
            pass
    with refused("takes extras ('cls',): there is no CLS token in this vision tower", own):
        with prunekit.apply(own, piped(strategy(extras=("cls",)), at="encoder")):
            pass


def test_extras_that_cannot_be_projected(llava):
    own = tiny_model("internvl", dtype=torch.float32)
    with refused("the projector of this model does not map single tokens, so its CLS token cannot be projected", own):
        with prunekit.apply(own, piped(strategy(extras=("cls",)), at="encoder")):
            pass
    with said(": the projector gets the tower's input"):
        plan_of(llava, strategy(extras=("cls",)), feature_layer=0)


def test_pooling_heads(llava):
    pooled = strategy("encoder_attention", EncoderRows(query="pool"))
    with refused("this vision tower has no pooling head; use query='cls' or 'mean'", llava):
        with prunekit.apply(llava, piped(pooled, at="encoder")):
            pass
    with said("the pooling head would also attend to what cuts in the tower have dropped"):
        plan_of(llava, pooled, "vision.0", pool=torch.nn.Identity())


@pytest.mark.parametrize(
    ("argument", "spec", "at", "phrase"),
    [
        ("features", Features(projected=True), "vision.0", "inside the tower nothing has been projected yet"),
        ("encoder_values", EncoderValues(7), "encoder", "there is no block 7: the vision tower has blocks 0 to 2"),
        ("encoder_keys", EncoderKeys(1), "vision.0", "block 1 has not run yet at 'vision.0'"),
        ("features", Features(0), "vision.0.mid", "block 0 has not run to its end at 'vision.0.mid'; ask for"),
    ],
)
def test_inputs_that_are_not_there(llava, argument, spec, at, phrase):
    with refused(phrase, llava), prunekit.apply(llava, piped(strategy(argument, spec), at=at)):
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


def test_a_decision_about_a_cache_that_is_not_there(llava):
    def select_tokens(self, valid):
        return Selection(valid, crop=True)

    body = {"select_tokens": hookimpl(select_tokens)}
    crops = prunekit.strategy(sites=EVERYWHERE, keep="refused")(type("Strategy", (), body))
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
    plan = plan_of(model, strategy("encoder_attention", spec), pool=torch.nn.Identity())
    return Encoding(plan, find(model).modalities[0], {})


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
