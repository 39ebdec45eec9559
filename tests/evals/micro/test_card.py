"""The card says what was measured, and what was measured is what the shipped weights answer."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from prunekit_evals.micro import model_path
from prunekit_evals.micro.card_tables import shown
from prunekit_evals.micro.measure import measure
from prunekit_evals.micro.record import earlier, load, packed, save

from prunekit.loading import model_identity


def test_the_card_holds_what_was_measured():
    record = load(model_path() / "measured.jsonl")
    card = (model_path() / "README.md").read_text()
    assert record.seeds
    for parts in record.seeds.values():
        for task in parts["dense"].tasks:
            assert len(parts["dense"].right("dense", task)) >= 500
            assert shown(parts["dense"].share("dense", task)) in card


@pytest.mark.slow
def test_what_was_measured_is_what_the_weights_answer():
    """A few hundred answers, of every task."""
    record = load(model_path() / "measured.jsonl")
    shipped = next(iter(record.seeds.values()))
    for task in shipped["dense"].tasks:
        found = measure(model_path(), ("dense",), (task,), 50)["dense"][task]
        for row in ("dense", "blind"):
            told = shipped["dense"].right(row, task)[:50]
            assert np.mean(np.array(found[row]) == told) >= 0.96  # a tie may fall the other way elsewhere


def test_a_model_that_was_measured_is_not_measured_again(tmp_path):
    file = tmp_path / "measured.jsonl"
    assert earlier(file, "aaa", 3) is None
    one = {"dense": {"pope": {"dense": packed([True, False, True])}}}
    save(file, {"pope": ["existence"] * 3}, {"2": "aaa"}, {"2": one})
    assert earlier(file, "aaa", 3) == one
    assert earlier(file, "bbb", 3) is None  # other weights
    assert earlier(file, "aaa", 4) is None  # other questions


def test_the_card_is_of_the_shipped_weights():
    data = json.loads((model_path() / "measured.jsonl").read_text())
    assert next(iter(data["models"].values())) == model_identity(model_path())
