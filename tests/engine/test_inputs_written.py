"""Hooks that write to what they get: the model answers as if they had only read it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from reading import EVERYWHERE, piped
from torch import Tensor, nn

import prunekit
from prunekit import Keys, Route, Rows, Selection, Site, Sites, Values, hookimpl, strategy
from prunekit.engine.decoder.view import View
from prunekit.strategy.inputs import OF_TOWER, inputs_of, region_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava

SITES = ["vision.1", "vision.1.mid", "encoder", "2", "2.mid", "2.after", "prefill_end"]
model_of = cache(tiny_llava)


class Zeros(nn.Module):
    """A layer of a strategy's own that writes to its input."""

    def forward(self, hidden, **_):
        return hidden.zero_()


def write(value):
    """Write over a tensor, over each of a tuple, and over what `forward` returns."""
    if isinstance(value, Tensor):
        value.fill_(True if value.dtype == torch.bool else 7)
        value.copy_(torch.zeros_like(value))
    elif isinstance(value, tuple):
        for one in value:
            write(one)
    elif hasattr(value, "rows") or type(value).__name__ == "Forward":
        for ran in (value([3]), value([Zeros()])):
            write((ran.hidden, ran.text, ran.last))


def names_at(hook, site, per_sample=False):
    """Every input that exists at a site; the processor's words need a processor."""
    rows = [one for one in inputs_of(hook) if region_of(Site.parse(site)) in one.regions]
    names = [one.name for one in rows if one.name in OF_TOWER or one.name == "keep" or hasattr(View, one.name)]
    absent = {"scores", "question", *(["extras", "extras_valid", "cls_crops"] if site != "encoder" else [])}
    absent |= {"features"} if site == "vision.1.mid" else set()
    absent |= {"forward"} if site.endswith("mid") or per_sample else set()
    return [name for name in names if name not in absent]


def hook(name, arguments, body):
    """A hook with these arguments that hands them all to `body`."""
    space = {"body": body}
    given = ", ".join(f"{one}={one}" for one in arguments)
    exec(f"def {name}(self, {', '.join(arguments)}):\n    return body({given})", space)
    return hookimpl(space[name])


def every_other(valid):
    return valid & (valid.cumsum(-1) % 2 == 1)


def writer(site, writes, per_sample):
    """A stage that keeps every other token and merges its neighbour into it; and writes over everything it gets."""

    def finish(given):
        if writes:
            for value in given.values():
                write(value)

    def select(**given):
        keep = every_other(given["valid"]).clone()
        finish(given)
        return keep

    def merge(**given):
        count, width = given["keep"].shape[-1], given["extras"].shape[-2] if "extras" in given else 0
        weights = torch.eye(count, count + width, dtype=torch.float64) / 2
        weights = (weights + weights.roll(1, -1)).expand(*given["keep"].shape, -1).clone()
        weights = weights.to(given["hidden"]) * given["keep"][..., None]  # a slot that leaves takes nothing
        finish(given)
        return weights

    methods = {
        name: hook(name, names_at(name, site, per_sample), body)
        for name, body in (("select_tokens", select), ("merge_tokens", merge))
    }
    extras = ("cls",) if site == "encoder" else ()
    sites = Sites(tower=True) if site.startswith("vision") else EVERYWHERE
    options = {"keep": "refused", "sites": sites, "extras": extras, "inputs": inputs_for(site)}
    return strategy(**options, per_sample=per_sample)(type("Writer", (), methods))


def answer(stage, at, **budget):
    """The logits of one prompt batch, which must stay as it was."""
    batch = tiny_inputs((1, 2), (9, 14))
    before = {name: value.clone() for name, value in batch.items()}
    with torch.no_grad(), prunekit.apply(model_of(), piped((stage, {"at": at, **budget}))):
        logits = model_of()(**batch).logits
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    return logits


def inputs_for(site):
    """At the decoder's input there is no layer behind to read."""
    return (
        {
            "attention": Rows("next"), "keys": Keys("next"), "values": Values("next"), "text_keys": Keys("next"),
            "text_values": Values("next"),
        }
        if (site == "encoder")
        else {}
    )


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "per sample"])
@pytest.mark.parametrize("site", SITES)
def test_every_input_of_a_token_stage(site, per_sample):
    expected = answer(writer(site, False, per_sample), site)
    assert torch.equal(answer(writer(site, True, per_sample), site), expected)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "per sample"])
def test_every_input_of_a_router(per_sample):
    def router(writes):
        def route(**given):
            scores = given["embeds"].sum(-1).clone()
            if writes:
                for value in given.values():
                    write(value)
            return Route(scores)

        names = ("embeds", "visual", "text", "valid", "shape", "state", "seed")
        return strategy(per_sample=per_sample)(type("Router", (), {"route": hook("route", names, route)}))

    assert torch.equal(*(answer(router(writes), "encoder", keep=0.5) for writes in (True, False)))


def test_the_prompt_that_a_function_of_queries_sees():
    def asking(writes):
        def queries(tokens):
            mask = (tokens.valid & ~tokens.visual).clone()
            if writes:
                for name in ("ids", "embeds", "valid", "visual", "text", "after"):
                    write(getattr(tokens, name))
            return mask

        @strategy(inputs={"attention": Rows("next", queries=queries)})
        class Asking:
            @hookimpl
            def score_tokens(self, attention):
                return attention

        return Asking

    assert torch.equal(*(answer(asking(writes), "encoder", keep=0.5) for writes in (True, False)))


def test_a_selection_that_is_written_to_after_its_return():
    """What a hook returned is no longer its own."""
    kept = []

    def stage(writes):
        @strategy(keep="refused", sites=EVERYWHERE)
        class Late:
            @hookimpl
            def select_tokens(self, valid, cut):
                if kept and writes:
                    write(kept.pop())
                kept.append(every_other(valid))
                return Selection(kept[-1])

        return Late

    assert torch.equal(answer(stage(True), [1, 3]), answer(stage(False), [1, 3]))
