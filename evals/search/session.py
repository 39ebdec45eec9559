"""A whole search: split, calibrate the budget, search, bring the baselines to the same cost, ask what was held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit_evals.lmms import tasks
from prunekit_evals.run import chosen, files
from prunekit_evals.run.journal import key_of
from prunekit_evals.runner import Outcome, Plan, Progress, Runner
from prunekit_evals.search.asking import Answered, Calibration, Questions
from prunekit_evals.search.candidates import Fitter, Infeasible, Refusals, described
from prunekit_evals.search.declared import Declared, space_of
from prunekit_evals.search.halving import Found, Halving, Trial
from prunekit_evals.search.space import Choices
from prunekit_evals.search.split import Part, Split, split

import prunekit
from prunekit import plugins
from prunekit.errors import SpecError
from prunekit.pipeline.build import Pipeline
from prunekit.spec.budget_keys import Budget
from prunekit.strategy.decisions import ModelShape

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
RANDOM = [{"use": "random", "at": "encoder"}]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    budget: with the tokens of the calibration's prompts. shipped: the halving of the pipelines that took no search;
    None where none can be brought to the budget. refused: those that cannot, by the reason. winner, random, baseline:
    as they were asked the held-out questions; None where there is none, or the winner is that pipeline. same: the name
    of the pipeline that took no search and that the winner is, brought to the budget; empty for most.
    """

    budget: Budget
    split: Split
    levels: int
    dense: Answered
    found: Found
    shipped: Found | None
    refused: Refusals
    winner: Pipeline
    random: Pipeline | None
    baseline: Pipeline | None
    same: str
    outcome: Outcome


@dataclass
class Session:
    """One search of a model. plan: without pipelines. folder: what it keeps. say: a line for a person."""

    declared: Declared
    plan: Plan
    folder: Path
    progress: Progress
    say: Say

    def run(self) -> Searched:
        """Everything; what was answered before is not asked again. Raises SpecError, InputError before any compute."""
        settings, refused = self.declared.settings, Refusals()
        runner = Runner(self.plan, self.progress)
        space, pipelines = space_of(self.declared, runner.shape), self._baselines(refused)
        questions = Questions(self.plan)
        parts = self._split(questions)
        asker = Calibration(runner, questions, parts.calibration, settings.factor, self.folder / "candidates")
        self.say(f"calibration: {asked(parts.calibration)}, in {asker.levels} rungs")
        dense = asker.ask(prunekit.load(DENSE), asker.levels - 1)
        fitter = Fitter(runner.shape, measured(self.declared.budget, dense, runner.shape))
        self.say(f"dense: {dense.accuracy(asker.levels - 1):.1%}; candidates after each rung:")
        found = Halving(asker, settings.trials, settings.factor, settings.seed, self._told).over(
            lambda trial: fitter.fit(space.draw(trial))
        )
        brought = at_cost(fitter, pipelines, refused)
        shipped = self._best(asker, brought)
        rows = self._rows(fitter, found, shipped, brought)
        asked_ = [one for one in rows if isinstance(one, Pipeline)]
        outcome = self._held_out(runner, parts.held_out, asked_)
        return Searched(fitter.budget, parts, asker.levels, dense, found, shipped, refused, *rows, outcome)

    def _rows(
        self, fitter: Fitter, found: Found, shipped: Found | None, brought: Mapping[str, Pipeline]
    ) -> tuple[Pipeline, Pipeline | None, Pipeline | None, str]:
        """The winner, random and the best baseline, named for the report; None for what the winner is itself, and the
        name of that.
        """
        winner, suffix = found.best.pipeline, f"-{fitter.budget.of}-{fitter.budget.fraction:g}"
        best, random = shipped.best.pipeline if shipped else None, None
        with suppress(Infeasible):  # of a model that cannot be cut there
            random = fitter.fit(RANDOM)
        name = next((name for name, one in brought.items() if best is not None and one.sha == best.sha), "")
        return (
            renamed(winner, self.declared.settings.name),
            None if random is None or random.sha == winner.sha else renamed(random, f"random{suffix}"),
            None if best is None or best.sha == winner.sha else renamed(best, f"{name}{suffix}"),
            next((name for name, one in (*brought.items(), ("random", random)) if one and one.sha == winner.sha), ""),
        )

    def _baselines(self, refused: Refusals) -> dict[str, Pipeline]:
        """Pipelines to bring to the same cost, by name; `dense` and `random` have rows of their own.

        A registered one that does not load here is refused; one that the search names raises SpecError.
        """
        chosen = self.declared.settings.baselines
        loaded = []
        for name in [one.name for one in plugins.registry().pipelines()] if chosen is None else chosen:
            try:
                loaded.append(prunekit.load(name))
            except SpecError as error:
                if chosen is not None:
                    raise
                refused.add(str(error.faults[0].message))
        return {one.name: one for one in loaded if {stage.use for stage in one.stages} not in ({"dense"}, {"random"})}

    def _split(self, questions: Questions) -> Split:
        """The two parts of the questions; read again where the same split was made before."""
        settings, data = self.declared.settings, self.plan.data
        names = [one.name for one in self.plan.tasks]
        sizes = settings.calibration, settings.held_out, settings.seed
        identities = [tasks.data_of(one, data).identity for one in self.plan.tasks]
        key = key_of(data=identities, root=str(data.root), tasks=names, sizes=sizes)
        path = self.folder / "split.json"
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["key"] == key:
                return Split(*(_part(known[side], names) for side in ("calibration", "held_out")))
        self.say(f"reading the images of {', '.join(names)}")
        made = split({name: questions.images(name) for name in names}, *sizes)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps({"key": key, **asdict(made)}) + "\n")
        return made

    def _best(self, asker: Calibration, at_cost: Mapping[str, Pipeline]) -> Found | None:
        """The best baseline by the same halving; None where there is none."""
        if not at_cost:
            return None
        settings = self.declared.settings
        names = Choices(tuple(at_cost))
        halving = Halving(asker, len(at_cost), settings.factor, settings.seed, self._told)
        self.say(f"{len(at_cost)} pipelines brought to the same cost, to compare with:")
        labels = [{"pipeline": json.dumps(name)} for name in at_cost]
        return halving.over(lambda trial: at_cost[names.draw(trial, "pipeline")], labels)

    def _held_out(self, runner: Runner, part: Mapping[str, Part], pipelines: Sequence[Pipeline]) -> Outcome:
        """The cells of the held-out questions, by the model that is loaded."""
        rows = {task: tuple(number for image in images for number in image) for task, images in part.items()}
        data = replace(self.plan.data, rows=rows)
        files.write(self.folder / "questions.json", chosen.text(rows))
        plan = replace(self.plan, pipelines=(prunekit.load(DENSE), *pipelines), data=data, limit=data.asked)
        held_out = Runner(plan, self.progress)
        if "loaded" in vars(runner):  # else every answer is there, and nobody may need it
            held_out.loaded = runner.loaded
        self.say(f"held out: {asked(part)}, {len(plan.pipelines)} pipelines")
        return held_out.run()

    def _told(self, number: int, trial: Trial) -> None:
        rungs = ", ".join(f"{value:.1%}" for value in trial.accuracies)
        end = f" failed: {trial.failed}" if trial.failed else ""
        self.say(f"  {number}: {rungs}{end}  {described(trial.pipeline)}")


def measured(budget: Budget, dense: Answered, shape: ModelShape) -> Budget:
    """The budget for prompts like those of the calibration, where it does not say for which."""
    prompt, visual = dense.mean("input_tokens"), dense.mean("visual_tokens")
    if visual is None:
        return budget
    told = budget.places
    if "text_tokens" not in told and prompt is not None:
        budget = replace(budget, text_tokens=max(round(prompt - visual), 1))
    if "visual_tokens" not in told and round(visual) != shape.visual_tokens:
        budget = replace(budget, visual_tokens=max(round(visual), 1))
    return budget


def at_cost(fitter: Fitter, pipelines: Mapping[str, Pipeline], refused: Refusals) -> dict[str, Pipeline]:
    """Each pipeline at the budget; of several that are then the same, the first. What cannot be goes to `refused`."""
    met: dict[str, Pipeline] = {}
    for name, pipeline in pipelines.items():
        try:
            brought = fitter.of(pipeline)
        except Infeasible as reason:
            refused.add(str(reason))
            continue
        if brought.sha not in {one.sha for one in met.values()}:
            met[name] = brought
    return met


def asked(part: Mapping[str, Part]) -> str:
    """How many questions of each task: `pope 101 (101 images), gqa 100 (100 images)`."""
    counts = {task: (sum(map(len, images)), len(images)) for task, images in part.items()}
    return ", ".join(f"{task} {questions} ({images} images)" for task, (questions, images) in counts.items())


def renamed(pipeline: Pipeline, name: str) -> Pipeline:
    """The same under another name."""
    return prunekit.load(pipeline.resolved, [f"name={json.dumps(name)}"])


def _part(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Part]:
    return {name: tuple(tuple(map(int, image)) for image in data[name]) for name in names}
