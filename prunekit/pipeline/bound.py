"""A pipeline on the numbers of one model: what the engine carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunekit.pipeline import layer_plans
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.stage import Stage
from prunekit.strategy.artefact import Artefact
from prunekit.strategy.decisions import LayerAction, LayerPlan, ModelShape
from prunekit.strategy.sites import Site


@dataclass(frozen=True)
class Ladder:
    """What a sample may keep under a budget of risk.

    rungs: the same pipeline with a fixed budget each: the first one keeps all, each keeps less than the one before.
    threshold: a sample takes rungs while their predicted harm is below it; 0: none. calibration: where it comes from;
    None where a calibration itself runs, dense.
    """

    rungs: tuple[BoundPipeline, ...]
    threshold: float
    calibration: Artefact | None


@dataclass(frozen=True)
class BoundPipeline:
    """A pipeline on a model.

    name, sha, positions, stages: those of the `Pipeline`.
    cuts: where visual tokens leave, in the order in which the data passes them.
    plan: what becomes of each decoder layer, for every sample alike.
    protected: layers that a router has to let run, because they have run before it is asked, a cut reads their
        attention or stands inside them, a later layer attends to their keys and values, or its own options say so.
    ladder: under a budget of risk what each sample may keep, as it turns out; cuts and stages then are those of the
        first rung. None: all samples keep the same.
    """

    name: str
    sha: str
    positions: Literal["keep", "renumber"]
    stages: tuple[Stage, ...]
    shape: ModelShape
    cuts: tuple[Cut, ...]
    plan: LayerPlan
    protected: frozenset[int] = frozenset()
    ladder: Ladder | None = None

    @property
    def routers(self) -> tuple[Stage, ...]:
        """Stages that decide for each sample, in the order of the data and of the file."""
        return tuple(sorted((stage for stage in self.stages if stage.is_router), key=lambda stage: stage.route_at))

    @property
    def asked(self) -> tuple[Cut, ...]:
        """Where strategies are asked: token stages at each of their cuts, routers once."""
        routers = tuple(Cut(router.route_at, router, None, 0) for router in self.routers)
        return (*(cut for cut in self.cuts if not cut.stage.is_router), *routers)

    @property
    def layer_budget(self) -> int | None:
        """How many decoder layers run for each sample; None when no router has a budget of layers."""
        return layer_plans.layer_budget(self.stages, self.shape.layers)

    @property
    def last_only(self) -> int | None:
        """As `ModelShape.last_only`; None where a stage cuts, routes or freezes tokens from there on."""
        first = self.shape.last_only
        if first is None or any(cut.site > Site(first - 1, "layer", "after") for cut in (*self.cuts, *self.asked)):
            return None
        free = any(router.decides_layers and router.keep_layers is None for router in self.routers)
        frozen = any(self.plan[layer] is LayerAction.FREEZE for layer in range(first, self.shape.layers))
        return None if free or frozen else first

    @property
    def acts(self) -> bool:
        """It changes anything: tokens, or layers in prefill or decoding, for all samples alike or by a router."""
        return bool(self.cuts or self.plan.layers or self.routers)
