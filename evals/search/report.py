"""What a search says: the winner on held-out questions against what took no search, its file, and how it was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunekit_evals.compare import judging, pooling, tables
from prunekit_evals.compare.judging import Comparison, Contender
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.compare.tables import Table
from prunekit_evals.search.candidates import described
from prunekit_evals.search.declared import Declared
from prunekit_evals.search.session import Searched, asked


@dataclass(frozen=True)
class Report:
    """A search that is done. table: of the held-out cells. comparisons: of the winner with each other row, corrected
    over all of them; empty where cells failed.
    """

    declared: Declared
    searched: Searched
    table: Table
    comparisons: tuple[Comparison, ...]

    @property
    def winner(self) -> Estimate | None:
        """Its accuracy on the held-out questions, the mean over tasks; None where its cells failed."""
        name = self.searched.winner.name
        return next((row.average for row in self.table.rows if row.pipeline == name), None)

    def lines(self) -> list[str]:
        """In words, what it came to."""
        done, found = self.searched, self.searched.found
        calibrated, average = found.best.accuracies[-1], self.winner
        lines = [f"{done.winner.name}: {described(done.winner)}, solved to {budget_text(self)}"]
        if average is not None:
            lines.append(
                f"calibration {calibrated:.1%}, held out {average.value:.1%} "
                f"({average.low:.1%} to {average.high:.1%}): the first is of the best of {len(found.trials)}, and "
                "flatters it; the second does not"
            )
        lines += [sentence(done.winner.name, one) for one in self.comparisons]
        if done.same:
            lines.append(f"{done.winner.name} is '{done.same}' brought to the budget: the search found nothing better")
        lines += self._counts()
        return lines

    def _counts(self) -> list[str]:
        found, refused = self.searched.found, self.searched.refused
        whole = sum(len(one.accuracies) == self.searched.levels for one in found.trials)
        lines = [f"{len(found.trials)} candidates asked, {whole} of them all calibration questions"]
        failed = [one for one in found.trials if one.failed]
        lines += [f"failed: {described(one.pipeline)}: {one.failed}" for one in failed]
        if found.exhausted:
            lines.append("the space has no more candidates within the budget, or hardly any: nothing new was drawn")
        lines += [f"not asked, {count}: {said}" for count, said in found.refusals.listed()]
        lines += [f"no baseline, {count}: {said}" for count, said in refused.listed()]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        done, found = self.searched, self.searched.found
        return {
            "name": done.winner.name,
            "pipeline": done.winner.resolved,
            "sha": done.winner.sha,
            "same_as": done.same or None,
            "budget": done.budget.as_data(),
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in asdict(self.declared.settings).items()
            },
            "calibration": {task: list(map(list, part)) for task, part in done.split.calibration.items()},
            "held_out": {task: list(map(list, part)) for task, part in done.split.held_out.items()},
            "dense_calibration_accuracy": done.dense.accuracy(done.levels - 1),
            "calibration_accuracy": found.best.accuracies[-1],
            "accuracy": self.winner and asdict(self.winner),
            "comparisons": [{**asdict(one), "holds": one.holds} for one in self.comparisons],
            "trials": [_trial(one) for one in found.trials],
            "baselines": [_trial(one) for one in done.shipped.trials] if done.shipped else [],
            "infeasible": [{"times": count, "reason": said} for count, said in found.refusals.listed()],
            "refused_baselines": [{"times": count, "reason": said} for count, said in done.refused.listed()],
            "exhausted": found.exhausted,
            "table": self.table.to_json(),
        }  # fmt: skip

    def yaml(self) -> str:
        """The winner as a pipeline file."""
        done, settings = self.searched, self.declared.settings
        average = self.winner
        held = f", held out {average.value:.1%} ({average.low:.1%} to {average.high:.1%})" if average else ""
        return "\n".join([
            f"# Found by `prunekit search` on {settings.model}: the best of {len(done.found.trials)} candidates of "
            f"{', '.join(self.declared.strategies)}.",
            f"# Calibration {done.found.best.accuracies[-1]:.1%} on {asked(done.split.calibration)}{held}. "
            f"Seed {settings.seed}.",
            done.winner.resolved,
        ])  # fmt: skip


def report(declared: Declared, searched: Searched) -> Report:
    """The held-out cells as a table, and the winner against each other row, dense first."""
    (table,) = tables.of_cells(searched.outcome.cells)
    rows, _ = pooling.pooled([cell for cell in searched.outcome.cells if cell.status == "done"])
    by_name = {row.name: Contender(row.name, row.dense, row.random, row.flops, row.scores) for row in rows}
    winner = by_name.pop(searched.winner.name, None)
    if winner is None or searched.outcome.failed:
        return Report(declared, searched, table, ())
    images, _ = pooling.images(rows)
    return Report(
        declared, searched, table, judging.against(winner, tuple(by_name.values()), tuple(winner.scores), images)
    )


def sentence(name: str, one: Comparison) -> str:
    """Whether the winner beats another row, plainly, with the paired difference."""
    verb = {1: "beats", 0: "is not shown to beat", -1: "is beaten by"}[one.holds]
    value, low, high = (100 * number for number in (one.difference.value, one.difference.low, one.difference.high))
    return (
        f"{name} {verb} {one.other}: {value:+.1f} points ({low:+.1f} to {high:+.1f}), "
        f"{one.wins} images won, {one.losses} lost, p = {one.corrected:.2g}"
    )


def budget_text(told: Report) -> str:
    """`flops 0.3 of dense for 26 text and 144 visual tokens`."""
    budget = told.searched.budget
    visual = f" and {budget.visual_tokens} visual" if budget.visual_tokens else ""
    return f"{budget.of} {budget.fraction:g} of dense, for prompts of {budget.text_tokens} text{visual} tokens"


def _trial(one: Any) -> dict[str, Any]:
    return {
        "pipeline": one.pipeline.resolved, "what": described(one.pipeline), "accuracies": list(one.accuracies),
        "drawn": one.times, "failed": one.failed,
    }  # fmt: skip
