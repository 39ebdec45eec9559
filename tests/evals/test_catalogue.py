"""The catalogue: cards are those of code and measurement, rows are added and not repeated, figures are as quoted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prunekit_evals.studies.catalogue import measure, pages, places, reported, rows, standing
from prunekit_evals.studies.catalogue.card import prose
from prunekit_evals.studies.catalogue.cells import Row

from prunekit import loading, plugins
from prunekit.strategy.about import about

NAMES = [entry.name for entry in plugins.registry().strategies()]
# Strategies of which papers report, and which prunekit has not.
ELSEWHERE = {"mustdrop", "twigvlm"}


def test_no_card_is_stale() -> None:
    """Else: make cards."""
    written = pages.written()
    stale = [path.name for path, text in written.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert stale == [], "write them anew: make cards"
    found = {*places.CARDS.glob("*.md"), *places.REPRODUCE.glob("*.yaml")}
    assert found == set(written), "pages of strategies that are gone: make cards"


def test_every_strategy_of_prunekit_has_a_card_with_all_sections() -> None:
    for name in NAMES:
        text = (places.CARDS / f"{name}.md").read_text(encoding="utf-8")
        heads = [line[3:] for line in text.splitlines() if line.startswith("## ")]
        assert [head for head in heads if head in ("Options", "What it is", "On the bundled model", "In papers")] == [
            "Options", "What it is", "On the bundled model", "In papers",
        ], name  # fmt: skip
        assert f"[{name}]({name}.md)" in (places.CARDS / "index.md").read_text(encoding="utf-8")


def test_the_measured_rows_are_of_this_model_and_benchmark() -> None:
    found = measure.load(places.MEASURED)
    assert found.about == measure.about(found.about["questions"]), f"{places.COMMAND} measure"
    assert all(len(right) == found.about["questions"] for row in found.rows.values() for right in row.right.values())
    assert found.rows["dense"].flops == 1 and standing.accuracy(found.part, "dense").value > 0.95
    for name in ("random", "pool", "downsample"):
        assert {f"{name} {share:g}" for share in rows.SHARES} <= set(found.rows)


def test_every_strategy_stands_in_the_table_or_it_is_said_why_not() -> None:
    """On the numbers of the bundled model alone, without a calibration."""
    every = list(rows.wanted(loading.load_shape("micro")))
    labels = {one.label: one for one in every if isinstance(one, rows.Wanted)}
    out = dict(one for one in every if not isinstance(one, rows.Wanted))
    assert {label.split()[0] for label in labels} | set(out) == set(NAMES)
    assert all(out.values()) and "text tower" in out["trim"] and "takes whole images" in out["pixelprune"]
    assert "calibration: is missing" in out["fitprune"]
    assert {label for label in labels if label.startswith("random")} == {"random 0.5", "random 0.25", "random 0.11"}
    assert labels["downsample 0.25"].pipeline.stages[0].strategy.scale == 0.5
    assert labels["pyramiddrop"].share is None and "vtw" in labels and "fastv" not in labels


@pytest.mark.slow
def test_a_run_adds_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "micro.json"
    first = measure.run(path, 2, tmp_path / "cache", ["dense", "first"])
    assert set(first.rows) == {"dense", "first 0.5", "first 0.25", "first 0.11"}
    assert measure.load(path) == first
    kept = path.read_text()
    again = measure.run(path, 2, tmp_path / "cache", ["last"])
    assert set(again.rows) == set(first.rows) | {"last 0.5", "last 0.25", "last 0.11"}
    assert {label: again.rows[label] for label in first.rows} == first.rows
    answers = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "answers").iterdir()}
    path.write_text(kept)  # as if the run had been cut short before it wrote
    assert measure.run(path, 2, tmp_path / "cache", ["last"]) == again
    assert {file: file.stat().st_mtime_ns for file in answers} == answers, (
        "answers that are kept are not asked for again"
    )
    measure.run(path, 2, tmp_path / "cache", ["last"], ["last"])
    assert {file: file.stat().st_mtime_ns for file in answers} != answers
    assert set(measure.run(path, 4, tmp_path / "cache", ["dense"]).rows) == {"dense"}, "other questions, other rows"


def test_tables_are_sorted_and_compared_with_random() -> None:
    def row(*right: bool) -> Row:
        return Row("[]", {"gqa": list(right)}, 0.5, 0.5, 36.0, 0.0)

    yes, no = (True,) * 60, (False,) * 60
    rows_of = {"dense": row(*yes), "random 0.25": row(*no), "scope 0.25": row(*yes[:50], *no[:10])}
    measured = measure.Measured({}, rows_of, {"trim": "needs more"})
    table = standing.at_share(
        0.25, measured, {"dense": "baselines", "random": "baselines", "scope": "before the decoder"}
    )
    lines = table.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "**[dense](dense.md)**",
        "[scope](scope.md)",
        "**[random](random.md)**",
    ]
    assert "| **+83.3 ±" in lines[1] and "| **−16.7 ±" in lines[1]
    assert standing.of_strategy("trim", measured) == "Not measured: needs more."


def test_what_papers_report_is_as_quoted() -> None:
    """The means that the sheet of sources gives, computed from the scores."""
    found = reported.load()
    known = {*NAMES, *ELSEWHERE}
    assert {line.strategy for one in found.tables for line in one.lines} <= known
    means = {
        (one.title, line.called, line.kept): round(one.mean(line), 1) for one in found.tables for line in one.lines
    }
    copied, again, lineage = (one.title for one in found.tables[:3])
    assert means[copied, "FastV", 192] == 87.8 and means[again, "FastV", 192] == 95.9
    assert means[again, "DivPrune", 64] == 94.1 and means[lineage, "CDPruner", 128] == 97.3
    assert means[copied, "FitPrune", 64] == 85.9, "six of seven benchmarks"
    assert all(not one.mean(line) > 100.5 for one in found.tables for line in one.lines)


def test_a_row_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = places.REPORTED.read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("[S12]", "[S99]"))
    monkeypatch.setattr(reported, "REPORTED", wrong)
    with pytest.raises(ValueError, match=r"the row of TwigVLM .* at 192 does not fit"):
        reported.load()


def test_every_fixture_belongs_to_a_strategy_that_names_its_commit() -> None:
    files = sorted(places.GOLDENS.glob("*.json"))
    owned = pages.goldens(NAMES)
    assert sorted(file for listed in owned.values() for file in listed) == files
    for name, listed in owned.items():
        commit = about(plugins.registry().get_strategy(name)).code.partition("@")[2].partition(":")[0]
        for file in listed:
            assert json.loads(file.read_text())["source"]["commit"].startswith(commit), file.name


def test_prose_of_docstrings_is_not_taken_for_markdown() -> None:
    said = prose("s_ij * x_i, `a_b` of\n[K; V] <see> (https://a.org/b_c)")
    assert said == r"s\_ij \* x\_i, `a_b` of \[K; V\] \<see\> (https://a.org/b_c)"


def test_the_command_refuses_more_questions_than_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunekit_evals.studies.catalogue", "measure", "--questions", "601"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "--questions is from 2 to 600" in done.stderr
