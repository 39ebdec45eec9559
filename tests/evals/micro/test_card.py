"""The card says what was measured, and what was measured is what the shipped weights answer."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from prunekit_evals.micro import model_path
from prunekit_evals.micro.card_tables import shown
from prunekit_evals.micro.measure import measure
from prunekit_evals.micro.record import load


def test_the_card_holds_what_was_measured():
    record = load(model_path() / "measured.jsonl")
    card = (model_path() / "README.md").read_text()
    assert record.seeds
    for parts in record.seeds.values():
        for task in parts["dense"].tasks:
            assert len(parts["dense"].right("dense", task)) >= 500
            assert shown(parts["dense"].share("dense", task)) in card


def test_what_was_measured_is_what_the_weights_answer():
    """A few hundred answers, of every task."""
    record = load(model_path() / "measured.jsonl")
    shipped = next(iter(record.seeds.values()))
    for task in shipped["dense"].tasks:
        found = measure(model_path(), ("dense",), (task,), 50)["dense"][task]
        for row in ("dense", "blind"):
            told = shipped["dense"].right(row, task)[:50]
            assert np.mean(np.array(found[row]) == told) >= 0.96  # a tie may fall the other way elsewhere
