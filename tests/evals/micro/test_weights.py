"""The shipped checkpoint: small, loadable by anyone, and right far more often than blind or chance."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from PIL import Image
from prunekit_evals.micro import model_path
from prunekit_evals.micro.benchmark import ITEMS, TASKS
from prunekit_evals.micro.measure import PROMPTS, Judge, measure, wilson
from prunekit_evals.micro.read import TOKENS

CHANCE = {"pope": 0.65, "mme": 0.5, "gqa": 0.25, "mmbench_en_dev_static": 0.25, "scienceqa_img": 0.25}


def test_at_most_twelve_megabytes_and_complete():
    files = {p.name: p.stat().st_size for p in model_path().iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert "Open Font License" in (model_path().parent / "icons" / "LICENSE").read_text().replace("\n", " ")


@pytest.mark.parametrize("task", TASKS)
def test_dense_beats_blind_and_chance(task):
    table = measure(model_path(), 120, keeps=(), tasks=(task,), removals=())
    share = {row: np.mean(np.concatenate(list(table[row][task].values()))) for row in ("dense", "blind")}
    assert share["dense"] >= max(CHANCE[task], share["blind"]) + 0.25


def test_few_random_tokens_cost_and_informed_ones_cost_less():
    table = measure(model_path(), 60, keeps=(0.11,), tasks=("pope", "gqa"), removals=())

    def mean(row):
        return np.mean([ok for families in table[row].values() for rights in families.values() for ok in rights])

    informed = max(mean(f"{name} 11%") for name in ("CLS attention", "diversity", "oracle"))
    assert mean("random 11%") + 0.1 <= mean("dense")
    assert mean("random 11%") < informed


def test_auto_classes_generate_what_the_judge_expects():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model_path())
    model = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.float32).eval()
    judge = Judge(model_path())
    for task in TASKS:
        items = ITEMS[task](8)
        keep = torch.arange(TOKENS).expand(len(items), -1)
        expected = judge.right(judge.view(items), keep, [q for _, q in items], task)
        texts = [_chat(processor, PROMPTS[task](q)) for _, q in items]
        images = [Image.fromarray(shown.image) for shown, _ in items]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
        out = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        assert [a == q.answer for a, (_, q) in zip(said, items, strict=True)] == expected


def _chat(processor, prompt):
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_the_card_holds_what_was_measured():
    measured = json.loads((model_path() / "measured.json").read_text())["chosen"]
    card = (model_path() / "README.md").read_text()
    for task in TASKS:
        right, asked = np.sum(list(measured["dense"][task].values()), axis=0)
        assert asked >= 500
        low, high = wilson(int(right), int(asked))
        assert f"{100 * right / asked:.1f} ({100 * low:.1f} to {100 * high:.1f})" in card


def test_wilson_interval():
    low, high = wilson(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
