"""Numbers of tokens, ids and words of the text, rotary positions, and which extras are real; for routers as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reading import piped, reader

import prunekit
from prunekit import EncoderKeys, Route, Rows, Selection, Sites, hookimpl, loading, strategy
from prunekit.errors import SpecError, Unsupported
from prunekit.ops import top_k_mask
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_model, tiny_names

RAGGED = {"images": (1, 2), "text": (7, 9)}


def seen_at(model: Any, prompt: Any, names: list[str], *at: Any, **declared: Any) -> list[dict[str, Any]]:
    """What a stage sees at each of these sites; it drops the last token of each sample at each."""
    seen: list[dict[str, Any]] = []
    stages = [(reader(names, seen, **declared), {"at": site}) for site in at]
    with torch.no_grad(), prunekit.apply(model, piped(*stages)):
        model(**prompt)
    return seen


def test_numbers_among_the_original_visual_tokens():
    seen = seen_at(tiny_llava(), tiny_inputs(**RAGGED), ["index"], "encoder", 2, "2.mid", "prefill_end")
    for gone, one in enumerate(seen):
        for row, count in enumerate((16, 32)):
            assert one["index"][row].tolist() == [*range(count - gone), *[-1] * (32 - count)]


@pytest.mark.parametrize("per_sample", [False, True])
def test_ids_of_the_text(per_sample):
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    seen = seen_at(model, inputs, ["text_ids"], 2, per_sample=per_sample)
    rows = [one["text_ids"] for one in seen] if per_sample else list(seen[0]["text_ids"])
    image = model.config.image_token_id
    for row, ids, mask in zip(rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
        words = [int(one) for one, real in zip(ids, mask, strict=True) if real and one != image]
        padding = 0 if per_sample else len(row) - len(words)
        assert row.tolist() == [*words, *[-1] * padding]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_rotary_positions_of_all_axes(name):
    model = tiny_model(name, dtype=torch.float32)
    inputs = tiny_batch(model)
    rotary = next(module for part, module in model.named_modules() if part.endswith("language_model.rotary_emb"))
    ids: list[torch.Tensor] = []
    handle = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: ids.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True
    )
    seen = seen_at(model, inputs, ["positions", "index"], "encoder", 2)
    handle.remove()
    axes = ids[0] if ids[0].ndim == 3 else ids[0][None]
    visual = torch.isin(inputs["input_ids"], torch.tensor(prunekit.families.find(model).visual_ids))
    for one in seen:
        assert one["positions"].shape[-1] == len(axes) == (3 if "qwen" in name else 1)
        for row in range(len(visual)):
            index = one["index"][row]
            wanted = axes.expand(-1, len(visual), -1)[:, row, visual[row]].T[index[index >= 0]]
            assert torch.equal(one["positions"][row, index >= 0], wanted)
            assert bool((one["positions"][row, index < 0] == -1).all())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_are_those_of_each_axis(name, dtype):
    """Of the module's frequencies, at the positions that `positions` says, whatever the model's precision."""
    model = tiny_model(name, dtype=dtype)
    inputs = tiny_batch(model)
    for site in ("encoder", 2):
        (seen,) = seen_at(model, inputs, ["positions", "rotary", "index"], site)
        rotary, positions = seen["rotary"], seen["positions"]
        assert rotary.dtype == torch.float32 and rotary.shape[:3] == positions.shape
        module = next(m for part, m in model.named_modules() if part.endswith("language_model.rotary_emb"))
        tables = [one.float() for part, one in module.named_buffers() if part.endswith("inv_freq")]
        angles = [torch.cat([positions[..., None].float() * table] * 2, dim=-1) for table in tables]
        there = seen["index"] >= 0
        close = [
            torch.allclose(rotary[there], torch.cat([angle.cos(), angle.sin()], dim=-1)[there], atol=1e-4)
            for angle in angles
            if 2 * angle.shape[-1] == rotary.shape[-1]
        ]
        assert any(close) and not rotary[~there].any()


@strategy(sites=Sites(decoder=False), extras=("cls",))
class AppendCls:
    """Baseline: the longest states, and every CLS token that is real in the slots of the next ones (TRIM's idea)."""

    @hookimpl
    def select_tokens(self, hidden, extras, extras_valid, valid, count):
        crops = extras_valid.sum(1)
        longest = top_k_mask(hidden.norm(dim=-1), count, valid)
        weights = torch.eye(hidden.shape[1], hidden.shape[1] + extras.shape[1], dtype=hidden.dtype)
        weights = weights.expand(len(hidden), -1, -1).clone()
        for row, number in enumerate(crops.tolist()):
            slots = longest[row].nonzero()[-number:, 0]
            weights[row, slots] = 0
            weights[row, slots, hidden.shape[1] + torch.arange(number)] = 1
        return Selection(longest, weights)


def test_a_strategy_that_appends_cls_keeps_in_a_batch_what_it_keeps_alone():
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    pipeline = piped((AppendCls, {"at": "encoder", "keep": 0.25}))
    with torch.no_grad(), prunekit.apply(model, pipeline) as run:
        together = model(**inputs).logits[:, -1]
        kept = run.report.events[0].kept
        for row, images in enumerate(RAGGED["images"]):
            real = inputs["attention_mask"][row].bool()
            start = sum(RAGGED["images"][:row])
            alone = {
                "input_ids": inputs["input_ids"][row][real][None], "attention_mask": torch.ones(1, int(real.sum())),
                "pixel_values": inputs["pixel_values"][start : start + images],
            }  # fmt: skip
            assert torch.allclose(model(**alone).logits[0, -1], together[row], atol=1e-5)
            assert run.report.events[0].kept[0] == kept[row]


@pytest.mark.parametrize("per_sample", [False, True])
def test_padding_of_extras(per_sample):
    seen = seen_at(
        tiny_llava(), tiny_inputs(**RAGGED), ["extras", "extras_valid"], "encoder", extras=("cls",),
        per_sample=per_sample, sites=Sites(decoder=False),
    )  # fmt: skip
    if per_sample:
        assert [(len(one["extras"]), one["extras_valid"].tolist()) for one in seen] == [(1, [True]), (2, [True, True])]
        return
    assert seen[0]["extras_valid"].tolist() == [[True, False], [True, True]]
    assert bool((seen[0]["extras"][0, 1] == 0).all()) and bool((seen[0]["extras"][1] != 0).any(-1).all())


ROUTED: list[dict[str, Any]] = []


ASKED = {"attention": Rows(layer="next", queries="text"), "encoder_keys": EncoderKeys()}


@strategy(inputs=ASKED)
class Curious:
    """A router that asks for what token stages ask for."""

    @hookimpl
    def route(self, visual, coords, index, count, attention, encoder_keys, hidden, text_ids, text_valid, frames):
        ROUTED.append({name: value for name, value in locals().items() if name != "self"})
        layers = torch.arange(6.0)
        return Route(visual.float(), layers if visual.ndim == 1 else layers.expand(len(visual), -1))


@strategy(per_sample=True)
class CuriousOne(Curious):
    """The same, sample by sample."""


@pytest.mark.parametrize("keys", [{"at": 3, "keep": 0.5, "keep_layers": 5}, {"keep_layers": 5}], ids=["both", "layers"])
def test_routers_get_what_token_stages_get_at_the_decoder_input(keys):
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    names = ["coords", "index", "attention", "encoder_keys", "hidden", "text_ids", "text_valid", "frames"]
    (expected,) = seen_at(model, inputs, names, "encoder", inputs=ASKED)
    for cls in (Curious, CuriousOne):
        ROUTED.clear()
        with torch.no_grad(), prunekit.apply(model, piped((cls, keys))):
            model(**inputs)
        counts = (8, 16) if "keep" in keys else None
        if cls is Curious:
            (got,) = ROUTED
            assert got["count"] == counts
            for name in names:
                assert torch.equal(got[name], expected[name]), name
            continue
        assert [one["count"] for one in ROUTED] == (list(counts) if counts else [None, None])
        for row, one in enumerate(ROUTED):
            for name in names:
                length = len(one[name])
                assert torch.allclose(one[name], expected[name][row, :length]), name
            assert (len(one["index"]), int(one["text_valid"].sum())) == ((16, 32)[row], len(one["text_ids"]))


@pytest.fixture(scope="module")
def micro():
    return loading.load("micro")


class TestQuestion:
    def asked(self, micro: Any, questions: list[str], **declared: Any) -> Any:
        from PIL import Image

        from prunekit.training.data import Sample, encode

        model, processor = micro
        image = Image.new("RGB", (168, 168), "red")
        inputs = encode(processor, [Sample((image,), question) for question in questions])
        seen: list[dict[str, Any]] = []
        pipeline = piped((reader(["question"], seen, **declared), {"at": 2}))
        with torch.no_grad(), prunekit.apply(model, pipeline, processor=processor):
            model(**inputs)
        return [one["question"] for one in seen]

    def test_the_words_of_a_batch_and_of_each_sample(self, micro):
        questions = ["Is there a dog?", "What color is the cat? Answer in one word."]
        assert self.asked(micro, questions) == [tuple(questions)]
        assert self.asked(micro, questions, per_sample=True) == questions

    def test_without_a_processor_it_is_refused_before_any_compute(self, micro):
        pipeline = piped((reader(["question"], []), {"at": 2}))
        refused = pytest.raises(Unsupported, match=r"stages\[0\] reader0 asks for `question`, the user's words, which")
        with refused, prunekit.apply(micro[0], pipeline):
            pytest.fail("entered")

    def test_it_does_not_exist_in_the_tower(self, micro):
        tower = piped((reader(["question"], [], sites=Sites(tower=True)), {"at": "vision.1"}))
        refused = pytest.raises(SpecError, match=r"asks for question, which is not there yet at 'vision\.1'")
        with refused, prunekit.apply(micro[0], tower, processor=micro[1]):
            pytest.fail("entered")


def test_cls_tokens_say_of_which_crop_they_are():
    """LLaVA-NeXT: the whole and the tiles of each image, in their order; padded behind rows with fewer."""
    model = tiny_model("llava_next")
    batch = tiny_batch(model, [("image",), ("image", "image")])
    (seen,) = seen_at(
        model, dict(batch), ["cls_crops", "extras_valid"], "encoder", extras=("cls",), sites=Sites(decoder=False)
    )
    for crops, valid in zip(seen["cls_crops"], seen["extras_valid"], strict=True):
        assert (crops[~valid] == -1).all()
        numbers = crops[valid].tolist()
        for image in {image for image, _ in numbers}:
            of_image = [crop for number, crop in numbers if number == image]
            assert of_image == list(range(len(of_image))) and len(of_image) > 1
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("name", [name for name in tiny_names() if takes_video(name)])
def test_which_tokens_are_of_a_video(name):
    """Behind stages that have dropped some, next to images whose crops are no frames; GLM takes one kind at a time."""
    model = tiny_model(name)
    prompts = ((("image", "video"), ("video",), ("image",), ()),)
    if "glm" in name:
        prompts = (("video",), ("video",)), (("image",), ())
    for rows in prompts:
        batch = tiny_batch(model, rows)
        for one in seen_at(model, batch, ["videos", "coords"], "encoder", 3):
            for kinds, videos, coords in zip(rows, one["videos"], one["coords"], strict=True):
                shown = [kinds[number] == "video" if number >= 0 else False for number in coords[:, 0].tolist()]
                assert videos.tolist() == shown


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_which_inputs_of_the_tower_are_videos(name):
    seen: list[dict[str, Any]] = []
    model, inside = tiny_model(name), reader(["videos"], seen, sites=Sites(tower=True))
    with torch.no_grad(), prunekit.apply(model, piped((inside, {"at": "vision.1"}))):
        model(**tiny_batch(model, (("image", "video"), ("image",))))
    kinds = [one["videos"].any() for one in seen]
    assert any(kinds) and not all(kinds)
    assert all(torch.equal(one["videos"], one["valid"] & kind) for one, kind in zip(seen, kinds, strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
def test_rows_that_are_not_there_at_a_site(per_sample):
    """The hook gets None in their place where they are optional; else the site is refused."""
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    own = Rows(layer="own", over="none", optional=True), Rows(layer="previous", optional=True)
    traits = {"inputs": {"attention": own}, "per_sample": per_sample}
    seen = seen_at(model, inputs, ["attention", "shape"], "encoder", "0.mid", "1", **traits)
    there = [tuple(one is not None for one in given["attention"]) for given in seen]
    assert there[:: 2 if per_sample else 1] == [(False, False), (True, False), (False, True)]
    assert all(given["shape"].layers == 6 for given in seen)
    with pytest.raises(SpecError, match="attention of the layer that the site stands in is not there at 'encoder'"):
        seen_at(model, inputs, ["attention"], "encoder", inputs={"attention": Rows(layer="own")})
