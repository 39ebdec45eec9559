"""What the figures say, in sentences that are made from them, so that a rerun cannot make one false."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit_evals.compare.rendering import SHORT
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.micro.card_tables import percent, signed
from prunekit_evals.micro.record import Part
from prunekit_evals.studies.par import results, tables
from prunekit_evals.studies.par.cells import Row
from prunekit_evals.studies.par.settings import CLAIM, OVERHEAD, TARGET_FLOPS, TARGET_KEPT

MAIN = tables.MAIN
SEED = "plain-1"  # the router that differs from `plain` in its seed alone


def side(estimate: Estimate) -> str:
    """Where an interval lies."""
    return "above zero" if estimate.low > 0 else "below zero" if estimate.high < 0 else "not clear of zero"


def _split(part: Part, theirs: str) -> dict[str, list[str]]:
    """Tasks by where PAR's paired difference to another row lies."""
    groups: dict[str, list[str]] = {"above zero": [], "below zero": [], "not clear of zero": []}
    for task in part.tasks:
        groups[side(part.difference(MAIN, theirs, task))].append(SHORT.get(task, task))
    return groups


def targets(figures: Mapping[str, Any]) -> str:
    """What was asked for on the bundled model, and whether it was reached, at each setting within the FLOPs."""
    lines = []
    for setting in figures["settings"]:
        part, rows = tables.of_setting(figures, setting)
        if rows[MAIN].flops > TARGET_FLOPS:
            continue
        kept = tables.of_dense(part, MAIN)
        met = "reached" if kept.value >= TARGET_KEPT else "missed"
        lines.append(
            f"- {setting} ({100 * rows[MAIN].flops:.1f} % of dense FLOPs, of which the router "
            f"{100 * rows[MAIN].decisions:.1f}): {percent(kept.value)} % of dense accuracy "
            f"({percent(kept.low)} to {percent(kept.high)}). The target of {TARGET_KEPT:.0%} is **{met}**."
        )
        lines += [f"  - {_versus(part, label)}" for label in _asked(rows)]
    return "\n".join(lines) or f"No setting is within {TARGET_FLOPS:.0%} of dense FLOPs."


def _asked(rows: Mapping[str, Row]) -> list[str]:
    """The rivals that the target names, wherever they cut."""
    return [label for label in rows if label.startswith(("fastv,", "random,")) and "static" not in label]


def _versus(part: Part, theirs: str) -> str:
    where = _split(part, theirs)
    told = [f"{name} on {len(tasks)} ({', '.join(tasks)})" for name, tasks in where.items() if tasks]
    most = "on most tasks" if 2 * len(where["above zero"]) > len(part.tasks) else "**not** on most tasks"
    mean = part.cost(MAIN, theirs)
    return f"against {theirs}: mean {signed(mean)}; {'; '.join(told)} of {len(part.tasks)}: above zero {most}"


def ranking(figures: Mapping[str, Any]) -> str:
    """Who does as well as PAR or better at its FLOPs."""
    lines = []
    for setting in figures["settings"]:
        part, rows = tables.of_setting(figures, setting)
        rivals = [label for label in rows if label not in (MAIN, "dense", "blind")]
        better = {label: part.cost(label, MAIN) for label in rivals if part.cost(label, MAIN).low > 0}
        equal = [label for label in rivals if side(part.cost(label, MAIN)) == "not clear of zero"]
        worse = len(rivals) - len(better) - len(equal)
        text = (
            f"- {setting}: {len(better)} of {len(rivals)} rivals are better, {worse} worse, "
            f"{len(equal)} cannot be told apart"
        )
        if better:
            text += ". Better: " + "; ".join(f"{label} by {signed(one)}" for label, one in better.items())
        if equal:
            text += f". Not told apart: {'; '.join(equal)}"
        lines.append(text + ".")
    return "\n".join(lines)


def joint(figures: Mapping[str, Any]) -> str:
    """What choosing layers as well is worth: settings of equal FLOPs against each other."""
    mine = {setting: Row.of(rows[MAIN]) for setting, rows in figures["settings"].items()}
    part = results.part(mine)
    lines = []
    for fewer, more in itertools.permutations(mine, 2):
        (flops, _, least), (other, _, most) = fewer.partition(", L="), more.partition(", L=")
        if flops == other and int(least) < int(most):
            change = part.cost(fewer, more)
            lines.append(
                f"- PAR at {flops}, tokens and layers (L={least}) minus tokens alone (L={most}): {signed(change)}, "
                f"{side(change)}."
            )
    return "\n".join(lines)


def layers(figures: Mapping[str, Any]) -> str:
    """Whether the cosine says which pair can go."""
    rows = results.rows(figures["rows"])
    part = results.part(rows)
    pairs = [label for label in rows if label != "dense"]
    loss = {label: part.cost(label, "dense") for label in pairs}
    alike = dict(zip(pairs, figures["cosines"], strict=True))
    cheapest, most = max(pairs, key=lambda one: loss[one].value), max(pairs, key=alike.__getitem__)
    free = [label for label in pairs if loss[label].high >= 0]
    told = ", ".join(free) if free else "none"
    rho = _spearman([alike[one] for one in pairs], [loss[one].value for one in pairs])
    return (
        f"Pairs whose loss is not clear of zero: {told}. The cheapest pair is {cheapest} ({signed(loss[cheapest])}); "
        f"the one with the highest cosine is {most} ({signed(loss[most])}). Rank correlation of cosine and accuracy "
        f"over the pairs: {rho:.2f}."
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [[sorted(values).index(one) for one in values] for values in (first, second)]
    return statistics.correlation([float(one) for one in ranks[0]], [float(one) for one in ranks[1]])


def boxes(figures: Mapping[str, Any]) -> str:
    """What noise does to the median, the spread and the best draw."""
    kinds = tables.boxes_of(figures)
    lines = []
    for share in dict.fromkeys(share for share, _ in kinds):
        plain = statistics.median(kinds[share, "attention"])
        noise, random = tables.five(kinds[share, "noise"]), tables.five(kinds[share, "random"])
        best = tables.any_of(figures, share, "noise")
        lines.append(
            f"- {float(share):.0%}: noise moves the median by {100 * (noise[2] - plain):+.1f} points against "
            f"attention alone and the maximum by {100 * (noise[4] - plain):+.1f}; its draws span "
            f"{100 * (noise[4] - noise[0]):.1f} points, random ones {100 * (random[4] - random[0]):.1f}. "
            "With the best draw of each question known, "
            f"accuracy would be {percent(best)} %: {100 * (best - plain):+.1f}."
        )
    return "\n".join(lines)


def correlation(figures: Mapping[str, Any]) -> str:
    """How often dropping half of the tokens changes which layer does least."""
    first, groups = figures["from"], tables.cosine_groups(figures)
    whole = [_least(row, first) for row in groups["all"]]
    told = []
    for name, rows in groups.items():
        if name != "all":
            changed = [_least(row, first) != whole[n % len(whole)] for n, row in enumerate(rows)]
            told.append(f"with {name} it is another one for {sum(changed) / len(changed):.0%} of the questions")
    return (
        f"The layer that changes states least: {'; '.join(told)}. ± is one standard deviation over questions and draws."
    )


def _least(row: Sequence[float], first: int) -> int:
    return max(range(first, len(row)), key=row.__getitem__)


def ablations(figures: Mapping[str, Any]) -> str:
    """Rows whose difference to the router they are compared with is clear of zero, and those whose is not."""
    lines = []
    for setting, data in figures["settings"].items():
        rows = results.rows(data)
        part, base = results.part(rows), tables.base_of(rows)
        groups: dict[str, list[str]] = {"above zero": [], "below zero": [], "not clear of zero": []}
        for label in rows:
            if label != base:
                groups[side(part.cost(label, base))].append(label)
        words = {"above zero": "better", "below zero": "worse", "not clear of zero": "not told apart"}
        told = "; ".join(f"{words[name]}: {', '.join(labels)}" for name, labels in groups.items() if labels)
        lines.append(f"- {setting}, against the {base} router: {told}.")
        if SEED in rows:
            noise = signed(part.cost(SEED, base))
            lines.append(f"  - Another seed of {base} differs from it by {noise}; what differs less may be chance.")
    return "\n".join(lines)


def overhead(figures: Mapping[str, Any]) -> str:
    """The 7B shape: the router's share, and the theory of the paper's smallest setting."""
    over = [row for row in figures["rows"] if row["share"] > OVERHEAD]
    told = ", ".join(f"width {row['width']}, depth {row['depth']}" for row in over) or "none"
    last = figures["promised"][-1]
    past = "past" if last["speed"] > CLAIM else "short of"
    return (
        f"Routers above {OVERHEAD:.0%}: {told}. With T={last['tokens']} and L={last['layers']} FLOPs alone promise a "
        f"prefill {last['speed']:.2f} times as fast as dense, {past} the {CLAIM} claimed for PAR. **No GPU was "
        "measured**: at this shape these are promises, not times."
    )


def times(figures: Mapping[str, Any], what: str) -> str:
    """How much of the promise was kept."""
    kept = {name: (1 - row["prefill"][1]) / (1 - row["flops"]) for name, row in figures["rows"].items()}
    worst, best = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    base = figures["dense_ms"]
    return (
        f"{what}: {figures['rounds']} interleaved rounds on one thread; the dense model takes {base['prefill']:.1f} ms "
        f"for the prefill and {base['step']:.2f} ms for a decoding step. Of the time that FLOPs promise to save, "
        f"{kept[worst]:.0%} ({worst}) to {kept[best]:.0%} ({best}) were saved."
    )


def seven(figures: Mapping[str, Any]) -> str:
    """The speed-up at the 7B shape, against theory and against what is claimed."""
    name, row = list(figures["rows"].items())[-1]
    speed, share = 1 / row["prefill"][1], row["flops"] / row["prefill"][1]
    past = "past" if speed > CLAIM else "short of"
    return (
        "Layers of that shape that share one layer's weights, in bfloat16, and a new router of the default width: "
        f"{figures['rounds']} interleaved rounds on one thread; the dense prefill takes {figures['dense_s']:.0f} s. At "
        f"{name} the prefill is {speed:.2f} times as fast as dense, {share:.2f} of what its FLOPs promise and {past} "
        f"the {CLAIM} claimed for PAR. **On a CPU**: a GPU was not measured."
    )
