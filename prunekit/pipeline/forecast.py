"""What a pipeline will do with a prompt, by its budgets alone: tokens, FLOPs and KV before any compute.

Figures are those of the budgets. They are a range where a router chooses layers by the prompt, or a stage decides by
itself how many tokens to leave, which may be all that reach it or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prunekit import cost
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.statements import selection_flops
from prunekit.pipeline.tower_forecast import one_size, tower_work
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import ENCODER, PREFILL_END, Site

# The tokens whose logits `generate` wants of a prompt.
LAST = 1

# The least and the most that something can be.
Bounds = tuple[int, int]


@dataclass(frozen=True)
class Forecast:
    """Figures for one sample, layer by layer, if no router skips anything; and bounds with what routers may skip.

    layer_tokens: that enter each layer. mlp_tokens: that go through its MLP. kv_tokens: that it holds afterwards.
    least_tokens: the fewest that can enter each layer. at_most: the first three are upper bounds, since a stage decides
    by itself how many tokens it leaves.
    prefill, dense_prefill: FLOPs of the decoder's layers. decode, dense_decode: the same of the first token that is
    decoded. kv, dense_kv: numbers in the KV cache after the prefill.
    selection, routing: FLOPs of what token stages, and routers, take to decide, as far as they say; not in `prefill`.
    vision, projector: FLOPs of the vision tower, and of what makes visual tokens behind it; None where they are not
    known. dense_vision, dense_projector: without any cut.
    """

    layer_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    least_tokens: tuple[int, ...]
    at_most: bool
    prefill: Bounds
    dense_prefill: int
    decode: Bounds
    dense_decode: int
    kv_numbers: Bounds
    dense_kv_numbers: int
    selection: Bounds
    routing: Bounds
    vision: Bounds | None = None
    projector: Bounds | None = None
    dense_vision: int | None = None
    dense_projector: int | None = None

    @property
    def flops(self) -> tuple[float, float]:
        """Lowest and highest fraction of the dense model's prefill FLOPs; of the decoder's layers."""
        return self.prefill[0] / self.dense_prefill, self.prefill[1] / self.dense_prefill

    @property
    def kv(self) -> tuple[float, float]:
        """Lowest and highest fraction of the dense model's KV cache."""
        return self.kv_numbers[0] / self.dense_kv_numbers, self.kv_numbers[1] / self.dense_kv_numbers

    @property
    def decisions(self) -> float:
        """The most that decisions take, as a fraction of the dense model's prefill FLOPs; not in `flops`."""
        return (self.selection[1] + self.routing[1]) / self.dense_prefill

    @property
    def whole(self) -> tuple[float, float] | None:
        """As `flops`, of the whole prefill with tower and projector; None where their cost is not known."""
        if self.vision is None or self.projector is None or self.dense_vision is None or self.dense_projector is None:
            return None
        dense = self.dense_prefill + self.dense_vision + self.dense_projector
        low, high = (sum(part[of] for part in (self.prefill, self.vision, self.projector)) for of in (0, 1))
        return low / dense, high / dense


@dataclass(frozen=True)
class _Layers:
    """Of each layer the tokens that enter it, go through its MLP and stay in its KV, and its FLOPs in both phases."""

    entering: tuple[int, ...]
    mlp: tuple[int, ...]
    kv: tuple[int, ...]
    flops: tuple[int, ...]
    decode: tuple[int, ...]


def forecast(bound: BoundPipeline, text_tokens: int, given: cost.TowerInput | None = None) -> Forecast | None:
    """For one prompt of images or videos and `text_tokens` other tokens.

    given: what the tower gets of them; None: one image of the number of visual tokens that the model has for each, and
    nothing to say (None) where that depends on the image.
    """
    original = bound.shape.visual_tokens if given is None else given.visual
    if original is None:
        return None
    if bound.ladder is not None:
        return _between(*(forecast(bound.ladder.rungs[at], text_tokens, given) for at in (0, -1)))
    shape, tower = bound.shape, bound.shape.tower
    if given is None and tower is not None and tower.work is not None:
        given = one_size(tower, tower.work, original)
    inputs = () if given is None else given.inputs
    counts = [visual_counts(bound.cuts, original, decided, inputs) for decided in (False, True)]
    least, most = (_layers(bound, one, text_tokens) for one in counts)
    widths = [cost.kv_bytes(shape, layer, 1) for layer in range(shape.layers)]
    kv = [[count * width for count, width in zip(one.kv, widths, strict=True)] for one in (least, most)]
    dense = original + text_tokens
    fewest, all_of = (_decisions(bound, one, text_tokens) for one in counts)
    held = cost.stock_kv_tokens(shape, dense)
    return Forecast(
        most.entering,
        most.mlp,
        most.kv,
        least.entering,
        any(cut.decides for cut in bound.cuts),
        _bounds(bound, least.flops, most.flops),
        cost.dense_flops(shape, dense, LAST),
        _bounds(bound, least.decode, most.decode),
        sum(cost.decode_flops(shape, _keys(bound, held))),
        _bounds(bound, kv[0], kv[1]),
        sum(count * width for count, width in zip(held, widths, strict=True)),
        (fewest[0], all_of[0]),
        (fewest[1], all_of[1]),
        *_tower(bound, given, counts),
    )


def _between(most: Forecast | None, least: Forecast | None) -> Forecast | None:
    """Where each sample takes a rung of its own: from the cheapest one, `least`, to the dense one."""
    if most is None or least is None:
        return None
    ranges = ("prefill", "decode", "kv_numbers", "selection", "routing", "vision", "projector")
    pairs = {name: (getattr(least, name), getattr(most, name)) for name in ranges}
    both: dict[str, Any] = {name: None if low is None else (low[0], high[1]) for name, (low, high) in pairs.items()}
    return replace(most, least_tokens=least.least_tokens, at_most=True, **both)


def _tower(
    bound: BoundPipeline, given: cost.TowerInput | None, counts: Sequence[Sequence[int]]
) -> tuple[Bounds | None, Bounds | None, int | None, int | None]:
    """FLOPs of the tower and of its projector, as bounds and dense; None where they are not known."""
    tower = bound.shape.tower
    params = None if tower is None else tower.work
    if tower is None or params is None or given is None:
        return None, None, None, None
    cuts = [cut for cut in bound.cuts if cut.site < ENCODER]
    work = [tower_work(given, params, tower, cuts, counts[of], bool(of)) for of in (0, 1)]
    dense = tower_work(given, params, tower, (), (given.visual,), True)
    vision = cost.vision_flops(params, work[0]), cost.vision_flops(params, work[1])
    projector = cost.projector_flops(params, work[0]), cost.projector_flops(params, work[1])
    return vision, projector, cost.vision_flops(params, dense), cost.projector_flops(params, dense)


def visual_counts(
    cuts: Sequence[Cut], original: int, decided: bool = True, inputs: Sequence[tuple[int, int]] = ()
) -> tuple[int, ...]:
    """How many of the `original` visual tokens of a sample reach each cut and, as last entry, leave the last one.

    decided: a stage that decides by itself leaves all that reach it; False: it leaves none. inputs: as in `TowerInput`,
    since in the tower each image is cut for itself, and what is made of no patch stays; empty: one image.
    """
    tower = [cut for cut in cuts if cut.site < ENCODER]
    counts = [original]
    if tower:
        rows = []
        for visual, blank in inputs or ((original, 0),):
            left = itertools.accumulate(tower, partial(_left, visual - blank, decided), initial=visual - blank)
            rows.append([blank + count for count in left])
        counts = [sum(column) for column in zip(*rows, strict=True)]
    others = itertools.accumulate(cuts[len(tower) :], partial(_left, original, decided), initial=counts[-1])
    return (*counts[:-1], *others)


def _left(original: int, decided: bool, entering: int, cut: Cut) -> int:
    """How many tokens a cut leaves of those that enter it."""
    if cut.drops_all or (cut.decides and not decided):
        return 0
    return entering if cut.keep is None or cut.decides else cut.keep.count(original, entering)


def _layers(bound: BoundPipeline, counts: Sequence[int], text_tokens: int) -> _Layers:
    """counts: visual tokens at each cut, as `visual_counts` gives them."""
    shape, plan = bound.shape, bound.plan
    entering, inside, gone = _visual(bound, counts)
    alive = tuple(visual + text_tokens for visual in entering)
    whole = shape.layers if bound.last_only is None else bound.last_only
    tokens = tuple(many if layer < whole else min(many, LAST) for layer, many in enumerate(alive))
    # Frozen layers are for the text alone.
    fed = [0 if plan[layer] is LayerAction.FREEZE else visual for layer, visual in enumerate(inside)]
    mlp = tuple(min(visual + text_tokens, tokens[layer]) * plan[layer].feeds_mlp for layer, visual in enumerate(fed))
    flops = tuple(
        cost.layer_flops(
            shape.of(layer), tokens[layer], plan[layer], visual=entering[layer], mlp=mlp[layer], keys=alive[layer]
        )
        for layer in range(shape.layers)
    )
    held = [many - left for many, left in zip(alive, gone, strict=True)]
    # What acts keeps a cache of its own, in which no window closes.
    kv = cost.kv_tokens(shape, held, plan) if bound.acts else cost.stock_kv_tokens(shape, held[0])
    return _Layers(tokens, mlp, kv, flops, cost.decode_flops(shape, _keys(bound, kv), plan))


def _keys(bound: BoundPipeline, held: Sequence[int]) -> list[int]:
    """Tokens that one decoded token attends to in each layer: those that are held there, or by the layer that it reads
    them of, and itself.
    """
    return [held[bound.shape.kv_source(layer)] + 1 for layer in range(bound.shape.layers)]


def _visual(bound: BoundPipeline, counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Visual tokens that enter each layer, those that stay inside it, and how many leave its KV afterwards."""
    layers = range(bound.shape.layers)
    # Cuts are in the order of the data, so that how many came before tells how many remain.
    before = [sum(cut.site.reach <= layer for cut in bound.cuts) for layer in layers]
    inside = [sum(cut.site <= Site(layer, "layer", "mid") for cut in bound.cuts) for layer in layers]
    crops = [cut.site == PREFILL_END or cut.stage.declaration.crops for cut in bound.cuts]
    lost = [counts[at] - counts[at + 1] for at in range(len(bound.cuts))]
    gone = [
        sum(lost[at] for at, cut in enumerate(bound.cuts) if crops[at] and layer < cut.site.reach) for layer in layers
    ]
    return [counts[at] for at in before], [counts[at] for at in inside], gone


def _decisions(bound: BoundPipeline, counts: Sequence[int], text_tokens: int) -> tuple[int, int]:
    """FLOPs of the decisions themselves: of token stages at each of their cuts, and of routers, which decide once."""
    total, routing = 0, 0
    for at, cut in enumerate(bound.cuts):
        if not cut.stage.is_router:
            total += selection_flops(cut.stage, bound.shape, text_tokens, counts[at])
    for router in bound.routers:
        left = counts[sum(cut.comes_before(router) for cut in bound.cuts)]
        routing += selection_flops(router, bound.shape, text_tokens, left)
    return total, routing


def _bounds(bound: BoundPipeline, least: Sequence[int], most: Sequence[int]) -> Bounds:
    """Lowest and highest sum of what layers cost."""
    if not any(router.decides_layers for router in bound.routers):
        return sum(least), sum(most)
    free = [layer for layer in range(bound.shape.layers) if layer not in bound.protected | bound.plan.layers]
    if bound.layer_budget is None:  # the router decides by itself, between all and nothing that is free
        return sum(least) - sum(least[layer] for layer in free), sum(most)
    skipped = sum(bound.plan[layer] is LayerAction.SKIP for layer in bound.plan.layers)
    drop = max(0, min(bound.shape.layers - skipped - bound.layer_budget, len(free)))
    saved_most = sum(sorted(least[layer] for layer in free)[len(free) - drop :])
    saved_least = sum(sorted(most[layer] for layer in free)[:drop])
    return sum(least) - saved_most, sum(most) - saved_least
