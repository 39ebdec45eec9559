"""Every family through the engine: tokens dropped at two places, a layer skipped, against the masked reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prunekit
from prunekit.testing.tiny_families import ROWS, TinyBatch, row_of, takes_video, tiny_batch, tiny_model, tiny_names
from prunekit.verify.equivalence import assert_equivalent

NAMES = tiny_names()
STAGES: tuple[dict[str, Any], ...] = (
    {"use": "random", "at": "encoder", "keep": 0.7},
    {"use": "fastv", "at": 2, "keep": 0.5},
    {"use": "skip_layers", "layers": [4]},
)
PIPELINE = {"name": "all-three", "stages": list(STAGES)}


def batch(model: Any) -> TinyBatch:
    """Two rows of different length; a video among them where the family takes any."""
    family = model.config.model_type
    if not takes_video(family):
        return tiny_batch(model, ROWS)
    return tiny_batch(model, (("video",), ("video", "video")) if "glm" in family else (("image", "image"), ("video",)))


@pytest.mark.parametrize("family", NAMES)
def test_pruned_and_skipped_equals_masked(family: str) -> None:
    model = tiny_model(family)
    found = assert_equivalent(model, PIPELINE, batch(model), steps=4)
    entered, kept = found.report.visual_tokens, found.report.kept_tokens
    assert len(set(entered)) == 2 and all(0 < few < many for few, many in zip(kept, entered, strict=True))


@pytest.mark.parametrize("family", NAMES)
def test_a_row_is_pruned_alone_as_in_its_batch(family: str) -> None:
    model = tiny_model(family)
    inputs = batch(model)
    with prunekit.apply(model, PIPELINE) as run:
        together = model.generate(**inputs, max_new_tokens=4)
        whole = run.report
        for row in range(2):
            single = row_of(inputs, row)
            alone = model.generate(**single, max_new_tokens=4)
            assert torch.equal(alone[0, -4:], together[row, -4:])
            assert run.report is not None and whole is not None
            assert [event.kept[0] for event in run.report.events] == [event.kept[row] for event in whole.events]


@pytest.mark.parametrize("family", NAMES)
def test_strategies_see_the_grid(family: str) -> None:
    """A strategy that asks for coordinates runs on every family."""
    model = tiny_model(family)
    with prunekit.apply(model, {"name": "pool", "stages": [{"use": "pool", "keep": 0.25}]}) as run:
        model(**batch(model))
    assert run.report is not None
    assert all(0 < few < many for few, many in zip(run.report.kept_tokens, run.report.visual_tokens, strict=True))
