"""The benchmarks run, and their figures are what they say; the figures themselves are measured by `make bench`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prunekit_evals.bench import cpu, gpu, gpu_models, sections, timing, workload

ROOT = Path(__file__).parent.parent


def test_the_documented_figures_are_the_measured_ones() -> None:
    figures = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    assert figures["about"]["size"] == dataclasses.asdict(workload.FULL)
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert cpu.into(text, cpu.rendered(figures)) == text


def test_prints_every_table_and_writes_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "figures.json"
    assert cpu.main(["--tiny", "--rounds", "1", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert set(figures) == {"about", *cpu.SECTIONS}
    assert figures["about"]["rounds"] == 1 and figures["about"]["size"]["layers"] == 8
    printed = capsys.readouterr().out
    for section in ("prefill", "par", "selection", "peers", "decode", "launch", "batch", "memory"):
        assert all(f"| {row[next(iter(row))]} |" in printed for row in figures[section]), section
    assert len(cpu.targets(figures)) == 10
    for row in figures["memory"]:
        assert row["kv"] == row["kv_stated"]
        assert row["peak"] >= row["kv"]
    peaks = {row["pipeline"]: row["peak_ratio"] for row in figures["memory"]}
    assert peaks["stride, at the encoder, keep 25 %"] < peaks["FastV, before layer 2, keep 25 %"] < peaks["dense"] == 1


def test_one_section_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    out.write_text('{"scoring": 0.5}')
    monkeypatch.setattr(cpu, "measure", lambda section, rounds, tiny: 0.25)
    cpu.main(["--only", "scoring", "--out", str(out)])
    assert json.loads(out.read_text())["scoring"] == 0.25
    out.write_text(
        '{"batch": [{"pipeline": "x", "tokens_per_second": 1, "ratio": 1, "filled": 1, "filled_pruned": 1}]}'
    )
    assert cpu.main(["--only", "scoring", "--out", str(out)]) == 1, "0.25 of a prefill is more than the target"
    assert set(json.loads(out.read_text())) == {"about", "batch", "scoring"}
    with pytest.raises(SystemExit):
        cpu.main(["--only", "speed", "--out", str(out)])


def test_flops_fractions_are_those_of_the_stages() -> None:
    model, inputs = workload.model_of(workload.TINY), workload.inputs_of(workload.TINY)

    def fraction(stages: list[Any] | None) -> float:
        return float(sections.flops_of(model, stages, inputs))

    assert fraction(None) == 1 == fraction([{"use": "dense"}])
    assert fraction([workload.SKIP]) == 0.5  # 4 of 8 layers
    assert fraction(workload.PRUNES["FastV, before layer 2, keep 25 %"]) < 0.6


def test_par_is_measured_at_the_counts_of_its_paper_with_its_router() -> None:
    """128 of 576 visual tokens and three of four layers; what the router costs is in the FLOPs that time is held to."""
    whole, *parts = workload.par_of(workload.FULL)
    assert whole == "PAR, T=128 of 576, L=12 of 16" and len(parts) == 3
    model, inputs = workload.model_of(workload.TINY), workload.inputs_of(workload.TINY)
    stages = workload.par_of(workload.TINY)
    report = workload.report_of(model, stages["PAR, T=8 of 36, L=6 of 8"], inputs)
    assert report.kept_tokens == (8,) and len(report.plans[0].layers) == 2 and report.cost.decision_flops[0] > 0
    shares = [float(sections.flops_of(model, one, inputs)) for one in stages.values()]
    assert shares[0] < min(shares[1:3]) and shares[3] > 1, "the router alone saves nothing"


def test_ratios_are_of_medians() -> None:
    time = timing.Time
    dense = [time(4.0, 8.0), time(2.0, 4.0), time(3.0, 9.0)]
    row = sections.row("half", [time(1.5, 4.0), time(1.0, 4.0), time(9.0, 9.0)], dense, 0.4)
    assert (row.cpu, row.wall, row.cpu_ratio, row.wall_ratio) == (1.5, 4.0, 0.5, 0.5)
    assert row.saved_of_promised == pytest.approx(0.5 / 0.6)
    assert (row.speedup, row.promised_speedup) == (2.0, 2.5)
    assert sections.row("dense", dense, dense, 1.0).saved_of_promised is None


def test_the_masking_peer_really_masks() -> None:
    """What is forbidden to be seen changes the logits, and nothing else does: with all kept they are the dense ones."""
    model, inputs = workload.model_of(workload.TINY), workload.inputs_of(workload.TINY)

    @contextmanager
    def logits(keep: float | None) -> Iterator[Any]:
        case = workload.prefill(model, None, inputs) if keep is None else sections.masked(model, inputs, 2, keep)
        with torch.inference_mode(), case as run:
            yield run().logits

    with logits(None) as dense, logits(1.0) as full, logits(0.25) as quarter:
        assert torch.allclose(dense, full, atol=1e-5)
        assert (dense - quarter).abs().max() > 1e-4


def test_peak_memory_counts_what_is_held_at_once() -> None:
    given = torch.zeros(1000)
    with timing.PeakMemory() as memory:
        first = given + 1
        second = first * 2
        assert memory.now == 8000
        del first
        assert memory.now == 4000
        view = second.view(10, 100)
        view += 1
        del second
        assert memory.now == 4000, "a view keeps its storage"
        del view
        assert (memory.now, memory.peak) == (0, 8000)


def test_what_is_profiled_must_exist() -> None:
    model, inputs = workload.model_of(workload.TINY), workload.inputs_of(workload.TINY)
    with pytest.raises(LookupError, match="did not run"):
        sections.cumulative(workload.prefill(model, None, inputs), sections.SCORING)


def test_the_gpu_script_runs_on_toys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--rounds", "1", "--batches", "1,2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3 * 2 * 6
    printed = capsys.readouterr().out
    assert all(f"| {model.name} | 2 | dense |" in printed for model in gpu_models.MODELS)
    promised = {
        row["pipeline"]: row["promised"] for row in rows if row["model"] == "LLaVA-1.5-7B" and row["batch"] == 2
    }
    assert promised["dense"] == promised["a stage keeps all"] == 1 < promised["FastV, layer 2, T=9"]
    assert gpu.main(["--tiny", "--rounds", "1", "--minutes", "0", "--out", str(out)]) == 0
    assert "left out, the time is over" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1


def test_the_promise_at_7b_is_that_of_the_paper_setting() -> None:
    """128 visual tokens from layer 2 on in 24 of 32 layers, beside 64 text tokens: about 30 % of the FLOPs."""
    from prunekit import cost, families
    from prunekit.strategy.decisions import LayerAction, LayerPlan

    model = gpu_models.MODELS[0]
    with torch.device("meta"):
        live = gpu_models.transformers.AutoModelForImageTextToText.from_config(model.config(model.decoder))
    shape = families.find(live).shape()
    (stages,) = [
        stages for name, stages in gpu.pipelines(model.decoder).items() if name == "random, layer 2, T=128, L=24"
    ]
    plan = LayerPlan(dict.fromkeys(stages[1]["layers"], LayerAction.SKIP))
    tokens = [640] * 2 + [192] * 30
    share = cost.prefill_flops(shape, tokens, plan) / cost.prefill_flops(shape, [640] * 32)
    assert len(plan.actions) == 8 and 0.25 < share < 1 / 3
