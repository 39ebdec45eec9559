"""Every page of docs/strategies as it should be: a card for each strategy of prunekit, and the index."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from prunekit_evals.bench import llava_7b
from prunekit_evals.compare.rendering import SHORT
from prunekit_evals.micro.card_tables import table
from prunekit_evals.studies.catalogue import measure, reported, reproduce, rows, standing
from prunekit_evals.studies.catalogue.card import Known, card
from prunekit_evals.studies.catalogue.measure import Measured
from prunekit_evals.studies.catalogue.places import CARDS, COMMAND, GOLDENS, MEASURED, REPRODUCE
from prunekit_evals.studies.catalogue.rows import SHARES

import prunekit
from prunekit import plugins
from prunekit.registry import Entry
from prunekit.strategy.about import GROUPS, REGIONS, About, about

OURS = "strategies"  # the plugin whose strategies get cards

INTRO = """# Strategies

A card for each strategy: its idea and rule, its options, what it needs, where it acts and what that means, what its
decisions cost, where it stands on the bundled model, and what papers report of it.
[Reference](../reference/strategies.md) has all options in one table. `prunekit list strategies` finds and filters the
same: `--site decoder --training-free --text-aware`, or an arXiv id."""

LEGEND = """\
**Text**: it may see what the prompt says. **Attention**: whose it reads. **Count**: how many tokens stay is fixed,
fixed with a budget in the file, or its own. **Servable**: an engine that takes image embeddings could do it, since it
acts before the decoder, with a count that can be fixed, and sees no text. **Cost**: FLOPs of its own decisions, in %
of dense prefill at the shape of LLaVA-1.5-7B, 128 of 576 visual tokens kept where a budget is needed."""

MICRO = """## On the bundled model

Every strategy whose needs [prunekit-micro](../../evals/micro/weights/README.md) meets, alone, on the same questions
of the bundled benchmark: {questions} of each of the tasks {tasks}, in {dtype}. *Kept* is what is left of the {visual}
visual tokens behind the last cut, so that strategies inside the decoder, which let the first layers see all tokens,
cost more at the same share: compare them by FLOPs (of the decoder's prefill, decisions included). *Accuracy* is the
mean of the tasks, *against* the paired difference on the same questions; all with their 95 % intervals, one question
an image, and bold where 0 is not in it. Bold names are baselines; `downsample` keeps all tokens of an image that was
made smaller by the share and enlarged again, since this tower takes one size. The model is small and was made for
this ([how](../../evals/micro/weights/README.md)): tokens were dropped in its training by patterns that know nothing
of the image, and its last prompt token looks at things early, so that ranks here are not ranks on large models.

To add what is missing: `{command} measure`."""


def written() -> dict[Path, str]:
    """Every page by its path, and the sweep files that measure their rows again."""
    known = _known()
    entries = [entry for entry in plugins.registry().strategies() if entry.plugin == OURS]
    told = {entry.name: about(entry.load()) for entry in entries}
    cards = {CARDS / f"{entry.name}.md": card(entry, entry.load(), told[entry.name], known) for entry in entries}
    sweeps = {name: text for name in told if (text := reproduce.sweep(name, known.measured))}
    files = {REPRODUCE / f"{name}.yaml": text for name, text in sweeps.items()}
    return {CARDS / "index.md": _index(entries, told, known), **cards, **files}


@cache
def _known() -> Known:
    names = [entry.name for entry in plugins.registry().strategies()]
    with tempfile.TemporaryDirectory() as folder:
        priced = {name: llava_7b.decided(name, Path(folder)) for name in names}
    return Known(measure.load(MEASURED), reported.load(), priced, goldens(names), _pipelines(names))


def goldens(names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of authors' own choices for each name: those called so, or so with something behind it."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    for file in sorted(GOLDENS.glob("*.json")):
        owners = [name for name in names if file.stem == name or file.stem.startswith(f"{name}_")]
        if owners:
            found[max(owners, key=len)].append(file)
    return found


def _pipelines(names: Sequence[str]) -> dict[str, list[str]]:
    """Shipped pipelines by the strategies that they use."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for entry in plugins.registry().pipelines():
        if entry.plugin == OURS:
            for use in dict.fromkeys(stage.use for stage in prunekit.load(entry.target).stages):
                found[use].append(entry.name)
    return found


def _index(entries: Sequence[Entry], told: Mapping[str, About], known: Known) -> str:
    groups = {name: one.group for name, one in told.items()}
    parts = [INTRO, LEGEND]
    for group in GROUPS:
        lines = [_line(entry, told[entry.name], known) for entry in entries if groups[entry.name] == group]
        if lines:
            head = ["strategy", "what it does", "acts", "text", "attention", "count", "servable", "cost %"]
            parts += [f"## {group[:1].upper()}{group[1:]}", table(head, lines)]
    measured = known.measured
    if measured.rows:
        parts += [*_micro(measured, groups)]
    return "\n\n".join(parts) + "\n"


def _line(entry: Entry, told: About, known: Known) -> list[str]:
    price = known.priced[entry.name]
    acts = {"pixels": "pixels", "tower": "tower", "encoder": "before the decoder", "decoder": "decoder", "end": "end"}
    assert set(acts) == set(REGIONS)
    return [
        f"[{entry.name}]({entry.name}.md)", standing.cell(entry.summary),
        ", ".join(acts[site] for site in told.sites) or "layers", "yes" if told.text_aware else "",
        ", ".join(told.attention), {"given": "either"}.get(told.count, told.count), "yes" if told.servable else "",
        "" if price is None else standing.percent(price),
    ]  # fmt: skip


def _micro(measured: Measured, groups: Mapping[str, str]) -> Iterator[str]:
    tasks = ", ".join(f"`{SHORT.get(task, task)}`" for task in measured.part.tasks)
    visual = max(row.kept for row in measured.rows.values())
    said = {**measured.about, "tasks": tasks, "visual": f"{visual:g}", "command": COMMAND}
    yield MICRO.format(**said)
    if missing := _missing(measured, groups):
        listed = ", ".join(f"`{name}`" for name in missing)
        yield f"Rows of these are not measured yet, at some share or at all: {listed}."
    for share in SHARES:
        yield f"### {100 * share:g} % of the tokens"
        yield standing.at_share(share, measured, groups)
    yield "### As they come"
    yield "With the sites and budgets of their own."
    alone = {name: group for name, group in groups.items() if name in measured.rows}
    yield standing.at_share(None, measured, alone)
    if measured.out:
        yield "### Not on this model"
        yield "They run in the tests, on tiny models that have what they need."
        yield table(
            ["strategy", "why"], [[f"[{name}]({name}.md)", standing.cell(why)] for name, why in measured.out.items()]
        )


def _missing(measured: Measured, groups: Mapping[str, str]) -> list[str]:
    """Strategies of which a row is wanted that is not there."""
    missing = []
    for name in (one for one in groups if one not in measured.out):
        cls = plugins.registry().get_strategy(name)
        labels = (standing.label_of(name, share) for share, _ in rows.stages(name, cls, about(cls)))
        if any(one not in measured.rows for one in labels):
            missing.append(name)
    return missing
