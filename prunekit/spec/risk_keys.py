"""Reads a budget of risk: how often an answer may be another one than the dense model's, and what it may keep."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from prunekit.errors import Fault, Where, did_you_mean
from prunekit.spec.budget_keys import Budget, read_budget, read_keeps, read_layers
from prunekit.spec.places import Node
from prunekit.strategy.sites import Keep

KEYS = ("risk", "confidence", "calibration", "ladder")
RUNG_KEYS = ("keep", "keep_tokens", "keep_layers")
EXAMPLE = "such as [{keep: 0.5}, {keep: 0.25, keep_layers: 0.9}]"


@dataclass(frozen=True)
class Rung:
    """What the stage keeps on one rung, as in its own keys: one `Keep` for all of its sites or one for each; and how
    many decoder layers run. Empty and None: all.
    """

    keeps: tuple[Keep, ...] = ()
    layers: Keep | None = None

    def as_data(self) -> dict[str, Any]:
        """As the file has it."""
        data: dict[str, Any] = {}
        if self.keeps:
            key = "keep" if self.keeps[0].tokens is None else "keep_tokens"
            amounts = [_amount(keep) for keep in self.keeps]
            data[key] = amounts[0] if len(amounts) == 1 else amounts
        return data if self.layers is None else {**data, "keep_layers": _amount(self.layers)}


# What the ladder is where the file has none: it is about tokens alone, since every strategy with scores has those.
LADDER = tuple(Rung((Keep(fraction),)) for fraction in (0.75, 0.5, 0.25, 0.1))


@dataclass(frozen=True)
class RiskBudget:
    """Each sample keeps as little as its predicted harm allows, so that answers differ from the dense model's rarely.

    risk: the share of prompts whose answer may differ. confidence: with which that share is promised.
    calibration: the artefact of `prunekit calibrate`; None: there is none yet. ladder: what a sample may keep, from the
    most to the least. places: of the keys in the file.
    """

    risk: float
    confidence: float = 0.9
    calibration: Path | None = None
    ladder: tuple[Rung, ...] = LADDER
    places: Mapping[str, Where | None] = field(default_factory=dict, compare=False)

    def as_data(self) -> dict[str, Any]:
        """As the file has it, with its defaults."""
        data: dict[str, Any] = {"risk": self.risk, "confidence": self.confidence, **self.ladder_data()}
        return data if self.calibration is None else {**data, "calibration": self.calibration}

    def ladder_data(self) -> dict[str, Any]:
        """The part of it that a calibration depends on."""
        return {"ladder": [rung.as_data() for rung in self.ladder]}

    def fault(self, key: str, message: str, hint: str = "") -> Fault:
        """A fault at one of its keys, such as `ladder[0]`; empty: at the budget itself."""
        where = self.places.get(key, self.places.get(""))
        return Fault(where, f"budget.{key}" if key else "budget", message, hint)


def read_any_budget(node: Node | None, faults: list[Fault]) -> Budget | RiskBudget | None:
    """The budget of a pipeline, of cost or of risk; None when there is none to read."""
    if node is not None and isinstance(node.data, dict) and "risk" in node.data:
        return read_risk(node, faults)
    return read_budget(node, faults)


def read_risk(node: Node, faults: list[Fault]) -> RiskBudget | None:
    """A budget of risk; None when what there is cannot be read."""
    values, before = cast("dict[str, Node]", node.data), len(faults)
    for key, value in values.items():
        if key not in KEYS:
            hint = f"{did_you_mean(key, KEYS)}known keys of a budget of risk: {', '.join(KEYS)}"
            faults.append(Fault(value.key, f"budget.{key}", "unknown key", hint))
    shares = {key: _share(values[key], f"budget.{key}", faults) for key in ("risk", "confidence") if key in values}
    calibration = _path(values.get("calibration"), faults)
    ladder = _ladder(values["ladder"], faults) if "ladder" in values else LADDER
    if len(faults) > before:
        return None
    places = {key: one.where for name, value in values.items() for key, one in value.table(name).items()}
    return RiskBudget(**shares, calibration=calibration, ladder=ladder, places={"": node.where, **places})


def _share(node: Node, key: str, faults: list[Fault]) -> float:
    value = node.data
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    hint = "for per cent divide by 100" if isinstance(value, int | float) and value > 1 else ""
    faults.append(Fault(node.where, key, f"must be a share between 0 and 1, not {node}", hint))
    return 0.0


def _path(node: Node | None, faults: list[Fault]) -> Path | None:
    if node is None:
        return None
    if isinstance(node.data, str) and node.data:
        return Path(node.folder, os.path.expanduser(node.data)).absolute()
    hint = "`prunekit calibrate` writes the file"
    faults.append(Fault(node.where, "budget.calibration", f"must be a path, not {node}", hint))
    return None


def _ladder(node: Node, faults: list[Fault]) -> tuple[Rung, ...]:
    """The rungs; each takes what it does not say from the one before."""
    if not isinstance(node.data, list) or not node.data:
        told = "is empty" if node.data == [] else f"must be a list of mappings, not {node}"
        faults.append(Fault(node.where, "budget.ladder", told, EXAMPLE))
        return ()
    before, rungs = len(faults), [Rung()]
    for index, one in enumerate(node.data):
        rungs.append(_rung(one, f"budget.ladder[{index}]", rungs[-1], faults))
    if len(faults) > before:
        return ()
    for index, (upper, lower) in enumerate(itertools.pairwise(rungs)):
        if (wrong := _not_less(upper, lower)) is not None:
            faults.append(Fault(node.data[index].where, f"budget.ladder[{index}]", wrong, "each rung keeps less"))
            return ()
    return tuple(rungs[1:])


def _rung(node: Node, key: str, before: Rung, faults: list[Fault]) -> Rung:
    if not isinstance(node.data, dict) or not node.data:
        faults.append(Fault(node.where, key, f"must be a mapping that says what is kept, not {node}", EXAMPLE))
        return before
    for name, value in node.data.items():
        if name not in RUNG_KEYS:
            hint = f"{did_you_mean(name, RUNG_KEYS)}known keys of a rung: {', '.join(RUNG_KEYS)}"
            faults.append(Fault(value.key, f"{key}.{name}", "unknown key", hint))
    budgets = {name: value for name, value in node.data.items() if name in RUNG_KEYS[:2]}
    several = next((len(value.data) for value in budgets.values() if isinstance(value.data, list)), 1)
    keeps = read_keeps(budgets, key, several, faults)
    layers = read_layers(node.data.get("keep_layers"), f"{key}.keep_layers", faults)
    return Rung(keeps or before.keeps, layers or before.layers)


def _not_less(upper: Rung, lower: Rung) -> str | None:
    """Why a rung does not keep less than the one before it; None: it does."""
    if upper.keeps and (len(upper.keeps) != len(lower.keeps) or _kind(upper.keeps[0]) != _kind(lower.keeps[0])):
        return "says otherwise than the rung before how many tokens stay: write the same key with as many entries"
    if upper.layers and lower.layers and _kind(upper.layers) != _kind(lower.layers):
        return "says otherwise than the rung before how many layers run: write whole numbers, or fractions"
    pairs = [*zip(upper.keeps or (Keep(1.0),) * len(lower.keeps), lower.keeps, strict=True)]
    pairs += [(upper.layers or Keep(1.0), lower.layers)] if lower.layers else []
    known = [(_amount(one), _amount(other)) for one, other in pairs if _kind(one) == _kind(other)]
    if any(after > amount for amount, after in known):
        return "keeps more than the rung before"
    if len(known) == len(pairs) and all(after == amount for amount, after in known):
        return "keeps as much as the rung before"
    return None


def _kind(keep: Keep) -> bool:
    return keep.tokens is None


def _amount(keep: Keep) -> float:
    """A whole number of tokens, or a fraction."""
    return cast("float", keep.fraction if keep.tokens is None else keep.tokens)
