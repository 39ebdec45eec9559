"""Rows of the bundled model, kept in one small file: a run adds what is missing, and goes on where it was cut short.

Each row is one pipeline on the same questions of the bundled benchmark, images as pixels, so that strategies in the
tower run as they do for a user. Nothing is simulated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunekit_evals.micro import model_path
from prunekit_evals.micro.record import Part
from prunekit_evals.run.answering import Loaded
from prunekit_evals.run.stamp import VERSION
from prunekit_evals.studies.catalogue.cells import Bench, Row, say, told
from prunekit_evals.studies.catalogue.rows import Wanted, wanted

import prunekit
from prunekit import plugins
from prunekit.loading import model_identity
from prunekit.training.calibrate import calibrate, stage_of
from prunekit.training.data import source

# Of the bundled benchmark's tasks those that differ most: `mme` is much like `pope`, `scienceqa_img` like MMBench.
TASKS = ("pope", "gqa", "mmbench_en_dev_static", "textvqa_val")
AT_ONCE = 24  # rows between two writings of the file
CALIBRATED_ON, PROMPTS = "micro-scenes", 20


@dataclass(frozen=True)
class Measured:
    """The file. about: model, benchmark and questions. rows: by label. out: strategies that cannot run, with why."""

    about: Mapping[str, Any]
    rows: Mapping[str, Row]
    out: Mapping[str, str]

    @property
    def part(self) -> Part:
        """Answers by task and row."""
        tasks = next(iter(self.rows.values())).right
        return Part({task: {label: list(row.right[task]) for label, row in self.rows.items()} for task in tasks})


def load(path: Path) -> Measured:
    """The file; without rows where there is none."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"about": {}, "rows": {}, "out": {}}
    return Measured(data["about"], {label: Row.of(one) for label, one in data["rows"].items()}, data["out"])


def save(path: Path, measured: Measured) -> None:
    """One line for each row, in the order of labels."""
    rows = {label: json.dumps(row.as_data()) for label, row in sorted(measured.rows.items())}
    lines = ",\n".join(f" {json.dumps(label)}: {row}" for label, row in rows.items())
    out = json.dumps(dict(sorted(measured.out.items())), indent=1)
    head = f'{{"about": {json.dumps(measured.about)},\n"out": {out},\n"rows": {{\n{lines}\n}}}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head, encoding="utf-8")


def about(questions: int) -> dict[str, Any]:
    """What every row depends on."""
    return {
        "model": str(model_identity(model_path())),
        "benchmark": VERSION,
        "questions": questions,
        "dtype": "float32",
    }


def run(path: Path, questions: int, cache: Path, only: Sequence[str] = (), again: Sequence[str] = ()) -> Measured:
    """Measure what is missing, and write it. only: these strategies; again: these although their rows are there."""
    loaded = Loaded.load("micro", "float32", "cpu")
    bench = Bench(loaded, questions, cache / "answers", seen_once=False, tasks=TASKS)
    now, old = about(questions), load(path)

    def found(stage: Mapping[str, Any]) -> Path:
        return calibrated(loaded, stage, cache)

    every = list(wanted(bench.shape, found, only))
    asked = {one.label: one for one in every if isinstance(one, Wanted)}
    kept = old if old.about == now else Measured(now, {}, {})
    others = [entry.name for entry in plugins.registry().strategies() if only and entry.name not in only]
    out = {name: why for name, why in kept.out.items() if name in others}
    out |= dict(one for one in every if not isinstance(one, Wanted))
    rows = {label: row for label, row in kept.rows.items() if label.split()[0] in others}
    rows |= {label: kept.rows[label] for label, one in asked.items() if _same(kept.rows.get(label), one)}
    missing = sorted(
        (one for label, one in asked.items() if label not in rows or one.strategy in again), key=lambda one: one.turn
    )
    bench.fresh = bool(again)
    say(f"{len(missing)} of {len(asked)} rows are to be measured")
    for begin in range(0, len(missing), AT_ONCE):
        some = missing[begin : begin + AT_ONCE]
        answered = bench.ask([one.pipeline for one in some])
        rows |= {one.label: replace(answered[one.pipeline.sha], stages=_stages(one)) for one in some}
        save(path, Measured(now, rows, out))
    save(path, Measured(now, rows, out))
    return load(path)


def _same(row: Row | None, one: Wanted) -> bool:
    return row is not None and row.stages == _stages(one)


def _stages(one: Wanted) -> str:
    """Its stages as the file has them: of a calibration only its name, wherever it lies."""
    return re.sub(r"calibration: \S*/", "calibration: ", told(one.pipeline))


def calibrated(loaded: Loaded, stage: Mapping[str, Any], cache: Path) -> Path:
    """The file of `prunekit calibrate` for a stage, made once."""
    options = {key: value for key, value in stage.items() if key not in ("keep", "calibration")}
    path = cache / "calibrations" / f"{'-'.join(str(value) for value in options.values())}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        built = stage_of(prunekit.load({"name": "calibrated", "stages": [options]}), None)
        say(f"{built.use}: calibrated on {PROMPTS} prompts of {CALIBRATED_ON}")
        calibrate(
            built, loaded.model, loaded.processor, source(CALIBRATED_ON), PROMPTS, model_id=loaded.identity,
            name=CALIBRATED_ON,
        ).write(path)  # fmt: skip
    return path
