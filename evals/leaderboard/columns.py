"""The columns of a page's tables: the texts of `prunekit compare`, each with the number that it is sorted by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunekit_evals.compare import rendering
from prunekit_evals.compare.tables import Row, Table

NAME = "Pipeline"
MEANINGS = {
    NAME: "a row leads to its pipeline file, command and record",
    "Average": "accuracy in %, unweighted over the tasks that all rows have, ± half of its 95 % interval",
    "Δ dense": "paired difference to dense on the same questions; * where it holds after Holm's correction",
    "Δ random": "the same to random at the same FLOPs",
    "Hard": "accuracy on the questions that a downsample row gets wrong, all tasks together",
    "Seeds": "how many seeds, and between which averages they lie",
    "Tokens": "visual tokens left after the last stage",
    "FLOPs": "of the language model's prefill, % of dense, counted exactly",
    "Whole": "FLOPs of the whole prefill, with vision tower and projector, % of dense",
    "KV": "bytes of the KV cache after the prefill, % of dense",
}


@dataclass(frozen=True)
class Text:
    """What a row says in a column. value: what it is sorted by, None for what comes last. holds: 1, -1 or 0."""

    text: str
    value: float | str | None
    holds: int = 0


@dataclass(frozen=True)
class Column:
    """A column with what it means, and a text for each row."""

    name: str
    meaning: str
    texts: tuple[Text, ...]


def ranking(table: Table) -> tuple[Column, ...]:
    """Average, differences and costs."""
    tasks = set(map(rendering.short, table.tasks))
    return tuple(_column(table, name, texts) for name, texts in rendering.columns(table).items() if name not in tasks)


def tasks(table: Table) -> tuple[Column, ...]:
    """Each task by itself."""
    texts = rendering.columns(table)
    shown = [_column(table, NAME, texts[NAME])]
    for label in table.tasks:
        of_task = [row.tasks.get(label) for row in table.rows]
        values = [None if one is None else one.value for one in of_task]
        images = f"{label}: {table.images.get(label, 0)} images"
        pairs = zip(texts[rendering.short(label)], values, strict=True)
        shown.append(Column(rendering.short(label), images, tuple(Text(text, value) for text, value in pairs)))
    return tuple(shown)


def _column(table: Table, name: str, texts: list[str]) -> Column:
    machine = _machine(table, name)
    hard = f" ({table.hard} of them)" if name == "Hard" else ""
    meaning = MEANINGS.get(name, "") + hard or "time of the whole prefill over dense's, measured alternately" + (
        f", on {machine}; not comparable with other columns of times" if len(table.machines) > 1 else ""
    )
    values: Callable[[Row], float | str | None] = KEYS.get(name) or (lambda row: _time(row, machine))
    pairs = zip(texts, table.rows, strict=True)
    return Column(name, meaning, tuple(Text(text, values(row), _holds(name, row)) for text, row in pairs))


KEYS: dict[str, Callable[[Row], float | str | None]] = {
    NAME: lambda row: row.pipeline,
    "Average": lambda row: row.average and row.average.value,
    "Δ dense": lambda row: row.to_dense and row.to_dense.difference.value,
    "Δ random": lambda row: row.to_random and row.to_random.difference.value,
    "Hard": lambda row: row.hard and row.hard.value,
    "Seeds": lambda row: len(row.seeds) or None,
    "Tokens": lambda row: row.kept_tokens,
    "FLOPs": lambda row: row.flops_fraction,
    "Whole": lambda row: row.whole_flops_fraction,
    "KV": lambda row: row.kv_fraction,
}


def _holds(name: str, row: Row) -> int:
    compared = {"Δ dense": row.to_dense, "Δ random": row.to_random}.get(name)
    return compared.holds if compared else 0


def _machine(table: Table, name: str) -> str:
    """Whose times a column holds: `Time`, or `Time 2` of several."""
    number = name.removeprefix("Time").strip()
    return table.machines[int(number or 1) - 1] if name.startswith("Time") and table.machines else ""


def _time(row: Row, machine: str) -> float | None:
    return 1.0 if row.dense else row.times.get(machine)
