"""The study of PAR as sweeps: files that fit what they name, a page that says what cells say, its own strategies."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from board_cells import cell, dense, under

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from prunekit_evals.run.seeds import seeds
from prunekit_evals.studies.par import __main__ as study
from prunekit_evals.studies.par import page
from prunekit_evals.studies.par.strategies import LAST, AnotherQuestion
from prunekit_evals.sweep import spec
from prunekit_strategies.par.strategy import Par

from prunekit import loading, plugins

MARKED = "before\n<!-- par-micro -->\nold\n<!-- /par-micro -->\nafter\n"


@pytest.fixture
def own(monkeypatch):
    """The study's own plugin, as the command brings it in."""
    monkeypatch.setenv("PRUNEKIT_PLUGINS", str(study.PLUGIN))
    plugins.reset()
    yield
    plugins.reset()


def rows():
    told = [("PAR-flops-0.5", 0.49, 0.97), ("PAR-L7-flops-0.5", 0.49, 0.5), ("fastv-flops-0.5", 0.5, 0.5),
            ("fastv-flops-0.3", 0.3, 0.4), ("static-3", 0.62, 0.6), ("static-4", 0.5, 0.5), ("static-5", 0.37, 0.5),
            ("blind", 0.1, 0.4), ("PAR-T64-L7", 0.57, 0.9)]  # fmt: skip
    tasks = ("pope", "gqa")
    made = [cell(name, task, flops=flops, hits=hits, count=80) for name, flops, hits in told for task in tasks]
    return [*made, dense(count=80), dense("gqa", count=80)]


def test_rows_that_no_budget_is_solved_for_stand_at_the_one_that_they_cost_at_least():
    text = page.section("Title", rows())
    assert text.startswith("### Title\n\norg/model") and "Images: pope 40, gqa 40" in text
    half, less = text.partition("#### 30 %")[0], text.partition("#### 30 %")[2].partition("#### PAR at")[0]
    assert "| static-4 |" in half and "static-3" not in half and "static-5" not in half and "blind" not in half
    assert "| static-5 |" in less and "| fastv-flops-0.3 |" in less and "PAR-flops" not in less
    assert "| PAR-T64-L7 |" in text.partition("#### PAR at T tokens")[2]


def test_who_beats_whom_is_what_the_comparison_says():
    text = page.section("Title", rows())
    said = next(line for line in text.splitlines() if line.startswith("**`PAR-flops-0.5`**"))
    assert "beats " in said and "`fastv-flops-0.5`" in said.partition("beats")[2].partition(";")[0]
    weak = next(line for line in text.splitlines() if line.startswith("**`PAR-L7-flops-0.5`**"))
    assert "is beaten by " in weak and "`dense`" in weak.partition("is beaten by")[2]
    assert text.count("| `PAR-flops-0.5` minus |") == 1


def test_results_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="2 sets of conditions"):
        page.section("Title", [*rows(), dense(conditions=under(limit=5))])


def test_only_the_marked_part_is_written():
    text = page.Block("par-micro").into(MARKED, "new")
    assert text == "before\n<!-- par-micro -->\n\nnew\n\n<!-- /par-micro -->\nafter\n"
    assert page.Block("par-micro").into(text, "new") == text
    with pytest.raises(ValueError, match="par-smol"):
        page.Block("par-smol").into(MARKED, "new")
    for name in study.STUDIES:
        page.Block(f"par-{name}").into(study.PAGE.read_text(encoding="utf-8"), "new")


def test_every_sweep_is_read_and_belongs_to_a_study(own):
    files = {path.stem for path in study.SWEEPS.glob("*.yaml")}
    assert files == {name for parts in study.STUDIES.values() for part in parts for name in part.sweeps}
    known = {entry.name for entry in plugins.registry().strategies()}
    for name in sorted(files):
        read = spec.load(study.SWEEPS / f"{name}.yaml")
        assert read.options["timing"] is False and len(read.tasks) == 6
        assert name.startswith(f"par-{read.models[0].model}")
        for one in read.pipelines:
            used = {stage["use"] for stage in one.source.plain()["stages"]}
            assert used <= known, (name, used)


def test_a_stage_with_no_seed_draws_nothing():
    assert list(seeds(yaml.safe_load("{stages: [{use: par, seed: null}, {use: random, seed: 3}]}"))) == [3]


def test_another_question_is_what_the_sample_before_was_asked():
    """Against PAR on the prompt spliced by hand."""
    shape = loading.load_shape("micro")
    drawn = torch.Generator().manual_seed(0)
    LAST.clear()

    def prompt(text):
        visual = torch.zeros(5 + shape.visual_tokens + text, dtype=torch.bool)
        visual[5 : 5 + shape.visual_tokens] = True
        return torch.randn(len(visual), shape.hidden, generator=drawn), visual, torch.ones_like(visual)

    plain, control = Par(weights="micro"), AnotherQuestion(weights="micro")
    first, second = prompt(9), prompt(6)
    end = 5 + shape.visual_tokens
    alone = control.route(*first, shape)
    assert torch.equal(alone.tokens[:end], plain.route(*first, shape).tokens[:end])
    swapped = control.route(*second, shape)
    spliced = torch.cat([second[0][:end], first[0][end:]])
    expected = plain.route(spliced, first[1], first[2], shape)
    assert torch.equal(swapped.tokens[:end], expected.tokens[:end]) and torch.equal(swapped.layers, expected.layers)
    assert not torch.equal(swapped.tokens[5:end], plain.route(*second, shape).tokens[5:end])
    assert len(swapped.tokens) == len(second[0])


@pytest.mark.slow
def test_a_small_study_from_end_to_end(own, data_root, tmp_path, capsys):
    target = tmp_path / "page.md"
    target.write_text(MARKED)
    par, chance = "{name: PAR, stages: [{use: par, weights: micro}]}", "{name: chance, stages: [{use: chance}]}"
    data = f"data_root={data_root}"
    changes = ("limit=2", "tasks=[pope]", data, "budgets=[{flops: 0.5}]", f"pipelines=[{par}, {chance}]")
    words = ["micro", *changes, "--parts", "par-micro-pairs", "--page", str(target), "--out", str(tmp_path / "out")]
    assert study.main(words) == 0
    text = target.read_text()
    assert "#### 50 % of dense's FLOPs" in text and "| PAR-flops-0.5 |" in text and "| chance-flops-0.5 |" in text
    assert study.main([*words, "--render"]) == 0 and target.read_text() == text
    with pytest.raises(SystemExit):
        study.main(["--parts", "nothing"])
