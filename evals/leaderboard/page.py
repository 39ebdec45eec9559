"""A board as one HTML file that needs nothing but itself.

Jinja2 escapes whatever is put in; data for plots goes in as JSON without `<`, `>` and `&`. Beside that, the page's own
content security policy runs the two scripts of known hash alone, and lets nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from prunekit_evals.leaderboard import bundle, charts, columns, commands, points
from prunekit_evals.leaderboard.board import Board, Entry, Section, spelled
from prunekit_evals.leaderboard.columns import Column
from prunekit_evals.leaderboard.pictures import Picture
from prunekit_evals.run.results import Cell

from prunekit.version import VERSION

LIMIT = 2_000_000  # bytes: what opens at once on a phone, and what code hosts show


@dataclass(frozen=True)
class Shown:
    """A section as the template needs it."""

    section: Section
    title: str
    ranking: tuple[Column, ...]
    tasks: tuple[Column, ...]
    plots: Mapping[str, Any]
    views: tuple[str, ...]
    conditions: Mapping[str, str]


def html(board: Board, pictures: Mapping[str, Picture] | None = None) -> str:
    """The page. pictures: name of a row -> its keep map; None: it shows none."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("prunekit_evals.leaderboard", "template"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    vega, own = _inside_html(bundle.bundle()), _inside_html(_text("board.js"))
    return environment.get_template("board.html").render(
        board=board, sections=[_shown(section) for section in board.sections], version=VERSION,
        css=Markup(_text("board.css")), vega=Markup(vega), own=Markup(own), policy=_policy(vega, own),
        receipt=receipt, cell_facts=cell_facts, pictures=pictures or {}, unrecorded=commands.UNRECORDED,
    )  # fmt: skip


def _shown(section: Section) -> Shown:
    views = points.views(section)
    documents = [charts.pareto(axis, views) for axis in points.axes(section)] if views else []
    plots = {"data": points.of_section(section), "documents": documents}
    table = section.table
    return Shown(
        section, table.conditions.title(), columns.ranking(table), columns.tasks(table), plots, views,
        spelled(table.conditions),
    )  # fmt: skip


def receipt(entry: Entry) -> dict[str, str]:
    """What identifies a row beside the conditions of its table."""
    pipelines = dict.fromkeys(cell.pipeline.sha for cell in entry.cells)
    created = sorted(cell.created for cell in entry.cells)
    timed = [cell.timing.machine for cell in entry.cells if cell.timing is not None and cell.timing.machine]
    facts = {
        "pipeline": ", ".join(pipelines),
        "code": ", ".join(dict.fromkeys(cell.pipeline.code for cell in entry.cells)),
        "seeds": ", ".join(entry.seeds),
        "made": created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}",
        "measured on": "; ".join(dict.fromkeys(timed)),
        "notes": "; ".join(dict.fromkeys(note for cell in entry.cells for note in cell.notes)),
    }
    return {name: fact for name, fact in facts.items() if fact}


def cell_facts(cell: Cell) -> dict[str, str]:
    """What one cell says, in words."""
    timing = cell.timing
    measured = timing is not None and timing.prefill_ms is not None and timing.dense_prefill_ms is not None
    metrics = (f"{name.partition(',')[0]} {value:.4g}" for name, value in cell.metrics.items())
    return {
        "cell": cell.id,
        "task": f"{cell.label} (version {cell.task_version})" if cell.task_version else cell.label,
        "questions": str(len(cell.questions)),
        "metrics of the task": ", ".join(metrics),
        "prefill ms": f"{timing.prefill_ms:.3g} of {timing.dense_prefill_ms:.3g}" if timing and measured else "",
        "tokens entering layers": _entering(cell),
        "flags": ", ".join(f"{count} {name}" for name, count in _flags(cell).items() if count),
    }  # fmt: skip


def _flags(cell: Cell) -> dict[str, int]:
    return {
        "unanswered": len(cell.unanswered), "empty": cell.empty, "not finite": cell.unsound,
        "off budget": cell.executed.off_budget if cell.executed else 0,
    }  # fmt: skip


def _entering(cell: Cell) -> str:
    """`180 ×2, 72 ×6`: equal neighbours together; empty where it was not recorded."""
    entered = cell.executed.layer_tokens if cell.executed else ()
    return ", ".join(f"{tokens:.4g} ×{len(list(run))}" for tokens, run in groupby(entered))


@cache
def _text(name: str) -> str:
    return (files("prunekit_evals.leaderboard") / "template" / name).read_text(encoding="utf-8")


def _inside_html(script: str) -> str:
    """JavaScript that may stand in a page: its end is the end that we write, and its hash is that of what is read."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
