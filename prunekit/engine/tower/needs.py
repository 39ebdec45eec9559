"""What a pipeline wants of a model's vision tower: cuts in it and things to read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.engine.tokens.masks import Kind, kind_of
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.families.tower_parts import Tower
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.strategy.inputs import OF_TOWER, requests
from prunekit.strategy.sites import Site
from prunekit.strategy.tower_requests import POOL, EncoderRows, EncoderSpec, Features, resolved
from prunekit.upstream import NAMES_OF_FEATURE_LAYERS


@dataclass(frozen=True)
class TowerNeeds:
    """The cuts of a pipeline in a vision tower, and what its stages read there.

    resizing: the stage that makes images smaller; None: there is none.
    reads: for each block what is read of its attention. states: blocks whose output is kept. carried: what goes along
    to the prompt. pools: the pooling head's input is kept. extras: the CLS tokens go through the projector.
    traced: decisions keep what a trace tells of them beside what stays.
    """

    tower: Tower
    resizing: Cut | None
    cuts: tuple[Cut, ...]
    reads: Mapping[int, tuple[EncoderSpec, ...]]
    states: frozenset[int]
    carried: tuple[EncoderSpec, ...]
    pools: bool
    extras: bool
    traced: bool = False

    @classmethod
    def of(cls, bound: BoundPipeline, parts: Parts, traced: bool = False) -> TowerNeeds | None:
        """What `bound` wants of the tower of `parts`, if only its cost; None: nothing. What a tower cannot give, `bind`
        has refused.
        """
        before = [cut for cut in bound.cuts if cut.site.in_tower]
        resizing = next((cut for cut in before if cut.stage.is_image), None)
        cuts = [cut for cut in before if cut is not resizing]
        reading = [
            (cut.site, spec)
            for cut in bound.asked
            for name in OF_TOWER
            if cut.stage.asks_for(name)
            for spec in requests(cut.stage.inputs, name)
        ]
        extras = any(cut.stage.extras for cut in bound.cuts)
        tower = parts.tower
        if not (before or reading or extras) and (tower is None or tower.embedding is None):
            return None
        assert tower is not None, "checked when the pipeline was bound"
        blocks, feature_block = len(tower.layers), tower.feature_block
        specs = [(site, resolved(spec, site, blocks, feature_block)) for site, spec in reading]
        reads: dict[int, tuple[EncoderSpec, ...]] = {}
        states = {feature_block} if extras else set()
        for spec in dict.fromkeys(spec for _, spec in specs if spec.layer is not None):
            assert isinstance(spec.layer, int), "resolved"
            if isinstance(spec, Features):
                states.add(spec.layer)
            else:
                reads[spec.layer] = (*reads.get(spec.layer, ()), spec)
        carried = tuple(dict.fromkeys(spec for site, spec in specs if not site.in_tower))
        pools = any(isinstance(spec, EncoderRows) and spec.query == POOL for _, spec in specs)
        return cls(tower, resizing, tuple(cuts), reads, frozenset(states), carried, pools, extras, traced)

    def resolve(self, spec: EncoderSpec, site: Site) -> EncoderSpec:
        """`spec` with the number of its block; without one where it is of no block."""
        return resolved(spec, site, len(self.tower.layers), self.tower.feature_block)

    def cuts_at(self, number: int | None, point: str) -> list[Cut]:
        """The cuts in or after block `number`; None: those of pixels, before all blocks."""
        return [cut for cut in self.cuts if cut.site.layer == number and cut.site.point == point]

    @property
    def asks(self) -> bool:
        """Stages want something of the tower; else it is there for its cost alone."""
        return bool(self.blocks or self.carried or self.extras or self.resizing)

    @property
    def blocks(self) -> bool:
        """Something happens in the tower itself; projected features are there without."""
        return bool(self.cuts or self.reads or self.states or self.pools)

    @cached_property
    def takes_masks(self) -> bool:
        """Its attention takes masks; towers that attend part by part take none."""
        attention = getattr(self.tower.layers[0], self.tower.attention)
        return "attention_mask" in inspect.signature(type(attention).forward).parameters

    @cached_property
    def mask_kind(self) -> Kind:
        """The kind of mask that it takes."""
        return kind_of(_implementation(self.tower)) or "bool"

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raise Unsupported for a call of an encoding method that takes features of another block."""
        name = next((name for name in NAMES_OF_FEATURE_LAYERS if arguments.get(name) is not None), None)
        if name is None:
            return
        chosen = arguments[name]
        states = len(self.tower.layers) + 1
        latest = max(one % states for one in ([chosen] if isinstance(chosen, int) else chosen))
        if latest != self.tower.feature_layer % states:
            raise Unsupported(
                f"{name}={chosen} in a call differs from the model's config, by which stages that cut or "
                "read the vision tower were checked; set it in the config"
            )


def _implementation(tower: Tower) -> str:
    config: Any = getattr(getattr(tower.layers[0], tower.attention), "config", None)
    return str(getattr(config, "_attn_implementation", "eager"))
