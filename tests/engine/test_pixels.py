"""Site `pixels`: what hooks get of the pixels, what the tower then computes, and smaller images."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy
import pytest
import torch
from PIL import Image
from tower_cases import Merging, Norms, piped
from transformers import Qwen2VLImageProcessor

import prunekit
from prunekit import Features, Selection, Sites, families, hookimpl, strategy
from prunekit.testing.tiny import row_of as row_of_llava
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_model, tiny_names
from prunekit.verify.equivalence import assert_equivalent
from prunekit.verify.precision import Float64Throughout

EARLY = Sites(tower=True, pixels=True)
TOWERS = {name: families.find(tiny_model(name)).tower for name in tiny_names()}
ANY_SIZE = [name for name, tower in TOWERS.items() if tower is not None and tower.shape().images == "any"]
model_of = cache(tiny_model)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


@strategy(sites=EARLY)
class Bright:
    """The brightest squares; takes down what it is given."""

    SEEN: ClassVar[list] = []

    @hookimpl
    def select_tokens(self, patches, coords, frames, index, sizes, valid, count, cut, seed, state):
        given = {"patches": patches, "coords": coords, "frames": frames, "index": index, "sizes": sizes, "valid": valid}
        self.SEEN.append({**given, "count": count, "cut": cut, "seed": seed, "state": state})
        order = patches.flatten(2).mean(-1).masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(valid)
        for row, number in enumerate(count):
            keep[row, order[row, :number]] = True
        return keep


@strategy(sites=EARLY, keep="refused")
class Nothing:
    """Keeps nothing of the images that are named, and all of the others."""

    images: tuple[int, ...] = ()

    @hookimpl
    def select_tokens(self, valid):
        keep = valid.clone()
        keep[list(self.images or range(len(keep)))] = False
        return keep


@strategy(sites=EARLY, keep="refused")
class Heavy:
    """Every second token, three times as heavy as it was."""

    @hookimpl
    def select_tokens(self, index, sizes, valid):
        return Selection(valid & (index % 2 == 0), sizes=sizes * 3)


@strategy(inputs={"features": Features(projected=True)})
class Projected:
    """What the projector made of each token that is left, which is what enters the decoder."""

    @hookimpl
    def score_tokens(self, features, hidden, valid):
        assert torch.equal(features[valid], hidden[valid])
        return hidden.norm(dim=-1)


@strategy()
class Shrink:
    """Another factor for each image, by its brightness; takes down what it is given."""

    SEEN: ClassVar[list] = []
    least: float = 0.4

    @hookimpl
    def resize_images(self, images, seed):
        self.SEEN.append((images, seed))
        bright = torch.stack([image.mean() for image in images])
        return self.least + (1 - self.least) * bright.sigmoid()


BRIGHT = (Bright, {"at": "pixels", "keep": 0.5})


def photo(height, width, seed=0):
    """Something with smooth parts and edges, uint8."""
    generator = numpy.random.default_rng(seed)
    rough = generator.integers(0, 256, (height // 14, width // 14, 3), dtype=numpy.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


PROCESSOR = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=10**6)


def processed(*pictures):
    found = PROCESSOR(images=list(pictures), return_tensors="pt")
    return {"pixel_values": found["pixel_values"], "image_grid_thw": found["image_grid_thw"]}


def holder_of(name="qwen2_vl"):
    return families.find(model_of(name)).tower.images


class TestWhatHooksGet:
    def test_the_processors_patches_are_the_image_that_it_normalised(self):
        pictures = [photo(56, 84), photo(112, 28, 1)]
        given = processed(*pictures)
        holder = holder_of()
        mean, std = torch.tensor(PROCESSOR.image_mean), torch.tensor(PROCESSOR.image_std)
        for picture, image in zip(pictures, holder.unpack("image", given), strict=True):
            expected = (torch.tensor(numpy.array(picture)) / 255 - mean) / std
            assert image.shape == (1, 2, 3, *expected.shape[:2])
            for frame in range(2):  # a still image is its own second frame
                assert torch.allclose(image[0, frame].permute(1, 2, 0), expected, atol=1e-5)
        again = holder.pack("image", given, holder.unpack("image", given))
        assert all(torch.equal(again[key], given[key]) for key in given)

    @pytest.mark.parametrize(("name", "kind"), [(name, "image") for name in ("qwen2_5_vl", "glm4v", "mistral3")] + [
        ("qwen3_vl", "video"), ("qwen2_5_vl", "video")
    ])  # fmt: skip
    def test_squares_stand_where_coords_say(self, name, kind):
        """Cut out one by one; padding is zeros, and beside every square are its place, its number and its size."""
        model = model_of(name)
        batch = tiny_batch(model, ((kind,), (kind, kind)))
        with torch.no_grad(), prunekit.apply(model, piped(BRIGHT)) as run:
            model(**batch)
        seen, holder = Bright.SEEN.pop(), holder_of(name)
        images = holder.unpack(kind, batch)
        assert len(set(seen["seed"])) == len(images) == len(seen["count"]) and seen["cut"] == 0 and seen["state"] == {}
        assert seen["patches"].shape[2:] == (*images[0].shape[1:3], holder.cell, holder.cell)
        for number, image in enumerate(images):
            cells = [slice(at * holder.cell, (at + 1) * holder.cell) for at in range(99)]
            for token in range(seen["valid"].shape[1]):
                _, row, column, rows, columns = seen["coords"][number, token].tolist()
                frame = int(seen["frames"][number, token])
                if not seen["valid"][number, token]:
                    assert row == frame == -1 and not seen["patches"][number, token].any()
                    continue
                assert (rows * holder.cell, columns * holder.cell) == image.shape[-2:]
                assert token == seen["index"][number, token] == (frame * rows + row) * columns + column
                assert torch.equal(seen["patches"][number, token], image[frame, :, :, cells[row], cells[column]])
        assert run.report.events[0].asked == run.report.kept_tokens

    def test_what_is_written_to_an_input_changes_nothing(self):
        @strategy(sites=EARLY)
        class Vandal:
            @hookimpl
            def score_tokens(self, patches):
                scores = patches.flatten(2).mean(-1)
                patches.zero_()
                return scores

        globals()["Vandal"] = Vandal
        Vandal.__module__, Vandal.__qualname__ = __name__, "Vandal"
        model, batch = model_of("qwen2_vl"), tiny_batch(model_of("qwen2_vl"))
        assert_equivalent(model, piped((Vandal, {"at": "pixels", "keep": 0.5})), batch, steps=1)


class TestWhatTheTowerComputes:
    @pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3"])
    def test_every_part_of_it_runs_on_what_is_left(self, name):
        """Patch embedding, blocks and all that makes visual tokens; a convolution over complete images alone does not.

        Each visual token is four patches. test_tower_cost.py counts the parts that are overridden.
        """
        model = model_of(name)
        batch, tower, sizes = tiny_batch(model, (("image",),)), families.find(model).tower, []
        parts = [getattr(tower.layers[0], tower.attention), getattr(tower.layers[-1], tower.mlp)]

        def watch(module, args, kwargs):
            sizes.append((args[0] if args else next(iter(kwargs.values()))).shape[-2])

        handles = [part.register_forward_pre_hook(watch, with_kwargs=True) for part in parts]
        with torch.no_grad(), prunekit.apply(model, piped(BRIGHT)) as run:
            model(**batch)
        for handle in handles:
            handle.remove()
        kept = run.report.kept_tokens[0]
        assert kept == len(run.report.events[0].kept[0]) == run.report.visual_tokens[0] // 2
        assert sizes == [kept * 4, kept * 4] and set(run.report.tower_tokens[0]) == {kept * 4}
        work = run.report.cost.tower_flops[0] / run.report.cost.dense_tower_flops[0]
        assert work < (0.9 if name == "mistral3" else 0.5 + 1e-9)

    def test_image_features_have_the_complete_length(self):
        """With zeros where nothing is left, in DeepStack features too."""
        model = model_of("qwen3_vl")
        batch = tiny_batch(model, (("image",),))
        given = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
        with torch.no_grad(), prunekit.apply(model, piped(BRIGHT)):
            output = model.model.get_image_features(**given, return_dict=True)
        (features,) = output.pooler_output
        zeros = (features == 0).all(-1)
        assert int(zeros.sum()) == len(features) // 2
        for stack in output.deepstack_features:
            assert torch.equal((torch.cat(list(stack)) == 0).all(-1), zeros)

    @pytest.mark.parametrize("stage", [(), (0,), (1,)], ids=["all", "first", "second"])
    @pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3"])
    def test_images_may_lose_everything(self, name, stage):
        """One of two, or both: then the prompt is words."""
        model = model_of(name)
        batch = tiny_batch(model, (("image",), ("image",)))
        pipeline = piped((Nothing, {"at": "pixels", "images": list(stage)}))
        found = assert_equivalent(model, pipeline, batch, steps=2)
        gone = stage or (0, 1)
        assert all((found.report.kept_tokens[row] == 0) is (row in gone) for row in (0, 1))

    @pytest.mark.parametrize("name", [
        pytest.param(name, marks=() if name in ("qwen2_5_vl", "mistral3") else pytest.mark.slow) for name in ANY_SIZE
    ])  # fmt: skip
    def test_cuts_follow_each_other_through_the_tower(self, name):
        model = model_of(name)
        stages = (
            (Bright, {"at": "pixels", "keep": 0.9}), (Bright, {"at": "pixels", "keep": 0.75}),
            (Norms, {"at": "vision.0.mid", "keep": 0.5}), (Norms, {"at": "vision.1", "keep": 0.4}),
            (Norms, {"at": "encoder", "keep": 0.3}),
        )  # fmt: skip
        found = assert_equivalent(model, piped(*stages), tiny_batch(model), steps=2)
        assert [event.site for event in found.report.events] == [
            "pixels",
            "pixels",
            "vision.0.mid",
            "vision.1",
            "encoder",
        ]

    @pytest.mark.parametrize("name", [
        pytest.param(name, marks=() if name == "qwen3_vl" else pytest.mark.slow)
        for name in ANY_SIZE if takes_video(name)
    ])  # fmt: skip
    def test_videos(self, name):
        model = model_of(name)
        batch = tiny_batch(model, (("video",), ("video",)))
        found = assert_equivalent(model, piped(BRIGHT, (Norms, {"at": "vision.1", "keep": 0.4})), batch, steps=2)
        assert all(few < many for few, many in zip(found.report.kept_tokens, found.report.visual_tokens, strict=True))

    def test_images_and_videos_in_one_prompt(self):
        """Each is a sample of its own: rows keep of both."""
        model = model_of("qwen3_vl")
        with torch.no_grad(), prunekit.apply(model, piped(BRIGHT)) as run:
            model(**tiny_batch(model, (("image", "video"), ("video",))))
        (event,) = run.report.events
        assert event.asked == tuple(map(len, event.kept)) == run.report.kept_tokens

    def test_later_stages_read_the_tower(self):
        """Zeros for what has left."""

        @strategy(inputs={"features": Features(-1)})
        class Reads:
            @hookimpl
            def score_tokens(self, features):
                assert bool((features != 0).any(-1).all())
                return features.norm(dim=-1)

        globals()["Reads"] = Reads
        Reads.__module__, Reads.__qualname__ = __name__, "Reads"
        model = model_of("qwen2_vl")
        assert_equivalent(
            model, piped(BRIGHT, (Reads, {"at": 2, "keep": 0.3})), tiny_batch(model, (("image",),)), steps=1
        )

    def test_sizes_hold_in_every_block_where_attention_takes_masks(self):
        """From before the first block on; another stage gets them."""
        model, inputs = tiny_llava(tower="pixtral"), tiny_inputs((1, 2), (9, 6), sizes=True)
        pipeline = piped((Heavy, {"at": "pixels"}), (Heavy, {"at": "vision.1"}))
        found = assert_equivalent(model, pipeline, inputs, steps=2)
        assert [set(event.sizes[0]) for event in found.report.events] == [{3.0}, {9.0}]


class TestSmallerImages:
    @pytest.mark.parametrize("scale", [0.75, 0.5, 0.3])
    def test_they_are_what_the_processor_makes_of_a_smaller_image(self, scale):
        """Up to the rounding of its eight bits."""
        from prunekit.engine.tower.pixels import Resized

        picture = photo(168, 112, 3)
        holder = holder_of()
        ours = Resized.of(None, holder, "image", processed(picture), [scale])
        ((height, width),) = ours.sizes
        assert (height, width) == tuple(max(int(side // 28 * scale + 0.5), 1) * 28 for side in (168, 112))
        theirs = processed(picture.resize((width, height), Image.Resampling.BILINEAR))
        assert torch.equal(ours.arguments["image_grid_thw"], theirs["image_grid_thw"])
        step = 1 / 255 / min(PROCESSOR.image_std)
        assert (ours.arguments["pixel_values"] - theirs["pixel_values"]).abs().max() < 1.1 * step

    @pytest.mark.parametrize(("rows", "scale", "left"), [
        (4, 0.5, (1, 3)), (4, 1.0, (0, 1, 2, 3)), (5, 0.5, (0, 2, 4)), (6, 0.5, (1, 3, 5)),
        (3, 0.1, (1,)), (7, 0.29, (1, 5)),
    ])  # fmt: skip
    def test_tokens_stand_in_the_middle_of_what_they_show(self, rows, scale, left):
        from prunekit.engine.tower.pixels import anchors, smaller

        image = torch.zeros(2, 1, 3, rows * 8, 8)
        height, width = smaller((rows * 8, 8), scale, 8)
        found = anchors(image, torch.zeros(2, 1, 3, height, width), 8)
        assert found.view(2, rows).nonzero()[:, 1].tolist() == [*left, *left]

    def test_later_stages_read_what_was_made_of_them(self):
        model = model_of("qwen3_vl")
        pipeline = piped((Shrink, {}), (Projected, {"at": "encoder", "keep": 0.25}))
        assert_equivalent(model, pipeline, tiny_batch(model), steps=1)

    def test_each_image_has_its_own_factor(self):
        model = model_of("qwen2_5_vl")
        batch = tiny_batch(model, (("image",), ("image", "image")))
        found = assert_equivalent(model, piped((Shrink, {})), batch, steps=2)
        images, seeds = Shrink.SEEN.pop()
        (event,) = found.report.events
        assert len(images) == len(set(seeds)) == 3
        sizes = [size for row in event.resized for size in row]
        cell = holder_of("qwen2_5_vl").cell
        for image, size in zip(images, sizes, strict=True):
            factor = 0.4 + 0.6 * float(image.mean().sigmoid())
            assert size == tuple(max(int(side // cell * factor + 0.5), 1) * cell for side in image.shape[-2:])
        assert "pixels" in str(found.report) and found.report.to_json()["events"][0]["resized"]

    def test_rows_do_not_depend_on_each_other(self):
        model, inputs = tiny_llava(tower="pixtral"), tiny_inputs((1, 2), (9, 6), sizes=True)
        with torch.no_grad(), prunekit.apply(model, piped((Shrink, {}))) as run:
            together, report = model(**inputs).logits, run.report
            for row in range(2):
                alone = model(**row_of_llava(inputs, row)).logits
                assert (together[row, -1] - alone[0, -1]).abs().max() < 1e-9
                assert run.report.events[0].resized[0] == report.events[0].resized[row]

    def test_a_tower_of_one_size_sees_less_and_costs_the_same(self):
        model, inputs = tiny_llava(), tiny_inputs()
        with torch.no_grad():
            dense = model(**inputs).logits
            with prunekit.apply(model, piped((Shrink, {"least": 0.5}))) as run:
                less = model(**inputs).logits
        assert (dense - less).abs().max() > 1e-3
        cost, (event,) = run.report.cost, run.report.events
        assert cost.tower_flops == cost.dense_tower_flops and cost.flops_fraction == 1
        assert event.kept == ((*range(16),),) and 28 <= event.resized[0][0][0] < 56

    def test_at_its_own_size_nothing_changes(self):
        model, inputs = tiny_llava(tower="pixtral"), tiny_inputs(sizes=True)
        with torch.no_grad():
            dense = model(**inputs).logits
            with prunekit.apply(model, piped((Shrink, {"least": 1.0}))):
                assert torch.equal(model(**inputs).logits, dense)

    @pytest.mark.parametrize(("factor", "said"), [
        ("0.0", "above 0 and at most 1"), ("1.5", "above 0 and at most 1"), ("float('nan')", "above 0 and at most 1"),
    ])  # fmt: skip
    def test_factors_that_are_none(self, factor, said):
        model = tiny_llava(tower="pixtral")
        space = {"torch": torch}
        exec(f"def resize_images(self, images):\n    return torch.full((len(images),), {factor})", space)
        made = strategy()(type("Odd", (), {"resize_images": hookimpl(space["resize_images"]), "__module__": __name__}))
        globals()["Odd"] = made
        with pytest.raises(prunekit.PrunekitError, match=said), prunekit.apply(model, piped((made, {}))):
            model(**tiny_inputs(sizes=True))


@strategy(sites=EARLY, keep="refused")
class Sums:
    """Merges at pixels, which have no states."""

    @hookimpl
    def select_tokens(self, valid):
        return Selection(valid, torch.eye(valid.shape[1]).expand(len(valid), -1, -1))


@strategy(sites=EARLY, keep="refused")
class Hooked(Sums):
    """The same in a hook of its own."""

    @hookimpl
    def select_tokens(self, valid):
        return valid

    @hookimpl
    def merge_tokens(self, keep):
        return torch.eye(keep.shape[1]).expand(len(keep), -1, -1)


@strategy(sites=Sites(pixels=True))
class Late:
    """Asks for pixels where they have become states."""

    @hookimpl
    def score_tokens(self, patches):
        return patches.flatten(2).mean(-1)


REFUSED = {
    "a tower of one size": ("llava", [BRIGHT], "takes whole images, of which no part can leave before"),
    "states before there are any": ("qwen2_vl", [(Norms, {"at": "pixels", "keep": 0.5})], "cannot act at 'pixels'"),
    "pixels later on": (
        "qwen2_vl", [(Late, {"at": "encoder", "keep": 0.5})], " asks for patches, which are there at 'pixels'"
    ),
    "pixels and prompt in one stage": (
        "qwen2_vl", [(Bright, {"at": ["pixels", "encoder"], "keep": [0.5, 0.25]})], "split the stage in two"
    ),
    "a merge": ("qwen2_vl", [(Hooked, {"at": "pixels"})], "' merges, and pixels are no states"),
    "a resize behind a cut": ("qwen2_vl", [BRIGHT, (Shrink, {})], "list one such stage, before all others"),
    "two resizes": ("qwen2_vl", [(Shrink, {}), (Shrink, {})], "list one such stage, before all others"),
    "a resize elsewhere": ("qwen2_vl", [(Shrink, {"at": "encoder"})], "needs 'pixels'"),
    "a resize with a budget": ("qwen2_vl", [(Shrink, {"keep": 0.5})], "about whole images, so it takes no `keep`"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_compute(case):
    name, stages, said = REFUSED[case]
    model = model_of(name)
    with pytest.raises(prunekit.PrunekitError, match=said), prunekit.apply(model, piped(*stages)):
        pass


MERGED = "could be merged; cut at 'vision.0'"


def test_refused_when_asked():
    """What only an answer shows: merged pixels, sizes where attention takes no masks."""
    model = model_of("qwen2_vl")
    with prunekit.apply(model, piped((Sums, {"at": "pixels"}))), pytest.raises(prunekit.Unsupported, match=MERGED):
        model(**tiny_batch(model))
    with (
        prunekit.apply(model, piped((Merging, {"at": "vision.0"}))),
        pytest.raises(prunekit.Unsupported, match="takes no masks for them"),
    ):
        model(**tiny_batch(model))


def test_arguments_that_do_not_fit_each_other():
    model = model_of("qwen2_vl")
    batch = tiny_batch(model, (("image",),))
    with prunekit.apply(model, piped(BRIGHT)):
        with pytest.raises(prunekit.Unsupported, match=" and the model's config say "):
            model(**batch | {"pixel_values": batch["pixel_values"][:-4]})
        with pytest.raises(prunekit.Unsupported, match=" did not come with the call, so images cannot be changed"):
            model.model.get_image_features(batch["pixel_values"])
