"""The card of a trained router, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_of(model_id: str, training: Mapping[str, Any]) -> str:
    """The model, the data, the recipe and the measurements of a training. All figures are held-out KL."""
    data, curve = training["data"], training["curve"]
    start, end = curve[0], curve[-1]
    lines = [
        "---", "library_name: prunekit", "tags: [pruning, router]", "---", f"# A router for {model_id}", "",
        f"Trained by prunekit {training['prunekit']} for {training['steps']} steps of {training['recipe']['batch']} "
        f"prompts, out of the {data['prompts']} of `{data['name']}` (digest `{data['digest']}`), without labels: the "
        "dense model is the teacher. It serves this model only, with any budget.", "",
        "KL of the pruned model's answers to the dense model's, on prompts that were held out:", "",
        "| decided by | KL |", "| --- | --- |",
        f"| chance | {start['random']:.4f} |", f"| the router as it started | {start['held_out']:.4f} |",
        f"| this router | {end['held_out']:.4f} |", "", "## Pipeline", "", "```yaml",
        training["pipeline"].rstrip(), "```", "", "## Recipe", "",
        *(f"- `{name}`: {value}" for name, value in training["recipe"].items()), "", "## Curve", "",
        "| step | loss | useful pairs | mean symmetric difference | held-out KL |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {int(row['step'])} | {row['loss']:.4f} | {row['useful']:.0%} | {row['difference']:.1f} "
        f"| {row['held_out']:.4f} |"
        for row in curve[1:]
    ]
    return "\n".join(lines) + "\n"
