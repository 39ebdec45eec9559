"""The card of one strategy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from prunekit_evals.bench import llava_7b
from prunekit_evals.micro.card_tables import table
from prunekit_evals.studies.catalogue import reproduce, standing
from prunekit_evals.studies.catalogue.measure import Measured
from prunekit_evals.studies.catalogue.places import IMAGES, ROOT
from prunekit_evals.studies.catalogue.reported import Reported
from prunekit_evals.studies.catalogue.standing import cell

from prunekit.registry import Entry
from prunekit.strategy.about import COUNTS, REGIONS, About
from prunekit.strategy.options import describe

BUDGET = {
    "required": "`keep` or `keep_tokens` in the file", "optional": "may be given; else it decides by itself",
    "refused": "takes none",
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What cards are written from, beside the strategy itself.

    priced: FLOPs of its decisions over dense prefill at 7B, by name; None where it cannot stand there. goldens: files
    of authors' own choices, by name. pipelines: shipped ones that use it, by name.
    """

    measured: Measured
    reported: Reported
    priced: Mapping[str, float | None]
    goldens: Mapping[str, Sequence[Path]]
    pipelines: Mapping[str, Sequence[str]]


def card(entry: Entry, cls: type[Any], told: About, known: Known) -> str:
    """The page of a strategy."""
    parts = [
        f"# {entry.name}",
        f"{cell(entry.summary[:1].upper() + entry.summary[1:])}. [Source]({_source(cls)}), [all strategies](index.md).",
        *_idea(cls),
        "## Options",
        _options(cls),
        "## What it is",
        table(["", ""], _facts(entry.name, cls, told, known)),
        *_keep_map(entry.name),
        "## On the bundled model",
        standing.of_strategy(entry.name, known.measured),
        *reproduce.section(entry.name, known.measured),
        "## In papers",
        _papers(entry.name, known.reported),
    ]
    return "\n\n".join(parts) + "\n"


def _source(cls: type[Any]) -> str:
    file = Path(str(inspect.getsourcefile(cls))).relative_to(ROOT)
    return f"../../{file.as_posix()}"


def _idea(cls: type[Any]) -> Iterator[str]:
    """What the file says: the idea, what the class does, the rule and how it deviates from the authors' code."""
    said = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "").split("\n\n")
    yield prose(said[0])
    yield from (prose(paragraph) for paragraph in _explained(cls)[0])
    if len(said) > 1:
        yield "## Rule and deviations"
        yield from (prose(paragraph) for paragraph in said[1:])


def prose(text: str) -> str:
    """A paragraph of a docstring as Markdown: in one line, with what Markdown would take for its own marked off."""
    parts = re.split(r"(`[^`]*`|https?://[^\s)]+)", " ".join(text.split()))
    escaped = (part if number % 2 else re.sub(r"([*_<>\[\]|\\])", r"\\\1", part) for number, part in enumerate(parts))
    return "".join(escaped)


def _explained(cls: type[Any]) -> tuple[list[str], dict[str, str]]:
    """The paragraphs of its docstring without what they say of options, `name: what it is.`, and that by option."""
    names = [field.name for field in dataclasses.fields(cls)]
    start = re.compile(rf"(?:^|(?<=[.;] ))((?:{'|'.join(names)})(?:, (?:{'|'.join(names)}))*): ")
    told, meant = [], {}
    for paragraph in inspect.cleandoc(inspect.getdoc(cls) or "").split("\n\n"):
        plain, *pairs = start.split(" ".join(paragraph.split())) if names else [paragraph]
        for together, meaning in zip(pairs[::2], pairs[1::2], strict=True):
            meant |= dict.fromkeys(together.split(", "), meaning.strip())
        if plain.strip():
            told.append(plain)
    return told, meant


def _options(cls: type[Any]) -> str:
    kinds, meant = get_type_hints(cls), _explained(cls)[1]
    rows = []
    for field in dataclasses.fields(cls):
        default = "has to be given" if field.default is dataclasses.MISSING else f"`{_yaml(field.default)}`"
        meaning = prose(meant.get(field.name, ""))
        rows.append([f"`{field.name}`", default, cell(describe(kinds[field.name])), meaning])
    return table(["option", "default", "takes", "what it is"], rows) if rows else "None."


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]


def _facts(name: str, cls: type[Any], told: About, known: Known) -> Iterator[list[str]]:
    if told.link:
        yield ["paper", f"[{told.paper}]({told.link})"]
    if told.code:
        yield ["studied", f"`{told.code}`"]
    yield ["acts", ", ".join(REGIONS[site] for site in told.sites) or "on decoder layers"]
    if told.placed:
        yield ["by default at", told.placed]
    if told.kind in ("token", "router"):
        yield ["budget", BUDGET[cls.__prunekit__.keep]]
    yield ["how many tokens stay", COUNTS[told.count]]
    yield ["may see the text", _yes(told.text_aware)]
    yield ["attention", " and ".join(f"of the {whose}" for whose in told.attention) or "none"]
    yield ["training-free", _yes(told.training_free) + (", calibrated" if told.calibrated else "")]
    yield ["in a serving engine", _served(told)]
    yield ["asks for", ", ".join(f"`{one}`" for one in told.asks) or "nothing"]
    yield ["needs", "; ".join(told.needs) or "nothing else"]
    yield ["its decisions cost", _price(name, known.priced[name])]
    yield ["same choices as the authors' code", "; ".join(map(_golden, known.goldens[name])) or "no fixture"]
    if known.pipelines[name]:
        yield ["shipped pipelines", ", ".join(f"`{one}`" for one in known.pipelines[name])]


def _served(told: About) -> str:
    """Whether an engine could do it that takes image embeddings, and what stands against it."""
    if told.kind in ("layer", "router"):
        return "no: it decides about layers" if told.kind == "layer" else "no: it decides inside the decoder"
    against = {
        "it acts inside the decoder": not set(told.sites) & {"pixels", "tower", "encoder"},
        "it may see the text": told.text_aware,
        "its count is not fixed": told.count == "own",
    }
    reasons = [reason for reason, holds in against.items() if holds]
    return "no: " + ", ".join(reasons) if reasons else "yes: before the decoder, a fixed count, blind to the text"


def _price(name: str, share: float | None) -> str:
    if share is None:
        return "nothing that is counted: pixels are compared, before a tower that takes images of any size"
    if reason := llava_7b.free(name):
        return f"nothing: {reason}"
    dear = f"; {llava_7b.DEAR[name]}" if name in llava_7b.DEAR else ""
    return f"{standing.percent(share)} % of the FLOPs of dense prefill at LLaVA-1.5-7B{dear}"


def _golden(file: Path) -> str:
    cases = len(json.loads(file.read_text(encoding="utf-8"))["cases"])
    return f"[{file.name}](../../tests/goldens/{file.name}), {cases} cases"


def _keep_map(name: str) -> Iterator[str]:
    """What it keeps of one image, where that was drawn."""
    if (IMAGES / f"{name}.webp").is_file():
        yield "## What it keeps"
        yield f"![what {name} keeps of one image, and the visual tokens that enter each layer](images/{name}.webp)"
        yield (
            "Of one scene of the bundled model, at a quarter of the tokens where it takes a budget: what is clear is "
            "kept, a cross is dropped, two strokes are merged into an outlined token; below, the tokens that enter "
            "each layer. [Your own](../trace.md)."
        )


def _papers(name: str, reported: Reported) -> str:
    parts = []
    for one, lines in reported.of(name):
        head = ["in the source", "kept", *one.benchmarks, *(["mean % of full"] if len(one.base) > 1 else []), "source"]
        rows = [
            [line.called, str(line.kept), *("–" if score is None else f"{score:g}" for score in line.scores),
             *([f"{one.mean(line):.1f}"] if len(one.base) > 1 else []), ", ".join(line.sources)]
            for line in lines
        ]  # fmt: skip
        base = ["none", "all", *(f"{score:g}" for score in one.base), *(["100"] if len(one.base) > 1 else []), ""]
        used = dict.fromkeys(source for line in lines for source in line.sources)
        notes = "; ".join(f"{source}: {reported.sources[source]}" for source in used)
        parts.append(f"{one.model}, {one.title}. {one.remark} {notes}.\n\n{table(head, [base, *rows])}")
    quoted = "Quoted, not measured here; the mean is ours, over the benchmarks that a row has."
    return "\n\n".join([quoted, *parts]) if parts else "No rows on LLaVA-1.5-7B or Qwen2.5-VL-7B were found."


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
