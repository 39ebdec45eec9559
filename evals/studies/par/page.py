"""The study part of docs/par.md, written from the results alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prunekit_evals.studies.par import findings, results, tables
from prunekit_evals.studies.par.parts import DRAWS, FASTV_SITE
from prunekit_evals.studies.par.settings import VARIANTS

BLOCK = re.compile(r"(<!-- study -->\n).*?(<!-- /study -->)", re.S)
PARTS = ("table", "unseen", "layers", "boxes", "correlation", "ablations", "overhead", "micro", "large", "seven")


def into(page: str, figures: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """The page with the study between its markers. Raises ValueError where there are none."""
    if not BLOCK.search(page):
        raise ValueError("the page has no '<!-- study --> ... <!-- /study -->'")
    text = written(figures, now)
    return BLOCK.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


def written(figures: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """The text. now: the bundled model and benchmark as they are, against which figures may be stale."""
    if "about" not in figures:
        return "Not measured yet: `make study`."
    sections = {
        "table": _table, "unseen": _unseen, "layers": _layers, "boxes": _boxes, "correlation": _correlation,
        "ablations": _ablations, "overhead": _overhead, "micro": _micro, "large": _large,
        "seven": _seven,
    }  # fmt: skip
    parts = [_about(figures["about"], now)]
    for name in PARTS:
        parts.append(sections[name](figures[name]) if name in figures else f"### {name}\n\nNot measured.")
    return "\n\n".join(parts)


def _about(about: Mapping[str, Any], now: Mapping[str, str]) -> str:
    router = about["router"]
    options = ", ".join(f"`{key}: {'null' if value is None else value}`" for key, value in router["options"].items())
    trained = f"trained for {router['steps']} steps" if router["trained"] else "**untrained**"
    curve = ""
    if router["trained"]:
        start, end = router["curve"]
        curve = (
            f" In its own training, held-out KL to the dense model: {start['random']:.3f} by chance, "
            f"{start['held_out']:.3f} as it began, {end['held_out']:.3f} at its end."
        )
    stale = [name for name in now if about[name] != now[name]]
    warning = f"\n\n**Stale**: the {' and the '.join(stale)} changed since; run `make study`." if stale else ""
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"{about['questions']} questions a task unless said otherwise, {about['dtype']}, model `{about['model']}`, "
        f"benchmark `{about['benchmark']}`, {versions}. The router ({options}) is {trained}.{curve}{warning}"
    )


def _table(figures: Mapping[str, Any]) -> str:
    parts = ["### PAR against others at equal FLOPs", findings.targets(figures)]
    parts += [findings.ranking(figures), findings.joint(figures)]
    for setting in figures["settings"]:
        parts.append(f"#### {setting}, T={tables.kept(figures, setting)}")
        parts += [tables.accuracy(figures, setting), tables.against(figures, setting)]
    orders = figures["orders"]
    parts.append(
        "FLOPs and KV are those of the language model's prefill, of dense, decisions of routers included. Layers are "
        f"left out in the order {orders['skip_layers']} and frozen in the order {orders['freeze_layers']}, each found "
        "greedily on other scenes. Intervals are of 95 %, paired by question."
    )
    return "\n\n".join(filter(None, parts))


def _unseen(figures: Mapping[str, Any]) -> str:
    setting = figures["setting"]
    table = {"base": {}, "settings": {setting: figures["rows"]}}
    title = f"### {setting}, on later questions"
    how = f"{_count(figures['rows'])} They begin with number {figures['first']} of each task."
    parts = [title, how, findings.targets(table), tables.accuracy(table, setting), tables.against(table, setting)]
    return "\n\n".join(parts)


def _count(rows: Mapping[str, Any]) -> str:
    """How many questions rows have."""
    right = results.rows(rows)[next(iter(rows))].right
    return f"{len(next(iter(right.values())))} questions a task."


def _layers(figures: Mapping[str, Any]) -> str:
    title = "### Pairs of layers left out"
    return "\n\n".join([title, _count(figures["rows"]), tables.layers(figures), findings.layers(figures)])


def _boxes(figures: Mapping[str, Any]) -> str:
    how = (
        f"Tokens leave before layer {FASTV_SITE}; accuracy in %, the mean of the tasks, over {DRAWS} draws. "
        f"Attention alone has nothing random in it, so its box is one value. {_count(figures['rows'])}"
    )
    return "\n\n".join(["### Selections repeated", how, tables.boxes(figures), findings.boxes(figures)])


def _correlation(figures: Mapping[str, Any]) -> str:
    how = "Cosine of what enters and what leaves a layer, over the tokens that run in it; one that does nothing has 1."
    return "\n\n".join(["### Tokens and layers", how, tables.correlation(figures), findings.correlation(figures)])


def _ablations(figures: Mapping[str, Any]) -> str:
    abouts = {one.folder: one.about for one in VARIANTS}
    how = (
        "All but the shipped router were trained alike, briefly, on one seed each; a held-out KL is that of the budget "
        "that a router was trained at. Budgets of tokens are solved for those of the setting, the router's included."
    )
    parts = ["### Ablations", how, findings.ablations(figures)]
    for setting, rows in figures["settings"].items():
        told = {"rows": rows, "training": figures["training"]}
        parts += [f"#### Within {setting}", _count(rows), tables.ablations(told, abouts)]
    return "\n\n".join(parts)


def _overhead(figures: Mapping[str, Any]) -> str:
    how = (
        f"LLaVA-1.5-7B, {figures['prompt']} prompt tokens, {figures['dense'] / 1e12:.2f} TFLOPs of dense prefill as "
        f"torch counts them on the meta device (the formula of `prunekit/cost.py`: {figures['formula'] / 1e12:.2f})."
    )
    title = "### Cost of the router, and the promise at 7B"
    return "\n\n".join([title, how, tables.overhead(figures), tables.promised(figures), findings.overhead(figures)])


def _micro(figures: Mapping[str, Any]) -> str:
    parts = ["### Measured: the bundled model"]
    for size, rows in figures.items():
        parts += [findings.times(rows, f"Batch {size}"), tables.times(rows)]
    return "\n\n".join(parts)


def _large(figures: Mapping[str, Any]) -> str:
    what = (
        f"A random LLaVA of {figures['layers']} layers, {figures['hidden']} wide, {figures['visual']} visual and "
        f"{figures['text']} text tokens, a new router of the default width"
    )
    return "\n\n".join(["### Measured: a larger shape", tables.times(figures), findings.times(figures, what)])


def _seven(figures: Mapping[str, Any]) -> str:
    title = "### Measured: LLaVA-1.5-7B's shape, on a CPU"
    return "\n\n".join([title, tables.prefills(figures), findings.seven(figures)])


__all__ = ["PARTS", "into", "results", "written"]
