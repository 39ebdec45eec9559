"""How inputs are read: masks of every kind, blocks of queries, layers on the side, and nothing that nobody asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from functools import cache

import pytest
import torch
from reading import piped, reader
from torch import nn
from transformers.modeling_utils import AttentionInterface

import prunekit
from prunekit import LayerAction, LayerPlan, Rows, Unsupported, hookimpl, strategy
from prunekit.engine.attention import decoder_rows, tap
from prunekit.engine.attention.attended import Attended
from prunekit.engine.cache import ragged
from prunekit.engine.decoder import aside
from prunekit.engine.decoder.forward_pass import CURRENT
from prunekit.errors import PluginError, SpecError
from prunekit.strategy.decoder_requests import Keys
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.precision import Float64Throughout

model_of = cache(tiny_llava)
B, A, L, D = 2, 4, 23, 8


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def states(**given):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, n, L, D, generator=generator, dtype=torch.float64) for n in (A, 2, 2))
    return Attended(q, k, v, **{"mask": None, "scaling": 0.3, **given})


def softmaxed(seen, softcap=None, sinks=None):
    """Full maps (B, A, L, L) with bool (B, L, L) of what is seen; sinks are one more key, whose column is left out."""
    one = states()
    logits = one.query @ one.key.repeat_interleave(2, dim=1).transpose(-1, -2) * one.scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks[:, None, None].expand(B, -1, L, 1)], -1).softmax(-1)[..., :L]


CAUSAL = torch.ones(L, L, dtype=torch.bool).tril().expand(B, L, L)
PRESENT = torch.arange(L) >= torch.tensor([[0], [6]])
NEAR = CAUSAL & torch.ones(L, L, dtype=torch.bool).triu(-4)
SEEN = CAUSAL & PRESENT[:, None]
KINDS = {
    "none": ({}, CAUSAL),
    "none, not causal": ({"causal": False}, torch.ones_like(CAUSAL)),
    "flat": ({"mask": PRESENT.long()}, SEEN),
    "flat, sliding": ({"mask": PRESENT, "window": 5}, NEAR & PRESENT[:, None]),
    "sliding": ({"window": 5}, NEAR),
    "bool": ({"mask": SEEN[:, None]}, SEEN),
    "bool for all rows": ({"mask": CAUSAL[:1, None]}, CAUSAL),
    "bool for each head": ({"mask": SEEN[:, None].expand(-1, A, -1, -1)}, SEEN),
    "additive": ({"mask": torch.zeros(B, 1, L, L).double().masked_fill(~SEEN[:, None], -torch.inf)}, SEEN),
    "capped": ({"softcap": 2.0}, CAUSAL),
    "sinks": ({"sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0]).double()}, CAUSAL),
}


@pytest.mark.parametrize("domain", ["softmax", "visual"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind(kind, domain):
    given, seen = KINDS[kind]
    queries = torch.tensor([[L - 1, 9, 12], [L - 1, 8, 15]])
    visual = (torch.arange(L) > 6) & (torch.arange(L) < 17)
    maps = softmaxed(
        seen & visual if domain == "visual" else seen,
        given.get("softcap"),
        given.get("sinks") if domain == "softmax" else None,
    )
    wanted = maps.gather(2, queries[:, None, :, None].expand(-1, A, -1, L)).nan_to_num(0.0)
    found = states(**given).scores(queries, visual.expand(B, -1), domain)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_log_sizes_in_an_additive_mask_count():
    """An additive mask that also holds log(size) is softmaxed as it is; among visual keys alone, too."""
    bias = torch.rand(B, 1, 1, L, dtype=torch.float64).log() * 40
    mask = bias.expand(-1, -1, L, -1).masked_fill(~SEEN[:, None], torch.finfo(torch.float64).min)
    one, last = states(mask=mask), torch.full((B, 1), L - 1)
    visual = (torch.arange(L) > 6).expand(B, -1)
    logits = one.logits(last) + bias
    for domain, there in (("softmax", SEEN), ("visual", SEEN & visual[:, None])):
        wanted = logits.masked_fill(~there[:, None, -1:], -torch.inf).softmax(-1)
        torch.testing.assert_close(one.scores(last, visual, domain), wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("heads", ["mean", "max", "none", 3])
@pytest.mark.parametrize("over", ["mean", "sum", "max", "none"])
def test_blocks_of_queries_change_nothing(heads, over, monkeypatch):
    spec = Rows(queries="all", heads=heads, over=over)
    slots = torch.arange(L).expand(B, -1)
    visual, columns = (torch.arange(L) > 6).expand(B, -1), torch.arange(7, L).expand(B, -1)
    answers = []
    for size in (2**25, 4 * B * A * L * 4, 1):
        monkeypatch.setattr(decoder_rows, "BLOCK_BYTES", size)
        answers.append(decoder_rows.attention(states(), slots, PRESENT, visual, columns, spec))
    assert answers[0].shape[:2] == (B, L - 7)
    for one in answers[1:]:
        torch.testing.assert_close(one, answers[0], atol=1e-13, rtol=1e-12)


def test_no_block_of_scores_is_larger_than_allowed(monkeypatch):
    monkeypatch.setattr(decoder_rows, "BLOCK_BYTES", 3 * B * A * L * 4)
    sizes, scores = [], Attended.scores
    monkeypatch.setattr(
        Attended, "scores", lambda self, slots, *rest: sizes.append(slots.shape[1]) or scores(self, slots, *rest)
    )
    slots = torch.arange(L).expand(B, -1)
    visual, columns = (torch.arange(L) > 6).expand(B, -1), torch.arange(7, L).expand(B, -1)
    decoder_rows.attention(states(), slots, PRESENT, visual, columns, Rows(queries="all"))
    assert max(sizes) == 3 and sum(sizes) == L


def test_more_heads_than_there_are():
    with pytest.raises(PluginError, match="more heads than the 4"):
        read(reader(["attention"], [], inputs={"attention": Rows(heads=5)}), "2")


@pytest.mark.parametrize(
    "given",
    [{"layer": "last"}, {"queries": "question"}, {"heads": 0}, {"heads": True}, {"heads": 1.5}, {"heads": "min"},
     {"over": "none "}, {"domain": "text"}, {"rope": 1}, {"undecay": "yes"}, {"pooled": 1}, {"temperature": 0},
     {"steps": 0}, {"steps": 2.0}],
    ids=str,
)  # fmt: skip
def test_rows_that_do_not_exist(given):
    (name,) = given
    with pytest.raises(ValueError, match=name):
        Rows(**given)


def read(cls, at, *others, model=None, **options):
    model = model or model_of()
    with prunekit.apply(model, piped((cls, {"at": at}), *others)) as run:
        return model(**tiny_inputs((1, 2), (9, 14)), **options), run.report


@contextlib.contextmanager
def counted(model):
    """How often each layer's key projection, attention output and MLP ran."""
    ran: dict[str, list[int]] = {}
    handles = []
    for number, layer in enumerate(model.get_decoder().layers):
        parts = {"keys": layer.self_attn.k_proj, "output": layer.self_attn.o_proj, "mlp": layer.mlp}
        for name, part in parts.items():
            handles.append(part.register_forward_hook(lambda *_, n=name, at=number: ran.setdefault(n, []).append(at)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_runs_that_nobody_asks_for(attention, monkeypatch):
    model, noted, scores = model_of(attention), [], []
    of, compute = Attended.of.__func__, Attended.scores
    monkeypatch.setattr(Attended, "of", classmethod(lambda cls, *given: noted.append(1) or of(cls, *given)))
    monkeypatch.setattr(Attended, "scores", lambda self, *given: scores.append(1) or compute(self, *given))
    every = {"keys": [*range(6)], "output": [*range(6)], "mlp": [*range(6)]}
    ahead = {**every, "keys": [0, 1, 2, 2, 3, 4, 5]}
    again = {**every, "keys": [0, 1, 1, 2, 3, 4, 5]}
    cases = [
        (["hidden", "previous_hidden", "text", "norm"], {"attention": Rows("next")}, every, 0, 0),
        (["attention"], {}, every, 1, 1),
        (["attention", "keys", "values"], {}, every, 1, 1),
        (["attention", "keys"], {"attention": Rows("next"), "keys": Keys("next", heads="mean")}, ahead, 1, 1),
        (["attention"], {"attention": (Rows(rope=False), Rows(queries="text", rope=False))}, again, 1, 2),
    ]
    for names, declared, runs, looks, blocks in cases:
        noted.clear(), scores.clear()
        with counted(model) as ran:
            read(reader(names, [], inputs=declared), "2", model=model)
        assert (ran, len(noted), len(scores)) == (runs, looks, blocks), names


def test_a_look_ahead_leaves_no_trace():
    """Nothing is written to the cache, and the answer is that of the same cut without the look."""
    asks = {"attention": (Rows("next"), Rows("next", rope=False)), "keys": Keys(rope=False)}
    looked, _ = read(reader(["attention", "keys", "forward"], [], inputs=asks), "2")
    plain, _ = read(reader([], []), "2")
    assert torch.equal(looked.logits, plain.logits)
    for one, other in zip(looked[CACHE].layers, plain[CACHE].layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_attention_interface_is_as_before_afterwards():
    before, registered = AttentionInterface.__dict__["get_interface"], dict(AttentionInterface._global_mapping)
    one, other = nn.Identity(), nn.Identity()
    with tap.tapped({one: print}):
        assert AttentionInterface.__dict__["get_interface"] is not before
        with tap.tapped({other: print}):
            pass
        assert AttentionInterface.__dict__["get_interface"] is not before
    with pytest.raises(RuntimeError), tap.tapped({one: print}):
        raise RuntimeError
    assert AttentionInterface.__dict__["get_interface"] is before
    assert AttentionInterface._global_mapping == registered
    with tap.tapped({}):
        assert AttentionInterface.__dict__["get_interface"] is before, "nobody asks"


def test_attention_interface_is_as_before_when_tokens_are_decoded():
    """Taps are there while the layer runs whose attention is read, and not for the rest of the pipeline's block."""
    before = AttentionInterface.__dict__["get_interface"]
    with prunekit.apply(model_of("sdpa"), piped((reader(["attention"], []), {"at": 2}))):
        model_of("sdpa")(**tiny_inputs())
        assert AttentionInterface.__dict__["get_interface"] is before


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(tap, "METHOD", "get_kernel")
    with pytest.raises(Unsupported, match=r"no AttentionInterface\.get_kernel"):
        read(reader(["attention"], []), "2")


def test_two_threads_read_their_own():
    model, alone, found = model_of("sdpa"), [], {}
    batches = [tiny_inputs((1, 2), (9, 14), seed=seed) for seed in range(4)]
    for batch in batches:
        with prunekit.apply(model, piped((reader(["attention"], alone), {"at": 2}))):
            model(**batch)
    together = []
    cls = reader(["attention", "hidden"], together)
    with prunekit.apply(model, piped((cls, {"at": 2}))):

        def work(number):
            for _ in range(5):
                with Float64Throughout():
                    found[number] = model(**batches[number]).logits

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(together) == 20 and len(found) == 4
    for given in together:
        assert any(torch.equal(given["attention"], one["attention"]) for one in alone)


@pytest.mark.parametrize(
    ("declared", "at", "message"),
    [({"attention": Rows("own")}, "2", "own|stands in"), ({"attention": Rows()}, "0", "layer before"),
     ({"attention": Rows()}, "encoder", "layer before"), ({"keys": Keys("next")}, "2.mid", "layer ahead"),
     ({"keys": Keys("next")}, "5.after", "layer ahead"), ({"values": Keys()}, "2", "Values"),
     ({"hidden": Rows()}, "2", "nothing can be requested"), ({"attention": "last"}, "2", "Rows"),
     ({"attention": ()}, "2", "Rows"), (("attention",), "2", "dict")],
    ids=str,
)  # fmt: skip
def test_inputs_that_are_not_there(declared, at, message):
    names = [name for name in declared if name != "hidden"]
    with pytest.raises((SpecError, PluginError, Unsupported), match=message):
        read(reader(names, [], inputs=declared), at)


def test_states_before_the_first_layer():
    with pytest.raises((SpecError, Unsupported), match="previous_hidden"):
        read(reader(["previous_hidden"], []), "0")


@pytest.mark.parametrize(
    "answer", [None, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 47)], ids=["none", "shape", "dtype"]
)
def test_queries_must_be_a_mask(answer):
    with pytest.raises(PluginError, match=r"must return bool \(2, 47\)"):
        read(reader(["attention"], [], inputs={"attention": Rows(queries=lambda known: answer)}), "2")


class Plans:
    """Something is done to one layer."""


def planned(action):

    @strategy()
    class Plan:
        """Does `action` to layer 1."""

        @hookimpl
        def plan_layers(self, shape):
            return LayerPlan({1: LayerAction(action)})

    return Plan


@pytest.mark.parametrize("action", ["freeze", "skip_mlp"])
def test_layers_that_run_in_part_show_their_attention(action):
    """Text rows of a frozen layer see the keys of the visual tokens' input; they are the rows of the layer unfrozen."""
    specs = (Rows(), Rows(queries="text", over="none", heads="none"), Rows(rope=False))
    found = []
    for others in ([(planned(action), {})], []):
        seen = []
        read(reader(["attention", "keys"], seen, inputs={"attention": specs}), "2", *others)
        found.append((*seen[0]["attention"], seen[0]["keys"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("action", ["skip", "skip_attention", "fill_kv"])
def test_layers_that_do_not_attend_show_nothing(action):
    with pytest.raises((SpecError, Unsupported), match="layer 1"):
        read(reader(["attention"], []), "2", (planned(action), {}))


def test_forward_runs_layers_and_throws_them_away():
    model = model_of("sdpa")
    answers = []

    def keep(given):
        forward, count = given["forward"], given["valid"].sum(1)
        answers.append(forward([2, 3], rows=Rows(queries="last")))
        answers.append(forward([2], hidden=given["hidden"]))
        answers.append(forward([model.get_decoder().layers[2]], hidden=2 * given["hidden"]))
        assert count.tolist() == [15, 31]
        return given["valid"]

    seen, later = [], []
    stages = [(reader((), []), {"at": 1}), (reader(["forward", "hidden"], seen, keep), {"at": 2})]
    names = ["hidden", "text_hidden", "attention", "previous_hidden"]
    everything = [(reader(names, later, lambda given: given["valid"]), {"at": at}) for at in (3, 4)]
    with prunekit.apply(model, piped(*stages, *everything)) as run:
        output = model(**tiny_inputs((1, 2), (9, 14)))
    with prunekit.apply(model, piped(stages[0])) as plain:
        assert torch.equal(model(**tiny_inputs((1, 2), (9, 14))).logits, output.logits)
    assert run.report.kv_tokens == plain.report.kv_tokens
    two, one, doubled = answers
    torch.testing.assert_close(one.hidden, later[0]["hidden"], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(one.text, later[0]["text_hidden"], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(two.hidden, later[1]["hidden"], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(two.attention, later[1]["attention"], atol=1e-12, rtol=1e-10)
    for row, length in enumerate((9 + 1, 14 + 1)):
        torch.testing.assert_close(two.last[row], later[1]["text_hidden"][row, length - 1], atol=1e-12, rtol=1e-10)
    assert one.attention is None
    assert (doubled.hidden - one.hidden).abs().max() > 1e-3


def test_forward_takes_modules_of_the_strategy():
    class Halves(nn.Module):
        """Called as a decoder layer is."""

        def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
            assert attention_mask is not None and len(position_embeddings) == 2 and not kwargs["use_cache"]
            return hidden_states / 2

    answers = []

    def keep(given):
        answers.append((given["forward"]([Halves(), Halves()]), given["hidden"]))
        return given["valid"]

    read(reader(["forward", "hidden"], [], keep), "encoder")
    assert torch.equal(answers[0][0].hidden, answers[0][1] / 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda forward: forward([]), "needs layers"), (lambda forward: forward([6]), "layer 6 of 6"),
     (lambda forward: forward([2], hidden=torch.zeros(1)), "not"),
     (lambda forward: forward([2], rows=Rows(rope=False)), "rope=True")],
)  # fmt: skip
def test_forward_refuses(call, message):
    with pytest.raises(PluginError, match=message):
        read(reader(["forward"], [], lambda given: call(given["forward"])), "2")


@pytest.mark.parametrize("at", ["2.mid", "prefill_end"])
def test_forward_is_not_there(at):
    with pytest.raises((SpecError, Unsupported), match="no layer can be run"):
        read(reader(["forward"], []), at)


def test_forward_needs_the_batch():
    with pytest.raises(PluginError, match="per_sample"):
        read(reader(["forward"], [], per_sample=True), "2")


def test_attention_of_other_kinds_is_refused():
    """Rows of kernels that add more to their logits, or take another mask, are not known."""
    one, module = states(), nn.Identity()
    with pytest.raises(Unsupported, match="where attention has a position_bias"):
        Attended.of(module, one.query, one.key, one.value, None, {"position_bias": torch.zeros(1)})
    with pytest.raises(Unsupported, match="object as mask"):
        Attended.of(module, one.query, one.key, one.value, object(), {})


def test_attention_that_takes_its_kernel_elsewhere_is_refused():
    looked = tap.Record(nn.Identity())
    with pytest.raises(Unsupported, match="Identity are not available"):
        _ = looked.result


@pytest.mark.parametrize("given", [{"rope": False}, {"domain": "logits"}], ids=str)
def test_only_rotated_probabilities_have_a_decay(given):
    with pytest.raises(ValueError, match="undecay is of probabilities"):
        Rows(undecay=True, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pooled": True, "over": "none"}, "pooled takes one row"),
        ({"pooled": True, "undecay": True}, "pooled takes one row"),
        ({"temperature": 0.1, "domain": "logits"}, "temperature and steps are of probabilities"),
        ({"steps": 2}, "steps above 1 take queries='all'"),
        ({"steps": 2, "queries": "all", "heads": 3}, "steps above 1 take queries='all'"),
    ],
    ids=str,
)
def test_rows_that_contradict_themselves(given, said):
    with pytest.raises(ValueError, match=said):
        Rows(**given)


@pytest.mark.parametrize("spec", [Rows(queries="all", steps=3), Rows(queries="all", pooled=True)], ids=str)
def test_blocks_and_padding_change_nothing_of_steps_and_pooled_queries(spec, monkeypatch):
    """A row with padding in front, whose own rows see nothing, equals itself alone."""
    monkeypatch.setattr(decoder_rows, "BLOCK_BYTES", 3 * B * A * L * 4)
    columns = torch.arange(7, L).expand(B, -1)
    visual = (torch.arange(L) > 6).expand(B, -1)
    gone = 4
    there = torch.arange(L).expand(B, -1) >= gone
    seen = torch.ones(L, L, dtype=torch.bool).tril() & there[:, None]
    slots = (torch.arange(L) + gone).clamp(max=L - 1).expand(B, -1)
    valid = (torch.arange(L) < L - gone).expand(B, -1)
    whole = states(mask=seen[:, None])
    found = decoder_rows.attention(whole, slots, valid, visual, columns, spec)
    alone = states()
    alone = dataclasses.replace(alone, query=alone.query[:, :, gone:], key=alone.key[:, :, gone:], mask=None)
    rest = torch.arange(L - gone).expand(B, -1)
    wanted = decoder_rows.attention(alone, rest, torch.ones_like(rest) > 0, visual[:, gone:], columns - gone, spec)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_massive_channels_in_half_precision(dtype):
    """Products that overflow in half precision have the probabilities that a kernel, which sums up wide, gives them."""
    one = states()
    query, key = one.query.clone(), one.key.clone()
    query[..., 0], key[..., 0] = 400, 400  # 160,000 before scaling, the same for all keys
    half = Attended(query.to(dtype), key.to(dtype), one.value.to(dtype), None, 0.3)
    exact = Attended(half.query.double(), half.key.double(), half.value.double(), None, 0.3)
    slots = torch.tensor([[L - 1], [9]])
    found, wanted = half.scores(slots, None, "softmax"), exact.scores(slots, None, "softmax")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=1e-2)
    kernel = nn.functional.scaled_dot_product_attention(
        half.query, half.key.repeat_interleave(2, 1), torch.eye(L, dtype=dtype).expand(B, A, L, L).contiguous(),
        is_causal=True, scale=0.3,
    )  # fmt: skip
    torch.testing.assert_close(found[0, :, 0].double(), kernel[0, :, L - 1].double(), atol=2e-2, rtol=2e-2)


def test_layers_without_cos_and_sin_have_no_unrotated_keys():
    with pytest.raises(Unsupported, match="rope=False"):
        aside._unrotated({"position_embeddings": torch.zeros(1)})


@pytest.mark.parametrize(("at", "kept"), [("2", {1: [1]}), ("2.mid", {1: [1], 2: [1, 2]}), ("2.after", {2: [2]})])
def test_what_was_noted_is_let_go(at, kept):
    """Queries and keys of a layer are there until the last cut that reads them, and not while further layers run."""
    model, held, passes = model_of(), {}, set()

    def look(number):
        passes.add(weakref.ref(CURRENT.get()))
        held[number] = sorted(CURRENT.get().readings.runs)

    for number, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: look(n))
    asks = (Rows("own"), Rows()) if at == "2.mid" else Rows()
    answer, _ = read(reader(["attention", "previous_hidden"], [], inputs={"attention": asks}), at)
    for layer in model.get_decoder().layers:
        layer.mlp._forward_pre_hooks.clear()
    assert {number: runs for number, runs in held.items() if runs} == kept
    assert ragged.owner_of(answer[CACHE]) is not None
    assert [one() for one in passes] == [None], "nothing holds what the prefill needed, before any garbage collection"
