"""What a sweep asks of each model, as plain data that a worker anywhere can be handed; and the plan that it makes."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit_evals.run.variants import expand, renamed
from prunekit_evals.sweep.spec import ModelChoice, PipelineChoice, SweepSpec

import prunekit
from prunekit import loading
from prunekit.errors import Fault, InputError, PrunekitError, PrunekitWarning, SpecError, UnknownName
from prunekit.pipeline.build import Pipeline
from prunekit.pipeline.equal import at_equal
from prunekit.spec.budget_keys import Budget
from prunekit.strategy.decisions import ModelShape

if TYPE_CHECKING:
    from prunekit_evals.runner import Plan

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}


@dataclass(frozen=True)
class Order:
    """What is asked of one model. pipelines: each in full, as YAML. folder: the one in which relative paths start.

    data: the data root, None for the hub's cache. include: the folder of the user's own tasks, None: none. options: of
    `runner.Plan`, by name.
    """

    model: str
    pipelines: tuple[str, ...]
    tasks: tuple[str, ...]
    data: str | None
    out: str
    folder: str
    include: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One cell: of which order, which task of it, which pipeline of it."""

    order: int
    task: int
    pipeline: int

    @property
    def place(self) -> tuple[int, int]:
        """What a worker has prepared once it has computed one of these cells: a model and a task."""
        return self.order, self.task


@dataclass(frozen=True)
class Where:
    """How a sweep is run, whatever it asks. force: also cells that are there. infeasible: skip what misses a budget."""

    out: Path
    download: bool = False
    force: bool = False
    skip_infeasible: bool = False


@dataclass(frozen=True)
class Ordered:
    """The orders of a sweep. skipped: what cannot meet a budget, if that was asked for. notes: of budgets."""

    orders: tuple[Order, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """Every cell, those of one model and task together."""
        return [
            Job(number, task, pipeline)
            for number, order in enumerate(self.orders)
            for task in range(len(order.tasks))
            for pipeline in range(len(order.pipelines))
        ]


def ordered(spec: SweepSpec, where: Where) -> Ordered:
    """Check a sweep against what is installed and what the models are, from their configs alone.

    Raises SpecError with the faults of all pipelines, tasks and models; InputError for pipelines of one name.
    """
    from prunekit_evals.lmms import tasks

    faults: list[Fault] = []
    names = _tasks(spec, faults)
    skipped: list[Fault] = []
    found: list[tuple[ModelChoice, tuple[Pipeline, ...]]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PrunekitWarning)
        for model in spec.models:
            shape = _shape(model, where.download, faults)
            if shape is not None:
                found.append((model, tuple(_on_model(spec, model, shape, faults, skipped))))
    if not where.skip_infeasible:
        hint = "leave it out, allow more, or skip all such rows by --skip-infeasible"
        faults += [dataclasses.replace(one, hint=f"{one.hint}; {hint}" if one.hint else hint) for one in skipped]
    if faults:
        raise SpecError(list({str(fault): fault for fault in faults}.values()))
    orders = []
    for model, pipelines in found:
        named, data = tasks.choose(model.model, names, spec.data_root, where.out, spec.include_path)
        orders.append(_order(spec, model, pipelines, tuple(one.name for one in named), data.root, where))
        plan_of(orders[-1])  # refuses pipelines of one name
    told = [str(one.message) for one in caught if issubclass(one.category, PrunekitWarning)]
    return Ordered(tuple(orders), tuple(map(str, skipped)), tuple(dict.fromkeys(told)))


def plan_of(order: Order, device: str | None = None) -> Plan:
    """The order as a plan, on the machine that computes it."""
    from prunekit_evals.lmms import tasks
    from prunekit_evals.runner import Plan

    if not os.path.isdir(order.folder):
        message = f"a worker on another machine has no folder '{order.folder}'"
        raise InputError(f"{message} (a sweep needs a file system that all its machines share)")
    os.chdir(order.folder)
    built = tuple(prunekit.load(text) for text in order.pipelines)
    data = tasks.data_at(None if order.data is None else Path(order.data))
    found = tuple(tasks.find(order.tasks, None if order.include is None else Path(order.include)))
    return Plan(order.model, built, found, data, Path(order.out), device=device, **order.options)


def _order(
    spec: SweepSpec, model: ModelChoice, pipelines: Sequence[Pipeline], names: tuple[str, ...], data: Path | None,
    where: Where,
) -> Order:  # fmt: skip
    own = {"dtype": model.dtype, "attn": model.attn, "batch_size": model.batch_size}
    options = {**spec.options, **{key: value for key, value in own.items() if value is not None}}
    options |= {"download": where.download, "force": where.force}
    return Order(
        model.model, tuple(one.resolved for one in pipelines), names, None if data is None else str(data.resolve()),
        str(where.out.resolve()), str(Path.cwd()),
        None if spec.include_path is None else str(spec.include_path.resolve()), options,
    )  # fmt: skip


def _tasks(spec: SweepSpec, faults: list[Fault]) -> list[str]:
    from prunekit_evals.lmms import tasks

    for number, (name, where) in enumerate(spec.tasks):
        try:
            tasks.find([name.removeprefix(f"{tasks.MICRO}/")], spec.include_path)
        except UnknownName as error:
            faults.append(Fault(where, f"tasks[{number}]", error.message, error.hint))
        except InputError as error:
            faults.append(Fault(where, f"tasks[{number}]", str(error)))
    return [name for name, _ in spec.tasks]


def _shape(model: ModelChoice, download: bool, faults: list[Fault]) -> ModelShape | None:
    try:
        return loading.load_shape(model.model, download)
    except PrunekitError as error:
        faults.append(Fault(model.where, model.key, str(error)))
        return None


def _on_model(
    spec: SweepSpec, model: ModelChoice, shape: ModelShape, faults: list[Fault], skipped: list[Fault]
) -> Iterator[Pipeline]:
    """The pipelines on one model, each at every budget; dense first."""
    found: dict[str, Pipeline] = {}
    for choice in spec.pipelines:
        for budget in spec.budgets or (None,):
            try:
                some = list(_at(choice, budget, shape, skipped) if budget else _as_they_are(choice, shape))
                found |= {one.sha: one for one in some if one.sha not in found}
            except SpecError as error:
                faults += map(choice.at_home, error.faults)
            except PrunekitError as error:
                faults.append(choice.at_home(Fault(None, "", f"{model.model}: {error}")))
    if spec.dense and not any(all(stage.use == "dense" for stage in one.stages) for one in found.values()):
        yield prunekit.load(DENSE)
    yield from found.values()


def _as_they_are(choice: PipelineChoice, shape: ModelShape) -> Iterator[Pipeline]:
    for one in expand(choice.source, choice.variation):
        one.pipeline.bind(shape)
        yield one.pipeline


def _at(choice: PipelineChoice, budget: Budget, shape: ModelShape, skipped: list[Fault]) -> Iterator[Pipeline]:
    """The variants of an entry at one budget, called by it; what prunes nothing as it is."""
    if budget.visual_tokens is not None:
        shape = dataclasses.replace(shape, visual_tokens=budget.visual_tokens)
    texts = tuple(f"budget.{key}={value}" for key, value in budget.as_data().items())
    for one in expand(choice.source, dataclasses.replace(choice.variation, budget=texts)):
        name = f"{one.pipeline.name}-{budget.of}-{budget.fraction:g}"
        wanted = (budget.of, budget.fraction)
        equal = at_equal([choice.source], renamed(one.overrides, name), wanted, shape, budget.text_tokens)
        for met in equal.pipelines:
            yield met if met.budget is not None else prunekit.load(choice.source, one.overrides)
        skipped += [choice.at_home(fault) for error in equal.refused for fault in error.faults]
