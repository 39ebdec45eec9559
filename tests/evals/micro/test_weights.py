"""The shipped checkpoint: small, loadable by anyone, right far more often than blind or chance, and hurt by pruning."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from PIL import Image
from prunekit_evals.micro import model_path
from prunekit_evals.micro.benchmark import ITEMS
from prunekit_evals.micro.card_tables import CHANCE
from prunekit_evals.micro.compose import TOKENS
from prunekit_evals.micro.judge import Judge
from prunekit_evals.micro.prompts import BY_TASK
from prunekit_evals.micro.record import Part, packed, unpacked
from prunekit_evals.micro.selections import SELECTIONS, most
from prunekit_evals.run.stamp import TASKS

COUNT = 60


@functools.cache
def _judge():
    return Judge(model_path())


@functools.cache
def _traced(task):
    items = ITEMS[task](COUNT)
    view = _judge().view(items)
    return view, _judge().trace(view, [q for _, q in items], task)


def _share(task, **kwargs):
    return np.mean(_judge().right(_traced(task)[1], **kwargs))


def _none():
    return torch.empty(COUNT, 0, dtype=torch.int64)


def test_at_most_twelve_megabytes_and_complete():
    files = {p.name: p.stat().st_size for p in model_path().iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert "Open Font License" in (model_path().parent / "icons" / "LICENSE").read_text().replace("\n", " ")


@pytest.mark.parametrize("task", TASKS)
def test_dense_beats_blind_and_chance(task):
    floor = max(CHANCE.get(task, 0) / 100, _share(task, layer=0, keep=_none()))
    assert _share(task) >= floor + 0.2


@pytest.mark.slow
def test_tokens_matter_inside_the_decoder():
    dense = np.mean([_share(task) for task in TASKS])
    for layer, cost in ((1, 0.4), (2, 0.4), (3, 0.4), (4, 0.05)):
        assert np.mean([_share(task, layer=layer, keep=_none()) for task in TASKS]) < dense - cost
    count = round(0.11 * TOKENS)
    means = {
        name: np.mean([_share(task, layer=2, keep=SELECTIONS[name](_traced(task)[0], count)) for task in TASKS])
        for name in ("random", "oracle")
    }
    means["FastV"] = np.mean([_share(task, layer=2, keep=most(_traced(task)[1].last[1], count)) for task in TASKS])
    assert means["random"] + 0.2 <= dense
    assert means["random"] + 0.08 < means["FastV"] < means["oracle"]


@pytest.mark.slow  # every layer of every task
def test_layers_matter():
    dense = np.mean([_share(task) for task in TASKS])
    costs = [dense - np.mean([_share(task, skip=(i,)) for task in TASKS]) for i in range(_judge().layers)]
    assert sum(cost >= 0.02 for cost in costs) >= _judge().layers / 2


def test_auto_classes_generate_what_the_judge_expects():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path())
    model = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32).eval()
    judge = _judge()
    for task in TASKS:
        items = ITEMS[task](8)
        view = judge.view(items)
        expected = judge.right(judge.trace(view, [q for _, q in items], task))
        texts = [_chat(processor, BY_TASK[task](q)) for _, q in items]
        images = [Image.fromarray(shown.image) for shown, _ in items]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        assert [a == q.answer for a, (_, q) in zip(said, items, strict=True)] == expected


def _chat(processor, prompt):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_rights_are_packed_and_paired():
    rights = [False, True, True, False, False]
    assert unpacked(packed(rights)) == rights
    part = Part({"pope": {"dense": [True] * 40, "few": [True] * 20 + [False] * 20}})
    cost = part.cost("few", "dense")
    assert cost.value == -0.5
    assert cost.low < cost.value < cost.high < -0.3
