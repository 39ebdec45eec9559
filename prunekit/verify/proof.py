"""A proof that a model can be pruned exactly: its tiny twin, pruned and skipped, against the masked reference.

It runs once for each config and costs seconds. Models of known families have it in the test suite; a model that was
only recognised (`prunekit.families.generic`) has it before it prunes for the first time, and `prunekit doctor` runs it
for any.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit import families, upstream
from prunekit.errors import PrunekitError, PrunekitWarning, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.verify.comparison import compared
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.stock import StockRun, stock_run_of
from prunekit.verify.strategies import ATTENDED, DRAWN, MERGED, WITHOUT, with_own
from prunekit.verify.tiny_prompts import Recipe, tiny_batch
from prunekit.verify.twin import recipe_for, rows_of, twin_of

STEPS, ALLOWED = 3, 1e-5
Stages = tuple[dict[str, Any], ...]
BY_ATTENTION = "tokens dropped by attention"
# In a case below: the first layer from 2 on whose keys and values no other layer reads.
UNREAD = "unread"
CASES: Mapping[str, Stages] = {
    "nothing pruned": ({"use": DRAWN, "keep": 1.0},),
    "tokens dropped at the decoder input and before layer 1": (
        {"use": DRAWN, "at": "encoder", "keep": 0.6},
        {"use": DRAWN, "at": 1, "keep": 0.5},
    ),
    BY_ATTENTION: ({"use": ATTENDED, "keep": 0.5},),
    "layers skipped": ({"use": DRAWN, "at": "encoder", "keep": 0.5}, {"use": WITHOUT, "layers": [0, 3]}),
    "attention skipped": ({"use": WITHOUT, "layers": UNREAD, "what": "attention"},),
    "MLP skipped": ({"use": WITHOUT, "layers": [2], "what": "mlp"},),
}
INSIDE = "tokens merged between attention and MLP of layer 1", ({"use": MERGED, "at": "1.mid", "keep": 0.5},)


@dataclass(frozen=True)
class Observed:
    """What only a running model shows: see `Parts.logical_until`; and whether its layers can be cut inside."""

    logical_until: int = 0
    cuts_inside: bool = True

    def added_to(self, parts: Parts) -> Parts:
        """The parts of a model, with what was observed, but for what a family's file states."""
        until = max(parts.logical_until, self.logical_until)
        return replace(parts, logical_until=until, mlp_norm=parts.mlp_norm if self.cuts_inside else None)


@dataclass(frozen=True)
class Case:
    """One pipeline on the twin: what it did, the largest error of a logit, and what went wrong, None if nothing.

    One that cuts inside a layer is no case where layers cannot be cut there: `Observed.cuts_inside` says it.
    """

    name: str
    error: float | None
    fault: str | None = None


@dataclass(frozen=True)
class Proof:
    """The cases that were run. `holds` when all are exact."""

    observed: Observed
    cases: tuple[Case, ...]

    @property
    def holds(self) -> bool:
        return all(case.fault is None for case in self.cases)


def proved_parts(model: PreTrainedModel) -> Parts:
    """The parts of `model`: as the file of its family says, or recognised, and then proved on its tiny twin.

    A family whose models may carry any decoder is proved with those that the tests do not prove with it.
    Raises Unsupported for a model that is not recognised, or whose twin is not pruned exactly, with all that is amiss,
    and for a version of transformers that lacks what prunekit needs.
    """
    upstream.verify()
    parts = families.find(model)
    if families.is_vouched_for(model) and parts.opaque is None:
        return parts
    proof = prove(model.config)
    faults = [f"{case.name}: {case.fault}" for case in proof.cases if case.fault is not None]
    if faults and parts.opaque is not None:
        raise Unsupported(
            f"the decoder {type(parts.text).__name__} can be cut at its input only, since {parts.opaque}, and its tiny "
            "twin shows that even this would not be exact"
        )
    if faults:
        raise Unsupported(
            f"{type(model).__name__} with {type(parts.text).__name__} was recognised, but its tiny twin is not pruned "
            f"exactly: {'; '.join(faults)}"
        )
    return proof.observed.added_to(parts)


def prove(config: Any) -> Proof:
    """Run all cases on a tiny twin of a model with this config; the answer is kept for equal configs.

    Raises Unsupported when there can be no twin, or when it shows what no declaration can express.
    """
    return _prove(_Key(config))


class _Key:
    """A config that is equal to others with the same class and numbers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        numbers = json.dumps(config.to_dict(), sort_keys=True, default=str)
        self.identity = type(config), numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


@lru_cache(maxsize=16)
def _prove(key: _Key) -> Proof:
    state = torch.random.get_rng_state()
    try:
        twin = twin_of(key.config)
    finally:
        torch.random.set_rng_state(state)
    try:
        parts = families.find(twin)
        recipe = _recipe(twin, parts)
        inputs = tiny_batch(twin, recipe, rows_of(recipe))
        with Float64Throughout():  # eager layers would make NaN of padding, which equals nothing
            observed = _observe(twin, inputs) if parts.opaque is None else Observed(cuts_inside=False)
    except PrunekitError:
        raise
    except Exception as error:  # code that was never seen may fail in any way
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise Unsupported(f"the tiny twin of {type(twin).__name__} does not run: {reason}") from error
    parts = observed.added_to(parts)
    stock_run = None
    if parts.opaque is None:
        with Float64Throughout():
            stock_run = stock_run_of(twin, inputs, STEPS + 1)
    cases = [_run(name, twin, parts, stages, inputs, stock_run) for name, stages in _cases(parts)]
    inside = None if parts.mlp_norm is None else _run(INSIDE[0], twin, parts, INSIDE[1], inputs, stock_run)
    if inside is None or inside.fault is not None:
        return Proof(replace(observed, cuts_inside=False), tuple(cases))
    return Proof(observed, (*cases, inside))


def _recipe(twin: Any, parts: Parts) -> Recipe:
    """As `recipe_for`; of a decoder that is not known inside the reason is that."""
    try:
        return recipe_for(twin, parts)
    except Unsupported as error:
        if parts.opaque is None:
            raise
        raise Unsupported(
            f"the decoder {type(parts.text).__name__} can be cut at its input only, since {parts.opaque}, and on a "
            "tiny twin no prompt runs, so that even this cannot be proved"
        ) from error


def _cases(parts: Parts) -> Iterator[tuple[str, Stages]]:
    """`CASES`, with layers, and the site at which attention is read: behind the first layer from 1 on that has it.

    Of a decoder that can be cut at its input only, what happens there.
    """
    if parts.opaque is not None:
        yield "nothing pruned", CASES["nothing pruned"]
        yield "tokens dropped at the decoder input", ({"use": DRAWN, "at": "encoder", "keep": 0.6},)
        return
    behind = [number + 1 for number in range(1, len(parts.layers) - 1) if parts.attends(number)]
    unread = [next(number for number in range(2, len(parts.layers)) if not parts.is_source(number))]
    for name, stages in CASES.items():
        if name != BY_ATTENTION:
            yield name, tuple(stage | ({"layers": unread} if stage.get("layers") == UNREAD else {}) for stage in stages)
        elif behind:
            yield f"{name} before layer {behind[0]}", ({**stages[0], "at": behind[0]},)


def _run(
    name: str,
    twin: Any,
    parts: Parts,
    stages: Sequence[dict[str, Any]],
    inputs: Mapping[str, Tensor],
    stock_run: StockRun | None,
) -> Case:
    data = {"name": name.replace(" ", "-"), "stages": list(stages)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrunekitWarning)
            result = compared(
                twin, parts, build(data, registry=with_own(Registry())), inputs, STEPS, ALLOWED, stock_run=stock_run
            )
    except PrunekitError as error:
        return Case(name, None, f"{error}")
    except Exception as error:  # code that was never seen may fail in any way
        return Case(name, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Case(name, result.error)


@torch.no_grad()
def _observe(twin: Any, inputs: Mapping[str, Tensor]) -> Observed:
    """Record the decoder loop during one prefill: which states it changes between layers."""
    layers = twin.get_decoder().layers
    entered: list[Tensor] = []
    returned: list[Any] = []

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0])

    def after(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not isinstance(result, Tensor):
            raise Unsupported("its decoder layers return more than the hidden states")
        returned.append(result)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        twin(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(entered) != len(layers):
        raise Unsupported(f"its decoder called {len(entered)} layers of {len(layers)} in one forward")
    touched = [n for n in range(len(layers) - 1) if not torch.equal(returned[n], entered[n + 1])]
    if touched and touched[-1] == len(layers) - 2:
        raise Unsupported("its decoder changes hidden states between all layers")
    return Observed(touched[-1] + 1 if touched else 0)
