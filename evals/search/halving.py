"""Successive halving over candidates: each rung asks more questions, and only the best of those before go on.

https://arxiv.org/abs/1502.07943 (Jamieson and Talwalkar 2016), asynchronous as in https://arxiv.org/abs/1810.05934.
Optuna draws (TPE, https://papers.nips.cc/paper/4443) and decides who goes on. The study lives in memory: its draws
follow from the seed and from what was answered, so a search that was interrupted is drawn again, and found answered.
Optuna's own journal of a study would add nothing but a second truth, and one whose last line a kill can tear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit_evals.search.asking import Asker
from prunekit_evals.search.candidates import Infeasible, Refusals

from prunekit.errors import InputError, PrunekitError
from prunekit.pipeline.build import Pipeline

if TYPE_CHECKING:
    from optuna.study import Study

DRAWS = 200  # for one new candidate; beyond it, a space is taken to have no more of them


@dataclass(frozen=True)
class Trial:
    """A candidate that was asked. accuracies: after each rung that it reached, on all questions so far.

    times: how often it was drawn. failed: what it raised; empty for most.
    """

    pipeline: Pipeline
    accuracies: tuple[float, ...]
    times: int = 1
    failed: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found. best: of those that were asked all questions, the one that answered most of them.

    trials: each candidate once, in the order in which they were first drawn. exhausted: nothing new was drawn any more.
    """

    best: Trial
    trials: tuple[Trial, ...]
    refusals: Refusals
    exhausted: bool


@dataclass(frozen=True)
class Halving:
    """A search: at most `trials` candidates are asked. told: of each trial when it ends, and its number."""

    asker: Asker
    trials: int
    factor: int
    seed: int
    told: Callable[[int, Trial], None] = lambda number, trial: None

    def over(self, draw: Callable[[Any], Pipeline], first: Sequence[dict[str, Any]] = ()) -> Found:
        """Search what `draw` makes of a trial of optuna. first: parameters to begin with.

        draw raises Infeasible for what is not asked. Raises InputError where nothing could be asked to the end.
        """
        study, refusals = self._study(first), Refusals()
        known: dict[str, Trial] = {}
        fruitless = 0
        while len(known) < self.trials and fruitless < DRAWS:
            drawn = study.ask()
            before = len(known)
            try:
                pipeline = draw(drawn)
            except Infeasible as reason:
                refusals.add(str(reason))
                self._tell(study, drawn, None)
            else:
                self._ask(study, drawn, pipeline, known)
            fruitless = 0 if len(known) > before else fruitless + 1
        whole = [one for one in known.values() if len(one.accuracies) == self.asker.levels]
        if not whole:
            raise InputError(_nothing(list(known.values()), refusals))
        best = max(whole, key=lambda one: one.accuracies[-1])
        return Found(best, tuple(known.values()), refusals, len(known) < self.trials)

    def _study(self, first: Sequence[dict[str, Any]]) -> Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=self.factor),
        )
        for parameters in first:
            study.enqueue_trial(parameters)
        return study

    def _ask(self, study: Study, drawn: Any, pipeline: Pipeline, known: dict[str, Trial]) -> None:
        """Ask a candidate rung by rung, as far as it goes; one that was drawn before may go further now."""
        old = known.get(pipeline.sha)
        accuracies: list[float] = []
        failed = ""
        for level in range(self.asker.levels):
            try:
                accuracies.append(self.asker.ask(pipeline, level).accuracy(level))
            except (PrunekitError, ValueError, RuntimeError) as error:  # of this candidate; the others go on
                failed = " ".join(str(error).split())[:500] or type(error).__name__
                break
            # The pruner knows rungs by a resource that grows with `factor`; how many questions that is, rungs say.
            drawn.report(accuracies[-1], self.factor**level)
            if level + 1 < self.asker.levels and drawn.should_prune():
                break
        self._tell(study, drawn, accuracies[-1] if len(accuracies) == self.asker.levels else None)
        further = max(tuple(accuracies), old.accuracies if old else (), key=len)
        known[pipeline.sha] = trial = Trial(pipeline, further, old.times + 1 if old else 1, failed)
        if old is None or len(further) > len(old.accuracies):
            self.told(list(known).index(pipeline.sha) + 1, trial)

    def _tell(self, study: Study, drawn: Any, value: float | None) -> None:
        from optuna.trial import TrialState

        if value is None:
            study.tell(drawn, state=TrialState.PRUNED)
        else:
            study.tell(drawn, value)


def _nothing(trials: Sequence[Trial], refusals: Refusals) -> str:
    failed = [f"{one.pipeline.name} failed: {one.failed}" for one in trials if one.failed]
    reasons = [f"{count} times {said}" for count, said in refusals.listed()[:5]]
    return "nothing could be asked to the end: " + ("; ".join([*failed[:5], *reasons]) or "no candidate was drawn")
