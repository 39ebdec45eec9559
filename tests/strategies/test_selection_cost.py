"""Choosing costs little beside what it saves: every registered strategy says what its decisions cost, and it is true.

At the shape of LLaVA-1.5-7B, which needs no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from prunekit_evals.bench import llava_7b, selection
from torch.utils.flop_counter import FlopCounterMode

from prunekit import plugins
from prunekit.engine.asking import decide
from prunekit.pipeline.statements import selection_flops
from prunekit.strategy.about import about
from prunekit.strategy.declare import implements

NAMES = [entry.name for entry in plugins.registry().strategies()]


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_costs_two_per_cent_of_dense_prefill_at_most(name: str, tmp_path: Path) -> None:
    """Or stands in DEAR with the reason. With its default sites; where a budget is needed, 128 of 576 tokens stay."""
    share = llava_7b.decided(name, tmp_path)
    if share is None:
        assert not llava_7b.runs_here(name)
        return
    assert (share > llava_7b.LIMIT) == (name in llava_7b.DEAR), f"{name}: {share:.2%} of dense prefill"


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_says_its_flops(name: str) -> None:
    """One that says none decides by a list of layers, or is in FREE with the reason."""
    assert implements(plugins.registry().get_strategy(name), "flops") != bool(llava_7b.free(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_says_no_less_than_its_matrix_products_are(name: str, tmp_path: Path) -> None:
    """Counted by torch while it decides on drawn inputs; attention rows and the like are given, and come on top."""
    stage = selection.stage_of(name, tmp_path)
    if isinstance(stage, str):
        assert about(plugins.registry().get_strategy(name)).kind != "token" or name in ("trim", "cdpruner")
        return
    given = selection.drawn(stage, about(type(stage.strategy)))
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        decide(stage, cast(Any, given))
    assert counted.get_total_flops() <= selection_flops(stage, llava_7b.shape(), 64, given.tokens)


def test_the_shape_is_that_of_the_model() -> None:
    """6.5 billion weights in 32 layers, 8.5 TFLOPs for 640 tokens."""
    shape = llava_7b.shape()
    assert (shape.layers, shape.visual_tokens, shape.tower_depth) == (32, 576, 23)
    assert shape.layers * (shape.attention_params + shape.mlp_params) == 6_476_005_376
    assert 8.0e12 < llava_7b.dense_flops() < 8.6e12


def test_every_strategy_is_timed_or_it_is_said_why_not() -> None:
    """What is drawn is what hooks get: nothing of it is refused, and the counts are kept."""
    rows = selection.selection_rows(1, tiny=True)
    assert [row.strategy for row in rows] == NAMES
    for row in rows:
        assert (row.seconds is None) == bool(row.why) and (row.time is None) == bool(row.why)
    assert {row.strategy for row in rows if row.flops is None} == {
        name for name in NAMES if not llava_7b.runs_here(name)
    }
