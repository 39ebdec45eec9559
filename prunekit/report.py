"""Frozen records of what a run did, printable and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunekit.abilities import selection_flops
from prunekit.cost import Cost, Work, cost_of, kv_tokens
from prunekit.decisions import LayerAction, LayerPlan
from prunekit.pipeline import BoundPipeline
from prunekit.sites import ENCODER, Site


@dataclass(frozen=True)
class StageEvent:
    """One decision of a token stage for a prompt batch.

    kept: per sample, the kept tokens as indices among its original visual tokens, ascending.
    entered: per sample, how many visual tokens reached the stage. crop: the others left the KV of earlier layers too.
    sizes: per sample, how many tokens each kept one stands for from here on; None: that did not change.
    """

    stage: str
    site: str
    entered: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    crop: bool = False
    sizes: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class RunReport:
    """What the prefill of one prompt batch did. Counts are without padding; one entry per sample.

    layer_tokens[b][l]: tokens of sample b that entered layer l (also where it was skipped).
    mlp_tokens[b][l]: tokens that went through its MLP; fewer where a stage cuts inside the layer, 0 without it.
    kv_tokens[b][l]: KV entries that layer l holds for sample b when the prefill is over.
    kept_tokens: visual tokens left after the last stage.
    plans: what became of the decoder layers, in prefill and decoding. positions: `keep` or `renumber`.
    tower_tokens[b][l]: tokens of sample b that entered block l of the vision tower, CLS tokens and padding of crops
    among them; empty where no stage cuts in the tower. `cost` is of the decoder alone.
    """

    pipeline: str
    sha: str
    samples: int
    prompt_tokens: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    events: tuple[StageEvent, ...]
    layer_tokens: tuple[tuple[int, ...], ...]
    mlp_tokens: tuple[tuple[int, ...], ...]
    kv_tokens: tuple[tuple[int, ...], ...]
    plans: tuple[LayerPlan, ...]
    positions: str
    notes: tuple[str, ...]
    cost: Cost
    tower_tokens: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        data = asdict(self)
        data["plans"] = [plan_data(plan) for plan in self.plans]
        data["cost"] |= {"flops_fraction": self.cost.flops_fraction, "kv_fraction": self.cost.kv_fraction}
        return data

    def __str__(self) -> str:
        lines = [f"pipeline {self.pipeline} ({self.sha}), {self.samples} sample{'s' * (self.samples != 1)}"]
        for event in self.events:
            kept = tuple(len(row) for row in event.kept)
            lines.append(f"  {event.stage} at {event.site}: visual tokens {_row(event.entered)} -> {_row(kept)}")
        for plan in _distinct(self.plans):
            several = any(other != plan for other in self.plans)
            who = [row for row, other in enumerate(self.plans) if other == plan]
            lines += [line + f" (samples {_listed(who)})" * several for line in plan_lines(plan)]
        lines.append(
            f"  tokens entering each layer: {_runs(self.layer_tokens[0])}" + " (sample 0)" * (self.samples > 1)
        )
        lines.append(
            f"  prefill FLOPs {self.cost.flops_fraction:.1%} of dense, KV {self.cost.kv_fraction:.1%} of dense"
        )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def summarise(
    bound: BoundPipeline,
    plans: Sequence[LayerPlan],
    *,
    events: tuple[StageEvent, ...],
    layer_tokens: tuple[tuple[int, ...], ...],
    layer_visual: tuple[tuple[int, ...], ...],
    mlp_tokens: tuple[tuple[int, ...], ...],
    itemsize: int,
    **counts: Any,
) -> RunReport:
    """The report of one prompt batch, with what follows from its counts.

    layer_visual[b][l]: visual tokens among `layer_tokens`. itemsize: bytes of one number in the KV cache. counts: the
    remaining fields of `RunReport` that are known as they are.
    """
    kv = tuple(_kv_tokens(plan, row, events, b) for b, (plan, row) in enumerate(zip(plans, layer_tokens, strict=True)))
    every = zip(plans, layer_tokens, layer_visual, mlp_tokens, strict=True)
    work = tuple(
        tuple(Work(plan[layer], *three) for layer, three in enumerate(zip(*row, strict=True))) for plan, *row in every
    )
    original, prompts = counts["visual_tokens"], counts["prompt_tokens"]
    decisions = [_decisions(bound, events, b, prompts[b] - original[b], original[b]) for b in range(len(plans))]
    return RunReport(
        pipeline=bound.pipeline.name,
        sha=bound.pipeline.sha,
        samples=len(plans),
        events=events,
        layer_tokens=layer_tokens,
        mlp_tokens=mlp_tokens,
        kv_tokens=kv,
        plans=tuple(plans),
        positions=bound.pipeline.positions,
        cost=cost_of(bound.shape, work, kv, counts["prompt_tokens"], itemsize, decisions),
        **counts,
    )


def _decisions(bound: BoundPipeline, events: Sequence[StageEvent], sample: int, text: int, original: int) -> int:
    """FLOPs of what stages decided for one sample, as far as they say: token stages at each cut, routers once."""
    cuts = {(cut.stage.use, str(cut.site)): cut for cut in bound.cuts}
    total, door = 0, original
    for event in events:
        cut = cuts[event.stage, event.site]
        if not cut.stage.is_router:
            total += selection_flops(cut.stage, bound.shape, text, event.entered[sample])
            door = len(event.kept[sample]) if cut.site <= ENCODER else door
    return total + sum(selection_flops(router, bound.shape, text, door) for router in bound.routers)


def _kv_tokens(plan: LayerPlan, entered: Sequence[int], events: Sequence[StageEvent], sample: int) -> tuple[int, ...]:
    """What each layer holds after the prefill: what it wrote and decoding reads, less what was cropped since."""
    cropped = [(Site.parse(e.site).reach, e.entered[sample] - len(e.kept[sample])) for e in events if e.crop]
    return tuple(
        held and held - sum(gone for reach, gone in cropped if layer < reach)
        for layer, held in enumerate(kv_tokens(entered, plan))
    )


def plan_data(plan: LayerPlan) -> dict[str, Any]:
    """A plan as plain data: actions by layer, `decode` only where it is said."""
    phases = {"prefill": plan.actions} | ({} if plan.decode is None else {"decode": plan.decode})
    return {
        phase: {str(layer): action.value for layer, action in sorted(actions.items())}
        for phase, actions in phases.items()
    }


def plan_lines(plan: LayerPlan) -> list[str]:
    """`skip: layers 4, 5`; what only one phase does says which."""
    found: dict[str, list[int]] = {}
    for layer in sorted(plan.layers):
        prefill, decode = plan[layer], plan.decoding(layer)
        if decode is prefill.in_decoding and prefill is not LayerAction.RUN:
            found.setdefault(prefill.value, []).append(layer)
            continue
        for phase, action in (("prefill", prefill), ("decoding", decode)):
            if action is not LayerAction.RUN:
                found.setdefault(f"{action.value} in {phase}", []).append(layer)
    return [f"  {what}: layers {_listed(layers)}" for what, layers in found.items()]


def _distinct(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Without repetition, in order; a plan holds dicts and has no hash."""
    found: list[LayerPlan] = []
    for plan in plans:
        if plan not in found:
            found.append(plan)
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _row(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))


def _runs(values: tuple[int, ...]) -> str:
    """`176 x2, 44 x8`: equal neighbours taken together."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ", ".join(f"{value} x{times}" for value, times in runs)
