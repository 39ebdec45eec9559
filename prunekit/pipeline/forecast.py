"""What a pipeline will do with a prompt of one image, by its budgets alone: tokens, FLOPs and KV before any compute.

Figures are those of the budgets: a stage that merges may leave fewer tokens, and one may also crop the KV of earlier
layers. Costs are a range where a router chooses layers by the prompt or a stage decides by itself how many tokens to
leave, which may be all that reach it or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from prunekit import cost
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.stage import Cut
from prunekit.pipeline.statements import selection_flops
from prunekit.strategy.decisions import LayerAction, TowerParams, TowerShape
from prunekit.strategy.sites import ENCODER, PIXELS, PREFILL_END, Site

# The tokens whose logits `generate` wants of a prompt.
LAST = 1


@dataclass(frozen=True)
class Forecast:
    """Figures for one sample, layer by layer, if no router skips anything; and bounds with what routers may skip.

    layer_tokens: that enter each layer. mlp_tokens: that go through its MLP. kv_tokens: that it holds afterwards.
    at_most: these are upper bounds, since a stage decides by itself how many tokens it leaves.
    flops, kv: lowest and highest fraction of the dense model's prefill FLOPs, and of its KV entries. FLOPs are those of
        the decoder's layers; tower, projector and head are not in them. whole: the same with tower and projector; None
        where their cost is not known.
    decisions: FLOPs of the stages' own decisions, as far as they say, as a fraction of the same; not in `flops`. The
        highest, where `at_most`.
    """

    layer_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    at_most: bool
    flops: tuple[float, float]
    kv: tuple[float, float]
    decisions: float
    whole: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Layers:
    """Tokens that enter each layer, go through its MLP and stay in its KV, and its FLOPs."""

    entering: tuple[int, ...]
    mlp: tuple[int, ...]
    kv: tuple[int, ...]
    flops: tuple[int, ...]


def forecast(bound: BoundPipeline, text_tokens: int) -> Forecast | None:
    """For one image and `text_tokens` other tokens; None where the number of visual tokens depends on the image."""
    shape, original = bound.shape, bound.shape.visual_tokens
    if original is None:
        return None
    most = _layers(bound, original, text_tokens, decided=True)
    least = _layers(bound, original, text_tokens, decided=False)
    dense = original + text_tokens
    dense_flops = cost.dense_flops(shape, dense, LAST)
    holding = sum(cost.kv_bytes(shape, layer, 1) > 0 for layer in range(shape.layers))
    flops = _range(bound, least.flops, most.flops, dense_flops)
    return Forecast(
        most.entering,
        most.mlp,
        most.kv,
        any(cut.keep is None and not cut.drops_all for cut in bound.cuts),
        flops,
        _range(bound, least.kv, most.kv, dense * holding),
        _decisions(bound, original, text_tokens) / dense_flops,
        _whole(bound, original, flops, dense_flops),
    )


def _whole(
    bound: BoundPipeline, original: int, flops: tuple[float, float], dense_flops: int
) -> tuple[float, float] | None:
    """Lowest and highest fraction of the whole prefill's FLOPs, from those of the decoder's; None: not known."""
    tower = bound.shape.tower
    params = None if tower is None else tower.work
    if tower is None or params is None or params.tokens is None:
        return None
    cuts = [cut for cut in bound.cuts if cut.site.in_tower]
    counts = (visual_counts(cuts, original, decided=False), visual_counts(cuts, original))
    low, high = (cost.tower_flops(params, _tower_work(tower, params, params.tokens, cuts, each)) for each in counts)
    tower_flops = cost.tower_flops(params, _tower_work(tower, params, params.tokens, [], (original,)))
    dense = dense_flops + tower_flops
    return (flops[0] * dense_flops + low) / dense, (flops[1] * dense_flops + high) / dense


def _tower_work(
    tower: TowerShape, params: TowerParams, tokens: int, cuts: Sequence[Cut], counts: Sequence[int]
) -> cost.TowerWork:
    """Of one image. tokens: of the tower. counts: visual tokens that enter each of the cuts, and leave the last one."""
    original = counts[0]
    each = max(round((tokens - tower.leading) / original), 1)

    def remaining(site: Site) -> int:
        """Tokens when the cuts before and at `site` have been made."""
        return tokens - each * (original - counts[sum(cut.site <= site for cut in cuts)])

    blocks = []
    for number in range(tower.blocks):
        entering = remaining(Site(number - 1, "vision", "after") if number else PIXELS)
        blocks.append((entering, entering**2, remaining(Site(number, "vision", "mid"))))
    pools, merged = int(tower.pool), (original,) * len(params.mergers)
    return cost.TowerWork(tokens - tower.leading, tuple(blocks), each * counts[-1], merged, pools, pools * tokens)


def visual_counts(cuts: Sequence[Cut], original: int, decided: bool = True) -> tuple[int, ...]:
    """How many of the `original` visual tokens of a sample reach each cut and, as last entry, leave the last one.

    decided: a stage that decides by itself leaves all that reach it; False: it leaves none.
    """

    def leaves(entering: int, cut: Cut) -> int:
        if cut.drops_all or (cut.keep is None and not decided):
            return 0
        return entering if cut.keep is None else cut.keep.count(original, entering)

    return tuple(itertools.accumulate(cuts, leaves, initial=original))


def _layers(bound: BoundPipeline, original: int, text_tokens: int, decided: bool) -> _Layers:
    shape, plan = bound.shape, bound.plan
    entering, inside, gone = _visual(bound, original, decided)
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
    held = cost.kv_tokens(shape, alive, plan)
    return _Layers(tokens, mlp, tuple(one and one - gone for one in held), flops)


def _visual(bound: BoundPipeline, original: int, decided: bool) -> tuple[list[int], list[int], int]:
    """Visual tokens that enter each layer, those that stay inside it, and how many leave after the prefill."""
    counts = visual_counts(bound.cuts, original, decided)
    layers = range(bound.shape.layers)
    # Cuts are in the order of the data, so that how many came before tells how many remain.
    before = [sum(cut.site.reach <= layer for cut in bound.cuts) for layer in layers]
    inside = [sum(cut.site <= Site(layer, "layer", "mid") for cut in bound.cuts) for layer in layers]
    gone = sum(counts[at] - counts[at + 1] for at, cut in enumerate(bound.cuts) if cut.site == PREFILL_END)
    return [counts[at] for at in before], [counts[at] for at in inside], gone


def _decisions(bound: BoundPipeline, original: int, text_tokens: int) -> int:
    """FLOPs of the decisions themselves: of token stages at each of their cuts, of routers once."""
    counts = visual_counts(bound.cuts, original)
    total, routed = 0, original
    for at, cut in enumerate(bound.cuts):
        if cut.stage.is_router:
            continue
        total += selection_flops(cut.stage, bound.shape, text_tokens, counts[at])
        if cut.site <= ENCODER:
            routed = counts[at + 1]
    return total + sum(selection_flops(router, bound.shape, text_tokens, routed) for router in bound.routers)


def _range(bound: BoundPipeline, least: Sequence[int], most: Sequence[int], dense: int) -> tuple[float, float]:
    """Lowest and highest sum of what layers cost, as a fraction of `dense`."""
    if not any(router.decides_layers for router in bound.routers):
        return sum(least) / dense, sum(most) / dense
    free = [layer for layer in range(bound.shape.layers) if layer not in bound.protected | bound.plan.layers]
    if bound.layer_budget is None:  # the router decides by itself, between all and nothing that is free
        return (sum(least) - sum(least[layer] for layer in free)) / dense, sum(most) / dense
    skipped = sum(bound.plan[layer] is LayerAction.SKIP for layer in bound.plan.layers)
    drop = max(0, min(bound.shape.layers - skipped - bound.layer_budget, len(free)))
    saved_most = sum(sorted(least[layer] for layer in free)[len(free) - drop :])
    saved_least = sum(sorted(most[layer] for layer in free)[:drop])
    return (sum(least) - saved_most) / dense, (sum(most) - saved_least) / dense
