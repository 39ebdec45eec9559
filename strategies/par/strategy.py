"""PAR, Pruning All-Rounder (https://arxiv.org/abs/2412.06458): one router ranks visual tokens and decoder layers.

Rules from the released code, ASGO-MM/Pruning-All-Rounder@1890d44, which masks where prunekit drops and skips. Choices
that neither that code nor the paper's figures settle are options here; docs/par.md lists them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from prunekit_strategies.par import files
from prunekit_strategies.par.config import WIDTH, Attention, RouterConfig, config_of
from prunekit_strategies.par.learner import Learner
from prunekit_strategies.par.router import Router
from prunekit_strategies.par.starting import LayerTokens, random_router, router_of_layers
from torch import Tensor, nn

from prunekit import ModelShape, Route, Site, Sites, Unsupported, hookimpl, strategy

UNTRAINED = "the router is untrained: its choices are as good as random ones (`weights: null`)"


@strategy(paper="2412.06458", code="ASGO-MM/Pruning-All-Rounder@1890d44", sites=Sites(default=Site(2)), per_sample=True)
class Par:
    """A small router ranks visual tokens and decoder layers for each sample; the stage's budget cuts both rankings.

    weights: a router folder, relative to the pipeline file, a hub id or the name of a shipped router; null: an
        untrained one, which needs `seed`.
    depth, width, heads, attention: of the router; null takes what the router's file says, for a new one 1 block, width
        512, a head for each 64 numbers, bidirectional. width `model`: blocks of the LVLM's own size.
    scatter: how far their places alone set scores of visual tokens apart, so that tokens alike are not kept or dropped
        together; null takes what the router's file says, for a new one 0. No weight depends on it, so any will do.
    init: how a new router starts: at `random`, or, in training, as copies of the LVLM's first blocks, `llm_first`.
        layer_tokens: they start as `normal` noise, as `zeros`, or `distinct`, as noise that tells layers apart.
    eligible: layers that may be skipped: `all`, the `second_half`, or a list. protect: layers that always run, negative
        ones counted from the end.
    """

    weights: Path | str | None
    seed: int | None = None
    depth: int | None = None
    width: int | Literal["model"] | None = None
    heads: int | None = None
    attention: Attention | None = None
    scatter: float | None = None
    init: Literal["random", "llm_first"] = "random"
    layer_tokens: LayerTokens = "normal"
    eligible: Literal["all", "second_half"] | tuple[int, ...] = "all"
    protect: tuple[int, ...] = (0, 1, -1)

    def __post_init__(self) -> None:
        if self.weights is None and self.seed is None:
            raise ValueError("seed: an untrained router (`weights: null`) is drawn at random and needs a seed")
        if self.weights == "":
            raise ValueError("weights: name a router folder, or write null for an untrained router")
        for name in ("depth", "width", "heads"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}: must be at least 1")
        if self.init == "llm_first" and self.width != "model" and self.weights is None:
            raise ValueError("init: llm_first copies blocks of the LVLM, which needs `width: model`")

    @hookimpl
    def files(self) -> Sequence[Path]:
        """The files that a pipeline's identity depends on besides the options."""
        if self.weights is None:
            return ()
        folder = _at("weights", files.find, self.weights)
        return (folder / files.CONFIG, folder / files.WEIGHTS)

    @hookimpl
    def check(self, shape: ModelShape) -> None:
        """Raise ValueError, beginning with the option's name, for a model that this router cannot serve."""
        self._config(shape)
        if self.weights is not None:
            _at("weights", lambda: files.check(files.find(self.weights)))
        self.protected_layers(shape)

    @hookimpl
    def protected_layers(self, shape: ModelShape) -> frozenset[int]:
        """Layers that run for every sample."""
        total = shape.layers
        for name, numbers in (("protect", self.protect), ("eligible", self.eligible)):
            beyond = [n for n in numbers if isinstance(n, int) and not -total <= n < total]
            if beyond:
                raise ValueError(f"{name}: the model has layers 0 to {total - 1}, not {beyond}")
        if self.eligible == "all":
            may = set(range(total))
        elif self.eligible == "second_half":
            may = set(range(total // 2, total))
        else:
            may = {int(n) % total for n in self.eligible}
        return frozenset(set(range(total)) - may | {n % total for n in self.protect})

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """What the router itself costs for a prompt of `text` and `visual` tokens."""
        return self._config(shape).flops(text + visual)

    @hookimpl
    def route(self, embeds: Tensor, visual: Tensor, valid: Tensor, shape: ModelShape) -> Route:
        """Logits of one sample: of its positions, (S,), and of the layers, (N,)."""
        router = self._router(shape, embeds)
        tokens, layers = router(embeds[None], visual[None], valid[None])
        return Route(tokens[0], layers[0], note=UNTRAINED if self.weights is None else None)

    @hookimpl
    def predict_harm(self, scores: Tensor, keep: Tensor, layer_scores: Tensor | None, keep_layers: Tensor) -> Tensor:
        """How much of the probabilities to keep leaves on each rung, of tokens and of layers, over their number."""
        harm = (scores.sigmoid() * ~keep).mean(-1)
        return harm if layer_scores is None else harm + (layer_scores.sigmoid() * ~keep_layers).mean(-1)

    @hookimpl
    def learner(self, shape: ModelShape, layers: Sequence[nn.Module], theta: float) -> Learner:
        """The router as `prunekit train` starts with it, float32: that of `weights`, or a new one.

        layers: the LVLM's decoder layers. theta: base of its rotary frequencies.
        """
        config = self._config(shape)
        if self.weights is not None:
            trained = _whole(files.load, files.find(self.weights)).float().requires_grad_()
            trained.config = config
            return Learner(trained, shape, frozenset())
        copied, seed = self.init == "llm_first", self.seed or 0
        if copied:
            router = router_of_layers(config, layers, theta, seed, self.layer_tokens)
        else:
            router = random_router(config, seed, self.layer_tokens)
        return Learner(router, shape, frozenset({"blocks"} if copied else ()))

    def _config(self, shape: ModelShape) -> RouterConfig:
        """The architecture on a model: the file's, or that of the options. Raises ValueError."""
        if self.weights is None:
            usual = self.depth or 1, self.width or WIDTH, self.heads, self.attention or "bidirectional"
            return config_of(shape, *usual, self.scatter or 0.0)
        file = _at("weights", lambda: files.read(files.find(self.weights)))
        if (refusal := file.refusal(shape)) is not None:
            raise ValueError(f"weights: {refusal}")
        mine: dict[str, Any] = {"depth": self.depth, "heads": self.heads, "attention": self.attention}
        mine["width"] = shape.hidden if self.width == "model" else self.width
        for name, value in mine.items():
            if value is not None and value != getattr(file.architecture, name):
                theirs = getattr(file.architecture, name)
                raise ValueError(f"{name}: the router in '{self.weights}' has {theirs}; leave it out, or train another")
        return file.architecture if self.scatter is None else replace(file.architecture, scatter=self.scatter)

    def _router(self, shape: ModelShape, like: Tensor) -> Router:
        if self.weights is not None:
            trained = _whole(files.loaded, files.find(self.weights), like.dtype, like.device)
            return trained if self.scatter is None else _scattered(trained, self.scatter)
        config = self._config(shape)
        if self.init == "llm_first":
            raise Unsupported(
                "an untrained router that starts as a copy of the LVLM's blocks exists in `prunekit train` only; train "
                "it (--steps 0 saves it as it starts), or use init: random"
            )
        return _untrained(config, self.seed or 0, self.layer_tokens, like.dtype, like.device)


@functools.lru_cache(maxsize=4)
def _untrained(
    config: RouterConfig, seed: int, layer_tokens: LayerTokens, dtype: torch.dtype, device: torch.device
) -> Router:
    return random_router(config, seed, layer_tokens).requires_grad_(False).to(device=device, dtype=dtype)


def _scattered(router: Router, scatter: float) -> Router:
    """The router with other scatter than its file says; the weights are shared."""
    other = copy.copy(router)
    other.config = replace(router.config, scatter=scatter)
    return other


def _whole(load: Callable[..., Router], *arguments: Any) -> Router:
    """Load a router whose names and shapes were checked before; any other fault becomes an Unsupported."""
    try:
        return load(*arguments)
    except ValueError as error:
        raise Unsupported(f"weights: {error}") from error


def _at(option: str, function: Any, *arguments: Any) -> Any:
    """Call a function; its ValueError then names the option."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
