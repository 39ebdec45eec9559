"""Pipelines that cost what PAR costs: none is given fewer FLOPs than PAR, as far as whole tokens and layers allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit_evals.studies.par.cells import Bench, Stages, pipeline

from prunekit.cost import prefill_flops
from prunekit.errors import SpecError
from prunekit.pipeline.build import BoundPipeline, Pipeline
from prunekit.pipeline.forecast import forecast
from prunekit.plugins import registry

Stage = Mapping[str, Any]
SLACK = 1e-9  # of a fraction of dense FLOPs
STEP, SHIFT, STEPS = 1e-3, 6, 36  # a token is worth several steps; the search begins a few away


def cost(bound: BoundPipeline, text_tokens: Mapping[int, int]) -> float:
    """Prefill FLOPs as a fraction of dense, decisions included, over prompts with so many text tokens each.

    Where a router chooses layers, the most that it can be.
    """
    visual = bound.shape.visual_tokens
    assert visual is not None
    ours = dense = 0.0
    for text, times in text_tokens.items():
        predicted = forecast(bound, text)
        assert predicted is not None
        whole = times * prefill_flops(bound.shape, [visual + text] * bound.shape.layers)
        ours, dense = ours + whole * (predicted.flops[1] + predicted.decisions), dense + whole
    return ours / dense


@dataclass(frozen=True)
class Equal:
    """Makes pipelines that cost `flops`, a fraction of the dense prefill. bench: gives the model and its prompts."""

    bench: Bench
    flops: float

    def _cost(self, stages: Stages) -> float:
        return self.cost(pipeline(stages))

    def below(self, *stages: Stage) -> Pipeline:
        """Stages of which one leaves its `keep` open, with the most tokens that do not cost more. Raises SpecError."""
        for step in range(STEPS):
            solved = self._solved(stages, self.flops + (SHIFT - step) * STEP)
            if self.cost(solved) <= self.flops:
                break
        return solved

    def tokens(self, *stages: Stage) -> Pipeline:
        """The same with the fewest tokens that do not cost less."""
        for step in range(STEPS):
            solved = self._solved(stages, self.flops + (step - SHIFT) * STEP)
            if self.cost(solved) >= self.flops - SLACK:
                break
        return solved

    def cost(self, one: Pipeline) -> float:
        """Of a pipeline, over the benchmark's prompts."""
        return cost(one.bind(self.bench.shape), self.bench.text_tokens)

    def _solved(self, stages: Stages, flops: float) -> Pipeline:
        """With numbers of tokens in place of the budget, which is met for a prompt of the usual length."""
        budget = {"flops": min(flops, 1.0), "text_tokens": self.bench.usual_text}
        bound = pipeline(stages, budget).bind(self.bench.shape)
        visual = self.bench.shape.visual_tokens
        assert visual is not None
        remaining, counts = visual, []
        for cut in bound.cuts:
            assert cut.keep is not None and cut.stage.open
            remaining = cut.keep.count(visual, remaining)
            counts.append(remaining)
        solved = [dict(one) for one in stages]
        solved[bound.cuts[0].stage.index]["keep_tokens"] = counts[0] if len(counts) == 1 else counts
        return pipeline(solved)

    def layers(self, use: str, order: Sequence[int]) -> Pipeline | None:
        """As many of the layers in `order` given to a strategy as leave at least the FLOPs; None: not even one."""
        best = None
        for count in range(1, len(order) + 1):
            stage = {"use": use, "layers": sorted(order[:count])}
            if self._cost([stage]) < self.flops - SLACK:
                break
            best = pipeline([stage])
        return best

    def leaving(self, use: str) -> Pipeline:
        """A strategy that drops all visual tokens, before the first layer that leaves at least the FLOPs."""
        layers = range(1, self.bench.shape.layers)
        sites = (at for at in layers if self._cost([{"use": use, "at": at}]) >= self.flops - SLACK)
        return pipeline([{"use": use, "at": next(sites, layers[-1])}])

    def router_layers(self, stage: Stage) -> Pipeline:
        """A router that chooses layers alone: the fewest that cost at least the FLOPs."""
        layers = self.bench.shape.layers
        for count in range(1, layers + 1):
            try:
                if self._cost([{**stage, "keep_layers": count}]) >= self.flops - SLACK:
                    return pipeline([{**stage, "keep_layers": count}])
            except SpecError:
                continue  # fewer than are protected
        return pipeline([{**stage, "keep_layers": layers}])


def token_strategies(sites: Sequence[int]) -> list[tuple[str, Stage]]:
    """Every registered strategy that takes a budget of tokens by itself, at its own place and before layers `sites`."""
    listed: list[tuple[str, Stage]] = []
    for entry in registry().strategies():
        for stage in ({"use": entry.name}, {"use": entry.name, "at": at(sites)}):
            try:
                one = pipeline([{**stage, "keep": 0.5}]).stages[0]
            except SpecError:
                continue  # it needs other options, takes no budget, or does not act there
            if one.is_router or not one.cuts_tokens or not one.known_sites:
                continue
            label = f"{entry.name}, {place([site.layer for site in one.known_sites])}"
            if label not in [other for other, _ in listed]:
                listed.append((label, stage))
    return listed


def at(sites: Sequence[int]) -> int | list[int]:
    """As a pipeline file has it."""
    return sites[0] if len(sites) == 1 else list(sites)


def place(layers: Sequence[int | None]) -> str:
    """Where tokens leave, in words."""
    if layers[0] is None:
        return "at the encoder"
    return f"before layer{'s' * (len(layers) > 1)} {' and '.join(map(str, layers))}"
