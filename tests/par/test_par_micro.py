"""PAR on the bundled model: the prompts that its routers are trained on, and the router that is shipped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prunekit_evals.micro import benchmark, choices, scene_prompts
from prunekit_evals.micro.questions import FAMILIES
from prunekit_strategies.par import files

import prunekit
from prunekit import loading
from prunekit.training.answers import dense_answers, divergence, forced_logits
from prunekit.training.data import Sample, encode
from prunekit.training.recipe import Recipe

PROMPTS = scene_prompts.ScenePrompts()


def test_the_prompts_are_of_the_families_of_the_benchmark_and_of_no_scene_of_it():
    drawn = [PROMPTS.drawn(number) for number in range(600)]
    families = Counter(question.family for _, question, _ in drawn)
    asked = {question.family for task in benchmark.TASKS for _, question in benchmark.ITEMS[task](60)}
    assert set(families) == asked <= set(FAMILIES)
    tasks = Counter(scene_prompts.TASKS.index(task) for _, _, task in drawn)
    assert sorted(tasks) == list(range(6)) and min(tasks.values()) > 70
    assert all(bool(question.choices) == (question.family in vars(choices)) for _, question, _ in drawn)
    assert min(shown.seed for shown, _, _ in drawn) >= 1 << 50


def test_a_number_always_gives_the_same_prompt():
    one, again, other = (PROMPTS[number] for number in (5, 5, 6))
    assert one.prompt == again.prompt and one.images[0].tobytes() == again.images[0].tobytes()
    assert (one.prompt, one.images[0].tobytes()) != (other.prompt, other.images[0].tobytes())
    assert len(PROMPTS) == 1_000_000
    with pytest.raises(IndexError):
        PROMPTS[1_000_000]


# The router that is shipped for the bundled model

PRESET = Path(__file__).parents[2] / "strategies" / "pipelines" / "par.yaml"
UNTRAINED = ("stages[0].weights=null", "stages[0].seed=5")


@pytest.fixture(scope="module")
def micro():
    return loading.load("micro")


def divergences(micro, *overrides):
    """KL to the dense answers of 48 prompts that were held out from training, with the engine as users have it."""
    model, processor = micro
    found = []
    for begin in range(len(PROMPTS) - 64, len(PROMPTS) - 16, 16):
        inputs = encode(processor, [PROMPTS[number] for number in range(begin, begin + 16)])
        answers = dense_answers(model, inputs, 8)
        with prunekit.apply(model, PRESET, overrides=list(overrides)) as run:
            logits = forced_logits(model, inputs, answers)
        assert run.report is not None and run.report.cost.flops_fraction < 0.56  # long prompts cost most
        found.append(divergence(answers, logits, Recipe()))
    return torch.cat(found)


def right(micro, *overrides):
    """Which of 20 questions of each task are answered exactly, and the mean of their prefill FLOPs beside dense."""
    model, processor = micro
    rights, costs = [], []
    for task, described in zip(benchmark.TASKS, scene_prompts.TASKS, strict=True):
        items = benchmark.ITEMS[task](20)
        images = ((Image.fromarray(np.asarray(shown.image)),) for shown, _ in items)
        worded = (described.worded(question) for _, question in items)
        samples = [Sample(*one) for one in zip(images, worded, strict=True)]
        inputs = encode(processor, samples)
        with prunekit.apply(model, PRESET, overrides=list(overrides)) as run, torch.no_grad():
            told = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(told, skip_special_tokens=True)
        rights += [text.strip() == question.answer for text, (_, question) in zip(texts, items, strict=True)]
        costs.append(run.report.cost.flops_fraction)
    return np.array(rights), float(np.mean(costs))


def test_the_shipped_router_is_nearer_to_the_dense_model_than_an_untrained_one(micro):
    trained, untrained = divergences(micro), divergences(micro, *UNTRAINED)
    assert float(trained.mean()) < 0.5 * float(untrained.mean())
    assert float((trained < untrained).float().mean()) > 0.6


def test_with_the_shipped_router_more_answers_are_right_at_half_of_the_flops(micro):
    (trained, cost), (untrained, _) = right(micro), right(micro, *UNTRAINED)
    assert cost <= 0.5
    gained, lost = int((trained & ~untrained).sum()), int((untrained & ~trained).sum())
    assert gained > 3 * lost and gained >= 10, (gained, lost)


def test_the_shipped_router_says_how_it_was_made():
    found = json.loads((files.find("micro") / "config.json").read_text())
    assert found["model"]["id"] == "micro" and found["training"]["data"]["digest"] == PROMPTS.digest
    curve = found["training"]["curve"]
    assert curve[-1]["held_out"] < 0.5 * min(curve[0]["held_out"], curve[0]["random"])
