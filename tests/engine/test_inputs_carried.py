"""Inputs where a run is not simply shorter: sizes, renumbered positions, samples that differ, gradients, flash."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from reading import logits_of, piped, projected, reader, watched
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

import prunekit
from prunekit import LayerAction, LayerPlan, Route, Rows, Selection, Unsupported, hookimpl, strategy
from prunekit.strategy.decoder_requests import Keys
from prunekit.testing.tiny import IMAGE, tiny_inputs, tiny_llava
from prunekit.verify.precision import Float64Throughout

model_of = cache(tiny_llava)
BOTH = (Rows(), Rows("next"), Rows("next", rope=False, heads="none"))


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def seen_at(at, *stages, names=("attention",), asks=BOTH, given=None, model=None, **options):
    """What a stage at `at` is given behind `stages`, for one sample or `given`."""
    seen: list[dict] = []
    model = model or model_of()
    last = (reader(names, seen, inputs={"attention": asks}, **options.pop("traits", {})), {"at": at})
    with prunekit.apply(model, piped(*stages, last, **options)):
        model(**(given or tiny_inputs((2,), (9,))))
    return seen[0]


def entering(model, inputs):
    """Embeddings, rotations and visual tokens of one sample, as the decoder gets them."""
    with watched(model) as calls:
        model(**inputs)
    return calls[0][0], calls[0][1]["position_embeddings"], inputs["input_ids"][0] == IMAGE


def softmaxed(logits, bias=0.0):
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return (logits + bias).masked_fill(~causal, -torch.inf).softmax(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sizes_are_in_the_rows(attention):
    """log(size) is added to the logits of a key in every layer from the cut on, also in one that is looked at ahead."""

    def grow(given):
        sizes = 1 + torch.arange(32, dtype=torch.float64)[None]
        return Selection(given["valid"], sizes=sizes)

    names = ["attention", "sizes"]
    found = seen_at("3", (reader((), [], grow), {"at": 1}), names=names, model=model_of(attention))
    model = model_of("sdpa")
    state, cos_sin, visual = entering(model, tiny_inputs((2,), (9,)))
    bias = torch.zeros(visual.shape[0], dtype=torch.float64)
    maps = []
    for number, layer in enumerate(model.get_decoder().layers[:4]):
        if number == 1:
            bias[visual] = (1 + torch.arange(32, dtype=torch.float64)).log()
        maps.append(softmaxed(logits_of(layer, state, cos_sin), bias)[0])
        unrotated = softmaxed(logits_of(layer, state, None), bias)[0]
        mask = bias.expand(1, 1, len(bias), -1).masked_fill(
            ~torch.ones(len(bias), len(bias), dtype=torch.bool).tril(), -torch.inf
        )
        state = layer(state, attention_mask=mask, position_embeddings=cos_sin)
    before, ahead, bare = found["attention"]
    torch.testing.assert_close(before[0], maps[2][:, -1, visual].mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ahead[0], maps[3][:, -1, visual].mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(bare[0], unrotated[:, -1, visual].T, atol=1e-12, rtol=1e-10)
    assert found["sizes"].tolist() == [[1.0 + n for n in range(32)]]


def test_renumbered_positions_are_in_the_rows():
    """Looking ahead, positions are those of the tokens that reach the site."""
    drop = reader((), [], lambda given: given["valid"] & (torch.arange(32) % 3 > 0))
    found = seen_at("3", (drop, {"at": 2}), positions="renumber")
    model = model_of("sdpa")
    state, cos_sin, visual = entering(model, tiny_inputs((2,), (9,)))
    maps = []
    for number, layer in enumerate(model.get_decoder().layers[:4]):
        if number == 2:
            stays = ~visual
            stays[visual.nonzero()[:, 0][torch.arange(32) % 3 > 0]] = True
            state, visual = state[:, stays], visual[stays]
            cos_sin = tuple(part[:, : len(visual)] for part in cos_sin)
        maps.append(softmaxed(logits_of(layer, state, cos_sin))[0])
        state = layer(state, attention_mask=None, position_embeddings=cos_sin)
    before, ahead, _ = found["attention"]
    torch.testing.assert_close(before[0], maps[2][:, -1, visual].mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ahead[0], maps[3][:, -1, visual].mean(0), atol=1e-12, rtol=1e-10)


def router(plans):
    @strategy(keep="refused", keep_layers="refused", routes=("layers",))
    class Plans:
        """One plan for each sample."""

        @hookimpl
        def route(self, embeds):
            return Route(plans=plans)

    return Plans


def test_samples_that_differ_by_layer_show_what_they_do_alone():
    """Layer 1 freezes the visual tokens of one sample, leaves out the MLP of another, and runs for the third."""
    plans = [LayerPlan({1: LayerAction.FREEZE}), LayerPlan({1: LayerAction.SKIP_MLP}), LayerPlan()]
    batch = tiny_inputs((1, 2, 1), (9, 14, 6))
    together = seen_at("2", (router(plans), {}), given=batch, asks=(*BOTH, Rows(queries="text")))
    for row, plan in enumerate(plans):
        alone = seen_at("2", (router([plan] * 3), {}), given=batch, asks=(*BOTH, Rows(queries="text")))
        for one, other in zip(together["attention"], alone["attention"], strict=True):
            torch.testing.assert_close(one[row], other[row], atol=1e-12, rtol=1e-10)
    simple = seen_at("2", given=batch, asks=Rows(queries="text"))["attention"]
    torch.testing.assert_close(together["attention"][3], simple, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("asks", [Rows(), Rows(rope=False)])
def test_a_router_that_skips_a_layer_that_is_read(asks):
    """Refused before any layer has run."""
    model, ran = model_of(), []
    handle = model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    plans = [LayerPlan(), LayerPlan({1: LayerAction.SKIP})]
    with pytest.raises(Unsupported, match="attention of layer 1"):
        seen_at("2", (router(plans), {}), given=tiny_inputs((1, 1), (9, 9)), asks=asks)
    handle.remove()
    assert not ran


def test_gradients_reach_the_states_but_not_the_attention():
    """A trainable strategy gets states with their graph; attention and keys are measurements."""
    model = tiny_llava()
    model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_(True)
    names = ["hidden", "previous_hidden", "attention", "text_hidden", "keys"]
    for trainable in (True, False):
        given = seen_at("2", names=names, asks=Rows("next"), model=model, traits={"trainable": trainable})
        needs = {name for name in names if given[name].requires_grad}
        assert needs == ({"hidden", "previous_hidden", "text_hidden"} if trainable else set())


@pytest.fixture
def flash():
    """A flash kernel by its interface: a 2-D mask or None, causal by itself; the arithmetic is plain."""

    def kernel(module, query, key, value, mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
        late = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[-1] - logits.shape[-2])
        seen = late if mask is None else late & mask.bool()[:, None, None, :]
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("flash_by_hand", kernel)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_by_hand", flash_attention_mask)
    model = tiny_llava()
    model.config.get_text_config()._attn_implementation = "flash_by_hand"
    yield model
    del AttentionInterface._global_mapping["flash_by_hand"]
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["flash_by_hand"]


def test_flash_kernels_show_the_same(flash):
    asks = (*BOTH, Rows(queries="text", over="none"), Rows("next", queries="visual", domain="visual"))
    batch = tiny_inputs((1, 2), (9, 14))
    for stages in ([], [(reader((), []), {"at": 1})]):
        names = ["attention", "keys"]
        one = seen_at("2", *stages, names=names, asks=asks, given=batch)
        other = seen_at("2", *stages, names=names, asks=asks, given=batch, model=flash)
        for mine, theirs in zip((*one["attention"], one["keys"]), (*other["attention"], other["keys"]), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_two_stages_at_one_site_read_what_the_layer_ran_on():
    """The second one's columns are the tokens that the first has left; the layer before saw more."""
    first, second = [], []
    asks = {"attention": (Rows(), Rows(domain="visual")), "keys": Keys("next", rope=False)}
    names = ["attention", "keys", "hidden"]
    stages = [(reader(names, seen, inputs=asks), {"at": 2}) for seen in (first, second)]
    model = model_of()
    with prunekit.apply(model, piped(*stages)):
        model(**tiny_inputs((2,), (9,)))
    for one, other in zip(first[0]["attention"], second[0]["attention"], strict=True):
        assert torch.equal(one[:, :-1], other)
    torch.testing.assert_close(first[0]["keys"][:, :-1], second[0]["keys"], atol=1e-12, rtol=1e-10)
    layer = model.get_decoder().layers[2]
    bare = projected(layer, second[0]["hidden"], None)[1][0]
    torch.testing.assert_close(second[0]["keys"][0], torch.cat(list(bare), -1), atol=1e-12, rtol=1e-10)
