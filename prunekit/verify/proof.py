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
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit import families, probes
from prunekit.errors import PrunekitError, PrunekitWarning, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.verify.comparison import compared
from prunekit.verify.observed import Observed, observe
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.stock import StockRun, stock_run_of
from prunekit.verify.strategies import ATTENDED, DRAWN, MERGED, WITHOUT, with_own
from prunekit.verify.twin import Twin, brief, twin_of
from prunekit.verify.whereabouts import coords_hold

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
    Raises Unsupported for a model that is not recognised, or whose twin is not pruned exactly, with the first fault,
    and for a version of transformers that lacks what prunekit needs.
    """
    probes.verify()
    parts = families.find(model)
    if families.is_vouched_for(model) and parts.opaque is None:
        return parts
    proof = prove(model)
    parts = proof.observed.added_to(parts, families.family_of(model) is None)
    faults = [f"{case.name}: {case.fault}" for case in proof.cases if case.fault is not None]
    if faults and parts.opaque is not None:
        raise Unsupported(
            f"the decoder {type(parts.text).__name__} can be cut at its input only, since {parts.opaque}, and its tiny "
            "twin shows that even this would not be exact"
        )
    if faults:
        raise Unsupported(
            f"{type(model).__name__} with {type(parts.text).__name__} was recognised, but its tiny twin is not pruned "
            f"exactly: {faults[0]} ({len(faults)} of {len(proof.cases)} cases fail)"
        )
    return parts


def prove(model: PreTrainedModel) -> Proof:
    """Run all cases on a tiny twin of `model`, which may live on the meta device.

    The answer is kept for models of the same classes with equal configs. Raises Unsupported when there can be no twin,
    or when it shows what no declaration can express.
    """
    key = _key(model)
    if key not in _PROOFS:
        state = torch.random.get_rng_state()
        try:
            _PROOFS[key] = _prove(model)
        finally:
            torch.random.set_rng_state(state)
        while len(_PROOFS) > KEPT:
            _PROOFS.pop(next(iter(_PROOFS)))
    return _PROOFS[key]


# The newest proofs, by what they rest on.
KEPT = 16
_PROOFS: dict[Any, Proof] = {}


def _key(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a proof rests on: the classes of a model's modules, and the numbers of its config."""
    classes = frozenset(type(module) for module in model.modules())
    return type(model), classes, json.dumps(model.config.to_dict(), sort_keys=True, default=str)


def _prove(model: PreTrainedModel) -> Proof:
    twin, recognised = twin_of(model), families.family_of(model) is None
    try:
        observed = replace(
            observe(twin.model, twin.parts, twin.inputs),
            kinds=twin.kinds,
            shared_id=twin.recipe.shared_id,
            coords=recognised and coords_hold(twin.model, twin.parts, twin.recipe),
        )
        parts = observed.added_to(twin.parts, recognised)
        stock_run = _stock_run(twin, parts)
    except PrunekitError:
        raise
    except Exception as error:  # code that was never seen may fail in any way
        raise Unsupported(f"the tiny twin of {type(model).__name__} does not run: {brief(error)}") from error
    cases = [_run(name, twin.model, parts, stages, twin.inputs, stock_run) for name, stages in _cases(parts)]
    if parts.opaque is not None or parts.mlp_norm is None:
        return Proof(replace(observed, cuts_inside=False), tuple(cases))
    name, stages = _inside(parts)
    inside = _run(name, twin.model, parts, stages, twin.inputs, stock_run)
    if inside.fault is not None:
        return Proof(replace(observed, cuts_inside=False), tuple(cases))
    return Proof(observed, (*cases, inside))


def _inside(parts: Parts) -> tuple[str, Stages]:
    """A cut inside a layer: a merge, which asks more, unless the layer does more with what its MLP gives than add it,
    where only dropping is allowed.
    """
    done, use = ("merged", MERGED) if parts.mlp_last else ("dropped", DRAWN)
    return f"tokens {done} between attention and MLP of layer 1", ({"use": use, "at": "1.mid", "keep": 0.5},)


def _stock_run(twin: Twin, parts: Parts) -> StockRun | None:
    """Of the twin; None where its decoder is not known inside."""
    if parts.opaque is not None:
        return None
    with Float64Throughout():
        return stock_run_of(twin.model, twin.inputs, STEPS + 1)


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
    except AssertionError as error:  # not equal to the reference; the figures of each step are left out
        said = (
            str(error).partition("\n")[0].removeprefix(f"pipeline {data['name']}: ").removesuffix("; per row and step:")
        )
        return Case(name, None, said)
    except Exception as error:  # code that was never seen may fail in any way
        return Case(name, None, brief(error))
    return Case(name, result.error)
