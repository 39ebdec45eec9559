"""Half precision: rows are those of the kernel, choices those of float32, and what is not finite is never silent."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from strategy_options import options_for
from torch import nn

import prunekit
from prunekit import (
    EncoderKeys,
    EncoderQueries,
    EncoderRows,
    EncoderValues,
    Keys,
    Owners,
    Rows,
    Selection,
    Values,
    families,
    hookimpl,
    plugins,
    strategy,
)  # fmt: skip
from prunekit.engine import asking
from prunekit.engine.attention import decoder_rows, tower_rows
from prunekit.engine.attention.attended import Attended
from prunekit.engine.tower.patches import Patches
from prunekit.errors import PluginError
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.strategy.declare import is_token, stage_keys
from prunekit.testing import tiny_configs
from prunekit.testing.tiny import TinyWords, tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import RECIPES, tiny_batch
from prunekit.verify.tiny_models import tiny_from_config

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SEEN: list[Any] = []


@strategy(inputs={"attention": Rows(heads="none")}, sites=prunekit.Sites(encoder=False))
class Looks:
    """Baseline: keeps the first, and shows the rows of the layer before."""

    @hookimpl
    def score_tokens(self, attention, valid):
        SEEN.append(attention)
        return 1.0 * valid


@strategy(inputs={"encoder_attention": EncoderRows(layer=1, heads="none")})
class LooksInTower:
    """Baseline: keeps the first, and shows the CLS rows of block 1 of the tower."""

    @hookimpl
    def score_tokens(self, encoder_attention, valid):
        SEEN.append(encoder_attention)
        return 1.0 * valid


@strategy()
class Longest:
    """Baseline: by the length of states."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)


@strategy(per_sample=True)
class LongestAlone(Longest):
    """The same, asked about each sample by itself."""


@strategy()
class Answers:
    """Baseline gone wrong: finite states, and in sample 1 something of `what` that is not."""

    what: str
    value: str = "nan"

    @hookimpl
    def select_tokens(self, hidden, valid, count):
        keep = valid & (torch.arange(valid.shape[1]) < torch.tensor(count)[:, None])
        wrong = float(self.value)
        if self.what == "sizes":
            return Selection(keep, sizes=torch.ones(valid.shape).index_fill(0, torch.tensor([1]), wrong))
        weights = torch.eye(valid.shape[1]).repeat(len(valid), 1, 1)
        weights[1, 0, 0] = wrong
        return Selection(keep, weights)


@strategy()
class Scores:
    """Baseline gone wrong: in sample 1 one score is not finite."""

    value: str = "nan"

    @hookimpl
    def score_tokens(self, hidden, valid):
        scores = 1.0 * valid
        scores[1, 0] = float(self.value)
        return scores


CLASSES = {
    "looks": Looks, "looks_in_tower": LooksInTower, "longest": Longest, "longest_alone": LongestAlone,
    "answers": Answers, "scores": Scores,
}  # fmt: skip


def made(*stages):
    registry = Registry("here", "here 1")
    for name, cls in CLASSES.items():
        registry.strategy(name, f"{__name__}:{cls.__name__}")
    for entry in plugins.registry().strategies():
        registry.strategy(entry.name, entry.target)
    return build({"stages": list(stages)}, registry=registry)


@contextmanager
def kernel_rows(calls: list[torch.Tensor]):
    """Notes what probabilities the fused kernel itself had in each call: its output for values of an identity."""
    original: Callable[..., torch.Tensor] = nn.functional.scaled_dot_product_attention

    @functools.wraps(original)
    def attend(query, key, value, **arguments):
        one = torch.eye(key.shape[2], dtype=value.dtype).expand(*value.shape[:2], -1, -1).contiguous()
        calls.append(original(query, key, one, **arguments))
        return original(query, key, value, **arguments)

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def with_massive_channels(dtype):
    """A LLaVA whose queries and keys have one channel of 400 in each head, in decoder and tower, the same for all."""
    decoder = tiny_configs.text(4, hidden_size=128, num_attention_heads=4, head_dim=32, attention_bias=True)
    tower = tiny_configs.vision("clip_vision_model", hidden_size=64, num_attention_heads=2)
    config = tiny_configs.config("llava", decoder, tower, image_seq_length=16, vision_feature_layer=-2)
    model = tiny_from_config(config, "sdpa", torch.float64, 0)
    channel = 15  # the first of the pair that rotates least
    for block in (*model.get_decoder().layers, *model.model.vision_tower.modules()):
        attention = getattr(block, "self_attn", None)
        if attention is not None:
            for product in (attention.q_proj, attention.k_proj):
                product.bias.data.view(-1, 32)[:, channel] = 400.0
    return model.to(dtype)


@HALVES
@pytest.mark.parametrize(("use", "at"), [("looks", 2), ("looks_in_tower", "encoder")])
def test_rows_are_those_of_the_kernel_with_massive_channels(use, at, dtype):
    """160,000 before scaling, more than float16 holds: a product in half precision would be infinite."""
    model, calls = with_massive_channels(dtype), []
    inputs = tiny_batch(model, (("image",),), recipe=RECIPES["llava"])
    SEEN.clear()
    with kernel_rows(calls), torch.no_grad(), prunekit.apply(model, made({"use": use, "at": at, "keep": 0.5})):
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    (found,) = SEEN
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    of_tower = [one for one in calls if one.shape[-1] == 1 + len(visual)]
    of_decoder = [one for one in calls if one.shape[-1] == inputs["input_ids"].shape[1]]
    assert len(of_tower) == 3 and len(of_decoder) == (2 if use == "looks" else 0)  # behind the cut they are shorter
    wanted = of_decoder[1][0, :, -1, visual] if use == "looks" else of_tower[1][0, :, 0, 1:]
    assert found.dtype == torch.float32 and found.isfinite().all() and found.unique().numel() > 4
    allowed = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found[0].T, wanted.float(), atol=allowed, rtol=allowed)


@HALVES
def test_means_of_heads_and_patches_are_not_rounded(dtype):
    """Of heads whose mean half precision does not hold."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, 4, generator=rng).to(dtype)  # rows, heads, tokens, numbers
    exact, one = states.double().mean(1), Attended(states, states, states, None, 1.0)
    columns = torch.arange(5).expand(2, -1)
    found = [decoder_rows.keys(one, columns, kind(heads="mean")) for kind in (Keys, Values)]
    found += [tower_rows.read(kind(), one) for kind in (EncoderKeys, EncoderValues, EncoderQueries)]
    for mean in found:
        torch.testing.assert_close(mean.double(), exact, atol=1e-6, rtol=1e-6)
    assert (exact.to(dtype).double() - exact).abs().max() > 1e-5, "rounding would show"
    pairs = Patches.of([torch.arange(4).view(2, 2)], 4, 0)
    made = pairs.mean(states[:1, 0, :4])
    torch.testing.assert_close(made.double(), states[:1, 0, :4].double().view(1, 2, 2, 4).mean(2), atol=1e-6, rtol=1e-6)
    single = Patches.plain(2, 5, 0).mean(states[:, 0])
    assert single.dtype == dtype and torch.equal(single, states[:, 0])


def wide(value, dtype):
    """float32 of the same numbers; functions of the model get them in its own dtype."""
    if isinstance(value, tuple):
        return tuple(wide(one, dtype) for one in value)
    if isinstance(value, torch.Tensor):
        return value.float().clone() if value.dtype == dtype else value.clone()
    if isinstance(value, dict):
        return {name: wide(one, dtype) for name, one in value.items()}
    if inspect.isfunction(value) or isinstance(value, nn.Module):
        return lambda states: value(states.to(dtype)).float()
    return value


def order(scores):
    return scores.argsort(dim=-1, descending=True, stable=True)


@pytest.fixture
def asked_twice(monkeypatch, dtype):
    """Every hook is also asked about float32 numbers of the same values; says where that made another choice."""
    differ, asked, original = [], [], asking.call

    def call(stage, hook, get, extra):
        def exactly(name):
            return wide(get(name), dtype)

        exact = original(stage, hook, exactly, {name: wide(one, dtype) for name, one in extra.items()})
        answer = original(stage, hook, get, extra)
        asked.append(hook)
        pairs = [(one.keep, one.weights) if isinstance(one, Selection) else (one, None) for one in (exact, answer)]
        (keep, weights), (mine, theirs) = pairs
        same = torch.equal(keep, mine) if keep.dtype == torch.bool else torch.equal(order(keep), order(mine))
        if isinstance(weights, Owners):
            same = same and torch.equal(weights.owner, theirs.owner)
        if not same:
            differ.append(f"{stage.label}: {hook}")
        return answer

    monkeypatch.setattr(asking, "call", call)
    return differ, asked


def decides(use):
    return is_token(plugins.registry().get_strategy(use))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return options_for(families.shape_of(tiny_llava()), tmp_path_factory.mktemp("options"))


@HALVES
@pytest.mark.parametrize("use", [entry.name for entry in plugins.registry().strategies() if decides(entry.name)])
def test_what_is_kept_is_what_float32_of_the_same_values_keeps(use, dtype, options, asked_twice):
    """Of every registered strategy, with features so long that their norms overflow float16."""
    stage = {"use": use, **options.get(use, {})}
    if "keep" in stage_keys(plugins.registry().get_strategy(use)):
        stage["keep"] = 0.5
    pipeline, model = prunekit.load({"stages": [stage]}), None
    for tower in ("clip", "pixtral"):
        model = tiny_llava(dtype=dtype, tower=tower)
        try:
            pipeline.bind(families.shape_of(model))
            break
        except prunekit.SpecError:
            continue
    inputs = tiny_inputs(images=(1, 2), text=(9, 5), dtype=dtype, sizes=tower == "pixtral")
    pixels = {name: inputs[name] for name in inputs if name in ("pixel_values", "image_sizes")}
    last = model.model.multi_modal_projector.linear_2
    for factor in (5e4, None):  # the largest number in them, and then a look at the norms
        features = torch.cat(list(model.get_image_features(**pixels).pooler_output)).float()
        if factor is not None:
            last.weight.data *= factor / features.abs().max()
            last.bias.data *= 0
    assert 65504 < features.norm(dim=-1).max() < torch.inf
    with torch.no_grad(), prunekit.apply(model, pipeline, processor=TinyWords()) as run:
        model(**inputs)
    differ, asked = asked_twice
    assert not differ and (asked or use == "dense" or plugins.registry().get_strategy(use).__prunekit__.drops_all)
    assert run.report.unsound == ()


@contextmanager
def broken(model, row, layer=0, value=float("nan")):
    """From behind a decoder layer on, the states of one sample are not finite."""

    def spoil(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states[row] = value
        return output

    handle = model.get_decoder().layers[layer].register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


TWO = {"images": (1, 2, 1), "text": (9, 5, 7)}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("use", ["longest", "longest_alone", "fastv", "divprune", "random", "scope", "todre", "dart"])
def test_what_the_model_computed_is_noted_and_others_are_as_they_were(use, value):
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    pipeline = made({"use": use, "at": 2, "keep": 0.4})
    with torch.no_grad(), prunekit.apply(model, pipeline) as run:
        model.generate(**inputs, max_new_tokens=2)
        sound = run.report
        with broken(model, 1, 0, float(value)):
            model.generate(**inputs, max_new_tokens=2)
        report = run.report
    assert sound.unsound == () and sound.notes == ()
    assert report.unsound == (1,) and report.kept_tokens == sound.kept_tokens
    notes = [note for note in report.notes if "samples 1: the model computes in float32" in note]
    assert any(note.startswith("logits, ") and "load it in bfloat16 or float32" in note for note in notes), report.notes
    if use not in ("random", "scope"):  # which do not choose by what is broken
        assert any(note.startswith(f"stages[0] {use} at '2', ") for note in notes), report.notes
    for row in (0, 2):
        assert report.events[0].kept[row] == sound.events[0].kept[row]
    assert "unsound" in report.to_json() and "samples 1" in str(report)


def test_logits_alone_are_looked_at_in_every_step_and_of_a_dense_model_too():
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    for stages in ([], [{"use": "fastv", "keep": 0.5}]):
        with torch.no_grad(), prunekit.apply(model, {"stages": stages or [{"use": "dense"}]}) as run:
            prompt = model.generate(**inputs, max_new_tokens=1)
            assert run.report.unsound == () and not run.report.notes
        steps, head = 0, model.lm_head.forward

        def late(states, head=head):
            nonlocal steps
            steps += 1
            written = head(states)
            if steps == 2:
                written[2, -1, 5] = float("inf")
            return written

        model.lm_head.forward = late
        with torch.no_grad(), prunekit.apply(model, {"stages": stages or [{"use": "dense"}]}) as run:
            told = model.generate(**inputs, max_new_tokens=3)
        assert model.lm_head.forward is late
        del model.lm_head.forward
        assert told.shape[1] == prompt.shape[1] + 2
        assert run.report.unsound == (2,)
        assert [note.partition(":")[0] for note in run.report.notes] == ["logits, samples 2"]


def test_padding_is_nobody():
    """Logits of all positions: those of padding are not looked at."""
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    pads = ~inputs["attention_mask"].bool()
    assert pads.any()
    handle = model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0].masked_fill(pads[..., None], float("nan")),)
    )
    with torch.no_grad(), prunekit.apply(model, {"stages": [{"use": "dense"}]}) as run:
        model(**inputs)
    handle.remove()
    assert run.report.unsound == ()


@strategy(sites=prunekit.Sites(tower=True))
class InTower:
    """Baseline: by the length of states, anywhere."""

    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


CLASSES["in_tower"] = InTower


def test_what_the_tower_computed_is_noted_of_the_sample_that_shows_it():
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    block = families.find(model).tower.layers[0]

    def spoil(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states[2] = float("nan")  # the second image of sample 1
        return output

    handle = block.register_forward_hook(spoil)
    with torch.no_grad(), prunekit.apply(model, made({"use": "in_tower", "at": "vision.1", "keep": 0.5})) as run:
        model(**inputs)
    handle.remove()
    assert run.report.unsound == (1,)
    assert any(note.startswith("stages[0] in_tower at 'vision.1', samples 1: ") for note in run.report.notes)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"use": "scores"}, "stages[0] scores: score_tokens returned NaN or infinity"),
        ({"use": "answers", "what": "sizes"}, "stages[0] answers: select_tokens (sizes) must be finite and above 0"),
        ({"use": "answers", "what": "weights"}, "stages[0] answers: select_tokens (weights) gave NaN or infinity"),
    ],
    ids=["scores", "sizes", "weights"],
)
def test_what_a_strategy_made_is_its_fault(stage, message, value):
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    pipeline = made({**stage, "value": value, "at": 2, "keep": 0.4})
    with pytest.raises(PluginError, match=re.escape(message)), torch.no_grad(), prunekit.apply(model, pipeline):
        model(**inputs)


def test_a_strategy_that_breaks_on_such_numbers_is_told_whose_they_are():
    model, inputs = tiny_llava(dtype=torch.float32), tiny_inputs(**TWO, dtype=torch.float32)
    pipeline = prunekit.load({"stages": [{"use": "lrcp", "at": 2, "keep": 0.4}]})
    with broken(model, 1), torch.no_grad(), prunekit.apply(model, pipeline) as run:
        try:
            model(**inputs)
        except PluginError as error:
            assert "(the model computed NaN or infinity: its hidden; load it in bfloat16 or float32)" in str(error)
        else:
            assert run.report.unsound == (1,)


def test_overflow_in_float16_is_noted_where_it_happens():
    """A real one: an MLP beyond 65504."""
    model, inputs = tiny_llava(dtype=torch.float16), tiny_inputs(**TWO, dtype=torch.float16)
    model.get_decoder().layers[0].mlp.down_proj.weight.data *= 3e4
    with torch.no_grad(), prunekit.apply(model, {"stages": [{"use": "divprune", "at": 1, "keep": 0.5}]}) as run:
        model(**inputs)
    assert run.report.unsound == (0, 1, 2)
    assert "stages[0] divprune at '1', samples 0, 1, 2: the model computes in float16" in run.report.notes[0]
