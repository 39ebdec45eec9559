"""What cells of one task share is computed once, and changes no answer."""

import functools

import pytest
import torch
from PIL import Image
from prunekit_evals import runner
from prunekit_evals.lmms import requests, tasks
from prunekit_evals.run import answering, kept
from prunekit_evals.run.kept import Kept
from prunekit_evals.run.prompts import Prompt
from prunekit_evals.runner import Plan, Runner, Silent
from transformers import BatchFeature

import prunekit


def prompt(number, side=10):
    return Prompt(f"question {number}", (Image.new("RGB", (side, side), (number, 0, 0)),))


def made(count):
    return BatchFeature({"input_ids": torch.zeros(count, 4, dtype=torch.int64)})


def test_prompts_and_inputs_are_made_once_a_task():
    store, asked = Kept(10_000), []
    store.begin("pope")
    for _ in range(2):
        for number in (1, 2):
            store.prompt(number, lambda number=number: asked.append(number) or prompt(number))
            store.inputs([prompt(number)], lambda number=number: asked.append(-number) or made(1))
        store.begin("pope")
    assert asked == [1, -1, 2, -2]
    store.begin("mme")
    store.prompt(1, lambda: asked.append(1) or prompt(1))
    assert asked[4:] == [1]


def test_other_pixels_or_words_are_other_inputs():
    store, asked = Kept(10_000), []
    store.begin("pope")
    for some in ([prompt(1)], [prompt(2)], [prompt(1), prompt(2)], [Prompt("question 1", ())]):
        store.inputs(some, lambda: asked.append(0) or made(1))
    assert len(asked) == 4


def test_what_has_no_room_is_made_again():
    store, asked = Kept(700), []  # two images of 300 bytes
    store.begin("pope")
    for number in (1, 2, 3, 1, 2, 3, 3):
        store.prompt(number, lambda number=number: asked.append(number) or prompt(number))
    assert asked == [1, 2, 3, 3, 3]
    clip = Prompt("question", (), (object(),))
    assert store.prompt(4, lambda: clip) is clip and store.prompt(4, lambda: prompt(1)) is not clip
    nothing, asked = Kept(), []
    for _ in range(2):
        nothing.prompt(1, lambda: asked.append(1) or prompt(1))
        nothing.inputs([prompt(1)], lambda: asked.append(2) or made(1))
    assert asked == [1, 2, 1, 2]


def test_callers_may_change_what_they_get():
    store = Kept(10_000)
    store.begin("pope")
    first = store.inputs([prompt(1)], lambda: made(1))
    first["more"] = torch.ones(1)
    assert list(store.inputs([prompt(1)], lambda: made(1))) == ["input_ids"]


@pytest.mark.parametrize("names", ["pope,mme"])
def test_cells_are_the_same_with_and_without(loaded, checkpoint, data_root, tmp_path, monkeypatch, names):
    """Also where a stage resizes images, whose inputs are made of what the processor gave."""
    pipelines = [
        prunekit.load({"name": name, "stages": [stage]})
        for name, stage in (
            ("dense", {"use": "dense"}),
            ("fastv", {"use": "fastv", "at": 2, "keep": 0.25}),
            ("smaller", {"use": "downsample", "scale": 0.5}),
            ("reads", {"use": "fastervlm", "keep": 0.25}),
            ("draws", {"use": "random", "at": "encoder", "keep": 0.25}),
        )
    ]
    counts = {"processed": 0, "read": 0, "seen": 0}

    def counted(name, function):
        def wrapper(*given, **named):
            counts[name] += 1
            return function(*given, **named)

        return wrapper

    monkeypatch.setattr(answering, "_processed", counted("processed", answering._processed))
    monkeypatch.setattr(requests, "from_messages", counted("read", requests.from_messages))
    tower = type(loaded.model.base_model.vision_tower)
    monkeypatch.setattr(tower, "forward", functools.wraps(tower.forward)(counted("seen", tower.forward)))
    found = {}
    for room in (0, kept.ROOM):
        monkeypatch.setattr(runner, "ROOM", room)
        counts.update(processed=0, read=0, seen=0)
        plan = Plan(
            str(checkpoint), tuple(pipelines), tuple(tasks.find(names.split(","))), tasks.data_at(data_root),
            tmp_path / str(room), limit=6, batch_size=4, device="cpu", timing=False,
        )  # fmt: skip
        outcome = Runner(plan, Silent()).run()
        assert not outcome.failed
        found[room] = [(one.questions, one.saved, one.metrics, one.notes) for one in outcome.cells]
        times = 1 if room else len(pipelines)
        # Two pipelines need the tower for themselves; the others share what it saw.
        seen = 2 * 2 * (3 if room else len(pipelines))
        assert counts == {"processed": 2 * 2 * times, "read": 2 * 6 * times, "seen": seen}
    assert found[0] == found[kept.ROOM]
