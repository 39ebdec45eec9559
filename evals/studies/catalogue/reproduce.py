"""Sweep files that measure the rows of a card again, on the bundled model: docs/reproduce."""

from __future__ import annotations

from collections.abc import Iterator

from prunekit_evals.studies.catalogue.measure import Measured
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
pipelines:
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
    return HEAD.format(name=name, tasks=tasks, questions=measured.about["questions"]) + "\n".join(entries) + "\n"


def section(name: str, measured: Measured) -> Iterator[str]:
    """What the card says of it."""
    if sweep(name, measured):
        file = f"{REPRODUCE.name}/{name}.yaml"
        yield "## Measure these rows again"
        yield f"`prunekit sweep docs/{file}` ([file](../{file})), in a checkout; see [sweeps](../sweep.md)."


def _entries(name: str, measured: Measured) -> Iterator[str]:
    for share in (*SHARES, None):
        label = label_of(name, share)
        # A calibration is a file that was made for the measurement.
        if label in measured.rows and "calibration:" not in measured.rows[label].stages:
            yield _entry(name, share, measured)


def _entry(name: str, share: float | None, measured: Measured) -> str:
    called = name if share is None else f"{name}-{share:g}"
    return f"  - {{name: {called}, stages: {measured.rows[label_of(name, share)].stages}}}"
