"""Every hook of prunekit: the normative text.

Shape letters: B batch, S sequence, V visual tokens (padded to the batch's longest row), H hidden, A heads, N layers.

Strategies implement Token and Layer hooks; a plugin module implements Host and Observer hooks. Arguments are opt-in:
an implementation names the ones it needs, and what nobody names is never computed. Token hooks run once per prompt
batch, at prefill. A strategy that sets `per_sample = True` is called once for each sample with unpadded tensors
without the B axis (and `count`, `seed` as int); otherwise once with the batch. A result must not depend on the
other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torch import Tensor

    from prunekit.decisions import LayerPlan, ModelShape, Selection
    from prunekit.registry import Registry
    from prunekit.report import RunReport, StageEvent

hookspec = pluggy.HookspecMarker("prunekit")
hookimpl = pluggy.HookimplMarker("prunekit")


class TokenHooks:
    """Called on the one strategy of a stage (and on what a plugin wrapped around it), in this order.

    Arguments that these hooks share:
        attention: float (B, V), the attention that each visual token receives, as declared by the strategy in
            `inputs = {"attention": Rows(...)}`; padded columns hold 0.
        hidden: float (B, V, H), visual tokens as they enter the site; at `encoder` the projected image features.
        coords: int64 (B, V, 5): number of the image in the prompt, row, column, and how many rows and columns that
            image has; padding holds -1.
        valid: bool (B, V), False on padding.
        count: how many tokens to leave of each sample, a tuple of B ints; None for a strategy that takes no `keep`.
        seed: a tuple of B ints, one per sample, drawn from its token ids and pixels: equal in every batch and run.
        state: a dict that lives for one prompt batch and belongs to this stage.
    """

    @hookspec(firstresult=True)
    def score_tokens(
        self, attention: Tensor, hidden: Tensor, coords: Tensor, valid: Tensor, count: Sequence[int] | None,
        seed: Sequence[int], state: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Score the visual tokens: float (B, V), higher is more important. Not called when `select_tokens` is given.

        Stops at the first result that is not None.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def select_tokens(
        self, scores: Tensor, attention: Tensor, hidden: Tensor, coords: Tensor, valid: Tensor,
        count: Sequence[int] | None, seed: Sequence[int], state: dict[str, Any],
    ) -> Tensor | Selection:  # fmt: skip
        """Choose the tokens to keep: a bool mask (B, V), or a `Selection`.

        The default keeps the `count` highest `scores` (float (B, V), from `score_tokens`), lower index first on ties.
        `scores` is computed only when an implementation names it. Stops at the first result that is not None.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def merge_tokens(
        self, keep: Tensor, attention: Tensor, hidden: Tensor, coords: Tensor, valid: Tensor, seed: Sequence[int],
        state: dict[str, Any],
    ) -> Tensor | None:  # fmt: skip
        """Say where dropped tokens go: weights, float (B, V, V), as in `Selection.weights`; None: nowhere.

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
