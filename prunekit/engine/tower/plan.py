"""What a pipeline wants of a model's vision tower: cuts in it and things to read, put in place and refused early."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunekit.engine.attention import tap
from prunekit.engine.attention.tower_rows import TowerWatch
from prunekit.engine.overrides import Overrides
from prunekit.engine.tower.notes import TowerNotes
from prunekit.engine.tower.run import TowerRun
from prunekit.errors import Unsupported
from prunekit.families.base import Modality, Parts, Tower
from prunekit.pipeline.build import BoundPipeline
from prunekit.pipeline.stage import Cut
from prunekit.strategy.inputs import OF_TOWER, requests
from prunekit.strategy.sites import Site
from prunekit.strategy.tower_requests import (
    POOL,
    EncoderRows,
    EncoderSpec,
    Features,
    resolved,
)

_RUN: ContextVar[TowerRun | None] = ContextVar("prunekit_tower", default=None)


class TowerPlan:
    """The cuts of a pipeline in a vision tower, and what its stages read there.

    reads: for each block what is read of its attention. kept_states: blocks whose output is kept. noted: what goes
    along to the prompt. extras: the CLS tokens go through the projector.
    """

    def __init__(self, tower: Tower, cuts: Sequence[Cut], asked: Sequence[tuple[Cut, str]], extras: bool) -> None:
        self.tower, self.cuts, self.extras = tower, tuple(cuts), extras
        self.reads: dict[int, tuple[EncoderSpec, ...]] = {}
        kept = {tower.feature_block} if extras else set()
        noted: list[EncoderSpec] = []
        self.pools = False
        for cut, name in asked:
            for spec in requests(cut.stage.inputs, name):
                found = self.resolve(spec, cut.site)
                if cut.site.place != "vision":
                    noted.append(found)
                self.pools |= isinstance(found, EncoderRows) and found.query == POOL
                if isinstance(found, Features) and found.layer is not None:
                    kept.add(found.layer)
                elif found.layer is not None and found not in self.reads.get(found.layer, ()):
                    self.reads[found.layer] = (*self.reads.get(found.layer, ()), found)
        self.noted, self.kept_states = tuple(dict.fromkeys(noted)), frozenset(kept)

    @classmethod
    def of(cls, bound: BoundPipeline, parts: Parts) -> TowerPlan | None:
        """What `bound` wants of the tower of `parts`; None: nothing. What a tower cannot give, `bind` has refused."""
        cuts = [cut for cut in bound.cuts if cut.site.place == "vision"]
        asked = [(cut, name) for cut in bound.cuts for name in OF_TOWER if cut.stage.asks_for(name)]
        extras = any(cut.stage.extras for cut in bound.cuts)
        if not (cuts or asked or extras):
            return None
        assert parts.tower is not None, "checked when the pipeline was bound"
        return cls(parts.tower, cuts, asked, extras)

    def resolve(self, spec: EncoderSpec, site: Site) -> EncoderSpec:
        """`spec` with the number of its block; without one where it is of no block."""
        return resolved(spec, site, len(self.tower.layers), self.tower.feature_block)

    def cuts_at(self, number: int, point: str) -> list[Cut]:
        """The cuts in or after block `number`."""
        return [cut for cut in self.cuts if cut.site.layer == number and cut.site.point == point]

    @property
    def needs_blocks(self) -> bool:
        """Something happens in the tower itself; projected features are there without."""
        return bool(self.cuts or self.reads or self.kept_states or self.pools)

    @property
    def additive(self) -> bool:
        """The tower's attention takes masks that are added."""
        return _implementation(self.tower) == "eager"

    @property
    def takes_masks(self) -> bool:
        """Its attention takes masks; towers that attend part by part take none."""
        attention = getattr(self.tower.layers[0], self.tower.attention)
        return "attention_mask" in inspect.signature(type(attention).forward).parameters

    def attach(self, overrides: Overrides) -> None:
        """Put overrides on the blocks that need one."""
        tower, first = self.tower, min((cut.site.layer or 0 for cut in self.cuts), default=len(self.tower.layers))
        if self.reads:
            tap.patch.acquire()
            overrides.later(tap.patch.release)
        for number, block in enumerate(tower.layers):
            if number >= first or number in self.kept_states:
                overrides.replace(block, "forward", _block_forward(number))
            if number >= first:
                overrides.replace(getattr(block, tower.attention), "forward", _attention_forward)
            if self.cuts_at(number, "mid"):
                overrides.replace(getattr(block, tower.mlp), "forward", _mlp_forward)
        if self.pools and tower.pool is not None:
            overrides.replace(tower.pool, "forward", _pool_forward)

    @contextmanager
    def encoding(self, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[TowerRun]:
        """Around a call of an encoding method with these arguments. Raises Unsupported for calls that do not fit."""
        _check_call(arguments, self.tower)
        if self.cuts and torch.is_grad_enabled() and any(map(_replays, self.tower.layers)):
            raise Unsupported(
                "gradient checkpointing would run blocks of the vision tower again, without their cuts; switch it off "
                "for the tower, which pruning makes cheaper, or cut at 'encoder'"
            )
        run = TowerRun(self, modality, arguments)
        modules = {getattr(self.tower.layers[number], self.tower.attention): number for number in self.reads}
        token = _RUN.set(run)
        try:
            with tap.watching(cast("Any", TowerWatch(modules, run.take))):
                yield run
        finally:
            _RUN.reset(token)

    @torch.no_grad()
    def notes(self, run: TowerRun, features: Sequence[Tensor]) -> TowerNotes:
        """What goes along with the pictures, after the call. features: its `pooler_output`, one entry for each."""
        return TowerNotes.of(run, self, features)


def _check_call(arguments: Mapping[str, Any], tower: Tower) -> None:
    chosen = arguments.get("vision_feature_layer")
    if chosen is None:
        return
    states = len(tower.layers) + 1
    latest = max(one % states for one in ([chosen] if isinstance(chosen, int) else chosen))
    if latest != tower.feature_layer % states:
        raise Unsupported(
            f"vision_feature_layer={chosen} in a call differs from the model's config, by which stages that cut or "
            "read the vision tower were checked; set it in the config"
        )


def _replays(block: nn.Module) -> bool:
    """Whether a backward pass runs the block a second time."""
    return block.training and bool(getattr(block, "gradient_checkpointing", False))


def _implementation(tower: Tower) -> str:
    config: Any = getattr(getattr(tower.layers[0], tower.attention), "config", None)
    return str(getattr(config, "_attn_implementation", "eager"))


def _block_forward(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            return original(*args, **kwargs) if run is None else run.run_block(number, original, args, kwargs)

        return forward

    return make


def _attention_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None or (run.only != "mlp" and run.left is None):
            return original(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given[names[0]]
        if run.only == "mlp":
            return (torch.zeros_like(hidden), None) if hidden.ndim == 3 else torch.zeros_like(hidden)
        if run.plan.takes_masks:
            given["attention_mask"] = run.mask(given.get("attention_mask"), hidden)
        return original(**given)

    return forward


def _mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None and run.only == "attention":
            return torch.zeros_like(hidden)
        return original(hidden, *args, **kwargs)

    return forward


def _pool_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None:
            run.pool_states = hidden.detach()
        return original(hidden, *args, **kwargs)

    return forward
