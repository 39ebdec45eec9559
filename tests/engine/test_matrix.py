"""The exactness matrix: every cell equals the masked reference in prefill and eight decode steps, or is refused.

`make test` runs one cell in 19, `make test-full` all of them, and writes their table into docs/exactness.md.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import nullcontext
from functools import cache

import exactness_table
import pytest
import torch
from examples import EXAMPLES, registered
from flash_kernel import flash
from matrix import (
    ALLOWED,
    BATCHES,
    CELLS,
    EVERY,
    FAMILIES,
    GROUP_OF,
    PIPELINES,
    SEVERAL_ROWS,
    SHAPES,
    SOME,
    TOWER_TOO,
    VIDEO_TOO,
    WAYS,
)  # fmt: skip
from wrong import AllAlike, OneLayerLate, PadsSeen, Renumbered, Uncropped, Unfilled

import prunekit
from prunekit.errors import PrunekitWarning, SpecError, Unsupported
from prunekit.testing.tiny_families import row_of, tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.stock import stock_run_of

STEPS, EXACT = 8, 1e-9


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with registered():
        yield


@cache
def model_of(family, attention, dtype=torch.float64):
    return tiny_model(family, attention, dtype)


@cache
def batch_of(family, attention, batch, dtype=torch.float64):
    return tiny_batch(model_of(family, attention, dtype), BATCHES[batch])


@cache
def stock_run(family, attention, batch, dtype=torch.float64):
    with Float64Throughout() if dtype == torch.float64 else nullcontext():
        return stock_run_of(model_of(family, attention, dtype), batch_of(family, attention, batch, dtype), STEPS + 1)


def pipeline(name):
    return {"name": name, **PIPELINES[name]}


def run(cell):
    """The largest error of the cell."""
    which = (cell.family, cell.attention, cell.batch, torch.float32 if cell.way == "float32" else torch.float64)
    model, inputs = model_of(which[0], which[1], which[3]), batch_of(*which)
    seen, options = stock_run(*which), WAYS.get(cell.way, {})
    with flash(model) if cell.way == "flash" else nullcontext():
        found = assert_equivalent(
            model, pipeline(cell.pipeline), inputs, STEPS, ALLOWED.get(cell.way, EXACT), stock_run=seen, **options
        )
    assert found.logits.shape[1] == STEPS + 1
    return found.error


def some_or_slow(all_of, some):
    chosen = set(some)
    return [pytest.param(one, id=str(one), marks=() if one in chosen else pytest.mark.slow) for one in all_of]


@pytest.mark.parametrize("cell", some_or_slow(CELLS, SOME))
def test_cell(cell):
    if cell.refused:
        with pytest.raises((Unsupported, SpecError), match=cell.refused):
            run(cell)
        record(cell, None)
    else:
        record(cell, run(cell))


def record(cell, error):
    """For `exactness_table.py`: one line a cell, in the file that the environment names."""
    if path := os.environ.get("PRUNEKIT_EXACTNESS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": str(cell), "error": error}) + "\n")


@pytest.mark.parametrize("cell", some_or_slow(SEVERAL_ROWS, SEVERAL_ROWS[::EVERY]))
def test_every_row_is_its_own_run(cell):
    """Alone, without padding, a row has the kept tokens, counts and logits that it has in its batch."""
    model, inputs = model_of(cell.family, "sdpa"), batch_of(cell.family, "sdpa", cell.batch)
    spec = pipeline(cell.pipeline)
    if cell.refused:
        with pytest.raises((Unsupported, SpecError), match=cell.refused), prunekit.apply(model, spec):
            model(**inputs)
        return
    with Float64Throughout(), prunekit.apply(model, spec) as run:
        together, report = generate(model, inputs, max_new_tokens=4), run.report
        for row in range(2):
            nothing_to_prune = report.events and not report.visual_tokens[row]
            with pytest.warns(PrunekitWarning, match="no visual tokens") if nothing_to_prune else nullcontext():
                alone = generate(model, row_of(inputs, row), max_new_tokens=4)
            for step, logits in enumerate(together.logits):
                assert (logits[row] - alone.logits[step][0]).abs().max() < EXACT
            kept = [event.kept[0] for event in run.report.events] or [()] * len(report.events)
            assert [event.kept[row] for event in report.events] == kept
            for field in ("layer_tokens", "mlp_tokens", "kv_tokens", "plans"):
                assert getattr(report, field)[row] == getattr(run.report, field)[0], field


WRONG = {
    Renumbered: "before", OneLayerLate: "mid", PadsSeen: "before", AllAlike: "recycle", Uncropped: "prefill-end",
    Unfilled: "fill-kv",
}  # fmt: skip
# Of positions, masks, features, and keys and values that layers share.
SPECIAL = ("qwen2_5_vl", "gemma3", "paligemma", "qwen3_vl", "idefics3", "cohere2_vision", "gemma3n", "gemma4")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", some_or_slow(SPECIAL, SPECIAL[:2]))
def test_a_wrong_reference_is_noticed(family, wrong):
    name = "before" if (family, wrong) == ("cohere2_vision", OneLayerLate) else WRONG[wrong]
    model, inputs, seen = (
        model_of(family, "sdpa"),
        batch_of(family, "sdpa", "ragged"),
        stock_run(family, "sdpa", "ragged"),
    )
    found = assert_equivalent(model, pipeline(name), inputs, STEPS, stock_run=seen)
    tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
    with Float64Throughout():
        logits = wrong(model, inputs, found.report, found.merges, seen).logits(tokens)
    assert (logits - found.logits).abs().max() > 1e-3


class TestTheMatrixItself:
    """What is counted is what there is, and one in `EVERY` of it has something of everything."""

    def test_it_is_large_and_has_no_cell_twice(self):
        assert len(CELLS) >= 2000
        assert len(set(map(str, CELLS))) == len(CELLS)
        # Most towers take whole images, for which all of `pixels` is refused.
        elsewhere = [cell for cell in CELLS if GROUP_OF[cell.pipeline] != "pixels"]
        assert sum(bool(cell.refused) for cell in elsewhere) < len(elsewhere) / 10

    def test_every_example_is_in_a_pipeline(self):
        used = {stage["use"] for one in PIPELINES.values() for stage in one["stages"]}
        assert set(EXAMPLES) <= used

    def test_some_cells_stand_for_all(self):
        assert len(CELLS) / (EVERY + 1) < len(SOME) < len(CELLS) / (EVERY - 1)
        for name in ("family", "pipeline", "batch", "attention", "way"):
            assert {getattr(cell, name) for cell in SOME} == {getattr(cell, name) for cell in CELLS}, name
        pairs = Counter((cell.family, cell.group) for cell in SOME)
        assert min(Counter(family for family, _ in pairs).values()) >= 6

    def test_every_pipeline_runs_rows_alone(self):
        """In part with every run of the tests: of every pipeline, every family, every batch of several rows."""
        for some in (SEVERAL_ROWS, SEVERAL_ROWS[::EVERY]):
            assert {cell.pipeline for cell in some} == set(PIPELINES)
            assert {cell.family for cell in some} == set(FAMILIES)
            assert {cell.batch for cell in some} == {"ragged", "words", "video", "videos"}

    def test_docs_show_the_last_full_run(self):
        """Made by `make test-full`, of exactly these cells."""
        results = json.loads(exactness_table.RESULTS.read_text())
        assert results["cells"] == len(CELLS)
        counted = Counter((cell.family, cell.group) for cell in CELLS)
        assert {(f, g): one["cells"] for f, row in results["families"].items() for g, one in row.items()} == counted
        assert exactness_table.table(results) in exactness_table.DOCS.read_text()

    def test_shapes_and_ways_are_all_there(self):
        assert {(cell.batch, cell.attention) for cell in CELLS} == {
            *SHAPES,
            *((batch, "sdpa") for batch in ("video", "videos", "pair")),
        }
        assert {cell.pipeline for cell in CELLS if "video" in cell.batch} == {*VIDEO_TOO, *TOWER_TOO}
