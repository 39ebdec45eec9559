"""Layers that read keys and values of earlier ones: what they see, what they hold and cost, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from functools import cache

import pytest
import torch
from examples import registered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import piped, reader
from torch.utils.flop_counter import FlopCounterMode
from twins import fastv, upto

import prunekit
from prunekit import Keys, LayerAction, LayerPlan, Route, Rows, hookimpl, strategy
from prunekit.engine.cache import shared
from prunekit.engine.decoder import prefill
from prunekit.errors import SpecError, Unsupported
from prunekit.families import find
from prunekit.pipeline.forecast import forecast
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import tiny_batch, tiny_from_config, tiny_model
from prunekit.upstream import CACHE
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.stock import stock_run_of

FAMILIES = ("gemma3n", "gemma4", "gemma4_unified")
STEPS, EXACT = 4, 1e-9
# Layer 1 attends to all and is read by 3 and 5; layer 2 has a window and is read by 4.
SOURCES = (0, 1, 2, 1, 2, 1)
BETWEEN = ("1.mid", "1.after", "2", "2.mid", "2.after", "3", "3.mid", "3.after", "4", "4.mid", "4.after", "5", "5.mid")


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with registered():
        yield


@cache
def model_of(family, attention="sdpa", dtype=torch.float64):
    return tiny_model(family, attention, dtype)


@cache
def batch_of(family):
    """Two rows, the shorter one padded at its left."""
    batch = tiny_batch(model_of(family), (("image",), ("image", "image")))
    assert not batch["attention_mask"].all()
    return batch


@cache
def stock_run(family):
    with Float64Throughout():
        return stock_run_of(model_of(family), batch_of(family), STEPS + 1)


def proved(family, stages, **more):
    """The pipeline equals the masked reference in prefill and decoding."""
    pipeline = {"name": "between", "stages": stages, **more}
    return assert_equivalent(model_of(family), pipeline, batch_of(family), STEPS, EXACT, stock_run=stock_run(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shared_is_what_the_model_says(family):
    parts = find(model_of(family))
    assert parts.kv_sources == SOURCES
    assert [layer for layer in range(6) if parts.is_reader(layer)] == [3, 4, 5]
    assert [layer for layer in range(6) if parts.is_source(layer)] == [1, 2]


@st.composite
def stages(draw):
    """One or two stages whose cuts lie between sources and readers, and sometimes an action of a layer."""
    sites = sorted(draw(st.lists(st.sampled_from(BETWEEN), min_size=1, max_size=2, unique=True)), key=BETWEEN.index)
    made = []
    for number, site in enumerate(sites):
        inside = site.endswith("mid")
        use = draw(st.sampled_from(("ex_loud", "ex_cropped", "ex_loud" if inside else "ex_gather")))
        made.append({"use": use, "at": site, "keep": draw(st.sampled_from((0.7, 0.5))) - 0.3 * number})
    free = [layer for layer in range(6) if not any(site.startswith(f"{layer}.mid") for site in sites)]
    action = draw(st.sampled_from(("run", "freeze", "fill_kv", "skip_mlp", "skip", "skip_attention")))
    if action in ("skip", "skip_attention"):  # of a source they are refused
        free = [layer for layer in free if layer not in (1, 2)]
    made.append({"use": "ex_acts", "layers": [draw(st.sampled_from(free))], "action": action})
    return made


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_cut_between_source_and_reader_is_exact(family, data):
    chosen, positions = data.draw(stages()), data.draw(st.sampled_from(("keep", "renumber")))
    report = proved(family, chosen, positions=positions).report
    assert all(few < many for few, many in zip(report.kept_tokens, report.visual_tokens, strict=True))


class SeesTheDropped(MaskedReference):
    """Wrong on purpose: a reader sees all tokens that its source has."""

    def mask(self, layer, tokens):
        seen, bias = super().mask(layer, tokens)
        if self.sources[layer] != layer:
            length = self.present.shape[1]
            seen[:, :length, :length] |= super().mask(self.sources[layer], tokens)[0][:, :length, :length]
            seen[:, length:, :length] |= self.tables.lasting[self.sources[layer]][:, None]
        return seen, bias


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_sees_dropped_tokens_is_noticed(family):
    """In the prefill and in every step of decoding."""
    chosen = [{"use": "ex_loud", "at": 3, "keep": 0.3}]
    found, inputs = proved(family, chosen), batch_of(family)
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    with Float64Throughout():
        wrong = SeesTheDropped(model_of(family), inputs, found.report, stock_run=stock_run(family)).logits(tokens)
    error = (wrong - found.logits).abs().amax((0, 2))
    assert len(error) == STEPS + 1 and (error > 1e-3).all(), error


def test_an_engine_that_shows_them_is_noticed(monkeypatch):
    monkeypatch.setattr(prefill, "seen_of", lambda source, reader, alive, ids: source.layout)
    with pytest.raises(AssertionError, match=r"differ from the masked reference by .* at decode step"):
        proved("gemma4", [{"use": "ex_loud", "at": 3, "keep": 0.3}])
    monkeypatch.undo()
    wrong = shared.Handed._seen

    def shifted(self, states):
        return wrong(self, states if self.slots is None else states.roll(1, dims=2))

    monkeypatch.setattr(shared.Handed, "_seen", shifted)
    with pytest.raises(AssertionError, match=r"differ from the masked reference by .* at prefill"):
        proved("gemma4", [{"use": "ex_loud", "at": 3, "keep": 0.3}])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_images_beside_others(family):
    batch = tiny_batch(model_of(family), ((), ("image",), ("image", "image")))
    for chosen in (
        [{"use": "ex_cropped", "at": 3, "keep": 0.4}],
        [{"use": "ex_lots"}, {"use": "ex_loud", "at": 4, "keep": 0.4}],
    ):
        found = assert_equivalent(model_of(family), {"name": "p", "stages": chosen}, batch, STEPS, EXACT)
        assert found.report.kept_tokens[0] == 0 < found.report.kept_tokens[1]


READ = re.escape("attends to its keys and values")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "stage",
    [
        {"use": "skip_layers", "layers": [1]},
        {"use": "skip_layers", "layers": [2], "what": "attention"},
        {"use": "ex_acts", "layers": [2], "decode": "skip"},
        {"use": "skip_layers", "layers": [1, 3]},  # 5 reads it, too
    ],
)
def test_a_layer_that_others_read_is_not_left_out(family, stage):
    """By the numbers of the config alone, and so before anything runs."""
    pipeline = prunekit.load({"name": "p", "stages": [stage]})
    with pytest.raises(SpecError, match=READ):
        pipeline.bind(find(model_of(family)).shape())
    with pytest.raises(SpecError, match=READ), prunekit.apply(model_of(family), pipeline):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_it_may_be_left_out_with_all_that_read_it(family):
    proved(family, [{"use": "ex_loud", "at": 1, "keep": 0.6}, {"use": "skip_layers", "layers": [1, 3, 5]}])
    proved(family, [{"use": "skip_layers", "layers": [2, 4]}, {"use": "ex_loud", "at": 3, "keep": 0.6}])
    # Decoding alone, of keys and values that the source then makes of decoded tokens alone.
    proved(family, [{"use": "ex_acts", "layers": [1, 3, 5], "action": "skip", "decode": "run"}])


@strategy(keep="refused", keep_layers="refused", routes=("layers",))
class LeavesOut:
    """A router that skips one layer of each sample, its number among `layers`."""

    layers: tuple[int, ...]

    @hookimpl
    def route(self, embeds):
        return Route(plans=[LayerPlan({layer: LayerAction.SKIP}) for layer in self.layers])


@strategy(routes=("layers",))
class Budget:
    """A router that would rather run the last layers."""

    @hookimpl
    def route(self, embeds, shape):
        return Route(layers=torch.arange(shape.layers).expand(len(embeds), -1) * 1.0)


def test_routers_do_not_leave_it_out_either():
    model, batch = model_of("gemma4"), batch_of("gemma4")
    message = "route leaves out what another layer needs in sample 1: layer 2 is to skip in prefill, but layer 4"
    with (
        pytest.raises(Unsupported, match=message),
        prunekit.apply(model, piped((LeavesOut, {"layers": [3, 2]}))),
    ):
        model(**batch)
    with Float64Throughout(), prunekit.apply(model, piped((Budget, {"keep_layers": 3}))) as run:
        generate(model, batch, max_new_tokens=2)
    assert [sorted(plan.actions) for plan in run.report.plans] == [[0, 3, 4]] * 2  # 1 and 2 are protected
    with pytest.raises(SpecError, match="later layers attend to the keys and values of"):
        piped((Budget, {"keep_layers": 1})).bind(find(model).shape())


COSTED = {
    "cuts": [{"use": "random", "at": "encoder", "keep": 0.7}, {"use": "random", "at": "2.after", "keep": 0.4}],
    "late": [{"use": "random", "at": 4, "keep": 0.4}],
    "mid": [{"use": "random", "at": "4.mid", "keep": 0.4}],
    "freeze": [{"use": "freeze_layers", "layers": [1, 4]}, {"use": "random", "at": 3, "keep": 0.5}],
    "parts": [{"use": "ex_acts", "layers": [3], "action": "skip_attention"}, {"use": "skip_layers", "layers": [4, 0]}],
    "mlp": [{"use": "ex_acts", "layers": [2, 5], "action": "skip_mlp"}, {"use": "random", "at": 2, "keep": 0.4}],
    "fill": [{"use": "ex_acts", "layers": [4], "action": "fill_kv"}],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COSTED)
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_reports_cost_what_runs(family, name, way):
    """FLOPs as torch counts them; KV entries and bytes as the cache holds them: none in layers that read others'."""
    model = model_of(family, "eager", torch.float32)
    inputs = tiny_batch(model, (("image",),))
    layers = model.get_decoder().layers
    names = {id(module): name for name, module in model.named_modules()}
    with (
        FlopCounterMode(display=False) as counter,
        prunekit.apply(model, {"name": name, "stages": COSTED[name]}) as run,
    ):
        cache = (
            generate(model, inputs, max_new_tokens=1)[CACHE]
            if way == "generate"
            else model(**inputs, use_cache=True)[CACHE]
        )
    counts, report = counter.get_flop_counts(), run.report
    counted = sum(sum(counts.get(f"{type(model).__name__}.{names[id(layer)]}", {}).values()) for layer in layers)
    assert report.cost.prefill_flops == (counted,)
    held = [0 if layer.keys is None else layer.keys.shape[2] for layer in cache.layers]
    assert list(report.kv_tokens[0]) == held and held[3:] == [0, 0, 0]
    numbers = sum(one.numel() for layer in cache.layers if layer.keys is not None for one in (layer.keys, layer.values))
    assert report.cost.kv_bytes == (4 * numbers,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_dense_costs_are_those_of_the_stock_model(family, way):
    model = model_of(family, "eager", torch.float32)
    inputs = tiny_batch(model, (("image",),))
    names = {id(module): name for name, module in model.named_modules()}

    def run():
        return generate(model, inputs, max_new_tokens=1) if way == "generate" else model(**inputs)

    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()
    counted = sum(
        sum(counts[f"{type(model).__name__}.{names[id(one)]}"].values()) for one in model.get_decoder().layers
    )
    with prunekit.apply(model, {"name": "p", "stages": COSTED["cuts"]}) as pruned:
        run()
    assert pruned.report.cost.dense_prefill_flops == (counted,)


def test_a_forecast_is_what_generate_then_does():
    model = model_of("gemma3n", dtype=torch.float32)
    four = copy.deepcopy(find(model_of("gemma4", dtype=torch.float32)).shape())
    for shape, inputs, own in (
        (find(model).shape(), tiny_batch(model, (("image",),)), model),
        (
            four,
            tiny_batch(model_of("gemma4", dtype=torch.float32), (("image",),)),
            model_of("gemma4", dtype=torch.float32),
        ),
    ):
        for name in ("cuts", "late", "parts", "mlp"):
            pipeline = prunekit.load({"name": name, "stages": COSTED[name]})
            with prunekit.apply(own, pipeline) as run:
                generate(own, inputs, max_new_tokens=1)
            visual, text = run.report.visual_tokens[0], run.report.prompt_tokens[0] - run.report.visual_tokens[0]
            shape = type(shape)(**{**shape.__dict__, "visual_tokens": visual})
            said = forecast(pipeline.bind(shape), text)
            assert said.layer_tokens == run.report.layer_tokens[0]
            assert said.kv_tokens == run.report.kv_tokens[0]
            assert math.isclose(said.flops[0], run.report.cost.flops_fraction)


class TestLastTokens:
    """Gemma 4's decoder, asked for the last logits alone, runs layers that write no KV for these tokens alone."""

    @pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
    def test_layers_behind_the_last_kv_run_for_one_token(self, family):
        model, seen = model_of(family), []
        handles = [
            layer.self_attn.q_proj.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
            for layer in model.get_decoder().layers
        ]
        found = proved(family, [{"use": "ex_loud", "at": "2.after", "keep": 0.5}])
        for handle in handles:
            handle.remove()
        width = max(found.report.layer_tokens[row][0] for row in range(2))
        assert seen[:6] == [width] * 3 + [1] * 3
        assert found.report.last_only == (3, 1)
        assert [row[3:] for row in found.report.layer_tokens] == [(1, 1, 1)] * 2
        assert proved(family, [{"use": "ex_loud", "at": 3, "keep": 0.5}]).report.last_only is None

    @pytest.mark.parametrize("wanted", [1, 3, 9, 1000])
    @pytest.mark.parametrize("ends_with_image", [True, False])
    def test_so_many_as_are_wanted(self, wanted, ends_with_image):
        """The logits are those of a forward that wants all; also where some of the last tokens were dropped."""
        model = model_of("gemma4")
        inputs = tiny_batch(model, (("image",), ("image",)), text=6)
        if ends_with_image:
            last = int((inputs["input_ids"][1] == model.config.image_token_id).nonzero()[-1]) + 1
            inputs = {
                name: one[:, :last] if one.shape[:2] == inputs["input_ids"].shape else one
                for name, one in inputs.items()
            }
            assert (inputs["input_ids"][:, -1] == model.config.image_token_id).all()
        stages = [{"use": "random", "at": "encoder", "keep": 0.6}, {"use": "random", "at": 2, "keep": 0.3}]
        with Float64Throughout(), prunekit.apply(model, {"name": "p", "stages": stages}):
            whole = model(**inputs).logits
            few = model(**inputs, logits_to_keep=wanted).logits
        assert few.shape[1] == min(wanted, whole.shape[1])
        assert (few - whole[:, -wanted:]).abs().max() < EXACT

    def test_a_second_turn_on_the_pruned_cache(self):
        """More text on the cache, of whose last token alone logits are wanted, is the same text token by token."""
        model, inputs = model_of("gemma4"), batch_of("gemma4")
        words = torch.randint(20, 100, (2, 5), generator=torch.Generator().manual_seed(0))
        stages = [{"use": "random", "at": 3, "keep": 0.3}]
        ends = []
        with Float64Throughout(), prunekit.apply(model, {"name": "p", "stages": stages}):
            for step in (5, 1):
                cache, mask = model(**inputs, logits_to_keep=1, use_cache=True)[CACHE], inputs["attention_mask"]
                for start in range(0, 5, step):
                    mask = torch.cat([mask, mask.new_ones(2, step)], 1)
                    more = {"input_ids": words[:, start : start + step], "attention_mask": mask, CACHE: cache}
                    types = torch.zeros_like(more["input_ids"])
                    out = model(**more, mm_token_type_ids=types, logits_to_keep=1).logits
                ends.append(out[:, -1])
        assert (ends[0] - ends[1]).abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_a_reader_is_what_it_sees(family):
    """FastV at layer 4 and 5, by the rows of 3 and 4 on keys from before a cut, against full maps of the reference."""
    model, batch = model_of(family, "eager"), batch_of(family)
    for site in (4, 5):
        stages = [{"use": "random", "at": 3, "keep": 0.6}, {"use": "fastv", "at": site, "keep": 0.3}]
        report = assert_equivalent(model, {"name": "p", "stages": stages}, batch, 1).report
        counts = [len(row) for row in report.events[1].kept]
        with Float64Throughout():
            reference = MaskedReference(model, batch, upto(report, 1))
            assert fastv(reference, 1, str(site), counts) == report.events[1].kept


def test_what_cannot_be_asked_of_them():
    batch = batch_of("gemma4")

    def asked(family, at, names, answer=None, **inputs):
        model = model_of(family)
        with prunekit.apply(model, piped((reader(names, [], answer, inputs=inputs), {"at": at}))):
            model(**batch_of(family))

    for name, request in (("attention", Rows(rope=False)), ("keys", Keys(rope=False))):
        with pytest.raises(
            SpecError, match=f"asks for {name} with rope=False, but layer 3 reads rotated keys of layer 1"
        ):
            asked("gemma4", 4, [name], **{name: request})
        asked("gemma4", 3, [name], **{name: request})
    with pytest.raises(
        Unsupported, match="forward cannot run layer 4 here: this model gives each layer inputs of its own"
    ):
        asked("gemma4", 3, ["forward"], lambda given: given["forward"]([3, 4]))
    with pytest.raises(Unsupported, match="or several streams of hidden states"):
        asked("gemma3n", 3, ["forward"], lambda given: given["forward"]([3]))
    asked("gemma4_unified", 2, ["forward"], lambda given: given["forward"]([2]).hidden.norm(dim=-1) > 0)
    merging = {"name": "p", "stages": [{"use": "ex_gather", "at": "3.mid", "keep": 0.5}]}
    with (
        pytest.raises(
            Unsupported, match=r"merges tokens inside layer 3, whose states this model changes further behind"
        ),
        prunekit.apply(model_of("gemma4"), merging),
    ):
        model_of("gemma4")(**batch)


def test_a_look_ahead_leaves_nothing_behind():
    """Layers called on the side, sources among them, hand nothing on to those that run."""
    model, batch, seen = model_of("gemma4", "eager"), batch_of("gemma4"), []
    asks = {"attention": (Rows("next"), Rows("previous", rope=False))}
    keep_all = reader(["attention"], seen, lambda given: given["valid"], inputs=asks)
    with Float64Throughout():
        plain = model(**batch).logits
        maps = model(**batch, output_attentions=True).attentions
        for at in (1, 2, 3):
            with prunekit.apply(model, piped((keep_all, {"at": at}))):
                assert (model(**batch).logits - plain).abs().max() < EXACT
            ahead = seen.pop()["attention"][0]
            for row, ids in enumerate(batch["input_ids"]):
                columns = torch.isin(ids, torch.tensor(find(model).visual_ids)).nonzero()[:, 0]
                wanted = maps[at][row, :, -1].mean(0)[columns]
                assert (ahead[row, : len(columns)] - wanted).abs().max() < EXACT


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_static_cache(family):
    """Where no layer has a window, which a static cache would hold as one. The stock gemma4_unified then lets images
    see themselves in other layers than on a growing cache.
    """
    config = CONFIGS[family](6)
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        text.per_layer_config = None
    text.layer_types = ["full_attention"] * 6
    model = tiny_from_config(config)
    assert find(model).kv_sources == (0, 1, 2, 2, 2, 2)
    inputs = tiny_batch(model, (("image",), ("image", "image")))
    stages = [{"use": "ex_loud", "at": 2, "keep": 0.7}, {"use": "ex_cropped", "at": 4, "keep": 0.4}]
    pipeline = {"name": "p", "stages": stages}
    assert_equivalent(model, pipeline, inputs, STEPS, EXACT, cache_implementation="static")
    assert_equivalent(model, pipeline, inputs, STEPS, EXACT, num_beams=2)


def test_rows_of_a_cache_are_repeated_and_selected():
    model, inputs = model_of("gemma4"), batch_of("gemma4")
    word = torch.tensor([[50], [60]])
    stages = [{"use": "ex_lots"}, {"use": "ex_cropped", "at": 3, "keep": 0.3}]
    with Float64Throughout(), prunekit.apply(model, {"name": "p", "stages": stages}):
        cache = model(**inputs, use_cache=True)[CACHE]
        twice = copy.deepcopy(cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)

        def go_on(kv, rows):
            more = {"input_ids": word[rows], "attention_mask": mask[rows], CACHE: kv}
            return model(**more, mm_token_type_ids=torch.zeros(len(rows), 1, dtype=torch.int64)).logits

        plain = go_on(cache, [0, 1])
        twice.batch_repeat_interleave(2)
        twice.batch_select_indices(torch.tensor([3, 0]))
        assert (go_on(twice, [1, 0]) - plain[[1, 0]]).abs().max() < EXACT


def test_what_comes_out_follows_its_layer_to_another_device():
    states = torch.zeros(1, 1, 2, 4)
    handed = shared.Handed({"kind": (states, states)}, {}, 3, 1, None, None).to(torch.device("meta"))
    assert [one.device.type for one in handed["kind"]] == ["meta", "meta"]
