"""Asking a router: once per sample, before the decoder's first layer, about tokens and layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.engine.asking import call, finite
from prunekit.errors import PluginError
from prunekit.ops import top_k_mask
from prunekit.pipeline.cuts import CAN_BE_CUT, cut_inside
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import LayerAction, LayerPlan, Route, Selection

if TYPE_CHECKING:
    from prunekit.engine.decoder.session import Session
    from prunekit.engine.decoder.view import View


def route(stage: Stage, session: Session, embeds: Tensor) -> tuple[Tensor | None, tuple[LayerPlan, ...]]:
    """What a router says of the prompt, and the layer plan of every sample with it.

    embeds: float (B, S, H), logical, as the decoder gets them. Returns token scores (B, S) or None.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and stage.trainable):
        answer = _ask(stage, session, embeds)
    if answer.note is not None:
        session.notes.append(f"{stage.label}: {answer.note}")
    tokens = answer.tokens
    if tokens is not None:
        tokens = finite(stage, "route (tokens)", tokens, session.alive_visual())
    own = _decided(stage, session, answer)
    if own is None:
        return tokens, session.plans
    try:
        return tokens, tuple(mine.merge(plan) for mine, plan in zip(session.plans, own, strict=True))
    except ValueError as error:
        raise PluginError(f"{stage.label}: route disagrees with another stage: {error}") from error


def _decided(stage: Stage, session: Session, answer: Route) -> tuple[LayerPlan, ...] | None:
    """What the router alone decides about the layers of each sample; None: nothing."""
    if answer.plans is not None:
        if not stage.decides_layers:
            raise PluginError(
                f"{stage.label}: route returned plans of layers, but the stage has a budget of tokens alone "
                "(let the class decide about layers by itself with @strategy(keep_layers='refused'))"
            )
        if stage.keep_layers is not None:
            raise PluginError(f"{stage.label}: route returned plans, but the stage has `keep_layers`: return scores")
        return _checked_plans(stage, session, tuple(answer.plans))
    if answer.layers is not None and stage.keep_layers is not None:
        every = torch.ones(
            len(session.lengths), session.bound.shape.layers, dtype=torch.bool, device=session.prompt.ids.device
        )
        return _plans(stage, session, finite(stage, "route (layers)", answer.layers, every))
    if stage.keep_layers is not None:
        raise PluginError(f"{stage.label}: it has a budget of layers, but route returned no layer scores")
    return None


def _checked_plans(stage: Stage, session: Session, plans: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    rows, layers = len(session.lengths), session.bound.shape.layers
    if len(plans) != rows or not all(isinstance(plan, LayerPlan) for plan in plans):
        raise PluginError(f"{stage.label}: route gave {len(plans)} plans for {rows} samples; each needs a LayerPlan")
    named = frozenset(layer for plan in plans for layer in plan.layers)
    if beyond := sorted(named - frozenset(range(layers))):
        raise PluginError(f"{stage.label}: route plans layers {beyond}, but the model has layers 0 to {layers - 1}")
    inside = sorted(
        layer for layer in cut_inside(session.bound.cuts) if any(plan[layer] not in CAN_BE_CUT for plan in plans)
    )
    if inside:
        raise PluginError(f"{stage.label}: layers {inside} do not simply run, but other stages cut inside them")
    return plans


def by_scores(stage: Stage, scores: Tensor | None, view: View) -> Selection:
    """The `count` best visual tokens by a router's scores, float (B, S)."""
    if scores is None or view.count is None:
        raise PluginError(f"{stage.label}: it has a token budget, but route returned no token scores")
    return Selection(top_k_mask(scores.gather(1, view.positions), view.count, view.valid))


def _ask(stage: Stage, session: Session, embeds: Tensor) -> Route:
    visual, shape = session.alive_visual(), session.bound.shape
    text = session.prompt.real & ~session.prompt.visual
    there = text | visual
    given: dict[str, Any] = {"embeds": embeds, "visual": visual, "text": text, "valid": there}
    if not stage.trainable:
        given["embeds"] = embeds.detach()
    state = session.states.setdefault(stage.index, {})
    if not stage.per_sample:
        found = call(stage, "route", _from(given | {"shape": shape, "state": state}, session), {})
        return _checked_route(stage, found)
    answers = []
    for b, here in enumerate(there):
        mine = {name: value[b, here] for name, value in given.items()}
        mine |= {"shape": shape, "state": state.setdefault(b, {})}
        answers.append(_checked_route(stage, call(stage, "route", _from(mine, session, b), {})))
    return _together(answers, there)


def _from(given: dict[str, Any], session: Session, b: int | None = None) -> Callable[[str], Any]:
    """Inputs by name; seeds cost a read-back and are made when asked for."""

    def get(name: str) -> Any:
        if name == "seed":
            return session.prompt.seeds if b is None else session.prompt.seeds[b]
        return given[name]

    return get


def _checked_route(stage: Stage, answer: Any) -> Route:
    if not isinstance(answer, Route):
        raise PluginError(f"{stage.label}: route must return a Route, not {type(answer).__name__}")
    return answer


def _together(answers: list[Route], there: Tensor) -> Route:
    """Answers about single samples, without padding, as one about the batch."""
    tokens = layers = plans = None
    scores = [answer.tokens for answer in answers if answer.tokens is not None]
    if len(scores) == len(answers):
        tokens = scores[0].new_zeros(there.shape)
        tokens = tokens.masked_scatter(there.to(tokens.device), torch.cat(scores))
    lines = [answer.layers for answer in answers if answer.layers is not None]
    if len(lines) == len(answers):
        layers = torch.stack(lines)
    chosen = [answer.plans for answer in answers if answer.plans is not None]
    if len(chosen) == len(answers):
        plans = tuple(plan for one in chosen for plan in one)
    notes = dict.fromkeys(answer.note for answer in answers if answer.note is not None)
    return Route(tokens, layers, plans, "; ".join(notes) or None)


def _plans(stage: Stage, session: Session, scores: Tensor) -> tuple[LayerPlan, ...]:
    """Skip the layers with the lowest scores until the stage's budget is met; protected ones run, and so do those about
    which another stage has decided what that says.
    """
    total = session.bound.shape.layers
    fixed = frozenset(session.bound.plan.layers)
    wanted = session.bound.layer_budget or total
    taken = {layer for layer in fixed if session.bound.plan[layer] is LayerAction.SKIP}
    free = [layer for layer in range(total) if layer not in fixed and layer not in session.bound.protected]
    drop = max(0, min(total - len(taken) - wanted, len(free)))
    column = torch.tensor(free, dtype=torch.int64, device=scores.device)
    # Of equal scores the later layer goes, as of equal tokens the later one does.
    order = scores[:, column].flip(1).argsort(dim=1, stable=True)[:, :drop]
    chosen = column.flip(0)[order].tolist()
    return tuple(LayerPlan(dict.fromkeys(sorted(row), LayerAction.SKIP)) for row in chosen)
