"""What stages read of the vision tower equals the naive tower's maps and states, wherever they stand."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import pytest
import torch
from tower_cases import (
    ANYWHERE,
    AppendCls,
    ClsTopK,
    Everything,
    Norms,
    Skewed,
    Steps,
    naive_logits,
    naive_states,
    piped,
    tower_of,
)

import prunekit
from prunekit import Sites, hookimpl, strategy
from prunekit.engine.tower import encoding as tower_encoding
from prunekit.families import find
from prunekit.ops import top_k_mask
from prunekit.strategy.tower_requests import EncoderKeys, EncoderRows, EncoderValues, Features
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.precision import Float64Throughout

BATCH = ((1, 2), (12, 9))
model_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout(), torch.no_grad():
        yield
    Everything.SEEN.clear()


def naive(model, pixels):
    """What `Everything` asks for, of each picture (pictures, patches, ...), in the order of its declarations."""
    states, attended, maps, _ = naive_states(model, pixels)
    q, k, v = (list(parts) for parts in zip(*attended, strict=True))
    joined = (q[2] * 1.0).transpose(1, 2).flatten(2) @ k[2].transpose(1, 2).flatten(2).transpose(1, 2)
    scale = q[1].shape[-1] ** -0.5
    features = model.model.multi_modal_projector(states[2][:, 1:])
    return {
        "encoder_attention": (
            maps[1][:, :, 0, 1:].mean(1), maps[0][:, :, 0, 1:].sum(1), maps[1].mean(2)[..., 1:].transpose(1, 2),
            (joined[:, 0] * (q[2].shape[1] * q[2].shape[-1]) ** -0.5).softmax(-1)[:, 1:],
            (q[1][:, :, :1] @ k[1].transpose(-1, -2) * scale)[:, :, 0, 1:].transpose(1, 2),
        ),
        "encoder_keys": k[0][:, :, 1:].transpose(1, 2),
        "encoder_values": (v[1][:, :, 1:].mean(1), v[1][:, :, :1].mean(1)),
        "encoder_queries": q[1][:, :, 1:].mean(1),
        "features": (states[2][:, 1:], states[1][:, 1:], features, states[2][:, :1]),
    }  # fmt: skip


def compare(given, expected, kept, cls_pictures):
    """Every table of the batch against the naive one of each picture. kept: for each row its visual tokens."""
    for name, tables in expected.items():
        several = isinstance(tables, tuple)
        assert isinstance(given[name], tuple) == several
        for one, table in zip(
            given[name] if several else (given[name],), tables if several else (tables,), strict=True
        ):
            first = 0
            for row, tokens in enumerate(kept):
                rows = table[first : first + cls_pictures[row]].flatten(0, 1)
                first += cls_pictures[row]
                wanted = rows[list(tokens)] if table.shape[1] > 1 else rows
                assert (one[row, : len(wanted)] - wanted).abs().max() < 1e-9, name
                assert not one[row, len(wanted) :].any(), "padding holds zeros"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("at", ["encoder", 2, "3.mid", "prefill_end"])
def test_everything_that_can_be_read(at, attention):
    model, inputs = model_of(attention), tiny_inputs(*BATCH)
    stages = [] if at == "encoder" else [(Norms, {"at": "encoder", "keep": 0.5})]
    with prunekit.apply(model, piped(*stages, (Everything, {"at": at}))) as run:
        model(**inputs)
    kept = [range(16), range(32)] if at == "encoder" else run.report.events[0].kept
    (given,) = Everything.SEEN
    compare(given, naive(model, inputs["pixel_values"]), kept, BATCH[0])


def test_generate_encodes_before_it_calls():
    model, inputs = model_of("sdpa"), tiny_inputs(*BATCH)
    with prunekit.apply(model, piped((Everything, {"at": "encoder"}))):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        alone = tiny_inputs((1, 1), (12, 9))  # older transformers mix the pictures of rows with several under beams
        model.generate(**alone, max_new_tokens=3, do_sample=False, num_beams=2)
    plain, beams = Everything.SEEN
    compare(plain, naive(model, inputs["pixel_values"]), [range(16), range(32)], BATCH[0])
    twice = alone["pixel_values"].repeat_interleave(2, 0)
    compare(beams, naive(model, twice), [range(16)] * 4, (1, 1, 1, 1))


def test_nothing_is_read_that_nobody_asks_for(monkeypatch):
    """One read for each declaration and call of the tower, none while decoding; only what is read is overridden, which
    keeps `torch.compile` from tracing it.
    """
    calls, read = [], tower_encoding.read
    monkeypatch.setattr(tower_encoding, "read", lambda spec, seen: calls.append(spec) or read(spec, seen))
    model, inputs = model_of("sdpa"), tiny_inputs(*BATCH)
    with prunekit.apply(model, piped((ClsTopK, {"at": "encoder", "keep": 0.5}), (ClsTopK, {"at": 2, "keep": 0.25}))):
        overridden = [one for one in model.model.vision_tower.modules() if "forward" in vars(one)]
        assert overridden == [find(model).tower.layers[1].self_attn]
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert calls == [EncoderRows(1)]
    with prunekit.apply(model, piped((Norms, {"at": "encoder", "keep": 0.5}))):
        model(**inputs)
    assert len(calls) == 1


def test_cls_top_k_keeps_what_the_naive_map_says():
    model, inputs = model_of("sdpa"), tiny_inputs(*BATCH)
    with prunekit.apply(model, piped((ClsTopK, {"at": "encoder", "keep": 0.25}))) as run:
        model(**inputs)
    _, _, maps, _ = naive_states(model, inputs["pixel_values"])
    row = maps[1][:, :, 0, 1:].mean(1)
    expected = [row[0].topk(4).indices, row[1:].flatten().topk(8).indices]
    assert run.report.events[0].kept == tuple(tuple(sorted(one.tolist())) for one in expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cls_token_itself_goes_in(attention):
    """VisionZip appends it: one for each picture, the first of them in the last slot that is kept."""
    model, inputs = model_of(attention), tiny_inputs(*BATCH)
    with prunekit.apply(model, piped((AppendCls, {"at": "encoder", "keep": 0.25}))) as run:
        logits = model(**inputs).logits[:, -1]
    states, _, maps, _ = naive_states(model, inputs["pixel_values"])
    project, rows, first = model.model.multi_modal_projector, maps[1][:, :, 0, 1:].mean(1), 0
    features = project(states[2][:, 1:])
    for count in BATCH[0]:
        last = rows[first : first + count].flatten().topk(4 * count).indices[-1]
        features[first : first + count].view(-1, features.shape[-1])[last] = project(states[2][first, 0])
        first += count
    left = torch.zeros(3, 16, dtype=torch.bool)
    left[0, list(run.report.events[0].kept[0])] = True
    left[1:].view(-1)[list(run.report.events[0].kept[1])] = True
    expected, _ = naive_logits(model, inputs, features, left)
    assert (logits - expected).abs().max() < 1e-9


def test_rows_after_a_cut_are_over_what_is_left():
    """In the tower and behind it; patches that are gone hold zeros, the others sum to one with CLS."""
    model, inputs = model_of("sdpa"), tiny_inputs(*BATCH)
    stages = [(Norms, {"at": "vision.0", "keep": 0.5}), (Later, {"at": "vision.1"}), (Later, {"at": "encoder"})]
    with prunekit.apply(model, piped(*stages)) as run:
        model(**inputs)
    keep = torch.zeros(3, 16, dtype=torch.bool)
    keep[0, list(run.report.events[0].kept[0])] = True
    keep[1:].view(-1)[list(run.report.events[0].kept[1])] = True
    _, attended, maps, _ = naive_states(model, inputs["pixel_values"], [(0, "after", lambda *_: (keep, None, None))])
    inside, behind = Later.SEEN
    row = maps[1][:, :, 0, 1:].mean(1)
    for picture in range(3):
        assert (inside[0][picture] - row[picture][keep[picture]]).abs().max() < 1e-9
        assert (inside[1][picture] - attended[1][1][picture].mean(0)[1:][keep[picture]]).abs().max() < 1e-9
    assert (behind[0][0, :8] - row[0][keep[0]]).abs().max() < 1e-9
    assert (behind[0][1, :16] - row[1:][keep[1:]]).abs().max() < 1e-9


@strategy(sites=ANYWHERE, keep="refused", inputs={"encoder_attention": EncoderRows(1), "encoder_keys": EncoderKeys(1)})
class Later:
    """Takes down rows and keys."""

    SEEN: ClassVar[list] = []

    @hookimpl
    def select_tokens(self, encoder_attention, encoder_keys, valid):
        self.SEEN.append((encoder_attention, encoder_keys))
        return valid


def test_one_stage_with_several_cuts_remembers():
    """The running score of two cuts, computed by hand."""
    model, inputs = model_of("sdpa"), tiny_inputs((1,), 9)
    with prunekit.apply(model, piped((Steps, {"at": ["vision.0", "vision.1"], "keep": [0.5, 0.25]}))) as run:
        model(**inputs)
    _, attended, maps, _ = naive_states(model, inputs["pixel_values"])

    def score(number, maps, attended):
        return maps[number][0, :, 0, 1:].mean(0) * attended[number][2][0].mean(0)[1:].norm(p=1, dim=-1)

    first = score(0, maps, attended)
    keep = top_k_mask(first[None], (8,), torch.ones(1, 16, dtype=torch.bool))
    _, attended, maps, _ = naive_states(model, inputs["pixel_values"], [(0, "after", lambda *_: (keep, None, None))])
    second = ((first + score(1, maps, attended)) / 2).masked_fill(~keep[0], -1)
    assert run.report.events[0].kept[0] == tuple(keep[0].nonzero()[:, 0].tolist())
    assert run.report.events[1].kept[0] == tuple(sorted(second.topk(4).indices.tolist()))


@strategy(sites=ANYWHERE, keep="refused", extras=("cls",))
class NoCls:
    """Asks for a token that SigLIP does not have."""

    @hookimpl
    def select_tokens(self, extras, valid):
        return valid


@strategy(sites=ANYWHERE, inputs={"encoder_attention": EncoderRows(query="pool")})
class Pooled:
    """Asks for the row of a pooling head."""

    @hookimpl
    def score_tokens(self, encoder_attention):
        return encoder_attention


@strategy(sites=Sites(pixels=True))
class Early:
    """Cuts before the tower."""

    @hookimpl
    def score_tokens(self, patches):
        return patches.flatten(2).std(-1)


@strategy(sites=ANYWHERE, inputs={"features": Features(2)})
class Ahead:
    """Asks for what has not run yet."""

    @hookimpl
    def score_tokens(self, features):
        return features.norm(dim=-1)


@strategy(sites=ANYWHERE, inputs={"encoder_values": EncoderValues(7)})
class Beyond:
    """Asks for a block that is not there."""

    @hookimpl
    def score_tokens(self, encoder_values):
        return encoder_values.norm(dim=-1)


REFUSED = {
    "cls of a tower without": ("paligemma", [(ClsTopK, {"at": "encoder", "keep": 0.5})], "no CLS token"),
    "extras of a tower without": ("paligemma", [(NoCls, {"at": "encoder"})], "no CLS token"),
    "extras that cannot be projected": ("internvl", [(NoCls, {"at": "encoder"})], "does not map single tokens"),
    "no pooling head": ("llava", [(Pooled, {"at": "encoder", "keep": 0.5})], "no pooling head"),
    "a block that is not there": ("llava", [(Beyond, {"at": "encoder", "keep": 0.5})], "blocks 0 to 2"),
    "a block that has not run": ("llava", [(Ahead, {"at": "vision.1", "keep": 0.5})], "has not run yet"),
    "a cut behind the features": ("llava", [(Norms, {"at": "vision.2", "keep": 0.5})], "after block 1"),
    "pixels": ("llava", [(Early, {"at": "pixels", "keep": 0.5})], "takes whole images"),
    "tower and decoder in one stage": (
        "llava", [(Norms, {"at": ["vision.0", 2], "keep": [0.5, 0.25]})], "split the stage in two"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_compute(case):
    name, stages, match = REFUSED[case]
    model = tiny_model(name)
    with pytest.raises(prunekit.PrunekitError, match=match), prunekit.apply(model, piped(*stages)):
        pass


def test_calls_that_do_not_fit_are_refused():
    model, inputs = tiny_model("llava"), tiny_inputs((1,), 9)
    pipeline = piped((ClsTopK, {"at": "encoder", "keep": 0.5}))
    with prunekit.apply(model, pipeline), pytest.raises(prunekit.Unsupported, match="vision_feature_layer"):
        model(**inputs, vision_feature_layer=-1)
    encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with prunekit.apply(model, pipeline), pytest.raises(prunekit.Unsupported, match="encoded outside"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_training():
    """Gradients flow through cuts and merges in the tower; blocks that would be run again are refused."""
    model, inputs = tiny_llava().requires_grad_(True).train(), tiny_inputs(*BATCH)
    weight = tower_of(model)[0].encoder.layers[0].mlp.fc1.weight
    with torch.enable_grad(), prunekit.apply(model, piped((Skewed, {"at": "vision.0"}))):
        model(**inputs).logits.square().mean().backward()
        assert weight.grad is not None and weight.grad.abs().sum() > 0
        for block in tower_of(model)[0].encoder.layers:
            block.gradient_checkpointing = True
        with pytest.raises(prunekit.Unsupported, match="gradient checkpointing would run blocks of the vision tower"):
            model(**inputs)


def test_shrunken_pictures_are_refused():
    """LLaVA-OneVision interpolates the tokens of large pictures, so that no patch makes a token."""
    model = tiny_model("llava_onevision")
    batch = tiny_batch(model)
    model.config.vision_aspect_ratio = "anyres_max_1"
    pipeline = piped((Norms, {"at": "vision.0", "keep": 0.5}))
    with prunekit.apply(model, pipeline), pytest.raises(prunekit.Unsupported, match="shrunken"):
        model(**batch)


def test_leading_tokens_are_never_dropped():
    model, inputs = model_of("sdpa"), tiny_inputs((1,), 9)
    assert tower_of(model)[1] == 1
    with prunekit.apply(model, piped((Norms, {"at": "vision.0", "keep_tokens": 1}))) as run:
        model(**inputs)
    assert run.report.kept_tokens == (1,)
