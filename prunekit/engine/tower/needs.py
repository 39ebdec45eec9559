"""What a pipeline wants of a model's vision tower: cuts in it and things to read, refused early."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.engine.tokens.masks import Kind, kind_of
from prunekit.errors import Unsupported
from prunekit.families.base import Parts, Tower
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.stage import Cut
from prunekit.strategy.inputs import OF_TOWER, TOKEN_HOOKS, inputs_of, requests
from prunekit.strategy.sites import Site
from prunekit.strategy.tower_requests import (
    POOL,
    EncoderRows,
    EncoderSpec,
    Features,
    resolved,
)

# What hooks get at a tower site; everything else belongs to the prompt or the decoder.
ARGUMENTS = frozenset(one.name for hook in TOKEN_HOOKS for one in inputs_of(hook) if "tower" in one.regions)


@dataclass(frozen=True)
class TowerNeeds:
    """The cuts of a pipeline in a vision tower, and what its stages read there.

    reads: for each block what is read of its attention. states: blocks whose output is kept. carried: what goes along
    to the prompt. pools: the pooling head's input is kept. extras: the CLS tokens go through the projector.
    """

    tower: Tower
    cuts: tuple[Cut, ...]
    reads: Mapping[int, tuple[EncoderSpec, ...]]
    states: frozenset[int]
    carried: tuple[EncoderSpec, ...]
    pools: bool
    extras: bool

    @classmethod
    def of(cls, bound: BoundPipeline, parts: Parts) -> TowerNeeds | None:
        """What `bound` wants of the tower of `parts`; None: nothing.

        Raises Unsupported, naming the stage, for what this tower cannot give.
        """
        cuts = [cut for cut in bound.cuts if cut.site.place == "vision"]
        reading = [
            (cut, name, spec)
            for cut in bound.cuts
            for name in OF_TOWER
            if cut.stage.asks_for(name)
            for spec in requests(cut.stage.inputs, name)
        ]
        extras = [cut for cut in bound.cuts if cut.stage.extras]
        if not (cuts or reading or extras):
            return None
        tower = parts.tower
        if tower is None:
            first = min([*cuts, *(cut for cut, _, _ in reading), *extras], key=lambda cut: cut.site)
            raise Unsupported(
                f"{first.label} needs the vision tower, which for {parts.family} can neither be cut nor read: its "
                "family file declares no `tower`; use sites from 'encoder' on, and inputs that are not of the tower"
            )
        for cut in cuts:
            _check_cut(cut, tower)
        for cut, name, spec in reading:
            _check_spec(cut, name, spec, tower, bool(cuts))
        for cut in extras:
            _check_extras(cut, tower)
        blocks, feature_block = len(tower.layers), tower.feature_block
        specs = [(cut.site, resolved(spec, cut.site, blocks, feature_block)) for cut, _, spec in reading]
        reads: dict[int, tuple[EncoderSpec, ...]] = {}
        states = {feature_block} if extras else set()
        for spec in dict.fromkeys(spec for _, spec in specs if spec.layer is not None):
            assert spec.layer is not None
            if isinstance(spec, Features):
                states.add(spec.layer)
            else:
                reads[spec.layer] = (*reads.get(spec.layer, ()), spec)
        carried = tuple(dict.fromkeys(spec for site, spec in specs if site.place != "vision"))
        pools = any(isinstance(spec, EncoderRows) and spec.query == POOL for _, spec in specs)
        return cls(tower, tuple(cuts), reads, frozenset(states), carried, pools, bool(extras))

    def resolve(self, spec: EncoderSpec, site: Site) -> EncoderSpec:
        """`spec` with the number of its block; without one where it is of no block."""
        return resolved(spec, site, len(self.tower.layers), self.tower.feature_block)

    def cuts_at(self, number: int, point: str) -> list[Cut]:
        """The cuts in or after block `number`."""
        return [cut for cut in self.cuts if cut.site.layer == number and cut.site.point == point]

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
        chosen = arguments.get("vision_feature_layer")
        if chosen is None:
            return
        states = len(self.tower.layers) + 1
        latest = max(one % states for one in ([chosen] if isinstance(chosen, int) else chosen))
        if latest != self.tower.feature_layer % states:
            raise Unsupported(
                f"vision_feature_layer={chosen} in a call differs from the model's config, by which stages that cut or "
                "read the vision tower were checked; set it in the config"
            )


def _check_cut(cut: Cut, tower: Tower) -> None:
    """Raise Unsupported for a cut that this tower does not allow."""
    blocks, number, used = len(tower.layers), cut.site.layer or 0, _implementation(tower)
    reason = None
    if number >= blocks:
        reason = f"the vision tower ends with block {blocks - 1}"
    elif number > tower.feature_block:
        reason = (
            f"image features are taken after block {tower.feature_block}, so a later cut changes nothing that the "
            "decoder sees; cut earlier, or at 'encoder'"
        )
    elif used not in ("sdpa", "eager"):
        reason = f"the vision tower runs on '{used}', which takes no masks of single tokens; use sdpa or eager"
    elif any(site.place != "vision" for site in cut.stage.known_sites or ()):
        reason = "inside the tower a sample is an image, later it is a row of the prompt: split the stage in two"
    else:
        wrong = sorted({name for hook in TOKEN_HOOKS for name in cut.stage.requests(hook)} - ARGUMENTS)
        if wrong:
            reason = f"it asks for {', '.join(wrong)}, which the prompt or the decoder has, and not the vision tower"
    if reason:
        raise Unsupported(f"{cut.label} cannot act at '{cut.site}': {reason}")


def _check_spec(cut: Cut, name: str, spec: EncoderSpec, tower: Tower, cuts: bool) -> None:
    """Raise Unsupported for an input that this tower does not have."""
    blocks, inside = len(tower.layers), cut.site.place == "vision"
    block = resolved(spec, cut.site, blocks, tower.feature_block).layer
    cls = getattr(spec, "of", "") == "cls" or getattr(spec, "query", "") == "cls"
    reason = None
    if cls and not tower.leading:
        reason = "this vision tower has no CLS token; use query='mean', or inputs of the patches"
    elif isinstance(spec, EncoderRows) and spec.query == POOL:
        if tower.pool is None:
            reason = "this vision tower has no pooling head; use query='cls' or 'mean'"
        elif cuts:
            reason = "the pooling head would also attend to what cuts in the tower have dropped"
    elif isinstance(spec, Features) and spec.projected:
        reason = "inside the tower nothing has been projected yet" if inside else None
    elif block not in range(blocks):
        reason = f"there is no block {spec.layer}: the vision tower has blocks 0 to {blocks - 1}"
    elif inside and (block or 0) > (cut.site.layer or 0):
        reason = f"block {block} has not run yet at '{cut.site}'"
    elif inside and isinstance(spec, Features) and cut.site.point == "mid" and block == cut.site.layer:
        reason = f"block {block} has not run to its end at '{cut.site}'; ask for `hidden`"
    if reason:
        raise Unsupported(f"{cut.label} asks for {name}, {spec}: {reason}")


def _check_extras(cut: Cut, tower: Tower) -> None:
    reason = None
    if not tower.leading:
        reason = "there is no CLS token in this vision tower"
    elif tower.projector is None:
        reason = "the projector of this model does not map single tokens, so its CLS token cannot be projected"
    elif tower.feature_block < 0:
        reason = "the projector gets the tower's input"
    if reason:
        raise Unsupported(f"{cut.label} takes extras {cut.stage.extras}: {reason}")


def _implementation(tower: Tower) -> str:
    config: Any = getattr(getattr(tower.layers[0], tower.attention), "config", None)
    return str(getattr(config, "_attn_implementation", "eager"))
