"""How many tokens and layers stay."""

from __future__ import annotations

from typing import Any

import torch

from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import Site
from prunekit.testing.check import check, expect
from prunekit.testing.checks.exact import problems
from prunekit.testing.checks.independent import alike_alone
from prunekit.testing.subject import BATCHES, Subject
from prunekit.testing.tiny import PATCH, tiny_inputs, tiny_llava
from prunekit.verify.comparison import replayed
from prunekit.verify.proof import proved_parts

# Budgets with the tokens that they leave of 32 and of 16.
ASKED: tuple[tuple[dict[str, Any], tuple[int, int]], ...] = (
    ({"keep": 0.47}, (15, 8)), ({"keep": 0.01}, (1, 1)), ({"keep_tokens": 7}, (7, 7)),
)  # fmt: skip


@check(
    "It leaves as many tokens of each sample as the file says: fractions are of the sample's original visual tokens, "
    "rounded half up, and at least 1 stays; a sample without images keeps none. A contract that says at_most=True "
    "allows "
    "fewer, may_keep_more=True more; with both the count is the strategy's own.",
    "a count that is taken over the batch and not from `count`; True on padding; groups that are rounded one by one. "
    "Where "
    "another number is meant, say so in the contract and in the docstring.",
    lambda traits: traits.fixed,
)
def keep(subject: Subject) -> None:
    images = BATCHES["mixed"]["images"]
    for keys, (of_32, of_16) in ASKED:
        report, _ = subject.run("mixed", **keys)
        event = report.events[-1]  # of several default sites the last one counts
        originals = report.visual_tokens
        counts = tuple({32: of_32, 16: of_16}.get(many, 0) for many in originals)
        if Site.parse(event.site).in_tower:  # where every image is a sample of its own
            counts = tuple(of_16 * many for many in images)
        if not {16, 32} >= set(originals) - {0}:
            counts = tuple(event.asked or counts)  # another model than the kit's own
        for row, (kept, count) in enumerate(zip(map(len, event.kept), counts, strict=True)):
            said = f"{keys}: row {row} had {originals[row]} visual tokens, should keep {count} and keeps {kept}"
            fewer = max(count, images[row]) if subject.setting.at_most else count  # a pool leaves one of each image
            expect(kept <= (originals[row] if subject.setting.may_keep_more else fewer), said)
            expect(kept >= (min(count, 1) if subject.setting.at_most else count), said)


@check(
    "A strategy that keeps everything changes nothing: with `keep: 1.0` all tokens stay, and the logits are those of "
    "the "
    "model without prunekit, bit for bit.",
    "merges or sizes that are returned even where no token leaves; a hook that ignores `count`. With declared extras "
    "the "
    "logits may differ, since an extra takes the slot of a visual token.",
    lambda traits: traits.fixed,
)
def keep_all(subject: Subject) -> None:
    report, logits = subject.run("mixed", keep=1.0)
    expect(report.kept_tokens == report.visual_tokens, f"of {report.visual_tokens} tokens {report.kept_tokens} stay")
    if not subject.traits.extras and not any(plan.layers for plan in report.plans):
        error = float((logits - subject.dense("mixed")).abs().max())
        expect(torch.equal(logits, subject.dense("mixed")), f"logits differ from the model's own by {error:.3g}")


@check(
    "Where the file need not say `keep`, it decides by itself without: exactly, and for each row of a batch as for the "
    "row alone.",
    "`count` that is taken for a number: it is None where the file says no `keep`. A strategy that always needs one "
    "leaves out keep='optional'.",
    lambda traits: traits.optional,
)
def without_keep(subject: Subject) -> None:
    open_ = subject.unbudgeted()
    found = subject.exact("ragged", open_)
    expect(not (said := problems(found)), said)
    alike_alone(subject, *subject.apply(open_, subject.batch("ragged")), open_)


@check(
    "A strategy that is declared with drops_all=True leaves no visual token.",
    "`drops_all` on a strategy that keeps some: leave it out.",
    lambda traits: traits.drops_all,
)
def drops_all(subject: Subject) -> None:
    report, _ = subject.run("mixed")
    expect(not any(report.kept_tokens), f"{report.kept_tokens} visual tokens stay")


@check(
    "Only visual tokens leave: what enters the last layer, or is left in the cache, is all of the text and the kept "
    "visual tokens; each sample with images keeps one at least.",
    "a selection that is empty for a small image; an answer of the wrong sample.",
    lambda traits: traits.tokens,
)
def text_stays(subject: Subject) -> None:
    report, _ = subject.run("mixed")
    at_end = any(event.site == "prefill_end" for event in report.events)
    last = report.kv_tokens if at_end else report.layer_tokens
    for row, (prompt, visual, kept) in enumerate(
        zip(report.prompt_tokens, report.visual_tokens, report.kept_tokens, strict=True)
    ):
        wanted = prompt - visual + kept
        expect(last[row][-1] == wanted, f"row {row} ends with {last[row][-1]} tokens, not with {wanted}")
        expect(kept or not visual or subject.traits.drops_all, f"row {row} keeps none of its {visual} visual tokens")


@check(
    "A plan names layers that the model has, is the same at every call, and lets every token stay.",
    "numbers from a calibration of another model; a plan from a draw without a seed.",
    lambda traits: traits.kind == "layer",
)
def plan(subject: Subject) -> None:
    report, _ = subject.run("ragged")
    expect(report.kept_tokens == report.visual_tokens, f"of {report.visual_tokens} tokens {report.kept_tokens} stay")
    for one in report.plans:
        beyond = sorted(one.layers - set(range(subject.shape.layers)))
        expect(not beyond, f"it plans layers {beyond} of {subject.shape.layers}")
    first, again = (subject.build().bind(subject.shape).plan for _ in range(2))
    expect(first == again, f"it plans {first}, and then {again}")


@check(
    "Of a router exactly as many layers run as the file says, for every sample; those that it protects always run.",
    "a budget that is applied to the batch; protected layers that depend on the sample.",
    lambda traits: traits.counts_layers,
)
def keep_layers(subject: Subject) -> None:
    layers, protected = subject.shape.layers, subject.build().bind(subject.shape).protected
    for count in sorted({max(len(protected), 1), (layers + len(protected)) // 2 or 1, layers}):
        report, _ = subject.run("mixed", keep_layers=count)
        for row, one in enumerate(report.plans):
            skipped = {layer for layer, action in one if action is LayerAction.SKIP}
            expect(
                len(skipped) == layers - count, f"keep_layers {count}: row {row} runs {layers - len(skipped)} layers"
            )
            expect(not skipped & protected, f"keep_layers {count}: row {row} skips {sorted(skipped & protected)}")


@check(
    "A tower that takes images of one size sees a smaller one enlarged again: all tokens stay, and the report says "
    "through how many pixels they were seen.",
    "factors above 1, or 0.",
    lambda traits: traits.kind == "image",
)
def one_size(subject: Subject) -> None:
    report, _ = subject.run("ragged")
    expect(report.kept_tokens == report.visual_tokens, f"of {report.visual_tokens} tokens {report.kept_tokens} stay")
    expect(report.events[0].resized is not None, "the report names no sizes")


@check(
    "A tower that takes images of any size gets the smaller one: the tokens of that stay, and equal those of the stock "
    "encoder on the smaller image.",
    "factors above 1, or 0.",
    lambda traits: traits.kind == "image",
)
def smaller_images(subject: Subject) -> None:
    model = tiny_llava(tower="pixtral")
    inputs = tiny_inputs(**BATCHES["ragged"], sizes=True)
    words = subject.setting.processor()
    found = replayed(model, proved_parts(model), subject.build(), inputs, 2, processor=words)
    expect(not (said := problems(found)), said)
    sizes = found.report.events[0].resized or ()
    cells = tuple(sum(height * width for height, width in row) // PATCH**2 for row in sizes)
    expect(found.report.kept_tokens == cells, f"{found.report.kept_tokens} tokens stay, not {cells}")
