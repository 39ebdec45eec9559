"""The tokens that an engine run keeps are those that naive twins choose from the stock model's full maps and states."""

from __future__ import annotations

from functools import cache

import pytest
import twins
from cases import BATCHES, PIPELINES, pipeline

import prunekit
from prunekit.testing.tiny import row_of, tiny_inputs, tiny_llava
from prunekit.verify.equivalence import generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

TWINS = {"fastv": twins.fastv, "divprune": twins.divprune, "pool": twins.pool, "stride": twins.stride}
model_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout():
        yield


def token_stages(name):
    return [stage for stage in PIPELINES[name] if stage["use"] not in ("dense", "skip_layers")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [name for name in PIPELINES if token_stages(name)])
def test_every_stage_keeps_what_its_twin_keeps(name, batch, attention):
    inputs = tiny_inputs(*BATCHES[batch])
    with prunekit.apply(model_of(attention), pipeline(name)) as run:
        model_of(attention)(**inputs)
    merges = twins.pool_merges(PIPELINES[name])(run.report)
    for number, (stage, event) in enumerate(zip(token_stages(name), run.report.events, strict=True)):
        earlier = {past: merge for past, merge in merges.items() if past < number}
        reference = MaskedReference(model_of("eager"), inputs, twins.upto(run.report, number), earlier)
        before = [len(tokens) for tokens in twins.entered(run.report, number)]
        assert (event.stage, event.entered) == (stage["use"], tuple(before))
        if stage["use"] in ("blind", "vtw"):
            assert not any(event.kept)
            continue
        counts = [twins.wanted(stage, *pair) for pair in zip(run.report.visual_tokens, before, strict=True)]
        if stage["use"] == "random":
            assert [len(kept) for kept in event.kept] == counts
        else:
            assert event.kept == TWINS[stage["use"]](reference, number, event.site, counts)


def kept_of(model, inputs, **options):
    with prunekit.apply(model, {"name": "draw", "stages": [{"use": "random", "keep": 0.5, **options}]}) as run:
        model(**inputs)
    return run.report.events[0].kept


def test_a_random_draw_belongs_to_the_sample_and_the_seed():
    model, inputs = model_of("sdpa"), tiny_inputs((1, 1, 1), (9, 9, 9))
    kept = kept_of(model, inputs)
    assert len(set(kept)) == 3, "samples differ"
    assert kept == kept_of(model, inputs), "runs do not"
    assert all(kept_of(model, row_of(inputs, row)) == kept[row : row + 1] for row in range(3))
    assert kept != kept_of(model, inputs, seed=1), "seeds do"
    other = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1] += 1
    changed = kept_of(model, other)
    assert changed[1] != kept[1], "another picture, another draw"
    assert (changed[0], changed[2]) == (kept[0], kept[2]), "the others keep theirs"


def test_a_random_draw_is_about_uniform():
    """Each of the 16 tokens is kept in about a quarter of 200 draws: within five standard deviations."""
    model, total = model_of("sdpa"), [0] * 16
    inputs = tiny_inputs((1,) * 8, 3)
    for seed in range(25):
        for row in kept_of(model, inputs, seed=seed, keep=0.25):
            for token in row:
                total[token] += 1
    assert sum(total) == 200 * 4
    assert all(abs(count - 50) < 5 * (200 * 0.25 * 0.75) ** 0.5 for count in total)


def test_fastv_reads_the_layer_before_and_not_another():
    """The twin tells layers apart: on the maps of a neighbouring layer it would keep other tokens."""
    inputs = tiny_inputs((2,), (9,))
    with prunekit.apply(model_of("sdpa"), pipeline("fastv")) as run:
        model_of("sdpa")(**inputs)
    reference = MaskedReference(model_of("eager"), inputs, twins.upto(run.report, 0))
    assert run.report.events[0].kept == twins.fastv(reference, 0, "2", [16])
    assert run.report.events[0].kept != twins.fastv(reference, 0, "3", [16])
    assert run.report.events[0].kept != twins.fastv(reference, 0, "1", [16])


def test_fastv_does_not_choose_again_while_decoding():
    with prunekit.apply(model_of("sdpa"), pipeline("fastv")) as run:
        model_of("sdpa")(**tiny_inputs())
        prefill = run.report
        generate(model_of("sdpa"), tiny_inputs(), max_new_tokens=5)
    assert run.report == prefill
