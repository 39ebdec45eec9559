"""What `prunekit cost` says is what runs: against FlopCounterMode on tiny models, and by hand on a published shape.

Eager attention, whose products the counter sees on every device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit import families, loading, plugins
from prunekit.cli import main
from prunekit.errors import InputError, Unsupported
from prunekit.estimate import Model, estimate, prompt_of
from prunekit.families.tower_inputs import tower_input
from prunekit.pipeline.forecast import forecast
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_model
from prunekit.verify.strategies import DRAWN, with_own

REGISTRY = with_own(plugins.registry())
PIPELINES = {
    "dense": [{"use": "dense"}],
    "encoder": [{"use": "random", "at": "encoder", "keep": 0.5}],
    "two sites": [{"use": "stride", "at": [1, 3], "keep": [0.6, 0.3]}],
    "attention": [{"use": "fastv", "at": 2, "keep": 0.25}],
    "inside a layer": [{"use": "random", "at": "1.mid", "keep": 0.5}],
    "skip": [{"use": "skip_layers", "layers": [1, 4]}],
    "skip the MLP": [{"use": "skip_layers", "layers": [0, 3], "what": "mlp"}],
    "fill": [{"use": "skip_layers", "layers": [2], "phase": "prefill", "fill_kv": True}],
    "freeze": [{"use": "freeze_layers", "layers": [1, 3]}],
    "drop all": [{"use": "vtw", "at": 3}],
    "at the end": [{"use": DRAWN, "at": "prefill_end", "keep": 0.5}],
    "in the tower": [{"use": DRAWN, "at": "vision.0", "keep": 0.5}],
    "in the tower twice": [{"use": DRAWN, "at": ["vision.0.mid", "vision.1"], "keep": [0.7, 0.3]}],
    "at the pixels": [{"use": DRAWN, "at": "pixels", "keep": 0.4}],
    "tower and decoder": [{"use": DRAWN, "at": "vision.1", "keep": 0.8}, {"use": "stride", "at": 2, "keep": 0.3}],
}
# Families whose stock decoder the counter sees whole: a recurrence's products are in no figure, and experts run by the
# tokens that they get.
COUNTED = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma",
    "vipllava", "idefics3", "mistral3", "glm4v", "llava_next_video", "aya_vision",
)  # fmt: skip
OFTEN = COUNTED[:9]
LAYER = r"\.(language_model|text_model)\.layers\.\d+$"


@cache
def model_of(name):
    return tiny_model(name, "eager", torch.float32)


def piped(stages):
    return prunekit.load({"name": "cost", "stages": stages}, registry=REGISTRY)


def executed(model, pipeline, batch):
    """FLOPs of a prefill and one more token: of tower and projector together, of the projector, and of decoder layers,
    with what stages compute there.
    """
    tower = families.find(model).tower
    counter, marks = FlopCounterMode(display=False), []
    with contextlib.ExitStack() as stack:
        for module in filter(None, (tower.projector, *tower.mergers)):
            before = module.register_forward_pre_hook(lambda *_: marks.append(-counter.get_total_flops()))
            behind = module.register_forward_hook(lambda *_: marks.append(counter.get_total_flops()))
            stack.callback(before.remove)
            stack.callback(behind.remove)
        with torch.no_grad(), prunekit.apply(model, pipeline), counter:
            model.generate(**batch, max_new_tokens=2, do_sample=False)

    def of(pattern):
        return sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if re.search(pattern, name))

    outside = of(r"\.(language_model|text_model)$") + of(r"\.lm_head$")
    return counter.get_total_flops() - outside, sum(marks), of(LAYER)


CASES = [(name, "image") for name in COUNTED]
CASES += [(name, "video") for name in COUNTED if takes_video(name)]


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=() if name in OFTEN and kind == "image" else pytest.mark.slow)
    for name, kind in CASES
])  # fmt: skip
def test_every_figure_is_what_the_counter_counts(name, kind):
    model = model_of(name)
    batch, parts = tiny_batch(model, ((kind,),)), families.find(model)
    modality = next(one for one in parts.modalities if one.name == kind)
    given = tower_input(parts.tower, modality, batch)
    shape = dataclasses.replace(parts.shape(), visual_tokens=given.visual)
    done = 0
    for label, stages in PIPELINES.items():
        try:
            bound = piped(stages).bind(shape)
        except prunekit.SpecError:  # this family cannot do that
            continue
        found = forecast(bound, batch["input_ids"].shape[1] - given.visual, given)
        both, projector, layers = executed(model, piped(stages), batch)
        assert found.prefill[0] == found.prefill[1] and found.decode[0] == found.decode[1], label
        assert layers == found.prefill[0] + found.decode[0] + found.selection[0] + found.routing[0], label
        low, high = (found.vision[of] + found.projector[of] for of in (0, 1))
        assert low <= both <= high, label
        if "tower" not in label and "pixels" not in label:
            assert ((both - projector,) * 2, (projector,) * 2) == (found.vision, found.projector), label
            assert (found.vision[0], found.projector[0]) == (found.dense_vision, found.dense_projector)
        elif all(sum(area.times for area in areas) == 1 for areas in given.blocks):
            assert low == high < found.dense_vision + found.dense_projector, label
        done += 1
    assert done >= 10


SHAPES = {
    "llava-1.5-7b": (7_063_427_072, 576),
    "llava-1.5-13b": (13_351_494_656, 576),
    "llava-next-7b": (7_566_747_648, 2928),
    "llava-onevision-7b": (8_030_807_584, 3699),
    "qwen2.5-vl-7b": (8_292_166_656, 576),
    "qwen3-vl-8b": (8_767_123_696, 441),
    "qwen3.5-9b": (9_409_813_744, 441),
    "internvl3-8b": (7_944_373_760, 1280),
    "gemma-3-12b": (12_187_325_040, 256),
}


@cache
def shape_model(name):
    return Model.of(loading.load_skeleton(name)), loading.load_image_processor(name)


@pytest.mark.parametrize("name", SHAPES)
def test_bundled_shapes(name):
    """Their weights, and the visual tokens of an image of 672 x 672 pixels."""
    model, processor = shape_model(name)
    prompt = prompt_of(model, processor, [(672, 672)], None, 64)
    found = estimate(model, prompt, None)
    assert (model.params, prompt.visual_tokens) == SHAPES[name]
    assert found.whole is not None and found.whole[0] == found.whole[1] > found.prefill[0] > 0


def test_the_7b_by_hand():
    """LLaVA-1.5-7B, 576 visual tokens and 64 others, of which FastV leaves 144 + 64 from layer 2 on."""
    model, processor = shape_model("llava-1.5-7b")
    prompt = prompt_of(model, processor, [(336, 336)], None, 64)
    found = estimate(model, prompt, prunekit.load("fastv-k2-r25"))
    weights = 4 * 4096**2 + 3 * 4096 * 11008

    def layer(queries, keys):
        return 2 * weights * queries + 4 * queries * keys * 4096

    assert found.prefill == (2 * layer(640, 640) + 30 * layer(208, 208),) * 2 == (3078409420800,) * 2
    assert found.decode == (2 * layer(1, 641) + 30 * layer(1, 209),) * 2
    assert found.selection == (2 * 640 * 4096,) * 2 and found.router == (0, 0)
    block = 2 * (4 * 1024**2 + 2 * 1024 * 4096) * 577 + 4 * 577**2 * 1024
    assert found.vision == (2 * 3 * 14**2 * 1024 * 576 + 24 * block,) * 2 == (381918216192,) * 2
    assert found.projector == (2 * (1024 * 4096 + 4096**2) * 576,) * 2
    assert found.kv_numbers == (2 * 4096 * (2 * 640 + 30 * 208),) * 2
    assert found.mean_tokens == (235, 235) and found.last_tokens == (208, 208)
    papers = sum(4 * n * 4096**2 + 2 * n**2 * 4096 + 2 * n * 4096 * 11008 for n in [640] * 2 + [208] * 30)
    assert found.paper == (papers, papers)


def test_what_decides_by_itself_is_a_range():
    model, processor = shape_model("llava-1.5-7b")
    prompt = prompt_of(model, processor, [(336, 336)], None, 64)
    dense = estimate(model, prompt, None)
    adaptive = estimate(model, prompt, prunekit.load("prumerge"))
    assert 0 < adaptive.prefill[0] < adaptive.prefill[1] == dense.prefill[0]
    assert adaptive.kv_numbers[0] < adaptive.kv_numbers[1] and adaptive.last_tokens == (64, 640)


def test_several_images_and_frames():
    model, processor = shape_model("qwen2.5-vl-7b")

    def seen(sizes, frames=None):
        return prompt_of(model, processor, sizes, frames, 64)

    assert seen([(448, 448), (336, 672)]).visual_tokens == 256 + 288
    assert seen([(448, 448)], 5).visual_tokens == 3 * 256  # two frames make one token
    internvl = prompt_of(*shape_model("internvl3-8b"), [(1024, 1024)], 4, 64)
    assert internvl.visual_tokens == 4 * 256 and "4 images" in internvl.note


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_tower_that_is_not_known_is_counted_on_the_meta_device_or_refused(name):
    model = Model.of(tiny_model(name, "eager", torch.float32).to("meta"))
    batch = tiny_batch(tiny_model(name, "eager", torch.float32), (("image",),))
    arguments = {key: value for key, value in batch.items() if key != "input_ids"}
    if name == "gemma4":  # it reads where its patches are
        with pytest.raises(Unsupported, match=r"makes of its images cannot be told without running it .*prunekit run"):
            prompt_of(model, lambda **_: arguments, [(56, 56)], None, 8)
        return
    prompt = prompt_of(model, lambda **_: arguments, [(56, 56)], None, 8)
    whole = estimate(model, prompt, prunekit.load({"stages": [{"use": "random", "keep": 0.5}]}))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        live = tiny_model(name, "eager", torch.float32)
        live.model.get_image_features(pixel_values=batch["pixel_values"])
    assert whole.vision[0] + whole.projector[0] == counter.get_total_flops()


def test_images_that_a_processor_refuses():
    model, processor = shape_model("qwen2.5-vl-7b")
    with pytest.raises(InputError, match="refuses images of 10x4000 pixels"):
        prompt_of(model, processor, [(10, 4000)], None, 64)


class TestCommand:
    """`prunekit cost` as a user meets it."""

    def run(self, capsys, *arguments):
        try:
            code = main.main(["cost", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    def test_one_pipeline_is_one_row(self, capsys):
        code, out, _ = self.run(
            capsys, "fastv-k2-r25", "--model", "llava-1.5-7b", "--image", "336x336", "--text-tokens", "46", "--json"
        )
        data = json.loads(out)
        assert code == 0 and data["exact"] is True and data["note"] is None
        assert (data["model"], data["prompt_tokens"], data["visual_tokens"]) == ("llava-1.5-7b", 622, 576)
        assert list(data["flops"]) == ["vision", "projector", "router", "selection", "prefill", "decode_per_token"]
        assert data["dense"]["flops"]["prefill"] == 8258989326336  # 32 layers by hand: 8.259 T
        assert data["kv_bytes"] == 2 * 2 * 4096 * (2 * 622 + 30 * 190)
        assert data["weights"] == {"parameters": 7_063_427_072, "bytes": 14_126_854_144}
        assert data["pipelines"][0]["flops"] == data["flops"] and data["cuts"][0]["visual_tokens"] == 144

    def test_ranges_and_dense_alone(self, capsys):
        _, out, _ = self.run(capsys, "prumerge", "--model", "llava-1.5-7b", "--json", "--dtype", "float32")
        low, high = json.loads(out)["flops"]["prefill"]
        assert low < high and json.loads(out)["exact"] is False
        code, out, _ = self.run(capsys, "--model", "qwen3.5-9b")
        assert code == 0 and out.count("\ndense ") == 1 and "without the recurrence" in out

    def test_one_budget_for_all(self, capsys):
        open_ones = [f"{{name: {name}, stages: [{{use: {name}, at: 2}}]}}" for name in ("fastv", "random")]
        late = "{name: late, stages: [{use: random, at: 30}]}"
        asked = [*open_ones, "dense", late, "fastv-k2-r25", "--model", "llava-1.5-7b", "--equal", "flops=0.5", "--json"]
        code, out, err = self.run(capsys, *asked)
        data = json.loads(out)
        assert code == 2 and [row["pipeline"] for row in data["pipelines"]] == ["fastv", "random", "dense"]
        for row in data["pipelines"][:2]:
            spent = row["flops"]["prefill"] + row["flops"]["selection"]
            assert 0.49 < spent / data["dense"]["flops"]["prefill"] <= 0.5
        assert "late: 0.5 cannot be reached: with one token at every open stage it is still 0.94" in err
        assert "fastv-k2-r25: no stage is left open" in err and len(data["refused"]) == 2

    @pytest.mark.parametrize(("arguments", "message"), [
        (["--image", "336"], "'336' is not a height and a width in pixels, such as 672x448"),
        (["--image", "0x336"], "'0x336' is not a height and a width"),
        (["--image", "20000x20"], "'20000x20' is too large: at most 16384 pixels a side"),
        (["--frames", "0"], "'0' is not a whole number of at least 1"),
        (["--frames", "4", "--image", "8x8", "--image", "9x9"], "--frames is of one video"),
        (["--text-tokens", "-3"], "'-3' is not a whole number of at least 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--equal", "flop=0.5"], "names no accounting, such as flops=0.5 (did you mean 'flops'?"),
        (["--equal", "flops=50"], "names no fraction in (0, 1], such as flops=0.5"),
        (["--equal", "flops"], "names no fraction in (0, 1]"),
        (["nothing-like-it"], "no such file: 'nothing-like-it', and no pipeline of that name"),
        (["fastv-k2-r25", "stages.0.at=40"], "the model has layers 0 to 31"),
        (["fastv-k2-r25", "stages.0.kep=0.3"], "did you mean 'keep'"),
    ])  # fmt: skip
    def test_wrong_inputs(self, capsys, arguments, message):
        code, _, err = self.run(capsys, *arguments, "--model", "llava-1.5-7b")
        assert code == 2 and message in err and "Traceback" not in err

    @pytest.mark.parametrize(("model", "message"), [
        ("llava-1.5-7", "did you mean 'llava-1.5-7b'?"),
        ("no/such", "it is not in the local cache; `--download` fetches it"),
        ("./nowhere", "no such model folder: './nowhere'"),
    ])  # fmt: skip
    def test_models_that_are_not_there(self, capsys, model, message):
        code, _, err = self.run(capsys, "--model", model)
        assert code == 2 and message in err

    def test_a_folder_without_an_image_processor(self, capsys, tmp_path):
        (tmp_path / "config.json").write_text((loading.resolve("llava-1.5-7b") / "config.json").read_text())
        code, _, err = self.run(capsys, "--model", str(tmp_path))
        assert code == 2 and "does not load" in err and "preprocessor_config.json" in err

    def test_a_config_cannot_run(self):
        with pytest.raises(InputError, match=r"'llava-1.5-7b' is a config without weights .*`prunekit cost`"):
            loading.load("llava-1.5-7b")
