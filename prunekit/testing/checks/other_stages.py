"""A strategy stands in a pipeline with others, before it and behind it."""

from __future__ import annotations

from typing import Any

import prunekit
from prunekit import Site, plugins
from prunekit.pipeline.build import Pipeline
from prunekit.testing.check import check, expect
from prunekit.testing.checks.exact import problems
from prunekit.testing.subject import Subject
from prunekit.verify.strategies import DRAWN, with_own

BREAKS = (
    "numbers of tokens that are taken for those of a complete image: after another stage `coords` has gaps, and "
    "`index` "
    "says which tokens are there; a reshape to rows and columns; a fixed number of tokens."
)


@check(
    "Where an earlier stage has thinned the tokens, it chooses among those that are left, and the two together are "
    "exact.",
    BREAKS,
    lambda traits: traits.kind != "image",
)
def after_others(subject: Subject) -> None:
    layers = subject.shape.layers
    places = (
        layers - 2, f"{layers - 2}.mid", f"{layers - 2}.after", "encoder", "prefill_end", "vision.1", "pixels",
    )  # fmt: skip
    at: dict[str, Any] = {}
    if subject.traits.tokens:
        at = {"at": next((site for site in places if subject.allows(site)), places[0])}
    ahead = {"vision.1": "vision.0", "pixels": "pixels"}.get(str(at.get("at")), "encoder")
    pipeline = _together(subject, {"use": DRAWN, "keep": 0.8, "at": ahead}, subject.stage(**at))
    report = _exact(subject, pipeline)
    for earlier, later in zip(report.events, report.events[1:], strict=False):
        for row, (before, after) in enumerate(zip(earlier.kept, later.kept, strict=True)):
            found = f"row {row} keeps {sorted(set(after) - set(before))}, which an earlier stage had dropped"
            expect(set(after) <= set(before), found)


@check(
    "A later stage chooses among what it left, and the two together are exact.",
    BREAKS + " A selection whose merges or sizes do not fit the tokens that it keeps shows here, too.",
    lambda traits: not traits.drops_all,
)
def before_others(subject: Subject) -> None:
    first = [event.site for event in subject.run("mixed")[0].events]
    last = Site(subject.shape.layers - 1)
    behind = last if not first or Site.parse(first[-1]) <= last else None
    if behind is None:
        return  # nothing cuts tokens behind the place where it acts
    later = {"use": DRAWN, "keep": 0.5, "keep_of": "current", "at": behind.layer}
    _exact(subject, _together(subject, subject.stage(), later))


def _together(subject: Subject, *stages: dict[str, Any]) -> Pipeline:
    return prunekit.load({"name": subject.use, "stages": list(stages)}, registry=with_own(plugins.registry()))


def _exact(subject: Subject, pipeline: Pipeline) -> Any:
    found = subject.exact("mixed", pipeline, steps=2)
    expect(not (said := problems(found)), said)
    return found.report
