"""From the counts of one prompt batch to its report: what layers held, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.cost import TowerWork, Work, cost_of, kv_tokens, stock_kv_tokens
from prunekit.pipeline.build import BoundPipeline
from prunekit.pipeline.statements import selection_flops
from prunekit.records import RunReport, StageEvent
from prunekit.strategy.decisions import LayerPlan
from prunekit.strategy.sites import Site


def summarise(
    bound: BoundPipeline,
    plans: Sequence[LayerPlan],
    *,
    events: tuple[StageEvent, ...],
    layer_tokens: tuple[tuple[int, ...], ...],
    layer_visual: tuple[tuple[int, ...], ...],
    layer_keys: tuple[tuple[int, ...], ...],
    mlp_tokens: tuple[tuple[int, ...], ...],
    itemsize: int,
    wanted: int,
    works: Sequence[Sequence[tuple[TowerWork, TowerWork]]] | None,
    **counts: Any,
) -> RunReport:
    """The report of one prompt batch, with what follows from its counts.

    layer_visual[b][l]: visual tokens among `layer_tokens`. layer_keys[b][l]: tokens that those can attend to.
    itemsize: bytes of one number in the KV cache. wanted: as in `BatchState`. works: of the vision tower, as `cost_of`
    takes them. counts: the remaining fields of `RunReport`, as they are.
    """
    rows = enumerate(zip(plans, layer_keys, strict=True))
    kv = tuple(_kv_tokens(bound, plan, row, events, b) for b, (plan, row) in rows)
    every = zip(plans, layer_tokens, layer_visual, mlp_tokens, layer_keys, strict=True)
    work = tuple(
        tuple(Work(plan[layer], *four) for layer, four in enumerate(zip(*row, strict=True))) for plan, *row in every
    )
    original, prompts = counts["visual_tokens"], counts["prompt_tokens"]
    decisions = [_decisions(bound, events, b, prompts[b] - original[b], original[b]) for b in range(len(plans))]
    return RunReport(
        pipeline=bound.name,
        sha=bound.sha,
        samples=len(plans),
        events=events,
        layer_tokens=layer_tokens,
        mlp_tokens=mlp_tokens,
        kv_tokens=kv,
        plans=tuple(plans),
        positions=bound.positions,
        cost=cost_of(bound.shape, work, kv, counts["prompt_tokens"], itemsize, decisions, wanted, works),
        last_only=(bound.last_only, wanted) if wanted and bound.last_only is not None else None,
        **counts,
    )


def _decisions(bound: BoundPipeline, events: Sequence[StageEvent], sample: int, text: int, original: int) -> int:
    """FLOPs of what stages decided for one sample, as far as they say: token stages at each cut, routers once."""
    cuts = {(cut.stage.index, str(cut.site)): cut for cut in bound.cuts}
    total, left = 0, {router.index: original for router in bound.routers}
    for event in events:
        cut = cuts[event.index, event.site]
        left |= {router.index: len(event.kept[sample]) for router in bound.routers if cut.comes_before(router)}
        if not cut.stage.is_router:
            total += selection_flops(cut.stage, bound.shape, text, event.entered[sample])
    return total + sum(selection_flops(router, bound.shape, text, left[router.index]) for router in bound.routers)


def _kv_tokens(
    bound: BoundPipeline, plan: LayerPlan, entered: Sequence[int], events: Sequence[StageEvent], sample: int
) -> tuple[int, ...]:
    """What each layer holds after the prefill: what it wrote and decoding reads, less what was cropped since."""
    if not bound.acts:
        return stock_kv_tokens(bound.shape, entered[0])
    cropped = [(Site.parse(e.site).reach, e.entered[sample] - len(e.kept[sample])) for e in events if e.crop]
    return tuple(
        held and held - sum(gone for reach, gone in cropped if layer < reach)
        for layer, held in enumerate(kv_tokens(bound.shape, entered, plan))
    )
