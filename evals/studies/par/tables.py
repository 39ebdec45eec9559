"""The tables of the study, from its results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from prunekit_evals.compare.rendering import SHORT
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.micro.card_tables import percent, shown, signed, table
from prunekit_evals.micro.record import Part
from prunekit_evals.studies.par import results
from prunekit_evals.studies.par.cells import Row

MAIN = "PAR"


def tasks_of(part: Part) -> list[str]:
    """Short names of the tasks."""
    return [SHORT.get(task, task) for task in part.tasks]


def mean(part: Part, label: str) -> Estimate:
    """Accuracy, the mean of the tasks, with its interval."""
    from prunekit_evals.compare.stats import average

    estimate = average([part.share(label, task) for task in part.tasks])
    assert estimate is not None
    return estimate


def of_dense(part: Part, label: str) -> Estimate:
    """Mean accuracy as a fraction of dense; the interval is that of the paired difference."""
    dense, loss = part.mean("dense"), part.cost(label, "dense")
    return Estimate(*(1 + value / dense for value in (loss.value, loss.low, loss.high)), loss.n)


def five(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles and maximum."""
    if len(values) < 2:
        return [values[0]] * 5
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return [min(values), *quartiles, max(values)]


def layers(figures: Mapping[str, Any]) -> str:
    """Fig. 2(a): pairs of layers left out."""
    rows = results.rows(figures["rows"])
    part = results.part(rows)
    lines = [["none", percent(part.mean("dense")), "", *_shares(part, "dense"), ""]]
    for label, cosine in zip([one for one in rows if one != "dense"], figures["cosines"], strict=True):
        loss = signed(part.cost(label, "dense"))
        lines.append([label, percent(part.mean(label)), loss, *_shares(part, label), f"{cosine:.3f}"])
    return table(["layers left out", "mean", "against dense", *tasks_of(part), "cosine in/out"], lines)


def _shares(part: Part, label: str) -> list[str]:
    return [percent(part.share(label, task).value) for task in part.tasks]


def boxes_of(figures: Mapping[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Mean accuracies of the draws by share and kind."""
    part = results.part(results.rows(figures["rows"]))
    kinds: dict[tuple[str, str], list[float]] = {}
    for label in part.rows():
        share, _, rest = label.partition(" ")
        if rest:
            kinds.setdefault((share, rest.split()[0]), []).append(part.mean(label))
    return kinds


def any_of(figures: Mapping[str, Any], share: str, kind: str) -> float:
    """Accuracy if the best draw of each question were known, mean over tasks."""
    part = results.part(results.rows(figures["rows"]))
    labels = [label for label in part.rows() if label.startswith(f"{share} {kind}")]
    each = [[any(one) for one in zip(*(rows[label] for label in labels), strict=True)] for rows in part.tasks.values()]
    return statistics.fmean(sum(right) / len(right) for right in each)


def boxes(figures: Mapping[str, Any]) -> str:
    """Fig. 2(b)."""
    names = {"random": "random", "attention": "attention", "noise": "attention + noise"}
    kinds = boxes_of(figures)
    shares = list(dict.fromkeys(share for share, _ in kinds))
    lines = []
    for share in shares:
        for kind, name in names.items():
            values = kinds[share, kind]
            best = percent(any_of(figures, share, kind))
            lines.append([f"{float(share):.0%}", name, str(len(values)), *map(percent, five(values)), best])
    return table(["keep", "chosen by", "draws", "min", "q1", "median", "q3", "max", "any draw right"], lines)


def correlation(figures: Mapping[str, Any]) -> str:
    """Fig. 2(c): mean cosine of each layer, and how often it is the one that changes states least."""
    first = figures["from"]
    groups = cosine_groups(figures)
    total = len(next(iter(groups.values()))[0])
    head = ["tokens", *(f"layer {layer}" for layer in range(first, total))]
    lines = []
    for name, rows in groups.items():
        cells = []
        for layer in range(first, total):
            values = [row[layer] for row in rows]
            cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
        lines.append([name, *cells])
        least = [max(range(first, total), key=row.__getitem__) for row in rows]
        lines.append(["… the least active one", *(f"{least.count(n) / len(rows):.0%}" for n in range(first, total))])
    return table(head, lines)


def cosine_groups(figures: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Cosines by variant, one row for each question; draws of noise one after the other."""
    names = {"all": "all", "attention": "50 % by attention", "noise": "50 % by attention + noise"}
    groups: dict[str, list[list[float]]] = {}
    for label, rows in figures["cosines"].items():
        groups.setdefault(names[label.split()[0]], []).extend(rows)
    return groups


def of_setting(figures: Mapping[str, Any], setting: str) -> tuple[Part, dict[str, Row]]:
    """One setting's rows with dense and blind before them."""
    rows = results.rows({**figures["base"], **figures["settings"][setting]})
    return results.part(rows), rows


def kept(figures: Mapping[str, Any], setting: str) -> str:
    """How many tokens PAR keeps at its cuts."""
    (stage,) = yaml.safe_load(figures["settings"][setting][MAIN]["stages"])
    counts = stage["keep_tokens"]
    return str(counts) if isinstance(counts, int) else ", then ".join(map(str, counts))


def accuracy(figures: Mapping[str, Any], setting: str) -> str:
    """Our Table 1 at one setting: every row, best first."""
    part, rows = of_setting(figures, setting)
    ordered = sorted(rows, key=lambda one: (one != "dense", -part.mean(one)))
    lines = []
    for label in ordered:
        row = rows[label]
        name = f"**{label}**" if label == MAIN else label
        kept = f"{100 * row.flops:.1f}", f"{100 * row.kv:.1f}", f"{row.kept:.0f}"
        whole = shown(mean(part, label)), percent(of_dense(part, label).value)
        lines.append([name, *kept, *whole, *_shares(part, label)])
    head = ["strategy", "FLOPs %", "KV %", "tokens left", "mean", "% of dense", *tasks_of(part)]
    return table(head, lines)


def against(figures: Mapping[str, Any], setting: str) -> str:
    """PAR minus each other row, paired by question."""
    part, rows = of_setting(figures, setting)
    lines = []
    for label in sorted((one for one in rows if one != MAIN), key=lambda one: -part.mean(one)):
        each = [signed(part.difference(MAIN, label, task)) for task in part.tasks]
        lines.append([label, signed(part.cost(MAIN, label)), *each])
    return table([f"{MAIN} minus", "mean", *tasks_of(part)], lines)


def base_of(rows: Mapping[str, Any]) -> str:
    """What ablations are compared with: the router that was trained as they were, else the one under study."""
    return "plain" if "plain" in rows else "shipped"


def ablations(figures: Mapping[str, Any], abouts: Mapping[str, str]) -> str:
    """Routers trained otherwise, and other uses of one."""
    rows = results.rows(figures["rows"])
    part, base = results.part(rows), base_of(rows)
    lines = []
    for label, row in rows.items():
        told = figures["training"].get(label)
        name = f"`{label}`: {abouts[label]}" if label in abouts else label
        kl = f"{told['start']:.3f} / {told['random']:.3f} / {told['end']:.3f}" if told else ""
        steps = [str(told["steps"]), f"{told['difference']:g}"] if told else ["", ""]
        versus = "" if label == base else signed(part.cost(label, base))
        lines.append([name, *steps, kl, f"{100 * row.flops:.1f}", f"{row.kept:.0f}", shown(mean(part, label)), versus])
    lines += [[f"`{name}`: {abouts[name]}", "not trained", *[""] * 6] for name in abouts if name not in rows]
    head = ["router", "steps", "mean difference of pairs", "held-out KL: start / chance / end", "FLOPs %",
            "tokens left", "mean", f"against {base}"]  # fmt: skip
    return table(head, lines)


def overhead(figures: Mapping[str, Any]) -> str:
    """Routers at the 7B shape."""
    lines = [[str(row["width"]), str(row["depth"]), f"{100 * row['share']:.3f}"] for row in figures["rows"]]
    return table(["width", "depth", "% of dense prefill"], lines)


def promised(figures: Mapping[str, Any]) -> str:
    """What FLOPs and KV promise at the 7B shape."""
    lines = [
        [str(row["tokens"]), str(row["layers"]), f"{100 * row['flops']:.1f}", f"{100 * row['router']:.2f}",
         f"{100 * row['kv']:.1f}", f"{row['speed']:.2f}"]
        for row in figures["promised"]
    ]  # fmt: skip
    return table(["T", "L", "FLOPs %", "of these the router", "KV %", "prefill speed-up by FLOPs"], lines)


def times(figures: Mapping[str, Any]) -> str:
    """Measured fractions of dense, beside the FLOPs."""
    lines = []
    for name, row in figures["rows"].items():
        low, middle, high = row["prefill"]
        slow = row["decode"]
        kept = (1 - middle) / (1 - row["flops"]) if row["flops"] < 1 else 0.0
        lines.append([
            name, f"{100 * row['flops']:.1f}", f"{100 * middle:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{kept:.2f}", f"{100 * slow[1]:.1f} ({100 * slow[0]:.1f} to {100 * slow[2]:.1f})",
            f"{100 * row['kv']:.1f}",
        ])  # fmt: skip
    head = ["setting", "FLOPs %", "prefill time % (quartiles)", "saved of promised", "decoding step % (quartiles)",
            "KV bytes %"]  # fmt: skip
    return table(head, lines)


def prefills(figures: Mapping[str, Any]) -> str:
    """Measured prefill beside what its FLOPs promise; both as times as fast as dense."""
    lines = []
    for name, row in figures["rows"].items():
        low, middle, high = row["prefill"]
        lines.append([
            name, f"{100 * row['flops']:.1f}", f"{100 * middle:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{1 / row['flops']:.2f}", f"{1 / middle:.2f}", f"{row['flops'] / middle:.2f}",
        ])  # fmt: skip
    head = ["setting", "FLOPs %", "prefill time % (quartiles)", "speed-up promised", "measured", "measured / promised"]
    return table(head, lines)
