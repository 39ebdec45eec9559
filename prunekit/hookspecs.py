"""Every hook of prunekit: the normative text.

Shape letters: B batch, S sequence, V visual tokens (padded to the batch's longest row), E extras, H hidden, N layers.

Strategies implement Token, Layer or Router hooks; a plugin module implements Host and Observer hooks. Arguments are
opt-in: an implementation names the ones it needs, and what nobody names is never computed. Token hooks run once per
prompt batch and site, router hooks once per prompt batch, at prefill. A strategy with `trainable = True` runs with
gradients, on states that are not detached. A strategy that sets `per_sample = True` is called once for each sample with
unpadded tensors without the B axis (and `count`, `seed` as int); otherwise once with the batch. A result must not
depend on the other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from os import PathLike

    from torch import Tensor

    from prunekit.records import RunReport, StageEvent
    from prunekit.registry import Registry
    from prunekit.strategy.decisions import LayerPlan, ModelShape, Route, Selection

hookspec = pluggy.HookspecMarker("prunekit")
hookimpl = pluggy.HookimplMarker("prunekit")


class TokenHooks:
    """Called on the one strategy of a stage (and on what a plugin wrapped around it) at each site, in this order.

    Arguments that these hooks share, T text tokens, W width of the vision tower; padding of floats holds 0:
        hidden: float (B, V, H), visual tokens as they enter the site; at `encoder` the projected image features, inside
            the tower float (B, V, W).
        previous_hidden: float (B, V, H), the same tokens as they entered the newest decoder layer that has begun.
        attention, keys, values, text_keys: what the strategy declares in `inputs = {"attention": Rows(...)}`, with
            `Keys` or `Values` for the others; a tuple of tensors for a tuple of declarations.
        text: float (B, T, H), embeddings of the text tokens, padded. text_hidden: float (B, T, H), their states at the
            site. text_valid: bool (B, T). text_after: bool (B, T), those behind the last visual token of their row.
        encoder_attention, encoder_keys, encoder_values, encoder_queries, features: what the strategy declares of the
            vision tower, with `EncoderRows`, `EncoderKeys`, `EncoderValues`, `EncoderQueries`, `Features`. See
            `prunekit.strategy.tower_requests`.
        extras: float (B, E, H), what the strategy declares in `extras = ("cls",)`, projected; at `encoder` only.
        coords: int64 (B, V, 5), number of the picture in the prompt, row, column, and how many rows and columns the
            crop or frame has; -1 on padding, row and column also on tokens that only separate.
        frames: int64 (B, V), number of the crop or video frame within its picture; -1 on padding.
        sizes: float (B, V), how many original tokens each token stands for, as earlier stages said in
            `Selection.sizes`; 1 where none did, and on padding.
        valid: bool (B, V), False on padding.
        count: how many tokens to leave of each sample, a tuple of B ints; None for a strategy that takes no `keep`.
        cut: number of the site in a list of sites, from 0.
        seed: a tuple of B ints, one per sample, drawn from its token ids and pixels: equal in every batch and run.
        state: a dict that lives for one prompt batch and belongs to this stage, at all of its sites.
        norm: the model's final norm, a function of states (..., H).
        forward: runs layers or modules on the current tokens and throws away what they write: `forward([3, 4])` gives
            `hidden`, `text`, `last` and `attention`. Not with `per_sample`.

    Inside the vision tower every picture is a sample of its own, and there is no prompt: `attention` to `text_after`,
    `extras`, `norm` and `forward` are not there.
    """

    @hookspec(firstresult=True)
    def score_tokens(
        self, hidden: Tensor, previous_hidden: Tensor, attention: Tensor, keys: Tensor, values: Tensor,
        text_keys: Tensor, text: Tensor, text_hidden: Tensor, text_valid: Tensor, text_after: Tensor,
        encoder_attention: Tensor, encoder_keys: Tensor, encoder_values: Tensor, encoder_queries: Tensor,
        features: Tensor, extras: Tensor, coords: Tensor, frames: Tensor, sizes: Tensor, valid: Tensor,
        count: Sequence[int] | None, cut: int, seed: Sequence[int], state: dict[str, Any],
        norm: Callable[[Tensor], Tensor], forward: Callable[..., Any],
    ) -> Tensor:  # fmt: skip
        """Score the visual tokens: float (B, V), higher is more important. Not called when `select_tokens` is given.

        Stops at the first result that is not None.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def select_tokens(
        self, scores: Tensor, hidden: Tensor, previous_hidden: Tensor, attention: Tensor, keys: Tensor, values: Tensor,
        text_keys: Tensor, text: Tensor, text_hidden: Tensor, text_valid: Tensor, text_after: Tensor,
        encoder_attention: Tensor, encoder_keys: Tensor, encoder_values: Tensor, encoder_queries: Tensor,
        features: Tensor, extras: Tensor, coords: Tensor, frames: Tensor, sizes: Tensor, valid: Tensor,
        count: Sequence[int] | None, cut: int, seed: Sequence[int], state: dict[str, Any],
        norm: Callable[[Tensor], Tensor], forward: Callable[..., Any],
    ) -> Tensor | Selection:  # fmt: skip
        """Choose the tokens to keep: a bool mask (B, V), or a `Selection`.

        The default keeps the `count` highest `scores` (float (B, V), from `score_tokens`), lower index first on ties.
        `scores` is computed only when an implementation names it. Stops at the first result that is not None.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def merge_tokens(
        self, keep: Tensor, hidden: Tensor, previous_hidden: Tensor, attention: Tensor, keys: Tensor, values: Tensor,
        text_keys: Tensor, text: Tensor, text_hidden: Tensor, text_valid: Tensor, text_after: Tensor,
        encoder_attention: Tensor, encoder_keys: Tensor, encoder_values: Tensor, encoder_queries: Tensor,
        features: Tensor, extras: Tensor, coords: Tensor, frames: Tensor, sizes: Tensor, valid: Tensor,
        count: Sequence[int] | None, cut: int, seed: Sequence[int], state: dict[str, Any],
        norm: Callable[[Tensor], Tensor], forward: Callable[..., Any],
    ) -> Tensor | None:  # fmt: skip
        """Say where dropped tokens go: weights, float (B, V, V + E), as in `Selection.weights`; None: nowhere.

        `keep` is the bool (B, V) that was selected. Stops at the first result that is not None.
        """
        raise NotImplementedError


class LayerHooks:
    """Called once when a pipeline meets a model, before any compute."""

    @hookspec(firstresult=True)
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """Decide the fate of every decoder layer of a model with these numbers.

        Raises ValueError when the strategy's options do not fit the model.
        """
        raise NotImplementedError


class RouterHooks:
    """Called on the one strategy of a router stage, after the stages at the encoder and before decoder layer 0."""

    @hookspec(firstresult=True)
    def route(
        self, embeds: Tensor, visual: Tensor, text: Tensor, valid: Tensor, shape: ModelShape, state: dict[str, Any],
        seed: Sequence[int],
    ) -> Route:  # fmt: skip
        """Decide for each sample which visual tokens leave at the stage's site, and which decoder layers run.

        embeds: float (B, S, H), the embeddings that enter the decoder. visual, text, valid: bool (B, S), the visual
        tokens that are left, the other real tokens, and both (False on padding). shape: the numbers of the model.
        Scores become decisions by the stage's `keep` or `keep_tokens` and `keep_layers`; see `Route`.
        """
        raise NotImplementedError


class HostHooks:
    """Implemented by plugin modules in the entry-point group `prunekit`."""

    @hookspec
    def prunekit_register(self, registry: Registry) -> None:
        """Add strategies: `registry.strategy(name, "package.module:Class", summary="one line")`. Import nothing
        heavy.
        """

    @hookspec
    def prunekit_models(self) -> dict[str, str]:
        """Short model names: {"micro": "package.module:function"}; the function returns the path of a model folder."""
        raise NotImplementedError

    @hookspec
    def prunekit_pipelines(self) -> dict[str, str | PathLike[str]]:
        """Named pipelines: {"fastv-k2-r25": path of the YAML file}; `prunekit show fastv-k2-r25` then works anywhere.
        The path is absolute, so that it does not depend on the working directory.
        """
        raise NotImplementedError

    @hookspec
    def prunekit_data(self) -> dict[str, str]:
        """Named prompts to train on: {"micro-scenes": "package.module:function"}; the function returns a `Source`, see
        `prunekit.training.data`.
        """
        raise NotImplementedError

    @hookspec
    def prunekit_commands(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add commands to the `prunekit` program; each sets `run=callable(namespace) -> int`. Import nothing heavy."""


class ObserverHooks:
    """Told what happened, with frozen data. An observer that raises is reported as a warning and hurts no run."""

    @hookspec
    def prunekit_tokens_pruned(self, event: StageEvent) -> None:
        """A token stage has decided for a prompt batch."""

    @hookspec
    def prunekit_run_finished(self, report: RunReport) -> None:
        """A prompt batch has been prefilled."""
