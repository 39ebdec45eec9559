"""Frozen records of what a run did, printable and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prunekit.cost import Cost
from prunekit.decisions import LayerAction


@dataclass(frozen=True)
class StageEvent:
    """One decision of a token stage for a prompt batch.

    kept: per sample, the kept tokens as indices among its original visual tokens, ascending.
    entered: per sample, how many visual tokens reached the stage.
    """

    stage: str
    site: str
    entered: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RunReport:
    """What the prefill of one prompt batch did. Counts are without padding; one entry per sample.

    layer_tokens[b][l]: tokens of sample b that entered layer l (also for skipped layers).
    kv_tokens[b][l]: KV entries that layer l wrote for sample b.
    kept_tokens: visual tokens left after the last stage.
    actions: decoder layers that did not simply run.
    """

    pipeline: str
    sha: str
    samples: int
    prompt_tokens: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    events: tuple[StageEvent, ...]
    layer_tokens: tuple[tuple[int, ...], ...]
    kv_tokens: tuple[tuple[int, ...], ...]
    actions: Mapping[int, LayerAction]
    notes: tuple[str, ...]
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        data = asdict(self)
        data["actions"] = {str(layer): action.value for layer, action in self.actions.items()}
        data["cost"] |= {"flops_fraction": self.cost.flops_fraction, "kv_fraction": self.cost.kv_fraction}
        return data

    def __str__(self) -> str:
        lines = [f"pipeline {self.pipeline} ({self.sha}), {self.samples} sample{'s' * (self.samples != 1)}"]
        for event in self.events:
            kept = tuple(len(row) for row in event.kept)
            lines.append(f"  {event.stage} at {event.site}: visual tokens {_row(event.entered)} -> {_row(kept)}")
        skipped: dict[LayerAction, list[int]] = {}
        for layer, action in sorted(self.actions.items()):
            skipped.setdefault(action, []).append(layer)
        lines += [f"  {action.value}: layers {', '.join(map(str, layers))}" for action, layers in skipped.items()]
        lines.append(
            f"  tokens entering each layer: {_runs(self.layer_tokens[0])}" + " (sample 0)" * (self.samples > 1)
        )
        lines.append(
            f"  prefill FLOPs {self.cost.flops_fraction:.1%} of dense, KV {self.cost.kv_fraction:.1%} of dense"
        )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


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
