"""The frozen LVLM as a teacher: candidates for each prompt, really run, and how far each is from the dense answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunekit.engine.attach import Attached
from prunekit.errors import Unsupported
from prunekit.pipeline.build import BoundPipeline, Pipeline
from prunekit.pipeline.stage import Stage
from prunekit.records import RunReport
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import PREFILL_END
from prunekit.training.answers import Answers, at_once, can_be_at_once, dense_answers, divergence, forced_logits
from prunekit.training.forced import Decide, Shown, deciding, shown
from prunekit.training.learner import Learner
from prunekit.training.recipe import Recipe
from prunekit.training.visual_inputs import encoded_once
from prunekit.verify.proof import proved_parts


@dataclass(frozen=True)
class Actions:
    """What was decided for a batch: tokens float (B, S), at which share of the router's cuts a visual token stays (of
    one cut: 1 or 0); layers bool (B, N), those that run.
    """

    tokens: Tensor
    layers: Tensor

    def difference(self, other: Actions) -> Tensor:
        """How many tokens and layers are in one and not in the other: int64 (B,)."""
        return (self.tokens != other.tokens).sum(1) + (self.layers != other.layers).sum(1)


@dataclass(frozen=True)
class Pairs:
    """For each sample the preferred decision and the other, whether they tell anything (bool (B,)), and all KLs,
    float32 (candidates, B). tried: what all of these candidates decided.
    """

    better: Actions
    worse: Actions
    useful: Tensor
    kl: Tensor
    tried: tuple[Actions, ...] = ()


def router_of(pipeline: Pipeline) -> Stage:
    """The one router of a pipeline. Raises Unsupported for a pipeline that this training does not cover."""
    routers = [stage for stage in pipeline.stages if stage.is_router]
    if len(routers) != 1:
        raise Unsupported(
            f"training needs a pipeline with one router, and '{pipeline.name}' has {len(routers)} (give it one stage "
            "whose strategy implements `route`)"
        )
    return routers[0]


def check_cuts(bound: BoundPipeline, stage: Stage) -> None:
    """Raise Unsupported where other stages cut between the router's decision and the last of its own cuts."""
    cuts = [cut for cut in bound.cuts if cut.site.in_decoder]
    own = [cut for cut in bound.cuts if cut.stage is stage]
    between = [cut for cut in cuts if cut.stage is not stage and not cut.comes_before(stage)]
    if own and any(cut.site <= own[-1].site for cut in between):
        raise Unsupported(f"another stage cuts tokens between the decision of {stage.label} and its own cut")


def is_alone(pipeline: Pipeline, bound: BoundPipeline) -> bool:
    """Nothing but the router acts, and what it does to the prompt holds for every token behind it."""
    return len(pipeline.stages) == 1 and not any(cut.site == PREFILL_END for cut in bound.cuts)


class Teacher:
    """One model under one pipeline.

    free: decoder layers about which the router decides. token_share: fraction of the visual tokens that stay, of each
    sample; layer_share: of the free layers. None where the pipeline gives the router no such budget. alone: as
    `is_alone`; candidates then run with visual inputs encoded once, prompt and answer in one forward.
    """

    def __init__(
        self, model: Any, pipeline: Pipeline, bound: BoundPipeline, recipe: Recipe, processor: Any = None
    ) -> None:
        self.model, self.pipeline, self.bound, self.recipe = model, pipeline, bound, recipe
        self.processor = processor
        self.stage, self.parts = router_of(pipeline), proved_parts(model)
        check_cuts(bound, self.stage)
        self.alone = is_alone(pipeline, bound) and self.parts.rotary is not None
        layers = range(bound.shape.layers)
        self.free = tuple(n for n in layers if n not in bound.protected and n not in bound.plan.layers)
        self.cuts_tokens = bool(self.stage.keeps)
        self.skips_layers = bound.layer_budget is not None and bool(self.free)

    def encoding_once(self) -> AbstractContextManager[None]:
        """Within the block, which is of one batch, visual inputs are encoded once, where that changes nothing."""
        return encoded_once(self.parts) if self.alone else nullcontext()

    def answers(self, inputs: Mapping[str, Tensor]) -> Answers:
        """What the model says without any pruning."""
        return dense_answers(self.model, inputs, self.recipe.answer_tokens)

    def decide(self, inputs: Mapping[str, Tensor], answers: Answers, by: Decide) -> tuple[Tensor, Actions, Shown]:
        """Run one decision for each sample: its KL (B,), what was decided, and what the router was shown."""
        with Attached(self.model, self.pipeline, self.parts, self.processor) as run:
            return self._decided(run, inputs, answers, by)

    def _decided(
        self, run: Attached, inputs: Mapping[str, Tensor], answers: Answers, by: Decide
    ) -> tuple[Tensor, Actions, Shown]:
        """As `decide`, with the pipeline on the model already."""
        once = self.alone and can_be_at_once(inputs, answers, self.parts.visual_ids)
        behind: list[int] | None = (answers.valid.sum(1) - 1).tolist() if once else None
        with deciding(self.stage, by, behind) as decider:
            logits = (at_once if once else forced_logits)(self.model, inputs, answers)
        assert run.report is not None
        seen = shown(decider.seen)
        return divergence(answers, logits, self.recipe), self._actions(run.report, seen), seen

    def pairs(
        self, learner: Learner, inputs: Mapping[str, Tensor], answers: Answers, seeds: Sequence[int]
    ) -> tuple[Pairs, Shown]:
        """Try candidates from this router, the first without noise; the best and the worst of each sample.

        seeds: one for each sample; every candidate draws its noise from it and its own number.
        """
        with Attached(self.model, self.pipeline, self.parts, self.processor) as run:
            kl, actions, seen = self._decided(run, inputs, answers, plainly(learner))
            kls, tried = [kl], [actions]
            for number in range(1, self.recipe.candidates):
                scores = self._candidate(learner, seen, seeds, number)
                kl, actions, _ = self._decided(run, inputs, answers, fixed(scores, seen))
                kls.append(kl)
                tried.append(actions)
        return paired(tuple(tried), _finite(torch.stack(kls)), self.recipe), seen

    def _candidate(self, learner: Learner, seen: Shown, seeds: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
        """Scores (B, S) and (B, N) that decide for the candidate of this number, which is not 0."""
        tokens, layers = self._noisy(learner, seen, [seed * 1_000_003 + number for seed in seeds])
        if self.recipe.vary == "together" or not (self.cuts_tokens and self.skips_layers):
            return tokens, layers
        with torch.no_grad():
            plain = learner.scores(seen.embeds, seen.visual, seen.valid)
        return (plain[0], layers) if number % 2 else (tokens, plain[1])

    def _noisy(self, learner: Learner, seen: Shown, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores of the router, disturbed where the recipe says, with one seed for each row."""
        shown = seen.embeds, seen.visual, seen.valid
        with torch.no_grad():
            if self.recipe.noise_on == "attention":
                return learner.noisy(*shown, self.recipe.noise, seeds)
            tokens, layers = (one.clone() for one in learner.scores(*shown))
            for row, (seed, length) in enumerate(zip(seeds, seen.lengths, strict=True)):
                drawn = torch.randn(length + layers.shape[1], generator=torch.Generator().manual_seed(seed % 2**63))
                drawn = (drawn * self.recipe.noise).to(tokens)
                tokens[row, :length] += drawn[:length] * _spread(tokens[row][seen.visual[row]])
                layers[row] += drawn[length:] * _spread(layers[row, list(self.free)])
        return tokens, layers

    def _actions(self, report: RunReport, seen: Shown) -> Actions:
        rows = range(report.samples)
        kept = [self._kept(report, row, seen) for row in rows]
        running = torch.ones(report.samples, self.bound.shape.layers, dtype=torch.bool)
        for row in rows:
            for layer, action in report.plans[row]:
                running[row, layer] = action is not LayerAction.SKIP
        return Actions(pad_sequence(kept, batch_first=True), running.to(seen.valid.device))

    def _kept(self, report: RunReport, row: int, seen: Shown) -> Tensor:
        """Float (S,), at the positions of the router's input: at what share of its cuts each visual token stays."""
        visual = seen.visual[row]
        if not self.cuts_tokens or not bool(visual.any()):
            return visual.float()
        numbers = [n for n, event in enumerate(report.events) if event.index == self.stage.index]
        before = report.events[numbers[0] - 1].kept[row] if numbers[0] else range(report.visual_tokens[row])
        alive = torch.tensor(list(before))
        stays = [torch.isin(alive, torch.tensor(report.events[n].kept[row], dtype=torch.int64)) for n in numbers]
        share = torch.stack(stays).float().mean(0)
        return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, share.to(visual.device))


def paired(tried: tuple[Actions, ...], kl: Tensor, recipe: Recipe) -> Pairs:
    """The pairs that candidates make, the first of which is without noise; kl: finite, float32 (candidates, B)."""
    best = kl.argmin(0)
    worst = kl.argmax(0) if recipe.pairing == "best_worst" else torch.zeros_like(best)
    gap = kl.gather(0, worst[None])[0] - kl.gather(0, best[None])[0]
    return Pairs(_chosen(tried, best), _chosen(tried, worst), gap >= recipe.least_gap, kl, tried)


def plainly(learner: Learner) -> Decide:
    """The router's own decision."""

    def decide(row: int, embeds: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens, layers = learner.scores(embeds[None], visual[None], torch.ones_like(visual)[None])
        return tokens[0], layers[0]

    return decide


def fixed(scores: tuple[Tensor, Tensor], seen: Shown) -> Decide:
    """Decisions by scores computed before, (B, S) and (B, N)."""
    lengths = seen.lengths
    return lambda row, embeds, visual: (scores[0][row, : lengths[row]], scores[1][row])


def at_random(layers: int, seeds: Sequence[int]) -> Decide:
    """Uniform scores, drawn on the CPU from one seed for each sample."""

    def decide(row: int, embeds: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seeds[row])
        drawn = torch.rand(len(visual) + layers, generator=generator).to(visual.device)
        return drawn[: len(visual)], drawn[len(visual) :]

    return decide


def _spread(scores: Tensor) -> Tensor:
    """Their deviation, a scalar, which is not 0: noise of any size orders scores at random that are all alike."""
    return scores.std(correction=0).clamp(min=1e-6) if len(scores) else scores.new_ones(())


def _finite(kl: Tensor) -> Tensor:
    """KLs (candidates, B) in which one that overflowed counts as the largest finite one of its sample."""
    finite = kl.isfinite()
    worst = kl.masked_fill(~finite, 0.0).amax(0, keepdim=True)
    return torch.where(finite, kl, worst)


def _chosen(tried: Sequence[Actions], which: Tensor) -> Actions:
    """For each sample that candidate's actions."""
    pick: Callable[[list[Tensor]], Tensor] = lambda parts: torch.stack(  # noqa: E731
        [parts[number][row] for row, number in enumerate(which.tolist())]
    )
    return Actions(pick([one.tokens for one in tried]), pick([one.layers for one in tried]))
