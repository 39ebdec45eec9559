"""Contrastive preference learning (https://arxiv.org/abs/2310.13639) on pairs of decisions, and sparsity.

A decision is taken as independent coin flips with the router's probabilities: log p(a) is the sum over visual tokens of
a log p + (1 - a) log(1 - p), and the same over the layers about which the router decides. Which loss PAR has is
not published; its code speaks of offline preferences, of a positive and a negative part, and of sparsity of tokens and
layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.training.forced import Shown
from prunekit.training.recipe import Recipe
from prunekit.training.teacher import Actions, Pairs, Teacher

Scores = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """The parts of a batch's loss, each summed over its samples: float32 scalars. pairs: useful ones."""

    preference: Tensor
    sparsity: Tensor
    pairs: int


def loss_of(scores: Scores, reference: Scores | None, pairs: Pairs, seen: Shown, teacher: Teacher) -> Loss:
    """The loss of a router's logits (B, S), (B, N) on a batch.

    reference: logits of the starting router, for `dpo`.
    """
    whole = teacher.recipe.pairing == "all"
    compared = pairs.tried if whole else (pairs.better, pairs.worse)
    likely = torch.stack([log_likelihood(scores, one, seen, teacher) for one in compared])
    if reference is not None:
        likely = likely - torch.stack([log_likelihood(reference, one, seen, teacher) for one in compared])
    margin = _margins(likely, teacher.recipe)
    each = (-F.logsigmoid(margin) * _weights(pairs.kl)).sum((0, 1)) if whole else -F.logsigmoid(margin[0, 1])
    preference = (each * pairs.useful).sum()
    return Loss(preference, _sparsity(scores, pairs.better, seen, teacher).sum(), int(pairs.useful.sum()))


def _margins(likely: Tensor, recipe: Recipe) -> Tensor:
    """By how much each decision is more likely than each other: float32 (decisions, decisions, B) from (decisions, B);
    with `dpo`, of what is likely beside the reference.
    """
    alpha, bias = (recipe.beta, 1.0) if recipe.loss == "dpo" else recipe.scale
    return alpha * (likely[:, None] - bias * likely[None])


def _weights(kl: Tensor) -> Tensor:
    """How much it counts that one candidate is preferred to another: the difference of their KLs, if it is the nearer
    one to the dense model; those of a sample add up to 1. Float32 (candidates, candidates, B) from (candidates, B).
    """
    gaps = (kl[None] - kl[:, None]).clamp(min=0.0)
    return gaps / gaps.sum((0, 1)).clamp(min=torch.finfo(gaps.dtype).tiny)


def log_likelihood(scores: Scores, actions: Actions, seen: Shown, teacher: Teacher) -> Tensor:
    """log p of what was decided for each sample, float32 (B,)."""
    mean = teacher.recipe.likelihood == "normalised"
    return sum(
        (_total(chosen * F.logsigmoid(logits) + (1 - chosen) * F.logsigmoid(-logits), counts, mean)
         for logits, chosen, counts in _groups(scores, actions, seen, teacher)),
        start=torch.zeros(len(seen.valid), device=seen.valid.device),
    )  # fmt: skip


def _sparsity(scores: Scores, actions: Actions, seen: Shown, teacher: Teacher) -> Tensor:
    """How far the mean probability of keeping is from the share that stays, squared; float32 (B,)."""
    total = torch.zeros(len(seen.valid), device=seen.valid.device)
    for logits, chosen, counts in _groups(scores, actions, seen, teacher):
        total = total + (_total(logits.sigmoid(), counts, True) - _total(chosen, counts, True)).square()
    return total


def _groups(scores: Scores, actions: Actions, seen: Shown, teacher: Teacher) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits, decisions (float, from 0 to 1) and which of them count, of tokens and of layers, as far as the router
    decides about them.
    """
    groups = []
    if teacher.cuts_tokens:
        groups.append((scores[0].float(), actions.tokens.float(), seen.visual))
    if teacher.skips_layers:
        free = torch.zeros_like(actions.layers)
        free[:, list(teacher.free)] = True
        groups.append((scores[1].float(), actions.layers.float(), free))
    return groups


def _total(values: Tensor, counts: Tensor, mean: bool) -> Tensor:
    """Sum or mean of the values that count, along the second axis; 0 where none does."""
    total = values.masked_fill(~counts, 0.0).sum(1)
    return total / counts.sum(1).clamp(min=1) if mean else total
