"""Every input of a hook equals what loops over single samples make of the stock model's layers, by hand, in float64."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from reading import logits_of, piped, projected, reader, rotated, watched

import prunekit
from prunekit import Rows
from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.strategy.decoder_requests import Keys, PromptTokens, Values
from prunekit.testing.tiny import IMAGE, row_of, tiny_inputs, tiny_llava
from prunekit.verify.precision import Float64Throughout

IMAGES, TEXT = (1, 2, 0), (9, 14, 6)
model_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def inputs(**options):
    """A left-padded batch, with positions that do not count the padding, as `generate` gives them."""
    batch = tiny_inputs(IMAGES, TEXT, **options)
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


class Sample:
    """One sample alone, without padding: the states that enter each layer, tokens dropped before layer 1 really gone.

    `states[l]`, `after_attention[l]`: float (1, n, H); `visual[l]`, `tokens[l]`: bool (n,) and places in the prompt.
    """

    def __init__(self, model, row, dropped):
        single = row_of(tiny_inputs(IMAGES, TEXT), row)
        with watched(model) as calls:
            model(**single)
        (state, kwargs), length = calls[0], single["input_ids"].shape[1]
        self.ids, self.embeds = single["input_ids"], state
        everything = torch.arange(length)
        self.whole = single["input_ids"][0] == IMAGE
        self.layers = model.get_decoder().layers
        self.states, self.after_attention, self.tokens, self.rotary = [], [], [], []
        tokens = everything
        for number, layer in enumerate(self.layers):
            if number == 1 and dropped and self.whole.any():
                stays = tokens != self.whole.nonzero()[-1]
                state, tokens = state[:, stays], tokens[stays]
            cos_sin = tuple(part[:, tokens] for part in kwargs["position_embeddings"])
            self.states.append(state)
            self.tokens.append(tokens)
            self.rotary.append(cos_sin)
            mixed, _ = layer.self_attn(layer.input_layernorm(state), cos_sin, None)
            self.after_attention.append(state + mixed)
            state = layer(state, attention_mask=None, position_embeddings=cos_sin)
        self.states.append(state)

    def visual(self, layer):
        return self.whole[self.tokens[layer]]

    def rows(self, layer, spec):
        """The rows of `spec` by loops: (v,), (v, a), (v, q) or (v, a, q)."""
        maps = logits_of(self.layers[layer], self.states[layer], self.rotary[layer] if spec.rope else None)[0]
        visual, number = self.visual(layer), maps.shape[1]
        lines = []
        for query in self.queries(layer, spec):
            line = maps[:, query].clone()
            if spec.domain != "logits":
                line[:, query + 1 :] = -torch.inf
                line = self.probable(layer, spec, line)
            if spec.undecay:
                line = line / self.left_by_rotation(layer, query)
            lines.append(line)
        if spec.steps > 1:
            return reduce(passed_on(torch.stack(lines), spec.steps)[None, :, visual], spec)
        if spec.pooled:
            lines = [self.probable(layer, spec, self.pooled(layer, spec))] if lines else []
        lines = [line[:, visual] for line in lines]
        stacked = torch.stack(lines) if lines else maps.new_zeros(1, maps.shape[0], int(visual.sum()))
        assert number == len(visual)
        return reduce(stacked, spec) if lines or spec.over != "none" else None

    def probable(self, layer, spec, line):
        """The softmax of one query's logits (a, s), those that it does not see -inf."""
        visual, asked = self.visual(layer), torch.tensor(self.queries(layer, spec))
        inside = {"visual": visual, "queries": torch.isin(torch.arange(len(visual)), asked)}
        if spec.domain in inside:
            line[:, ~inside[spec.domain]] = -torch.inf
        return torch.zeros_like(line) if line[0].isinf().all() else (line / spec.temperature).softmax(-1)

    def pooled(self, layer, spec):
        """Logits (a, s) of the mean of the queries."""
        module, rotary = self.layers[layer], self.rotary[layer] if spec.rope else None
        query, key, _ = (one[0] for one in projected(module, self.states[layer], rotary))
        mean = torch.stack([query[:, at] for at in self.queries(layer, spec)]).mean(0)
        key = key.repeat_interleave(len(query) // len(key), 0)
        line = torch.einsum("ad,asd->as", mean, key) / query.shape[-1] ** 0.5
        line[:, max(self.queries(layer, spec)) + 1 :] = -torch.inf
        return line

    def left_by_rotation(self, layer, query):
        """What becomes of the product of two vectors of ones when both are rotated, over what it was: (s,)."""
        dim = self.layers[layer].self_attn.head_dim
        ones = rotated(torch.ones(1, 1, len(self.tokens[layer]), dim, dtype=torch.float64), *self.rotary[layer])[0, 0]
        return torch.stack([(ones[query] @ key / dim).clamp(min=0.1) for key in ones])

    def queries(self, layer, spec):
        visual = self.visual(layer)
        last = self.whole.nonzero()[-1].item() if self.whole.any() else -1
        chosen = {
            "last": lambda at, place: at == len(visual) - 1,
            "text": lambda at, place: not visual[at],
            "after": lambda at, place: not visual[at] and place > last,
            "visual": lambda at, place: visual[at],
            "all": lambda at, place: True,
            up_to_the_image: lambda at, place: place <= last,
        }.get(spec.queries, lambda at, place: even(self.ids[0, place]))
        return [at for at, place in enumerate(self.tokens[layer]) if chosen(at, place)]


def reduce(rows, spec):
    """Rows (q, a, v): heads first, then queries."""
    if not isinstance(spec.heads, str):
        mass = rows.sum((0, 2)).tolist()
        number = {0.375: 2}.get(spec.heads, spec.heads)  # 1.5 of 4 heads, rounded half up
        best = sorted(range(len(mass)), key=lambda head: (-mass[head], head))[:number]
        rows = rows[:, best].mean(1)
    elif spec.heads != "none":
        rows = {"mean": rows.mean(1), "max": rows.amax(1), "sum": rows.sum(1)}[spec.heads]
    if spec.over != "none":
        rows = {"mean": rows.mean(0), "max": rows.amax(0), "sum": rows.sum(0)}[spec.over]
        return rows.T if rows.ndim == 2 else rows
    return rows.permute(2, 1, 0) if rows.ndim == 3 else rows.T


def passed_on(maps, steps):
    """PageRank over rows (s, a, s) of all queries, by loops: (a, s)."""
    number = len(maps)
    held = torch.full(maps.shape[1:], 1 / number, dtype=maps.dtype)
    for _ in range(steps):
        held = torch.stack([sum(held[head, i] * maps[i, head] for i in range(number)) for head in range(len(held))])
    return held


def even(ids):
    """Raters by their ids."""
    return ids % 2 == 0


def even_rows(known: PromptTokens):
    return even(known.ids)


def up_to_the_image(known: PromptTokens):
    return known.valid & ~known.after


SPECS = [
    Rows(**given)
    for given in (
        {}, {"heads": "max"}, {"heads": "sum"}, {"heads": "none"}, {"heads": 2}, {"rope": False}, {"domain": "visual"},
        {"domain": "logits", "queries": "visual", "heads": "none", "rope": False}, {"queries": "text"},
        {"queries": "after", "over": "sum", "heads": "max"}, {"queries": "visual", "heads": "max", "over": "max"},
        {"queries": "all", "heads": 3, "over": "max"}, {"queries": "text", "domain": "visual", "over": "none"},
        {"queries": "after", "heads": "none", "over": "none", "rope": False}, {"queries": even_rows, "over": "max"},
        {"queries": "visual", "over": "none", "heads": "none"},
        {"queries": "visual", "domain": "visual", "rope": False}, {"undecay": True},
        {"undecay": True, "queries": even_rows, "heads": 0.375},
        {"undecay": True, "queries": "all", "domain": "visual"}, {"domain": "queries", "queries": "text"},
        {"temperature": 0.1, "queries": "all"}, {"temperature": 3, "domain": "visual", "heads": "max"},
        {"queries": "all", "steps": 5, "temperature": 0.1, "heads": "none"}, {"queries": "all", "steps": 2},
        {"queries": "all", "steps": 3, "heads": "max", "rope": False, "domain": "visual"}, {"pooled": True, "heads": 2},
        {"pooled": True, "queries": up_to_the_image, "domain": "queries", "rope": False},
        {"pooled": True, "queries": "visual", "domain": "visual", "heads": "sum", "temperature": 2.0},
        {"pooled": True, "queries": "after", "heads": "none"},
    )
]  # fmt: skip
# The site, what `layer` means there, and the layer that this is.
PLACES = [("2", "previous", 1), ("2", "next", 2), ("2.mid", "own", 2), ("2.mid", "previous", 1), ("2.after", "own", 2)]
PLACES += [("2.after", "next", 3), ("encoder", "next", 0), ("prefill_end", "previous", 5)]


def read(model, at, declared, names, earlier, **traits):
    """What a hook is given at `at` behind, if `earlier`, a stage that drops a token of each sample before layer 1."""
    seen: list[dict] = []
    stages = [(reader((), []), {"at": 1})] if earlier else []
    with prunekit.apply(model, piped(*stages, (reader(names, seen, inputs=declared, **traits), {"at": at}))):
        model(**inputs())
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("at", "where", "layer"), PLACES)
def test_rows(at, where, layer, earlier, attention):
    if earlier and at == "encoder":
        at, where, layer = "3.after", "previous", 3
    model = model_of(attention)
    specs = tuple(Rows(where, **{n: v for n, v in vars(spec).items() if n != "layer"}) for spec in SPECS)
    (seen,) = read(model, at, {"attention": specs}, ["attention"], earlier)
    for row in range(len(IMAGES)):
        sample = Sample(model_of("sdpa"), row, earlier)  # eager attention without a mask would see what is to come
        for spec, found in zip(specs, seen["attention"], strict=True):
            wanted = sample.rows(layer, spec)
            count = seen["valid"][row].sum()
            assert not found[row, count:].any(), "padding holds 0"
            if wanted is None or not len(wanted):
                continue
            mine = found[row, :count]
            if spec.over == "none":
                assert not mine[..., wanted.shape[-1] :].any()
                mine = mine[..., : wanted.shape[-1]]
            torch.testing.assert_close(mine, wanted, atol=1e-12, rtol=1e-10, msg=lambda m, s=spec: f"{s}: {m}")


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("at", "where", "layer"), PLACES[:6])
def test_keys_and_values(at, where, layer, earlier):
    model = model_of("sdpa")
    keys = tuple(itertools.starmap(Keys, itertools.product([where], [True, False], ["concat", "mean", "none"])))
    values = (Values(where), Values(where, "mean"), Values(where, "none"))
    declared = {"keys": keys, "text_keys": keys, "values": values, "text_values": values}
    (seen,) = read(model, at, declared, declared, earlier)
    for row in range(len(IMAGES)):
        sample = Sample(model, row, earlier)
        for name, specs in declared.items():
            for spec, found in zip(specs, seen[name], strict=True):
                rotary = sample.rotary[layer] if getattr(spec, "rope", True) else None
                third = name.endswith("values")
                states = projected(sample.layers[layer], sample.states[layer], rotary)[2 if third else 1][0]
                whole = {"mean": states.mean(0), "none": states.transpose(0, 1)}
                wanted = whole.get(spec.heads, torch.cat(list(states), dim=-1))
                visual = sample.visual(layer)
                wanted = wanted[~visual if name.startswith("text") else visual]
                torch.testing.assert_close(found[row, : len(wanted)], wanted, atol=1e-12, rtol=1e-10)
                assert not found[row, len(wanted) :].any()


STATES = ["hidden", "previous_hidden", "text", "text_hidden", "text_valid", "text_after", "norm"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("at", "layer", "before"), [("2", 2, 1), ("3", 3, 2), ("2.mid", 2, 2), ("2.after", 3, 2), ("1", 1, 0)]
)
def test_states(at, layer, before, earlier):
    model = model_of("sdpa")
    (seen,) = read(model, at, {}, STATES, earlier)
    assert seen["norm"] is model.get_decoder().norm
    for row in range(len(IMAGES)):
        sample = Sample(model, row, earlier)
        now = (sample.after_attention if at.endswith("mid") else sample.states)[layer]
        tokens = sample.tokens[min(layer, len(sample.tokens) - 1)]
        visual, text = sample.whole[tokens], ~sample.whole
        alive = sample.whole & torch.isin(torch.arange(len(text)), tokens)
        earlier_states = sample.states[before][0, torch.isin(sample.tokens[before], alive.nonzero())]
        after = torch.arange(len(text)) > (sample.whole.nonzero()[-1] if sample.whole.any() else -1)
        wanted = {
            "hidden": now[0, visual],
            "previous_hidden": earlier_states,
            "text": sample.embeds[0, text],
            "text_hidden": now[0, ~visual],
            "text_valid": text[text],
            "text_after": after[text],
        }
        for name, value in wanted.items():
            found = seen[name][row]
            torch.testing.assert_close(found[: len(value)], value, atol=1e-12, rtol=1e-10, msg=lambda m, n=name: n + m)
            assert not found[len(value) :].any(), name


@pytest.mark.parametrize("names", [["attention", "keys", "values", "text_keys", "text_values"], STATES[:6]])
def test_a_sample_at_a_time(names):
    """`per_sample` strategies get the same numbers, unpadded."""
    model = model_of("sdpa")
    spec = Rows(queries="after", over="none", heads="none")
    declared = {"attention": (Rows(), spec), "keys": Keys(heads="mean")} if "keys" in names else {}
    (batch,) = read(model, "2", declared, names, True)
    single = read(model, "2", declared, names, True, per_sample=True)
    assert len(single) == 2, "the sample without pictures is not asked"
    for row, given in enumerate(single):
        for name in names:
            pairs = [(batch[name], given[name])]
            if isinstance(given[name], tuple):
                pairs = list(zip(batch[name], given[name], strict=True))
            for whole, one in pairs:
                length = len(one)
                assert length == (TEXT[row] + 1 if name.startswith("text") else given["valid"].shape[0])
                torch.testing.assert_close(whole[row][tuple(slice(n) for n in one.shape)], one)
    if "attention" in names:
        assert given["attention"][1].shape[-1] == len(Sample(model, 1, True).queries(1, spec))


def test_default_rows_have_the_bits_of_one_query_alone():
    """Products of the last query with grouped keys, all in at least float32, masked, softmax, mean of the heads."""
    generator = torch.Generator().manual_seed(0)
    for batch, heads, shared, length, dim in ((1, 16, 16, 640, 64), (3, 8, 2, 47, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (
                torch.randn(batch, n, length, dim, generator=generator).to(dtype) for n in (heads, shared, shared)
            )
            mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
            mask[0, :, :, : length // 9] = False
            states = Attended(q, k, v, mask, dim**-0.5)
            columns = torch.arange(5, length - 9).expand(batch, -1)
            last, there = torch.full((batch, 1), length - 1), torch.ones(batch, 1, dtype=torch.bool)
            visual = torch.zeros(batch, length, dtype=torch.bool).scatter(1, columns, True)
            grouped = q[torch.arange(batch), :, last[:, 0]].view(batch, shared, heads // shared, dim)
            logits = (grouped.float() @ k.float().transpose(-1, -2)).view(batch, heads, -1) * dim**-0.5
            logits = logits.masked_fill(~mask[:, 0, -1][:, None], -torch.inf)
            wanted = logits.softmax(-1).mean(1)[:, 5 : length - 9]
            assert torch.equal(decoder_rows.attention(states, last, there, visual, columns, Rows()), wanted)
