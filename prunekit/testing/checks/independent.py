"""A sample's decisions depend on the sample alone: on no other row, no earlier run, no global state."""

from __future__ import annotations

import random
import warnings

import torch
from torch import Tensor

from prunekit import Pipeline, PrunekitWarning, RunReport
from prunekit.testing.check import check, expect
from prunekit.testing.subject import Subject

ALLOWED = 1e-9
NOTE = "no visual tokens in this batch"


@check(
    "Equal prompts give equal decisions and logits, bit for bit, whatever ran before and whatever the global random "
    "state "
    "is; and that state is afterwards what it was.",
    "`torch.rand` without a generator: name the input `seed`, which is drawn from the sample itself, and use "
    "`torch.Generator().manual_seed(seed)`. Memory of earlier runs: the input `state` lives for one prompt batch.",
)
def same_result(subject: Subject) -> None:
    first, logits = subject.run("ragged")  # makes the model, too, for which random numbers are drawn
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), torch.get_rng_state()
        subject.apply(subject.build(), subject.batch("mixed"))
        untouched = random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
        torch.manual_seed(12345)
        second, again = subject.apply(subject.build(), subject.batch("ragged"))
    for event, other in zip(first.events, second.events, strict=True):
        expect(event == other, f"at '{event.site}' a second run of the same batch decides otherwise")
    expect(first == second, f"a second run of the same batch reports otherwise:\n{first}\n{second}")
    expect(torch.equal(logits, again), "a second run of the same batch gives other logits")
    expect(untouched, "a run changes the global random state of Python or PyTorch")


@check(
    "Every row of a batch equals the row alone: the same decisions, and the same logits up to rounding.",
    "a mean, norm or threshold over axis 0; padding that takes part (mask with `valid`, and remember that padding of "
    "scores is not -inf by itself); the longest row's length taken for each. `@strategy(per_sample=True)` calls hooks "
    "once for each sample, without padding.",
)
def rows_alone(subject: Subject) -> None:
    alike_alone(subject, *subject.run("ragged"), subject.build())


def alike_alone(subject: Subject, together: RunReport, logits: Tensor, pipeline: Pipeline) -> None:
    """Raises Broken unless what `pipeline` made of the ragged batch is what it makes of each of its rows."""
    for row in range(together.samples):
        alone, single = subject.apply(pipeline, subject.setting.row(subject.batch("ragged"), row))
        for event, own in zip(together.events, alone.events, strict=True):
            mine, kept = set(own.kept[0]), set(event.kept[row])
            expect(
                mine == kept,
                f"at '{event.site}' row {row} keeps {len(kept)} tokens in the batch and {len(mine)} alone; "
                f"only in the batch {sorted(kept - mine)}, only alone {sorted(mine - kept)}",
            )
        expect(together.plans[row] == alone.plans[0], f"row {row} is planned otherwise in the batch than alone")
        error = float((logits[row] - single[0]).abs().max())
        expect(error < ALLOWED, f"row {row} keeps the same, but its logits differ by {error:.3g} from those alone")


@check(
    "A batch of text alone runs as without prunekit, bit for bit where no layers are skipped; a strategy of tokens "
    "says that it had nothing to do, by a warning and by a note in the report.",
    "a router that takes a mean or a maximum over no visual tokens: it is asked about every prompt.",
    lambda traits: traits.kind != "layer",
)
def no_image(subject: Subject) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report, logits = subject.apply(subject.build(), subject.batch("text"), quiet=False)
    said = [one for one in told if issubclass(one.category, PrunekitWarning) and NOTE in str(one.message)]
    noted = said and any(NOTE in note for note in report.notes)
    expect(noted or not (subject.traits.tokens or subject.traits.kind == "image"), f"nothing says so: {report.notes}")
    expect(not any(report.kept_tokens), f"{report.kept_tokens} visual tokens stay of none")
    if not any(plan.layers for plan in report.plans):
        expect(torch.equal(logits, subject.dense("text")), "logits are not those of the model without prunekit")
