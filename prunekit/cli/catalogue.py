"""Strategies for `prunekit list strategies`: in groups, filtered, found by name or arXiv id. Imports each of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.errors import InputError, PluginError, did_you_mean
from prunekit.registry import Entry, Registry
from prunekit.strategy.about import COUNTS, GROUPS, REGIONS, About, about

BROKEN = "do not import"
# Option, what it leaves over, and the test.
FILTERS: Mapping[str, tuple[str, Callable[[About], bool]]] = {
    "--training-free": ("nothing in them is trained", lambda one: one.training_free),
    "--trained": ("they need something trained", lambda one: not one.training_free),
    "--calibrated": ("`prunekit calibrate` fits them to a model", lambda one: one.calibrated),
    "--text-aware": ("they may see what the prompt says", lambda one: one.text_aware),
    "--text-blind": ("they see no text", lambda one: not one.text_aware),
    "--attention": ("they read attention, of the tower or of the decoder", lambda one: bool(one.attention)),
    "--attention-free": ("they read none", lambda one: not one.attention),
    "--fixed-count": ("how many tokens they leave is, or can be, fixed", lambda one: one.count in ("fixed", "given")),
    "--dynamic-count": ("what tokens show may say how many stay", lambda one: one.count in ("given", "own")),
    "--servable": ("before the decoder, fixed count, blind to the text", lambda one: one.servable),
}
PREFIX = re.compile(r"(arxiv:|https?://(www\.)?arxiv\.org/(abs|pdf)/)", re.I)
VERSION = re.compile(r"v\d+$")


@dataclass(frozen=True)
class Listed:
    """One registered strategy; `about` is None, and `broken` says why, where its class does not import."""

    entry: Entry
    about: About | None
    broken: str = ""

    @property
    def group(self) -> str:
        """The heading that it stands under."""
        return self.about.group if self.about else BROKEN

    def to_json(self) -> dict[str, Any]:
        """Plain data: who registered it, and what follows from its class."""
        told = {name: getattr(self.entry, name) for name in ("name", "target", "summary", "origin", "plugin")}
        told["summary"] = self.entry.summary or self.entry.target
        return told | ({"broken": self.broken} if self.about is None else self.about.to_json())


def add_filters(command: argparse.ArgumentParser) -> None:
    """The options that choose among strategies."""
    command.add_argument("find", nargs="*", metavar="WORD", help="of strategies: a name, an arXiv id, or any words")
    command.add_argument("--group", metavar="G", help=f"strategies of this group: {', '.join(GROUPS)}, or a plugin's")
    command.add_argument("--site", choices=tuple(REGIONS), help="strategies that may act there")
    for option, (what, _) in FILTERS.items():
        command.add_argument(option, action="store_true", help=f"strategies only of which: {what}")


def chosen(namespace: argparse.Namespace) -> tuple[Callable[[About], bool], ...]:
    """The tests that the options ask for."""
    tests = [test for option, (_, test) in FILTERS.items() if getattr(namespace, option[2:].replace("-", "_"))]
    if namespace.site:
        tests.append(lambda one: namespace.site in one.sites)
    if namespace.group:
        tests.append(lambda one: one.group == namespace.group)
    return tuple(tests)


def listed(registry: Registry, words: Sequence[str], tests: Sequence[Callable[[About], bool]]) -> list[Listed]:
    """What matches, in the order of the groups. Raises InputError for words that nothing has.

    A class that does not import passes no test.
    """
    every = [_looked_at(entry) for entry in registry.strategies()]
    named = [one for one in every if [one.entry.name] == list(words)]
    found = named or [one for one in every if all(_has(one, word) for word in words)]
    if words and not found:
        names = [one.entry.name for one in every]
        near = "".join(did_you_mean(word, names) for word in words)
        raise InputError(f"no strategy has '{' '.join(words)}' ({near}`prunekit list strategies` shows all)")
    passed = [one for one in found if not tests or (one.about is not None and all(test(one.about) for test in tests))]
    order = {name: number for number, name in enumerate(GROUPS)}
    return sorted(passed, key=lambda one: (order.get(one.group, len(order)), one.group, one.entry.name))


def lines(rows: Sequence[Listed]) -> Iterable[str]:
    """As `prunekit list strategies` prints them: a single one with all that is known of it."""
    if len(rows) == 1 and rows[0].about is not None:
        yield from _details(rows[0].entry, rows[0].about)
        return
    wide = max((len(row.entry.name) for row in rows), default=0)
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            yield f"  {group}"
        paper = row.about.paper if row.about and ":" not in row.about.paper else ""
        summary = row.broken or row.entry.summary or row.entry.target
        yield f"    {row.entry.name:{wide}}  {paper:12}{summary}  [{row.entry.origin}]"
    if not rows:
        yield "  none"


def _looked_at(entry: Entry) -> Listed:
    try:
        cls = entry.load()
    except PluginError as error:
        return Listed(entry, None, str(error))
    if not hasattr(cls, "__prunekit__"):
        return Listed(entry, None, f"{entry.target} is not declared: put @strategy(...) above the class")
    return Listed(entry, about(cls))


def _has(one: Listed, word: str) -> bool:
    """The word is its arXiv id, in any writing and version, or stands in its name, summary, class or repository."""
    plain = VERSION.sub("", PREFIX.sub("", word))
    if one.about is not None and plain == VERSION.sub("", one.about.paper):
        return True
    texts = (one.entry.name, one.entry.summary, one.entry.target, one.about.code if one.about else "")
    return any(word.casefold() in text.casefold() for text in texts)


def _details(entry: Entry, told: About) -> Iterable[str]:
    facts = {
        "paper": told.link,
        "studied": told.code,
        "group": told.group,
        "acts": ", ".join(REGIONS[site] for site in told.sites) or "on decoder layers",
        "default": told.placed,
        "text-aware": _yes(told.text_aware),
        "attention": " and ".join(f"of the {whose}" for whose in told.attention) or "none",
        "count": COUNTS[told.count],
        "training-free": _yes(told.training_free),
        "servable": _yes(told.servable),
        "asks for": ", ".join(told.asks),
        "needs": "; ".join(told.needs) or "nothing else",
    }
    yield f"  {entry.name}: {entry.summary or entry.target}  [{entry.origin}]"
    wide = max(map(len, facts))
    for name, text in facts.items():
        if text:
            yield f"    {name:{wide}}  {text}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
