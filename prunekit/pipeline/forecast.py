"""What a pipeline will do with a prompt of one picture, by its budgets alone: tokens, FLOPs and KV before any compute.

A stage that merges may leave fewer tokens than its budget, one that decides by itself is taken to leave all, one may
also crop the KV of earlier layers, and a router chooses its layers by the prompt: so figures are those of the budgets,
and costs are a range where a router decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit import cost
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.stage import Cut
from prunekit.pipeline.statements import selection_flops
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import ENCODER, PREFILL_END, Site


@dataclass(frozen=True)
class Forecast:
    """Figures for one sample, layer by layer, if no router skips anything; and bounds with what routers may skip.

    layer_tokens: that enter each layer. mlp_tokens: that go through its MLP. kv_tokens: that it holds afterwards.
    flops, kv: lowest and highest fraction of the dense model's prefill FLOPs, and of its KV entries.
    decisions: FLOPs of the stages' own decisions, as far as they say, as a fraction of the same; not in `flops`.
    """

    layer_tokens: tuple[int, ...]
    mlp_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...]
    flops: tuple[float, float]
    kv: tuple[float, float]
    decisions: float


def forecast(bound: BoundPipeline, text_tokens: int) -> Forecast | None:
    """For one picture and `text_tokens` other tokens; None where the number of visual tokens depends on the picture."""
    shape, plan = bound.shape, bound.plan
    original = shape.visual_tokens
    if original is None:
        return None
    entering, inside, gone = _visual(bound, original)
    tokens = tuple(visual + text_tokens for visual in entering)
    # Frozen layers are for the text alone.
    fed = [0 if plan[layer] is LayerAction.FREEZE else visual for layer, visual in enumerate(inside)]
    mlp = tuple((visual + text_tokens) * plan[layer].feeds_mlp for layer, visual in enumerate(fed))
    flops = [
        cost.layer_flops(shape, tokens[layer], plan[layer], visual=entering[layer], mlp=mlp[layer])
        for layer in range(shape.layers)
    ]
    held = tuple(kept and kept - gone for kept in cost.kv_tokens(tokens, plan))
    dense = original + text_tokens
    dense_flops = cost.prefill_flops(shape, [dense] * shape.layers)
    return Forecast(
        tokens,
        mlp,
        held,
        _range(bound, flops, dense_flops),
        _range(bound, held, dense * shape.layers),
        _decisions(bound, original, text_tokens) / dense_flops,
    )


def _visual(bound: BoundPipeline, original: int) -> tuple[list[int], list[int], int]:
    """Visual tokens that enter each layer, those that are left inside it, and how many leave after the prefill."""
    entering, inside, left, gone = [], [], original, 0
    cuts = list(bound.cuts)
    for layer in range(bound.shape.layers):
        while cuts and cuts[0].site.reach <= layer:
            left = _after(cuts.pop(0), original, left)
        entering.append(left)
        while cuts and cuts[0].site == Site(layer, "layer", "mid"):
            left = _after(cuts.pop(0), original, left)
        inside.append(left)
    for cut in cuts:
        before, left = left, _after(cut, original, left)
        gone += (before - left) * (cut.site == PREFILL_END)
    return entering, inside, gone


def _decisions(bound: BoundPipeline, original: int, text_tokens: int) -> int:
    """FLOPs of the decisions themselves: of token stages at each of their cuts, of routers once."""
    total, left, door = 0, original, original
    for cut in bound.cuts:
        if not cut.stage.is_router:
            total += selection_flops(cut.stage, bound.shape, text_tokens, left)
        left = _after(cut, original, left)
        if cut.site <= ENCODER and not cut.stage.is_router:
            door = left
    return total + sum(selection_flops(router, bound.shape, text_tokens, door) for router in bound.routers)


def _after(cut: Cut, original: int, left: int) -> int:
    if cut.drops_all:
        return 0
    return left if cut.keep is None else cut.keep.count(original, left)


def _range(bound: BoundPipeline, each: Sequence[int], dense: int) -> tuple[float, float]:
    """Lowest and highest sum of what layers cost, as a fraction of `dense`."""
    total = sum(each)
    if not any(router.decides_layers for router in bound.routers):
        return total / dense, total / dense
    free = [layer for layer in range(bound.shape.layers) if layer not in bound.protected | bound.plan.layers]
    costs = sorted(each[layer] for layer in free)
    if bound.layer_budget is None:  # the router decides by itself, between all and nothing that is free
        return (total - sum(costs)) / dense, total / dense
    skipped = sum(bound.plan[layer] is LayerAction.SKIP for layer in bound.plan.layers)
    drop = max(0, min(bound.shape.layers - skipped - bound.layer_budget, len(free)))
    return (total - sum(costs[len(costs) - drop :])) / dense, (total - sum(costs[:drop])) / dense
