"""The pruned model computes what the complete one computes with the dropped tokens masked, in float64."""

from __future__ import annotations

import torch

from prunekit.strategy.decisions import LayerAction
from prunekit.testing.check import check, expect
from prunekit.testing.on_videos import on_videos
from prunekit.testing.subject import Subject
from prunekit.verify.comparison import Replay

ALLOWED = 1e-9
BATCHES = ("ragged", "mixed")
TOUCHING = (
    "a hook that changes the model: weights or hooks of a module that it got as `norm`, states that it reached by "
    "other "
    "ways than its arguments; a decision that is another in a second run."
)


def difference(found: Replay, first: int = 0, last: int | None = None) -> str:
    """Where a run differs from its reference at these steps; empty: nowhere."""
    errors = found.errors[:, first:last]
    if float(errors.max()) <= ALLOWED:
        return ""
    row, step = divmod(int(errors.argmax()), errors.shape[1])
    where = "at the prefill" if first + step == 0 else f"at decoding step {first + step}"
    return f"logits of row {row} differ {where} by {float(errors.max()):.3g} (allowed {ALLOWED:.0e})\n{found.report}"


def problems(found: Replay) -> str:
    """Whatever is not exact about a run."""
    return difference(found) or found.counts or found.held


@check(
    "Dropping a token equals masking its key in all later layers, merging equals writing the sum into the anchor's "
    "slot, "
    "skipping a layer equals the identity: the logits behind the prompt are those of the complete model with masks.",
    TOUCHING,
)
def prefill(subject: Subject) -> None:
    for batch in BATCHES:
        expect(not (said := difference(subject.exact(batch), 0, 1)), f"batch '{batch}': {said}")


@check(
    "Decoding goes on from exactly the state that the prefill left: each step with the KV cache gives the logits of "
    "the "
    "complete sequence with masks, without a cache.",
    TOUCHING + " What happens at the prefill alone and is forgotten at the first decoded token shows here.",
)
def decoding(subject: Subject) -> None:
    for batch in BATCHES:
        expect(not (said := difference(subject.exact(batch), 1)), f"batch '{batch}': {said}")


@check(
    "Every layer's KV cache holds as many tokens as the decisions leave it, and the report says so.",
    "a hook that reaches for the cache: a strategy returns what stays, and the engine does the rest.",
)
def kv_lengths(subject: Subject) -> None:
    for batch in BATCHES:
        found = subject.exact(batch)
        expect(not found.counts and not found.held, f"batch '{batch}': {found.counts or found.held}\n{found.report}")


@check(
    "It is exact at every kind of site that it allows, of decoder layers at the first and the last.",
    "`sites` that allow places for which the rule was not written (say `sites=Sites(encoder=False, lowest=2)` and the "
    "like); a hook that takes the number of tokens or of layers from somewhere else than its arguments.",
    lambda traits: traits.tokens,
)
def sites(subject: Subject) -> None:
    layers = subject.shape.layers
    inside = [f"{layer}.{point}" for point in ("mid", "after") for layer in (0, layers - 1)]
    before = [layer for layer in (0, 1, layers - 1) if subject.allows(layer)]
    tried = 0
    for site in ("pixels", "vision.0.mid", "vision.0", "encoder", *(before or inside), "prefill_end"):
        if subject.allows(site):
            found = subject.exact("ragged", steps=2, at=site)
            expect(not (said := problems(found)), f"at '{site}': {said}")
            expect(found.report.events[0].site == str(site), f"at '{site}' it acts at '{found.report.events[0].site}'")
            tried += 1
    expect(tried, "it allows no site that a model of 6 layers and a tower of 3 blocks has")


@check(
    "Layers that a router skips are skipped exactly, as many as it may skip, for every sample.",
    "plans that name layers which hold what others read.",
    lambda traits: traits.counts_layers,
)
def skipped_layers(subject: Subject) -> None:
    least = max(len(subject.build().bind(subject.shape).protected), 1)
    for batch in BATCHES:
        found = subject.exact(batch, keep_layers=least)
        expect(not (said := problems(found)), f"batch '{batch}', keep_layers {least}: {said}")
        for row, plan in enumerate(found.report.plans):
            left_out = [layer for layer, action in plan if action is LayerAction.SKIP]
            expect(len(left_out) == subject.shape.layers - least, f"row {row} skips {left_out}")


@check(
    "What looks at videos is exact on a model that takes them, for videos beside images and rows without either, and "
    "each row of such a batch equals the row alone.",
    "numbers of `frames` or `coords` that are taken for those of one long video; rows that hold images alone; padding, "
    "whose `frames` and `coords` are -1.",
    lambda traits: traits.video,
)
def videos(subject: Subject) -> None:
    clips = on_videos(subject)
    for batch in BATCHES:
        expect(not (said := problems(clips.exact(batch))), f"batch '{batch}': {said}")
    together, logits = clips.run("ragged")
    for row in range(together.samples):
        alone, single = clips.apply(clips.build(), clips.setting.row(clips.batch("ragged"), row))
        for event, own in zip(together.events, alone.events, strict=True):
            said = f"at '{event.site}' row {row} keeps other tokens in the batch than alone"
            expect(event.kept[row] == own.kept[0], said)
        expect(torch.allclose(logits[row], single[0], atol=ALLOWED, rtol=0), f"row {row} gives other logits alone")
