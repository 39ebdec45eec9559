"""Likelihoods in batches, on one prefill a question: equal to one by one, and to the reference, in float64."""

import pytest
import torch
from lmms_eval.api.instance import Instance
from prunekit_evals.lmms.adapter import PruneKitSimple
from prunekit_evals.lmms.requests import Settings
from prunekit_evals.run.answering import Tally, encode
from prunekit_evals.run.likelihoods import losses
from prunekit_evals.run.prompts import from_visuals
from video_models import clip, video_model

import prunekit
from prunekit.errors import InputError
from prunekit.verify.oracle import MaskedReference

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}
SAID = (" yes", "B", " a longer answer", " no")
EXACT = 1e-9


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return [clip(folder / f"{number}.mp4", 8, seed=number) for number in range(3)]


def prompt_of(parts, film):
    return from_visuals([str(film)], "Is it?", parts.processor, "")


def close(ones, others):
    return all(abs(a[0] - b[0]) < EXACT and a[1] == b[1] for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "qwen3_5"])
@pytest.mark.parametrize("pipeline", [DENSE, FASTV], ids=lambda one: one["name"])
def test_batches_equal_one_by_one(films, family, pipeline):
    parts, made = video_model(family), prunekit.load(pipeline)
    prompt = prompt_of(parts, films[0])
    alone = [losses(parts, made, prompt, [one], 1, Tally())[0] for one in SAID]
    for batch in (1, 3, 99):
        assert close(losses(parts, made, prompt, SAID, batch, Tally()), alone)
    assert len({round(loss, 9) for loss, _ in alone}) == len(SAID)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_losses_are_those_of_the_masked_reference(films, family):
    parts = video_model(family)
    prompt = prompt_of(parts, films[0])
    scored = losses(parts, prunekit.load(FASTV), prompt, SAID, 8, Tally())
    inputs = encode(parts, [prompt])
    with torch.inference_mode(), prunekit.apply(parts.model, prunekit.load(FASTV)) as run:
        parts.model(**inputs)
        report = run.report
    for said, (loss, greedy) in zip(SAID, scored, strict=True):
        ids = parts.processor.tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = MaskedReference(parts.model, inputs, report).logits(ids)
        assert abs(loss - float(torch.nn.functional.cross_entropy(logits[0], ids[0]))) < EXACT
        assert greedy is bool((logits.argmax(-1) == ids).all())


def requests(films, count=4):
    """Questions of four choices, one with two, as lmms-eval makes them of multiple_choice tasks."""
    made = []
    for number in range(count):
        for place, said in enumerate(SAID[:2] if number == 1 else SAID):
            args = ("Is it?", said, lambda doc: [str(doc["film"])], number, "toy", "test")
            about = {"task": "toy", "doc_id": number, "repeats": 1}
            made.append(Instance("loglikelihood", args, place, about))
    return made


def adapter(films, **settings):
    made = PruneKitSimple.over(video_model("qwen2_5_vl"), prunekit.load(FASTV), Settings(**settings))
    made.task_dict = {"toy": {"test": [{"film": films[n % 3]} for n in range(4)]}}
    return made


def test_the_images_of_a_question_are_encoded_once(films, monkeypatch):
    asked = requests(films)
    alone, several = adapter(films), adapter(films, batch_size=8)
    one = [result.text for result in alone.loglikelihood(asked)]
    tower, seen = several.loaded.model.model.visual, []
    handle = tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    try:
        together = [result.text for result in several.loglikelihood(asked)]
    finally:
        handle.remove()
    assert close(together, one)
    assert len(seen) == 4  # one each question
    assert len(several.tally.facts) == 4 and all(one.kept_tokens < one.visual_tokens for one in several.tally.facts)
    assert len(several.tally.images) == 4 and len(set(several.tally.images.values())) == 3


def test_a_continuation_without_tokens_is_refused(films):
    parts = video_model("llava_onevision")
    with pytest.raises(InputError, match="'' has no tokens"):
        losses(parts, prunekit.load(DENSE), prompt_of(parts, films[0]), ["A", ""], 4, Tally())
