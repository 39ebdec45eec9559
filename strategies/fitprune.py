"""FitPrune (https://arxiv.org/abs/2409.10197, AAAI 2025): layers delete what a calibration says they can miss.

With a = max over heads of the attention in layer l, cross_i = sum of a over the text behind the image and self_i = mean
of a over the visual tokens, each to token i: the least cross_i self_i leave between attention and MLP. Fitted
beforehand, with the smallest alpha (bisected to 1/128) for which the visual tokens' FLOPs fall by `reduction`: layer l
deletes the tokens that are among the least of cross *and* among the least of self that together hold at most alpha of
the dense mass of it, until the target is met; a table of mean deletions remains.

Rule: ywh187/FitPrune@d28e418, whose fit and deletion differ in the same way. Deviations: the table holds fractions of
the visual tokens, for any number of them, where the authors' are counts for 576; a prompt's last visual token is not
deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit import Artefact, CalibrationPrompt, ModelShape, Rows, Site, Sites, hookimpl, read_artefact, strategy
from prunekit.ops import ranks

STEPS = 7  # of the bisection


def _mid(layer: int) -> Site:
    return Site(layer, "layer", "mid")


@strategy(
    paper="2409.10197",
    code="ywh187/FitPrune@d28e418",
    sites=Sites(encoder=False, points=("mid",)),
    inputs={
        "attention": (
            Rows(layer="own", queries="after", heads="max", over="sum"),
            Rows(layer="own", queries="visual", heads="max", over="mean"),
        )
    },
    schedule=lambda self, layers: self._table(),
)
class FitPrune:
    """Keep the visual tokens that text and other visual tokens together attend to most, inside each layer.

    calibration: a file of `prunekit calibrate`, from which sites and budgets follow; null where the file of the
    pipeline names them. reduction: how much of the visual tokens' FLOPs a calibration is to save.
    """

    calibration: Path | None = None
    reduction: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise ValueError("reduction: is between 0 and 1")
        if (found := self._artefact()) is not None and found.result["reduction"] != self.reduction:
            raise ValueError(f"reduction: the calibration is for {found.result['reduction']}, not {self.reduction}")

    @hookimpl
    def score_tokens(self, attention: tuple[Tensor, Tensor]) -> Tensor:
        """The product of both, float (B, V)."""
        cross, own = attention
        return cross * own

    @hookimpl
    def check(self, shape: ModelShape) -> None:
        """Refuse the calibration of another model."""
        if (found := self._artefact()) is not None and (wrong := found.refusal(shape)):
            raise ValueError(f"calibration: {wrong}")

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The rows of the visual tokens, and of at most all text."""
        return shape.row_flops(text + visual, text + visual)

    @hookimpl
    def calibrate(self, prompts: Iterable[CalibrationPrompt], shape: ModelShape) -> Mapping[str, Any]:
        """The fraction of the visual tokens that each layer leaves, and the alpha that gives it."""
        layers = list(range(shape.layers))
        stage = {"use": "fitprune", "at": [str(_mid(layer)) for layer in layers], "keep": 1.0}
        listed, dense = list(prompts), []
        for prompt in listed:
            dense.append(_Fit())
            prompt.logits([stage], dense[-1])
        low, high, found = 0.0, 1.0, None
        for _ in range(STEPS):
            alpha = (low + high) / 2
            runs = [_Fit(alpha, one.masses) for one in dense]
            for prompt, run in zip(listed, runs, strict=True):
                prompt.logits([stage], run)
            left = self._left(shape, [run.entered for run in runs], [run.left for run in runs])
            low, high, found = (alpha, high, found) if left is None else (low, alpha, (alpha, left))
        if found is None:
            raise ValueError(f"reduction: {self.reduction} cannot be reached")
        return {"reduction": self.reduction, "alpha": found[0], "left": found[1]}

    def _left(self, shape: ModelShape, entered: Sequence[Sequence[int]], left: Sequence[Sequence[int]]) -> Any:
        """Mean fractions left by each layer, none deleting once the target is met; None: it is not."""
        inside, between = shape.attention_params, 2 * shape.heads * shape.head_dim

        def layer(before: Sequence[int], after: Sequence[int]) -> float:
            attention = (inside * n + between * n**2 for n in before)
            return sum(attention) + sum(shape.mlp_params * n for n in after)

        columns = list(zip(zip(*entered, strict=True), zip(*left, strict=True), strict=True))
        start = columns[0][0]
        target, used = (1 - self.reduction) * shape.layers * layer(start, start), 0.0
        kept, fractions = float(sum(start)) / len(start), []
        whole = kept
        for number, (before, after) in enumerate(columns):
            if used + (shape.layers - number) * layer(before, before) <= target:
                return fractions + [fractions[-1]] * (shape.layers - number)
            used += layer(before, after)
            kept -= (sum(before) - sum(after)) // len(before)
            fractions.append(max(kept, 1) / whole)
        return fractions if used <= target else None

    def _table(self) -> Mapping[Site, float]:
        """Layers that delete, with what they leave."""
        artefact = self._artefact()
        if artefact is None:
            raise ValueError("calibration: is missing; `prunekit calibrate` writes one, or name `at` and `keep`")
        left = artefact.result["left"]
        deleting = {layer: one for layer, one in enumerate(left) if one < ([1.0, *left])[layer]}
        return {_mid(layer): one for layer, one in deleting.items()} or {_mid(len(left) - 1): 1.0}

    def _artefact(self) -> Artefact | None:
        if self.calibration is None:
            return None
        try:
            return read_artefact(self.calibration, "fitprune")
        except ValueError as error:
            raise ValueError(f"calibration: {error}") from error


class _Fit:
    """Stands around the stage while one prompt runs: notes the dense masses, or deletes by the rule of the fit.

    masses: of cross and self in each layer of the dense model. entered, left: visual tokens of each layer.
    """

    def __init__(self, alpha: float = 0.0, masses: Sequence[tuple[Tensor, ...]] = ()) -> None:
        self.alpha, self.dense = alpha, masses
        self.masses: list[tuple[Tensor, ...]] = []
        self.entered: list[int] = []
        self.left: list[int] = []

    @hookimpl(wrapper=True)
    def select_tokens(self, attention: tuple[Tensor, Tensor], valid: Tensor, cut: int) -> Any:
        """Answers in the place of the stage; all of them stay while nothing is deleted."""
        yield
        keep = valid.clone()
        self.masses.append(tuple(one.sum() for one in attention))
        if self.dense:
            low = [_least(one[0], mass, self.alpha) for one, mass in zip(attention, self.dense[cut], strict=True)]
            keep[0] &= ~(low[0] & low[1])
        self.entered.append(int(valid.sum()))
        self.left.append(int(keep.sum()))
        return keep


def _least(scores: Tensor, mass: Tensor, alpha: float) -> Tensor:
    """The least of `scores`, float (V,), without which more than (1 - alpha) of `mass` is left: bool (V,)."""
    order = ranks(-scores)
    lowest = scores[order.argsort()].cumsum(0)
    many = (scores.sum() - lowest[:-1] >= (1 - alpha) * mass).sum()
    return order < many
