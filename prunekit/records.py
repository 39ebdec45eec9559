"""Frozen records of what a run did, printable and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunekit.cost import FLOPS_OF, WHOLE_FLOPS_OF, Cost
from prunekit.strategy.decisions import LayerAction, LayerPlan


@dataclass(frozen=True)
class StageEvent:
    """One decision of a token stage for a prompt batch.

    index: of the stage in the pipeline, from 0; `stage` is the name of its strategy.
    kept: per sample, the kept tokens as indices among its original visual tokens, ascending.
    entered: per sample, how many visual tokens reached the stage. crop: the others leave the KV of earlier layers too.
    sizes: per sample, how many tokens each kept one stands for from here on; None: that did not change.
    asked: per sample, how many tokens the budget said to keep; None: the stage decides by itself.
    resized: per sample, height and width in pixels at which each image or video was seen; None: the stage resizes none.
    """

    stage: str
    index: int
    site: str
    entered: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    crop: bool = False
    sizes: tuple[tuple[float, ...], ...] | None = None
    asked: tuple[int, ...] | None = None
    resized: tuple[tuple[tuple[int, int], ...], ...] | None = None


@dataclass(frozen=True)
class RunReport:
    """What the prefill of one prompt batch did. Counts are without padding; one entry per sample.

    layer_tokens: `[b][l]`, tokens of sample b that entered layer l (also where it was skipped).
    mlp_tokens: `[b][l]`, tokens that went through its MLP; fewer where a stage cuts inside the layer, 0 without it.
    kv_tokens: `[b][l]`, KV entries that layer l holds for sample b when the prefill is over.
    kept_tokens: visual tokens that remain after the last stage.
    plans: what became of the decoder layers, in prefill and decoding. positions: `keep` or `renumber`.
    tower_tokens: `[b][l]`, tokens of sample b that entered block l of the vision tower, CLS tokens and padding of crops
    among them; empty where no stage cuts in the tower.
    unsound: the samples for which the model computed NaN or infinity where prunekit looked: in what stages were given
    to choose by, and in logits; `notes` say where.
    last_only: the first of the layers that only the last tokens of each prompt entered, as none of them writes KV, and
    how many; None: there are none.
    rungs: under a budget of risk, per sample, the rung that it took, 0 is dense; harms: per sample, what was predicted
    for the others, empty for a sample without visual tokens.
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
    last_only: tuple[int, int] | None = None
    unsound: tuple[int, ...] = ()
    rungs: tuple[int, ...] = ()
    harms: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        data = asdict(self)
        data["plans"] = [plan_data(plan) for plan in self.plans]
        fractions = {"flops_fraction": self.cost.flops_fraction, "kv_fraction": self.cost.kv_fraction}
        whole = {"whole_flops_fraction": self.cost.whole_flops_fraction, "whole_flops_of": WHOLE_FLOPS_OF}
        data["cost"] |= {**fractions, "flops_of": FLOPS_OF, **whole}
        return data

    def __str__(self) -> str:
        lines = [f"pipeline {self.pipeline} ({self.sha}), {self.samples} sample{'s' * (self.samples != 1)}"]
        for event in self.events:
            kept = tuple(len(row) for row in event.kept)
            asked = "" if event.asked in (None, kept) else f", asked for {_row(event.asked or ())}"
            lines.append(f"  {event.stage} at {event.site}: visual tokens {_row(event.entered)} -> {_row(kept)}{asked}")
        for plan in _distinct(self.plans):
            several = any(other != plan for other in self.plans)
            who = [row for row, other in enumerate(self.plans) if other == plan]
            lines += [line + f" (samples {_listed(who)})" * several for line in plan_lines(plan)]
        lines.append(
            f"  tokens entering each layer: {_runs(self.layer_tokens[0])}" + " (sample 0)" * (self.samples > 1)
        )
        if self.rungs:
            lines.append(f"  rung of the ladder: {_row(self.rungs)}" + " (0 is dense)" * (0 in self.rungs))
        flops, kv = self.cost.flops_fraction, self.cost.kv_fraction
        lines.append(f"  prefill FLOPs of the decoder {flops:.1%} of dense, KV {kv:.1%} of dense")
        if (whole := self.cost.whole_flops_fraction) is not None:
            lines.append(f"  whole-prefill FLOPs, with vision tower and projector, {whole:.1%} of dense")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class VisualTokens:
    """One image or video of a sample. kind: `image` or `video`.

    ordinals: its tokens, as numbers among the sample's original visual tokens.
    coords: for each of them crop or frame, row, column, rows and columns there, then row, column, rows and columns in
    the grid of the complete image or frame; rows and columns are -1 on tokens that only separate. None: not known.
    joined: the family says where crops stand in the complete image; else the last four only repeat those before.
    unknown: why coords are not known; empty where they are.
    """

    kind: str
    ordinals: tuple[int, ...]
    coords: tuple[tuple[int, ...], ...] | None
    joined: bool = False
    unknown: str = ""


@dataclass(frozen=True)
class StageTrace:
    """What one decision of a token stage did to one sample's visual tokens, by their numbers among the original ones.

    event: the number of the decision among `RunReport.events`. entered: the tokens that reached it: those in `kept`, in
    `merged` and in `dropped`, ascending. merged: for each token that went into others these, which were kept.
    scores: of tokens that entered, those by which the strategy decided; None: it does not score.
    """

    event: int
    entered: tuple[int, ...]
    kept: tuple[int, ...]
    merged: Mapping[int, tuple[int, ...]]
    dropped: tuple[int, ...]
    scores: Mapping[int, float] | None


@dataclass(frozen=True)
class SampleTrace:
    """One sample: its images and videos in the order of the prompt, and its stages in the order of the data."""

    inputs: tuple[VisualTokens, ...]
    stages: tuple[StageTrace, ...]


@dataclass(frozen=True)
class Trace:
    """What became of every visual token of one prompt batch. report: of the same batch; samples: row by row."""

    report: RunReport
    samples: tuple[SampleTrace, ...]


def plan_data(plan: LayerPlan) -> dict[str, Any]:
    """A plan as plain data: actions by layer, `decode` only where it is said."""
    phases = {"prefill": plan.actions} | ({} if plan.decode is None else {"decode": plan.decode})
    return {
        phase: {str(layer): action.value for layer, action in sorted(actions.items())}
        for phase, actions in phases.items()
    }


def plan_lines(plan: LayerPlan) -> list[str]:
    """`skip: layers 4, 5`; what only one phase does says which."""
    listed: dict[str, list[int]] = {}
    for layer in sorted(plan.layers):
        prefill, decode = plan[layer], plan.decoding(layer)
        if decode is prefill.in_decoding and prefill is not LayerAction.RUN:
            listed.setdefault(prefill.value, []).append(layer)
            continue
        for phase, action in (("prefill", prefill), ("decoding", decode)):
            if action is not LayerAction.RUN:
                listed.setdefault(f"{action.value} in {phase}", []).append(layer)
    return [f"  {what}: layers {_listed(layers)}" for what, layers in listed.items()]


def _distinct(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Without repetition, in order; a plan holds dicts and has no hash."""
    distinct: list[LayerPlan] = []
    for plan in plans:
        if plan not in distinct:
            distinct.append(plan)
    return distinct


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
