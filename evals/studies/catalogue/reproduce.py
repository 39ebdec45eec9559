"""Sweep files that measure the rows of a card again, on the bundled model: docs/reproduce."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from prunekit_evals.studies.catalogue.measure import CALIBRATED_ON, PROMPTS, Measured
from prunekit_evals.studies.catalogue.places import REPRODUCE
from prunekit_evals.studies.catalogue.rows import SHARES
from prunekit_evals.studies.catalogue.standing import RANDOM, label_of

HEAD = """\
# The rows of docs/strategies/{name}.md on the bundled model, with random subsets of the same sizes beside them:
#   prunekit sweep docs/reproduce/{name}.yaml
# Written by `make cards`.
name: {name}
models: micro
tasks: [{tasks}]
limit: {questions}
{calibrate}pipelines:
"""


def sweep(name: str, measured: Measured) -> str:
    """The file for a strategy; empty where none of its rows can be written so."""
    entries = list(_entries(name, measured))
    if not entries:
        return ""
    if name != RANDOM:
        known = {share: label_of(RANDOM, share) for share in SHARES if label_of(name, share) in measured.rows}
        entries += [_entry(RANDOM, share, measured) for share, label in known.items() if label in measured.rows]
    tasks = ", ".join(measured.part.tasks)
    told = {"name": name, "tasks": tasks, "questions": measured.about["questions"]}
    return HEAD.format(**told, calibrate=_calibrations(name, measured)) + "\n".join(entries) + "\n"


def section(name: str, measured: Measured) -> Iterator[str]:
    """What the card says of it."""
    if sweep(name, measured):
        file = f"{REPRODUCE.name}/{name}.yaml"
        yield "## Measure these rows again"
        yield f"`prunekit sweep docs/{file}` ([file](../{file})), in a checkout; see [sweeps](../sweep.md)."


def _entries(name: str, measured: Measured) -> Iterator[str]:
    for share in (*SHARES, None):
        label = label_of(name, share)
        if label in measured.rows:
            yield _entry(name, share, measured)


def _calibrations(name: str, measured: Measured) -> str:
    """What the rows need of `prunekit calibrate`, as the measurement made it."""
    stages = [yaml.safe_load(row.stages)[0] for label, row in measured.rows.items() if label.split()[0] == name]
    needed = {stage["calibration"]: stage for stage in stages if "calibration" in stage}
    lines = []
    for out, stage in needed.items():
        options = {key: value for key, value in stage.items() if key not in ("keep", "calibration")}
        written = yaml.safe_dump([options], default_flow_style=True, sort_keys=False, width=10**6).strip()
        pipeline = f"{{name: calibrated, stages: {written}}}"
        lines.append(f"  - {{out: {out}, pipeline: {pipeline}, data: {CALIBRATED_ON}, prompts: {PROMPTS}}}\n")
    return "calibrate:\n" + "".join(lines) if lines else ""


def _entry(name: str, share: float | None, measured: Measured) -> str:
    called = name if share is None else f"{name}-{share:g}"
    return f"  - {{name: {called}, stages: {measured.rows[label_of(name, share)].stages}}}"
