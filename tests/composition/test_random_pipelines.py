"""Random pipelines of up to four registered strategies on eight families: exact in float64, or refused with why.

Exact is to be equal to the masked reference; where a layer holds a state, and around a decoder that is not known
inside, to lists that really are shorter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from compositions import Bench, built, names
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st

import prunekit
from prunekit import plugins
from prunekit.families import find
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.strategy.declare import stage_keys
from prunekit.strategy.sites import Site
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_model

# One crop and several; positions of three axes, a deep stack; sliding windows and prompts that see ahead; images of any
# size; layers that read the KV of others; layers with a state; and a decoder that is not known inside.
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "qwen3_5", "closed")
SITES = tuple(
    map(
        Site.parse,
        ("pixels", "vision.0.mid", "vision.0", "vision.1", "encoder", "0", "1", "1.mid", "2", "2.after", "3", "3.mid",
         "4", "5", "5.after", "prefill_end"),
    )
)  # fmt: skip
IMAGE, NEITHER = ("image",), ()
BATCHES = {"one": (IMAGE,), "ragged": (IMAGE, ("image", "image")), "words": (NEITHER, IMAGE)}
SOME, EACH = 5, 125  # pipelines of each family, in `make test` and in the full suite


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory):
    """A model of each family, made when it is needed."""
    made = {}

    def bench(family):
        if family not in made:
            model = tiny_model("llava" if family == "closed" else family)
            parts = find(model)
            if family == "closed":
                parts = replace(parts, opaque="it is closed for this test", layers=(), rotary=None)
            video = ("video",)
            videos = {"video": (video, IMAGE), "videos": (video, video)} if takes_video(model.config.model_type) else {}
            rows = BATCHES | videos
            batches = {name: tiny_batch(model, batch) for name, batch in rows.items()}
            made[family] = Bench(model, parts, batches, tmp_path_factory.mktemp(family))
        return made[family]

    return bench


def budgets(draw, use, index):
    """What a stage says beside its name, options and site."""
    keys = stage_keys(plugins.registry().get_strategy(use))
    said = {}
    if "keep" in keys and (
        plugins.registry().get_strategy(use).__prunekit__.keep == "required" or draw(st.booleans(), label="says keep")
    ):
        said["keep"] = draw(st.sampled_from((0.9, 0.7, 0.5, 0.3)), label="keep")
        if index and draw(st.booleans(), label="of what is left"):
            said["keep_of"] = "current"
    if "keep_layers" in keys:
        said["keep_layers"] = draw(st.sampled_from((0.5, 4)), label="keep_layers")
    if use in ("skip_layers", "freeze_layers"):
        said["layers"] = sorted(draw(st.sets(st.integers(0, 5), min_size=1, max_size=2), label="layers"))
    if use == "skip_layers":
        said["what"] = draw(st.sampled_from(("layer", "attention", "mlp")), label="what")
    return said


def drawn(draw, bench):
    """A pipeline as a file has it, its stages in the order of the data, most of them where they may act."""
    use = st.one_of(*[st.sampled_from(bench.suited)] * 4, st.sampled_from(names()))
    chosen = draw(st.lists(use, min_size=1, max_size=4), label="strategies")
    stages = []
    for use in chosen:
        stage = built(bench, use)
        said, first = {}, None
        if stage.cuts_tokens:
            default = stage.placements(bench.shape.layers, bench.shape.tower_depth)
            first = default[0][0] if default else SITES[4]
            allowed = [site for site in SITES if stage.sites.reason_against(site) is None]
            if not stage.is_image and allowed and draw(st.booleans(), label="says where"):
                first = draw(st.sampled_from(allowed), label="at")
                said["at"] = str(first)
        stages.append((first, use, said))
    stages.sort(key=lambda one: SITES[-1] if one[0] is None else one[0])
    made = [bench.stage(use, **said, **budgets(draw, use, at)) for at, (_, use, said) in enumerate(stages)]
    for at, stage in enumerate(made):
        if "keep" in stage and "keep_of" not in stage:  # a later stage keeps less of all tokens than those before
            stage["keep"] = round(stage["keep"] * 0.6**at, 3)
    return {"name": "drawn", "stages": made, "positions": draw(st.sampled_from(("keep", "keep", "renumber")))}


def search(bench, examples, start):
    """How so many pipelines were met."""
    met = Counter()

    @seed(start)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def each(data):
        batch = data.draw(st.sampled_from([name for name in sorted(bench.batches) if name != "videos"]), label="batch")
        pipeline = drawn(data.draw, bench)
        if batch == "video" and bench.cuts_tower(pipeline):  # the reference follows one kind of visual input there
            batch = "videos"
        why = bench.refusal(pipeline, batch)
        met["refused" if why else "exact"] += 1
        event("refused" if why else "exact")

    each()
    return met


@pytest.mark.parametrize("family", FAMILIES)
def test_some_pipelines_are_exact_or_refused(family, bench_of):
    met = search(bench_of(family), SOME, FAMILIES.index(family))
    assert met.total() >= SOME


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_pipelines_are_exact_or_refused(family, bench_of):
    met = search(bench_of(family), EACH, 100 + FAMILIES.index(family))
    print(family, dict(met))
    assert met["exact"] > EACH / 8, met


# What the random pipelines have met and was wrong.


def test_a_schedule_without_budgets_is_for_any_number_of_sites(bench_of):
    """FEATHER decides by itself, at one site as at its own two."""
    bench = bench_of("llava")
    for sites, count in ((2, 1), ([1, 3, 4], 3)):
        pipeline = prunekit.load({"stages": [{"use": "feather", "at": sites}]})
        assert len(pipeline.bind(bench.shape).cuts) == count
    assert not bench.refusal({"stages": [{"use": "feather", "at": 2}]}, "ragged")


@prunekit.strategy(keep="optional", schedule={Site(1): 0.5, Site(3): 0.25})
class Twice:
    """Baseline: by the length of states, at two sites with budgets of their own."""

    @prunekit.hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


def test_a_schedule_with_budgets_is_for_its_own_number_of_sites(bench_of):
    shape, registry = bench_of("llava").shape, Registry("here", "here 1")
    registry.strategy("twice", f"{__name__}:Twice")
    for keys, count in (({}, 2), ({"at": [2, 4]}, 2), ({"at": 2, "keep": 0.4}, 1)):
        assert len(build({"stages": [{"use": "twice", **keys}]}, registry=registry).bind(shape).cuts) == count
    with pytest.raises(prunekit.SpecError, match=r"stages\[0\].at: names 1 site, but 'twice' has budgets for 2 \(say"):
        build({"stages": [{"use": "twice", "at": 2}]}, registry=registry).bind(shape)


def test_the_reference_merges_in_the_tower_of_one_image(bench_of):
    bench = bench_of("llava")
    assert not bench.refusal({"stages": [bench.stage("tome", keep=0.5)]}, "one")
