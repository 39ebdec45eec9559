"""How strategies stand on the bundled model: tables of the measured rows, for cards and for the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunekit_evals.compare.stats import Estimate, average
from prunekit_evals.micro.card_tables import table
from prunekit_evals.micro.record import Part
from prunekit_evals.studies.catalogue.cells import Row
from prunekit_evals.studies.catalogue.measure import Measured
from prunekit_evals.studies.catalogue.rows import SHARES

RANDOM = "random"  # what every strategy is held against at its share
ENDS = ("dense", "blind")  # which stand in every table
HEAD = ["tokens", "FLOPs %", "KV %", "accuracy %", "against dense", "against random"]
Group = Mapping[str, str]  # a strategy's group by its name


def of_strategy(name: str, measured: Measured) -> str:
    """The rows of one strategy, with those of the baselines at the same shares."""
    labels = {share: label for share in (*SHARES, None) if (label := label_of(name, share)) in measured.rows}
    if not labels:
        return f"Not measured: {cell(measured.out.get(name, 'there is no row yet'))}."
    rows = [[_share(share), *_figures(label, measured, share)] for share, label in labels.items()]
    return (
        table(["kept", *HEAD], rows)
        + "\n\nWhat the columns mean and all strategies beside each other: [index](index.md)."
    )


def at_share(share: float | None, measured: Measured, groups: Group) -> str:
    """All rows of one share, the most accurate first; baselines are bold. None: strategies as they come."""
    labels = {name: name if name in ENDS else label_of(name, share) for name in groups}
    found = {name: label for name, label in labels.items() if label in measured.rows}
    part = measured.part
    ordered = sorted(found, key=lambda name: (-part.mean(found[name]), measured.rows[found[name]].flops, name))
    rows = []
    for name in ordered:
        link = f"[{name}]({name}.md)"
        shown = f"**{link}**" if groups[name] == "baselines" else link
        figures = _figures(found[name], measured, share)
        # Alone there is no share at which a random subset would be of the same size; how it was set says more.
        last = figures[-1] if share is not None else f"`{measured.rows[found[name]].stages}`"
        rows.append([shown, groups[name], *figures[:-1], last])
    head = HEAD if share is not None else [*HEAD[:-1], "stages"]
    return table(["strategy", "acts", *head], rows)


def accuracy(part: Part, label: str) -> Estimate:
    """The mean of the tasks, with its interval."""
    estimate = average([part.share(label, task) for task in part.tasks])
    assert estimate is not None
    return estimate


def percent(share: float) -> str:
    """A small share in per cent."""
    return "0" if share == 0 else f"{100 * share:.3f}" if share >= 1e-5 else "< 0.001"


def cell(text: str) -> str:
    """Text that may stand in a cell of a table, and in prose."""
    return " ".join(text.split()).replace("|", "\\|")


def label_of(name: str, share: float | None) -> str:
    """Of a row in the file."""
    return name if share is None else f"{name} {share:g}"


def _share(share: float | None) -> str:
    return "as it comes" if share is None else f"{100 * share:g} %"


def _figures(label: str, measured: Measured, share: float | None) -> Sequence[str]:
    row: Row = measured.rows[label]
    part = measured.part
    found = accuracy(part, label)
    base = label_of(RANDOM, share)
    against = "" if share is None or base not in measured.rows or base == label else _signed(part.cost(label, base))
    dense = "" if label == "dense" else _signed(part.cost(label, "dense"))
    return [
        f"{row.kept:.4g}", f"{100 * row.flops:.1f}", f"{100 * row.kv:.1f}",
        f"{100 * found.value:.1f} ± {100 * found.half:.1f}", dense, against,
    ]  # fmt: skip


def _signed(estimate: Estimate) -> str:
    """A difference with its interval, bold where that excludes none."""
    value = f"{100 * estimate.value:+.1f}"
    value = "0.0" if value in ("+0.0", "-0.0") else value.replace("-", "−")
    text = f"{value} ± {100 * estimate.half:.1f}"
    return f"**{text}**" if estimate.low > 0 or estimate.high < 0 else text
