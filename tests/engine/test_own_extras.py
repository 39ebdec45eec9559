"""States that a strategy brings itself, and the projector that makes them of what it merged in front of it."""

from __future__ import annotations

import pytest
import torch
from reading import piped

import prunekit
from prunekit import Features, Selection, Sites, hookimpl, strategy
from prunekit.errors import PluginError
from prunekit.families import find
from prunekit.ops import slot_weights
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names
from prunekit.verify.equivalence import assert_equivalent
from prunekit.verify.precision import Float64Throughout

RAGGED = {"images": (1, 2, 0), "text": (7, 9, 12)}
SEEN: list = []
MAPPED = [name for name in tiny_names() if getattr(find(tiny_model(name)).tower, "projector", None) is not None]


@strategy(sites=Sites(decoder=False), inputs={"features": (Features(), Features(projected=True))})
class Looks:
    """Baseline: takes down what the projector makes of features, and what it made of them."""

    @hookimpl
    def score_tokens(self, features, project, valid, coords):
        SEEN.append((project(features[0]), features[1], valid & (coords[..., 1] >= 0)))
        return valid.float()


@pytest.mark.parametrize("name", MAPPED)
def test_project_is_what_the_model_does(name):
    """Of features as they came, token by token, in every family whose projector maps single tokens."""
    SEEN.clear()
    model = tiny_model(name)
    with Float64Throughout(), torch.no_grad(), prunekit.apply(model, piped((Looks, {"keep": 0.5}))):
        model(**tiny_batch(model, [("image",), ("image", "image")]))
    ((made, expected, shown),) = SEEN
    assert int(shown.sum()) > 0
    assert (made - expected)[shown].abs().max() < 1e-9


@strategy(sites=Sites(decoder=False), keep="refused", per_sample=True)
class Means:
    """Baseline: averages runs of about eight features in front of the projector, so another number for each sample."""

    @hookimpl
    def select_tokens(self, features, project):
        many = len(features) // 8
        made = project(torch.stack([part.mean(0) for part in features.tensor_split(many)]))
        keep = torch.arange(len(features)) < many + 2
        return Selection(keep, slot_weights(torch.arange(many), len(features)), extras=made)


@pytest.mark.parametrize("before", [[], [("random", {"keep": 0.7})]], ids=["first", "second"])
def test_merges_in_front_of_the_projector_are_exact(before):
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    assert_equivalent(model, piped(*before, (Means, {})), inputs, steps=3)


def test_what_goes_in_is_the_projected_mean():
    """By hand: one image, its features from the stock tower."""
    model, inputs = tiny_llava(), tiny_inputs(images=(1,), text=5)
    with torch.no_grad(), Float64Throughout():
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
        made = model.model.multi_modal_projector(torch.stack([half.mean(0) for half in tower.tensor_split(2)]))
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        where = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        embeds[0, where] = features
        embeds[0, where[:2]] = made
        stay = torch.ones(embeds.shape[1], dtype=torch.bool).index_fill(0, where[4:], False)
        expected = model.model.language_model(
            inputs_embeds=embeds[:, stay], position_ids=torch.arange(len(stay))[None, stay],
            attention_mask=torch.ones(1, int(stay.sum()), dtype=torch.int64),
        ).last_hidden_state[0, -1]  # fmt: skip
        with prunekit.apply(model, piped((Means, {}))):
            logits = model(**inputs).logits[0, -1]
    assert (logits - model.lm_head(expected)).abs().max() < 1e-9


def answering(answer, **traits):
    """A strategy that says what `answer` makes of the states that it is given."""

    @strategy(keep="refused", **traits)
    class Answers:
        """Baseline."""

        @hookimpl
        def select_tokens(self, hidden):
            return answer(hidden)

    return Answers


def all_of(hidden):
    return torch.ones(hidden.shape[:-1], dtype=torch.bool)


def wide(hidden, extras):
    weights = torch.eye(hidden.shape[1], hidden.shape[1] + extras).expand(len(hidden), -1, -1)
    return weights.to(hidden.dtype)


WRONG = {
    "needs weights, a matrix": lambda x: Selection(all_of(x), extras=x[:, :1]),
    r"must be states, \(B, E, H\), not \(32,\)": lambda x: Selection(all_of(x), wide(x, 1), extras=x[0, 0]),
    "must be states, .* not list": lambda x: Selection(all_of(x), wide(x, 1), extras=[1.0]),
    "extras.* must return float": lambda x: Selection(all_of(x), wide(x, 1), extras=x[:, :1].long()),
    r"extras\) holds NaN or infinity": lambda x: Selection(all_of(x), wide(x, 1), extras=x[:, :1] / 0),
    "must be states of width 32, not 16": lambda x: Selection(all_of(x), wide(x, 1), extras=x[:, :1, :16]),
    r"\(weights\) puts an extra into the slot of a token that leaves": lambda x: Selection(
        all_of(x) & (torch.arange(x.shape[1]) < 3), slot_weights(torch.tensor([3]), x.shape[1])[None], extras=x[:, :1]
    ),
    r"\(weights\) must return a tensor of shape": lambda x: Selection(all_of(x), wide(x, 2), extras=x[:, :1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_extras_that_cannot_be_put_in(message):
    model = tiny_llava()
    with pytest.raises(PluginError, match=message), prunekit.apply(model, piped((answering(WRONG[message]), {}))):
        model(**tiny_inputs())
