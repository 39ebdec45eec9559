"""On every family, attention rows and keys are those of the stock model's own attention maps and projections."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from reading import piped, reader

import prunekit
from prunekit import Rows, SpecError, Unsupported
from prunekit.families import find
from prunekit.strategy.decoder_requests import Keys
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names
from prunekit.verify.precision import Float64Throughout

model_of = cache(tiny_model)
WHOLE = {"queries": "all", "heads": "none", "over": "none"}


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def visual_of(model, batch):
    """Which tokens of the prompt are visual, bool (B, S)."""
    return torch.isin(batch["input_ids"], torch.tensor(find(model).visual_ids)) & batch["attention_mask"].bool()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny_names())
def test_rows_are_those_of_the_full_maps(family, attention):
    """Of the layer before and the layer ahead, whole rows by heads and queries, against the stock model's maps."""
    stock = model_of(family, "eager")
    batch = tiny_batch(stock)
    attending = [layer for layer in range(6) if find(stock).attends(layer)]
    maps = dict(zip(attending, stock(**batch, output_attentions=True).attentions, strict=True))
    visual, present, seen = visual_of(stock, batch), batch["attention_mask"].bool(), []
    asks = {"attention": (Rows("previous", **WHOLE), Rows("next", **WHOLE), Rows("next", queries="after"))}
    model = model_of(family, attention)
    at = max(2, find(model).logical_until)
    with prunekit.apply(model, piped((reader(["attention"], seen, inputs=asks), {"at": at}))):
        model(**batch)
    before, ahead, after = seen[0]["attention"]
    for row, (columns, tokens) in enumerate(zip(visual, present, strict=True)):
        behind = tokens & (torch.arange(len(tokens)) > columns.nonzero()[-1])
        for found, layer in ((before, at - 1), (ahead, at)):
            wanted = maps[layer][row][:, tokens][:, :, columns].permute(2, 0, 1)
            found = found[row, : columns.sum(), :, : tokens.sum()]
            torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-9)
        wanted = maps[at][row][:, behind][:, :, columns].mean((0, 1))
        torch.testing.assert_close(after[row, : columns.sum()], wanted, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("family", tiny_names())
def test_unrotated_keys_are_those_of_the_projection(family):
    """Taken from the stock model's own key projections, and their norm where the family has one."""
    model, taken, seen = model_of(family), {}, []
    batch, parts = tiny_batch(model), find(model)
    at = max(2, parts.logical_until)
    handles = []
    for where, layer in (("previous", at - 1), ("next", at)):
        attention = getattr(parts.layers[layer], parts.attention)
        source = getattr(attention, "k_norm", None) or attention.k_proj
        handles.append(source.register_forward_hook(lambda _, __, out, w=where: taken.setdefault(w, out)))
    model(**batch)
    for handle in handles:
        handle.remove()
    asks = {"keys": (Keys("previous", rope=False), Keys("next", rope=False))}
    with prunekit.apply(model, piped((reader(["keys"], seen, inputs=asks), {"at": at}))):
        model(**batch)
    for where, found in zip(("previous", "next"), seen[0]["keys"], strict=True):
        wanted = taken[where]
        if wanted.ndim == 4:  # (B, S, heads, D), or with heads first
            wanted = (wanted if wanted.shape[1] == batch["input_ids"].shape[1] else wanted.transpose(1, 2)).flatten(2)
        for row, columns in enumerate(visual_of(model, batch)):
            torch.testing.assert_close(found[row, : columns.sum()], wanted[row, columns], atol=1e-11, rtol=1e-9)


def asked(family, at, names, answer, **traits):
    model = model_of(family)
    with prunekit.apply(model, piped((reader(names, [], answer, **traits), {"at": at}))):
        model(**tiny_batch(model))


def test_nothing_is_looked_at_past_features_that_the_decoder_adds():
    """Qwen3-VL adds features of its pictures behind its first layers; what comes next is not what is there."""
    assert find(model_of("qwen3_vl")).logical_until > 1
    with pytest.raises(SpecError, match=r"looks ahead at layer 1, but this model adds features .* \(name '1'\)"):
        asked("qwen3_vl", "0.after", ["attention"], None, inputs={"attention": Rows("next")})
    with pytest.raises(Unsupported, match="adds features"):
        asked("qwen3_vl", 0, ["forward"], lambda given: given["forward"]([0, 1]))
    asked("qwen3_vl", 0, ["forward"], lambda given: given["forward"]([0]).hidden.norm(dim=-1) > 0)


def test_layers_of_a_kind_that_has_not_run():
    """Gemma 3 gives its sliding and its full layers different masks and rotations."""
    kinds = find(model_of("gemma3")).text.config.layer_types
    full = kinds.index("full_attention")
    with pytest.raises(SpecError, match=f"ahead at layer {full}, but no layer of its kind, full_attention, has run"):
        asked("gemma3", f"{full - 1}.after", ["attention"], None, inputs={"attention": Rows("next")})
    with pytest.raises(Unsupported, match="no layer of its kind, full_attention, has run"):
        asked("gemma3", 0, ["forward"], lambda given: given["forward"]([full]))
    answers, states = [], []

    def keep(given):
        answers.append(given["forward"]([full + 1, full + 2]).hidden)
        return given["valid"]

    model = model_of("gemma3")
    later = reader(["hidden"], states, lambda given: given["valid"])
    with prunekit.apply(model, piped((reader(["forward"], [], keep), {"at": full + 1}), (later, {"at": full + 3}))):
        model(**tiny_batch(model))
    torch.testing.assert_close(answers[0], states[0]["hidden"], atol=1e-11, rtol=1e-9)
