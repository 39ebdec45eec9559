"""Reads the keys that say how much stays: the budget of a pipeline, and the `keep` keys of its stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from prunekit.errors import Fault, Where, did_you_mean
from prunekit.spec.places import Node
from prunekit.strategy import meant
from prunekit.strategy.sites import Keep

DROP_ALL = "dropping all has strategies of its own: see `prunekit list strategies`"
ACCOUNTINGS = ("flops", "layer_mean", "kept_at_end", "kv_bytes")
# What a stage keeps that is left open to the budget of the pipeline, until a model says how much that is.
OPEN = Keep(1.0, of="current")


@dataclass(frozen=True)
class Budget:
    """What the stages that are left open may keep, so that the whole pipeline costs `fraction` of the dense model.

    of: what is counted, one of `ACCOUNTINGS`. text_tokens: of the prompt that it is for, beside its visual ones.
    visual_tokens: of that prompt; None takes those of one image. places: of the keys in the file.
    """

    of: str
    fraction: float
    text_tokens: int = 64
    visual_tokens: int | None = None
    places: Mapping[str, Where | None] = field(default_factory=dict, compare=False)

    def as_data(self) -> dict[str, Any]:
        """As the file has it, with its defaults."""
        data: dict[str, Any] = {self.of: self.fraction, "text_tokens": self.text_tokens}
        return data if self.visual_tokens is None else {**data, "visual_tokens": self.visual_tokens}


def read_budget(node: Node | None, faults: list[Fault]) -> Budget | None:
    """The budget of a whole pipeline; None when there is none to read."""
    if node is None:
        return None
    if not isinstance(node.data, dict):
        faults.append(Fault(node.where, "budget", f"must be a mapping, not {node}", "such as {flops: 0.46}"))
        return None
    before = len(faults)
    names = (*ACCOUNTINGS, "text_tokens", "visual_tokens")
    for key, value in node.data.items():
        if key not in names:
            hint = f"{did_you_mean(key, names)}known keys: {', '.join(names)}"
            faults.append(Fault(value.key, f"budget.{key}", "unknown key", hint))
    accountings = [key for key in ACCOUNTINGS if key in node.data]
    if len(accountings) != 1:
        told = f"names {len(accountings)} accountings" if accountings else "names no accounting"
        faults.append(Fault(node.where, "budget", told, f"write one of {', '.join(ACCOUNTINGS)}"))
    for key in accountings:
        _fraction(node.data[key], f"budget.{key}", "original", faults)
    for key in ("text_tokens", "visual_tokens"):
        if (one := node.data.get(key)) is not None and not (_is(one, int) and cast("int", one.data) >= 1):
            faults.append(Fault(one.where, f"budget.{key}", f"must be a whole number, at least 1, not {one}"))
    if len(faults) > before:
        return None
    plain = {key: value.data for key, value in node.data.items()}
    places = {"": node.where, **{key: value.where for key, value in node.data.items()}}
    text, visual = cast("int", plain.get("text_tokens", 64)), cast("int | None", plain.get("visual_tokens"))
    return Budget(accountings[0], float(cast("float", plain[accountings[0]])), text, visual, places)


def read_keeps(
    values: Mapping[str, Node], path: str, sites: int | None, faults: list[Fault]
) -> tuple[Keep, ...] | None:
    """The budgets of `keep` or `keep_tokens`: one for all sites, or one for each. None when there are none to read.

    sites: how many `at` names, 1 without it; None when it could not be read.
    """
    fraction, tokens, of = values.get("keep"), values.get("keep_tokens"), values.get("keep_of")
    if fraction and tokens:
        message = "this stage has two budgets, `keep` and `keep_tokens`"
        faults.append(Fault(tokens.key, f"{path}.keep_tokens", message, "remove one of them"))
    if of and of.data not in ("original", "current"):
        message = f"must be 'original' or 'current', not {of}"
        near = did_you_mean(str(of.data), ("original", "current")).strip()
        faults.append(Fault(of.where, f"{path}.keep_of", message, near))
    if of and not fraction:
        faults.append(Fault(of.key, f"{path}.keep_of", "says what `keep` is a fraction of, but there is no `keep`"))
    base: Literal["original", "current"] = "current" if of and of.data == "current" else "original"
    keeps = None
    # Both are read, so that the faults of both are told.
    for key, node, read in (("keep", fraction, _fraction), ("keep_tokens", tokens, _tokens)):
        if node is not None:
            keeps = _aligned(node, f"{path}.{key}", base, read, sites, faults)
    return keeps


def read_layers(node: Node | None, key: str, faults: list[Fault]) -> Keep | None:
    """How many decoder layers run: a whole number, or a fraction of them."""
    if node is None:
        return None
    if _is(node, int) and cast("int", node.data) >= 1:
        return Keep(tokens=cast("int", node.data))
    if _is(node, float) and 0 < cast("float", node.data) <= 1:
        return Keep(cast("float", node.data))
    message = f"must be a number of layers, at least 1, or a fraction of them in (0, 1], not {node}"
    hint = "a model without any layer is none" if node.data == 0 and _is(node, (int, float)) else ""
    faults.append(Fault(node.where, key, message, hint))
    return None


def _aligned(
    node: Node,
    key: str,
    base: Literal["original", "current"],
    read: Callable[..., Keep | None],
    sites: int | None,
    faults: list[Fault],
) -> tuple[Keep, ...] | None:
    if not isinstance(node.data, list):
        keep = read(node, key, base, faults)
        return None if keep is None else (keep,)
    entries = node.data
    keeps = [read(one, f"{key}[{index}]", base, faults) for index, one in enumerate(entries)]
    if sites is not None and len(keeps) != sites:
        faults.append(Fault(node.where, key, *_unequal(len(keeps), sites)))
        return None
    good = tuple(keep for keep in keeps if keep is not None)
    if len(good) < len(keeps):
        return None
    if base == "original" and not _falling(entries, good, key, faults):
        return None
    return good


def _unequal(keeps: int, sites: int) -> tuple[str, str]:
    if sites == 1:
        message = f"names {keeps} budgets, but the stage acts at one site"
        return message, "give `at` a list of as many sites, or one budget"
    return f"names {keeps} budgets for {sites} sites", "one for each site in `at`, or a single one for all"


def _falling(entries: Sequence[Node], keeps: Sequence[Keep], key: str, faults: list[Fault]) -> bool:
    """No later site keeps more than an earlier one leaves; else adds a fault."""
    for index, (before, keep) in enumerate(itertools.pairwise(keeps), start=1):
        new, old = (keep.fraction, before.fraction) if keep.tokens is None else (keep.tokens, before.tokens)
        if new is not None and old is not None and new > old:
            message = f"asks for {keep}, but the site before it leaves only {before}"
            faults.append(Fault(entries[index].where, f"{key}[{index}]", message, "budgets must not rise"))
            return False
    return True


def _fraction(node: Node, key: str, base: Literal["original", "current"], faults: list[Fault]) -> Keep | None:
    if _is(node, (int, float)) and 0 < cast("float", node.data) <= 1:
        return Keep(float(cast("float", node.data)), of=base)
    faults.append(Fault(node.where, key, f"must be a fraction in (0, 1], not {node}", _fraction_hint(node)))
    return None


def _tokens(node: Node, key: str, base: object, faults: list[Fault]) -> Keep | None:
    if _is(node, int) and cast("int", node.data) >= 1:
        return Keep(tokens=cast("int", node.data))
    hint = DROP_ALL if node.data == 0 and _is(node, int) else meant.whole(node.data)
    faults.append(Fault(node.where, key, f"must be a whole number of tokens, at least 1, not {node}", hint))
    return None


def _fraction_hint(node: Node) -> str:
    if not _is(node, (int, float)):
        return meant.fraction(node.data) if isinstance(node.data, str) else ""
    if node.data == 0:
        return DROP_ALL
    if cast("float", node.data) > 1:
        return "for a number of tokens write `keep_tokens`, for per cent divide by 100"
    return ""


def _is(node: Node, kind: Any) -> bool:
    value = node.data
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
