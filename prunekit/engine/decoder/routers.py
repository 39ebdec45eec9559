"""Asking a router, once for each sample, about tokens and layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.asking import Answer, Given, call, checked, finite
from prunekit.engine.decoder.ladder import choose, skipped
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.decoder.view import View
from prunekit.engine.tokens.layout import leftmost
from prunekit.errors import PluginError, Unsupported
from prunekit.ops import top_k_mask
from prunekit.pipeline.cuts import CAN_BE_CUT, cut_inside
from prunekit.pipeline.layer_plans import sharing_problem, without_kv
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import LayerAction, LayerPlan, Route, Selection


def route(view: View, embeds: Tensor) -> tuple[Tensor | None, tuple[LayerPlan, ...]]:
    """What a router says of the prompt, and the layer plan of every sample with it.

    embeds: float (B, S, H), logical: the prompt's states where the router is asked.
    Returns token scores (B, S) or None.
    """
    stage, state = view.place.stage, view.tokens.state
    with torch.set_grad_enabled(torch.is_grad_enabled() and stage.trainable):
        answer, unsound = _ask(view, embeds)
    state.see(stage.label, unsound)
    if answer.note is not None:
        state.notes.append(f"{stage.label}: {answer.note}")
    tokens = answer.tokens
    if tokens is not None:
        tokens = finite(stage, "route (tokens)", tokens, state.alive_visual(), unsound)
    layers = _layer_scores(stage, state, answer, unsound)
    if state.bound.ladder is not None and (tokens is not None or layers is not None):
        _choose(view, tokens, layers)
    own = _decided(stage, state, answer, layers)
    if own is None:
        return tokens, state.plans
    try:
        plans = tuple(mine.merge(plan) for mine, plan in zip(state.plans, own, strict=True))
    except ValueError as error:
        raise PluginError(f"{stage.label}: route disagrees with another stage: {error}") from error
    for row, plan in enumerate(plans):
        if problem := sharing_problem(plan, state.bound.shape):
            raise Unsupported(f"{stage.label}: route leaves out what another layer needs in sample {row}: {problem}")
    return tokens, plans


def _layer_scores(stage: Stage, state: BatchState, answer: Route, unsound: Tensor) -> Tensor | None:
    """Scores by which a budget of layers is met; None: there is none to meet. unsound: as `finite` takes it."""
    if answer.layers is None or stage.keep_layers is None or answer.plans is not None:
        return None
    shape = (len(state.lengths), state.bound.shape.layers)
    every = torch.ones(shape, dtype=torch.bool, device=state.prompt.ids.device)
    return finite(stage, "route (layers)", answer.layers, every, unsound)


def _choose(view: View, tokens: Tensor | None, layers: Tensor | None) -> None:
    """The rung of each sample, by token scores, float (B, S), and those of layers, (B, N)."""
    visual = None if tokens is None else tokens.gather(1, view.tokens.positions)
    for row, count in enumerate(view.counts):
        if count:
            scores, of_layers = (None if one is None else one[row] for one in (visual, layers))
            choose(view.place.stage, view.tokens.state, row, scores if scores is None else scores[:count], of_layers)


def _decided(stage: Stage, state: BatchState, answer: Route, layers: Tensor | None) -> tuple[LayerPlan, ...] | None:
    """What the router alone decides about the layers of each sample; None: nothing. layers: scores of them."""
    if answer.plans is not None:
        if not stage.decides_layers:
            raise PluginError(
                f"{stage.label}: route returned plans of layers, but the stage has a budget of tokens alone "
                "(let the class decide about layers by itself with @strategy(keep_layers='refused'))"
            )
        if stage.keep_layers is not None:
            raise PluginError(f"{stage.label}: route returned plans, but the stage has `keep_layers`: return scores")
        return _checked_plans(stage, state, tuple(answer.plans))
    if layers is not None:
        return _plans(state, layers)
    if stage.keep_layers is not None:
        raise PluginError(f"{stage.label}: it has a budget of layers, but route returned no layer scores")
    return None


def _checked_plans(stage: Stage, state: BatchState, plans: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    rows, layers = len(state.lengths), state.bound.shape.layers
    if len(plans) != rows or not all(isinstance(plan, LayerPlan) for plan in plans):
        raise PluginError(f"{stage.label}: route gave {len(plans)} plans for {rows} samples; each needs a LayerPlan")
    named = frozenset(layer for plan in plans for layer in plan.layers)
    if beyond := sorted(named - frozenset(range(layers))):
        raise PluginError(f"{stage.label}: route plans layers {beyond}, but the model has layers 0 to {layers - 1}")
    if ran := sorted(named & frozenset(range(stage.route_at.reach))):
        raise PluginError(
            f"{stage.label}: route plans layers {ran}, which have run: the stage is asked before layer "
            f"{stage.route_at.layer} (plan that layer and later ones)"
        )
    if named and state.bound.shape.opaque:
        raise Unsupported(
            f"{stage.label}: route plans layers, but this decoder can be cut at its input only: "
            f"{state.bound.shape.opaque}"
        )
    for plan in plans:
        if held := without_kv(plan, state.bound.shape):
            raise Unsupported(
                f"{stage.label}: route {held[1]}; layers {sorted(held[0])} hold a recurrent state and have none"
            )
    inside = sorted(
        layer for layer in cut_inside(state.bound.cuts) if any(plan[layer] not in CAN_BE_CUT for plan in plans)
    )
    if inside:
        raise PluginError(f"{stage.label}: layers {inside} do not simply run, but other stages cut inside them")
    return plans


def by_scores(view: View, scores: Tensor | None) -> Answer:
    """The `count` best visual tokens by a router's scores, float (B, S)."""
    stage, state = view.place.stage, view.tokens.state
    if scores is None or view.count is None:
        raise PluginError(f"{stage.label}: it has a token budget, but route returned no token scores")
    of_visual = scores.gather(1, view.tokens.positions)
    keep = top_k_mask(of_visual, view.count, view.tokens.valid)
    return Answer(Selection(keep), None, of_visual.detach() if state.traced else None)


def _ask(view: View, embeds: Tensor) -> tuple[Route, Tensor]:
    """The answer about the batch, and the samples, bool (B,), of which what the router was given is not finite."""
    stage, state = view.place.stage, view.tokens.state
    visual, text = state.alive_visual(), state.text
    real = text | visual
    # Copies: a hook that writes to what it gets must not change what the decoder gets.
    own = {"embeds": embeds if stage.trainable else embeds.detach(), "visual": visual, "text": text, "valid": real}
    if not stage.per_sample:
        copies = {name: value if value.requires_grad else value.clone() for name, value in own.items()}
        batch = Given(_inputs(view, copies), real)
        return _checked_route(stage, call(stage, "route", batch, {})), batch.unsound
    answers, unsound = [], []
    # By positions, as the host knows how many there are: a bool index would wait for the device, for each of them.
    positions = leftmost(real, max(state.lengths))
    for b, length in enumerate(state.lengths):
        mine = positions[b, :length]
        of_sample = {name: value[b].index_select(0, mine.to(value.device)) for name, value in own.items()}
        one = Given(_inputs(view, of_sample, b), of_sample["valid"])
        answer = _checked_route(stage, call(stage, "route", one, {}))
        answers.append(_of_sample(stage, answer, len(of_sample["valid"]), state.bound.shape.layers))
        unsound.append(one.unsound)
    return _together(stage, answers, real), torch.stack(unsound)


def _inputs(view: View, own: dict[str, Any], b: int | None = None) -> Callable[[str], Any]:
    """Inputs by name, of one sample or of all: what only routers get, else those of the visual tokens."""

    def get(name: str) -> Any:
        if name in own:
            return own[name]
        return view.get(name) if b is None else view.of_sample(name, b)

    return get


def _checked_route(stage: Stage, answer: Any) -> Route:
    if not isinstance(answer, Route):
        raise PluginError(f"{stage.label}: route must return a Route, not {type(answer).__name__}")
    return answer


def _of_sample(stage: Stage, answer: Route, length: int, layers: int) -> Route:
    """An answer about one sample of this many tokens and layers, which has no axis B."""
    for name, value, size in (("tokens", answer.tokens, length), ("layers", answer.layers, layers)):
        if value is not None:
            checked(stage, f"route ({name})", value, (size,))
    if answer.plans is not None and len(answer.plans) != 1:
        raise PluginError(f"{stage.label}: route gave {len(answer.plans)} plans for one sample; it needs one LayerPlan")
    return answer


def _together(stage: Stage, answers: list[Route], real: Tensor) -> Route:
    """Answers about single samples, without padding, as one about the batch."""
    given: dict[str, list[Any]] = {}
    for name in ("tokens", "layers", "plans"):
        given[name] = [value for answer in answers if (value := getattr(answer, name)) is not None]
        if 0 < len(given[name]) < len(answers):
            raise PluginError(
                f"{stage.label}: route gave {name} for {len(given[name])} of {len(answers)} samples; what it decides "
                "about for one sample it must for all (a plan that changes nothing is LayerPlan())"
            )
    tokens = None
    if given["tokens"]:
        tokens = given["tokens"][0].new_zeros(real.shape)
        tokens = tokens.masked_scatter(real.to(tokens.device), torch.cat(given["tokens"]))
    layers = torch.stack(given["layers"]) if given["layers"] else None
    plans = tuple(plan for (plan,) in given["plans"]) if given["plans"] else None
    notes = dict.fromkeys(answer.note for answer in answers if answer.note is not None)
    return Route(tokens, layers, plans, "; ".join(notes) or None)


def _plans(state: BatchState, scores: Tensor) -> tuple[LayerPlan, ...]:
    """Skip the layers with the lowest scores until the budget of each sample is met."""
    bound = state.bound
    if bound.ladder is None:
        gone = skipped(bound, scores, bound.layer_budget)
    else:
        budgets = [bound.ladder.rungs[state.rung(row)].layer_budget for row in range(len(scores))]
        gone = torch.stack([skipped(bound, row, budget) for row, budget in zip(scores, budgets, strict=True)])
    return tuple(
        LayerPlan({layer: LayerAction.SKIP for layer, leaves in enumerate(row) if leaves}) for row in gone.tolist()
    )
