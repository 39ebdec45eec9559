"""What splits showed, as tables of docs/risk.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from prunekit_evals.studies.risk.collect import FOREIGN
from prunekit_evals.studies.risk.replay import RISKS, SPLITS, Prompts, Split, replay


def text(told: Mapping[str, Any], sets: Mapping[str, Prompts]) -> str:
    """All tables of one collected file."""
    home = next(name for name in sets if name != FOREIGN)
    prompts, foreign = sets[home], sets.get(FOREIGN)
    splits = {share: replay(prompts, share, foreign) for share in RISKS}
    half = len(prompts) // 2
    parts = [
        f"`{told['use']}` on {told['model']}, {len(prompts)} prompts of {home}, answers of up to "
        f"{told['max_new_tokens']} tokens. Rungs, each for all prompts alike:",
        _rungs(told["ladder"], sets, home),
        f"{SPLITS} random halves, {half} prompts to calibrate on and {len(prompts) - half} held out, confidence 0.9:",
        _promise(splits),
        "Mean FLOPs of the decoder's prefill on the held-out prompts, as a share of dense, decisions included:",
        _saving(splits),
    ]
    if foreign is not None:
        away = {share: replay(foreign, share, prompts) for share in RISKS}
        parts += [
            f"Prompts that are not exchangeable. Calibrated on {home}, as above, and asked {len(foreign)} prompts of "
            f"{FOREIGN}:",
            _elsewhere(splits),
            f"Calibrated on random halves of {FOREIGN}, and asked the {len(prompts)} prompts of {home}:",
            _elsewhere(away),
        ]
    return "\n\n".join(parts)


def _rungs(ladder: Sequence[Mapping[str, Any]], sets: Mapping[str, Prompts], home: str) -> str:
    named = " | ".join(f"differ, {name}" for name in sets)
    rows = [f"| rung | FLOPs | {named} |", "| --- " + "| ---: " * (1 + len(sets)) + "|"]
    names = ["dense", *(", ".join(f"{key} {value}" for key, value in rung.items()) for rung in ladder)]
    for number, name in enumerate(names):
        differ = " | ".join(_percent(one.differs[:, number].mean()) for one in sets.values())
        rows.append(f"| {name} | {_percent(sets[home].flops[:, number].mean())} | {differ} |")
    return "\n".join(rows)


def _promise(splits: Mapping[float, Sequence[Split]]) -> str:
    rows = [
        "| promised | differ, mean | least to most | splits above | prompts on the rungs |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for share, made in splits.items():
        differ = [one.differ for one in made]
        taken = " / ".join(f"{100 * mean(column):.0f}" for column in zip(*(one.rungs for one in made), strict=True))
        above = sum(one > share for one in differ)
        rows.append(
            f"| {_percent(share)} | {_percent(mean(differ))} | {_percent(min(differ))} to {_percent(max(differ))} | "
            f"{above} of {len(made)} | {taken} % |"
        )
    return "\n".join(rows)


def _saving(splits: Mapping[float, Sequence[Split]]) -> str:
    rows = [
        "| promised | a rung for each | fixed, equal agreement | fixed, same promise | differ there |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for share, made in splits.items():
        each, equal, fixed, differ = (
            _percent(mean(getattr(one, name) for one in made))
            for name in ("flops", "equal_flops", "fixed_flops", "fixed_differ")
        )
        rows.append(f"| {_percent(share)} | {each} | {equal} | {fixed} | {differ} |")
    return "\n".join(rows)


def _elsewhere(splits: Mapping[float, Sequence[Split]]) -> str:
    rows = ["| promised | differ, mean | least to most | splits above |", "| ---: | ---: | ---: | ---: |"]
    for share, made in splits.items():
        differ = [one.foreign for one in made if one.foreign is not None]
        above = sum(one > share for one in differ)
        span = f"{_percent(min(differ))} to {_percent(max(differ))}"
        rows.append(f"| {_percent(share)} | {_percent(mean(differ))} | {span} | {above} of {len(differ)} |")
    return "\n".join(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
