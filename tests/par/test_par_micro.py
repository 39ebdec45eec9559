"""PAR on the bundled model: the prompts that its routers are trained on."""

from __future__ import annotations

from collections import Counter

import pytest
from prunekit_evals import scene_prompts
from prunekit_evals.micro import benchmark, choices
from prunekit_evals.micro.questions import FAMILIES

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
