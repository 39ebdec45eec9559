"""Under a budget of risk: what each rung of the ladder is predicted to do to a sample, by which it takes one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.asking import call, checked
from prunekit.engine.decoder.state import BatchState
from prunekit.errors import PluginError
from prunekit.ops import top_k_mask
from prunekit.ops.host import on_device
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import LayerAction


def counts_at(state: BatchState, cut: Cut) -> tuple[int, ...] | None:
    """How many visual tokens a cut with a budget leaves of each sample; None as long as rungs are not chosen."""
    if state.bound.ladder is not None and not state.harms:
        return None
    return tuple(count_at(state, cut, row) for row in range(len(state.counts)))


def count_at(state: BatchState, cut: Cut, row: int) -> int:
    """The same of one sample, whose rung is chosen."""
    keep, ladder = cut.keep, state.bound.ladder
    if ladder is not None:
        keep = ladder.rungs[state.rung(row)].cuts[state.bound.cuts.index(cut)].keep
    assert keep is not None, "asked of cuts with a budget alone"
    return keep.count(state.prompt.visual_counts[row], state.counts[row])


def choose(stage: Stage, state: BatchState, row: int, scores: Tensor | None, layers: Tensor | None) -> None:
    """Predict what each rung does to a sample, by which it takes its own.

    scores: of its visual tokens, float (V,), at the first site of a token stage, at the decoder input of a router;
    layers: float (N,); None: they are not scored. A sample without visual tokens is not asked about: it runs dense,
    since no calibration prompt was like it.
    """
    # A rung does at least the harm of those before it, whatever was predicted.
    state.harms[row] = tuple(itertools.accumulate(_harms(stage, state, row, scores, layers).tolist(), max))


def _harms(stage: Stage, state: BatchState, row: int, scores: Tensor | None, layers: Tensor | None) -> Tensor:
    """What each rung is predicted to do to one sample, float64 (R,); infinity where the model's own numbers are NaN."""
    bound, original = state.bound, state.prompt.visual_counts[row]
    assert bound.ladder is not None
    rungs = bound.ladder.rungs[1:]
    given: dict[str, Any] = {"scores": scores, "keep": None, "layer_scores": layers, "keep_layers": None}
    if scores is not None:
        counts = [_left(stage, rung.cuts, original, len(scores)) for rung in rungs]
        given["keep"] = top_k_mask(scores.expand(len(counts), -1), counts)
    if layers is not None:
        given["keep_layers"] = torch.stack([~skipped(bound, layers, rung.layer_budget) for rung in rungs])
    if stage.states("predict_harm"):
        own = state.stage_states.setdefault(stage.index, {})
        memory = {"state": own.setdefault(row, {}) if stage.per_sample else own}
        answer = call(stage, "predict_harm", given.__getitem__, memory)
        harms = checked(stage, "predict_harm", answer, (len(rungs),)).double()
    else:
        harms = sum_of_shares(**given)
    wrong = ~(torch.isfinite(harms) & (harms >= 0))
    if bool(wrong.any()) and all(bool(torch.isfinite(one).all()) for one in (scores, layers) if one is not None):
        raise PluginError(f"{stage.label}: predict_harm must return finite numbers of at least 0, not {harms.tolist()}")
    return harms.masked_fill(wrong, math.inf)


def _left(stage: Stage, cuts: Sequence[Cut], original: int, entering: int) -> int:
    """How many tokens a rung leaves of one sample: a router at its last site, other stages at the first."""
    for cut in cuts if stage.is_router else cuts[:1]:
        assert cut.keep is not None, "a rung has a budget at every cut"
        entering = cut.keep.count(original, entering)
    return entering


def skipped(bound: BoundPipeline, scores: Tensor, budget: int | None) -> Tensor:
    """The layers that a router leaves out by scores, float (..., N), so that `budget` of them run: bool (..., N).

    Protected ones run, and so do those about which another stage has decided what that says. Of equal scores the later
    layer goes, as of equal tokens the later one does.
    """
    total, fixed = bound.shape.layers, frozenset(bound.plan.layers)
    taken = {layer for layer in fixed if bound.plan[layer] is LayerAction.SKIP}
    free = [layer for layer in range(total) if layer not in fixed and layer not in bound.protected]
    drop = max(0, min(total - len(taken) - (budget or total), len(free)))
    column = on_device(free, scores.device)
    order = scores[..., column].flip(-1).argsort(dim=-1, stable=True)[..., :drop]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, column.flip(0)[order], True)


def sum_of_shares(
    scores: Tensor | None, keep: Tensor | None, layer_scores: Tensor | None, keep_layers: Tensor | None
) -> Tensor:
    """The harm of a strategy that does not predict it: of tokens, and of layers, the share of the scores, counted from
    the lowest, that leaves; both shares together. Float (R,), from 0 to 2.
    """
    pairs = [(one, kept) for one, kept in ((scores, keep), (layer_scores, keep_layers)) if one is not None]
    return torch.stack([_share(one.double(), kept) for one, kept in pairs if kept is not None]).sum(0)


def _share(scores: Tensor, keep: Tensor) -> Tensor:
    """Float (R,): of all scores above the lowest, the share that is not kept; of equal scores, of their number."""
    above = scores - scores.min()
    above = torch.where(above.sum() > 0, above, torch.ones_like(above))
    return (above * ~keep).sum(1) / above.sum()
