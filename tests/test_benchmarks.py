"""The benchmark runs, and its figures are what they say; the figures themselves are measured by `make bench`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "prefill.py"


@pytest.fixture(scope="module")
def prefill() -> ModuleType:
    """The script as a module."""
    name = "prunekit_bench_prefill"
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_documented_figures_are_the_measured_ones(prefill: ModuleType) -> None:
    figures = json.loads((SCRIPT.parent / "prefill.json").read_text(encoding="utf-8"))
    assert figures["about"]["size"] == dataclasses.asdict(prefill.Size())
    text = (SCRIPT.parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert prefill.table([prefill.Row(**row) for row in figures["rows"]]) in text


def test_prints_a_table_and_writes_figures(
    prefill: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "figures.json"
    assert prefill.main(["--tiny", "--rounds", "1", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    rows = {row["pipeline"]: row for row in figures["rows"]}
    assert next(iter(rows)) == "dense" and len(rows) == 7
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)
    assert figures["about"]["rounds"] == 1 and figures["about"]["size"]["layers"] == 8


def test_flops_fractions_are_those_of_the_stages(prefill: ModuleType) -> None:
    model, inputs = prefill.model_of(prefill.TINY), prefill.inputs_of(prefill.TINY)

    def fraction(stages: list[object] | None) -> float:
        return float(prefill.time_once(model, stages, inputs)[2])

    assert fraction(None) == 1 == fraction([{"use": "dense"}])
    assert fraction([prefill.SKIP]) == 0.5  # 4 of 8 layers
    assert fraction(prefill.PRUNES["FastV, before layer 2, keep 25 %"]) < 0.6


def test_ratios_are_of_medians(prefill: ModuleType) -> None:
    dense = [(4.0, 8.0, 1.0), (2.0, 4.0, 1.0), (3.0, 9.0, 1.0)]
    row = prefill._row("half", [(1.5, 4.0, 0.4), (1.0, 4.0, 0.4), (9.0, 9.0, 0.4)], dense)
    assert (row.cpu, row.wall, row.cpu_ratio, row.wall_ratio) == (1.5, 4.0, 0.5, 0.5)
    assert row.saved_of_promised == pytest.approx(0.5 / 0.6)
    assert (row.speedup, row.promised_speedup) == (2.0, 2.5)
    assert prefill._row("dense", dense, dense).saved_of_promised is None
