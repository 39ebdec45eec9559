"""Every hook of prunekit: the normative text.

Strategies implement token, image, layer or router hooks, and may make statements beside; a plugin module implements
host and observer hooks. Arguments are opt-in: an implementation names the ones it needs, in any order, and what nobody
names is never computed. The arguments of token, image and router hooks are the rows of `prunekit.strategy.inputs`, with
their shapes; the signatures below are made from that table. What is deprecated is marked so that pluggy warns when a
plugin registers: a hook by `@hookspec(warn_on_impl=DeprecatedHook(...))`, an input by its row of the table.

Token hooks run once for each prompt batch and site, at prefill; the router hook once for each prompt batch. With
`per_sample=True` they run once for each sample, with unpadded tensors without the B axis (and `count`, `seed` as int,
`question` as str). A result must not depend on the other rows of the batch. What hooks get is theirs to read: changing
it in place changes no model.

Shape letters: B batch, S sequence, V visual tokens (padded to the longest row), E extras, H hidden, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from prunekit.errors import DeprecatedHook
from prunekit.strategy.inputs import inputs_of

if TYPE_CHECKING:
    import argparse
    from os import PathLike

    from torch import Tensor, nn

    from prunekit.records import RunReport, StageEvent
    from prunekit.registry import Registry
    from prunekit.strategy.artefact import CalibrationPrompt
    from prunekit.strategy.decisions import LayerPlan, ModelShape, Owners, Route, Selection

# (major, minor) of all that plugins implement and name: hooks, their arguments, what is declared. A minor version adds;
# a major one takes away what a minor one before has marked as deprecated. tests/hookspecs.json records each.
SPEC_VERSION = (1, 2)

hookspec = pluggy.HookspecMarker("prunekit")
hookimpl = pluggy.HookimplMarker("prunekit")

F = TypeVar("F", bound=Callable[..., Any])


def _with_inputs(function: F) -> F:
    """A specification that stops at the first result, with the inputs of the table as its arguments.

    pluggy reads them off the code object, and warns whoever implements it with one that the table calls deprecated.
    """
    inputs = inputs_of(function.__name__)
    names = ("self", *(one.name for one in inputs))
    code = function.__code__.replace(co_argcount=len(names), co_nlocals=len(names), co_varnames=names)
    function.__code__ = code
    old = {one.name: DeprecatedHook(f"`{one.name}`: {one.deprecated}") for one in inputs if one.deprecated}
    return hookspec(firstresult=True, warn_on_impl_args=old or None)(function)


class TokenHooks:
    """Implemented by a strategy; called on the one strategy of a stage, and on wrappers around it, in this order.

    At `pixels` and inside the vision tower every image and video is a sample of its own, and there is no prompt yet:
    what the table does not place there is refused there.
    """

    @_with_inputs
    def score_tokens(self) -> Tensor:
        """Decide how important each visual token is.

        Arguments: the inputs of token hooks.
        Returns: float (B, V), higher is more important, finite wherever `valid`; the default `select_tokens` keeps the
        `count` highest.
        Stops at the first result that is not None. Not called where `select_tokens` is implemented without naming
        `scores`.
        """
        raise NotImplementedError

    @_with_inputs
    def select_tokens(self) -> Tensor | Selection:
        """Decide which visual tokens stay.

        Arguments: the inputs of token hooks; `scores`, float (B, V), is computed only where it is named.
        Returns: bool (B, V), or a `Selection` with merges, sizes, or a crop of the KV that earlier layers hold; True on
        padding is ignored. The default keeps the `count` highest scores, lower index first on ties.
        Stops at the first result that is not None.
        """
        raise NotImplementedError

    @_with_inputs
    def merge_tokens(self) -> Tensor | Owners | None:
        """Decide where dropped tokens go, once it is known which stay.

        Arguments: the inputs of token hooks; `keep`, bool (B, V), is what was selected.
        Returns: `Owners`, who joins whom; or weights, float (B, V, V + E), as `Selection.weights` takes them; None:
        dropped tokens are gone.
        Stops at the first result that is not None. Not called where `select_tokens` has already said.
        """
        raise NotImplementedError


class ImageHooks:
    """Implemented by a strategy of its own, which acts at `pixels`; called once for each call that encodes images or
    videos, before the vision tower sees them.
    """

    @_with_inputs
    def resize_images(self) -> Tensor:
        """Decide how small each image or video is shown to the vision tower.

        Arguments: the inputs of `resize_images`; B counts images and videos.
        Returns: float (B,), the factor of both sides, above 0 and up to 1. Where a tower takes images of any size, it
        gets the smaller image, in whole visual tokens a side, rounded half up and at least one: the others leave, and
        those that stay keep the positions of the tokens in whose middle they lie. A tower that takes one size only gets
        the image made smaller and enlarged again: it sees less and costs the same.
        Stops at the first result that is not None.
        """
        raise NotImplementedError


class LayerHooks:
    """Implemented by a strategy; called once when a pipeline meets a model, before any compute."""

    @hookspec(firstresult=True)
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """Decide what becomes of every decoder layer, for all samples alike.

        Arguments: shape, the numbers of the model.
        Returns: a plan that names the layers that do not simply run.
        Stops at the first result that is not None. Raises ValueError, `field: message`, when the options do not fit the
        model.
        """
        raise NotImplementedError


class RouterHooks:
    """Implemented by a strategy of its own; called after the other stages at its `route_at`: at the decoder input, or
    before a decoder layer.
    """

    @_with_inputs
    def route(self) -> Route:
        """Decide for each sample which visual tokens leave at the stage's site, and which decoder layers run.

        Arguments: the inputs of `route`; those over V are the visual tokens that are left there.
        Returns: scores, which the stage's `keep` or `keep_tokens` and `keep_layers` turn into decisions, or plans.
        Stops at the first result that is not None.
        """
        raise NotImplementedError


class StatementHooks:
    """Implemented by a strategy that has more to say than its decisions; every one is optional.

    A ValueError that begins with the name of a field and a colon is put at that field of the pipeline file.
    """

    @hookspec(firstresult=True)
    def files(self) -> Iterable[str | PathLike[str]]:
        """Name the files that decide what the strategy does, such as trained weights or a calibration.

        Returns: their paths; their content enters the hash of a pipeline.
        Stops at the first result that is not None. Raises ValueError for files that are not there or not usable.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def check(self, shape: ModelShape) -> None:
        """Refuse a model that the strategy cannot serve.

        Arguments: shape, the numbers of the model.
        Returns: None. Raises ValueError.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def protected_layers(self, shape: ModelShape) -> Iterable[int]:
        """Name decoder layers that a router lets run for every sample.

        Arguments: shape, the numbers of the model.
        Returns: numbers of layers, from 0.
        Stops at the first result that is not None. For routers only.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Say what one decision costs.

        Arguments: shape, the numbers of the model; text, visual: tokens of the sample that reach the decision.
        Returns: FLOPs for one sample, two for each multiply-add.
        Stops at the first result that is not None; without one, a decision counts nothing.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def learner(self, shape: ModelShape, layers: Sequence[nn.Module], theta: float) -> Any:
        """Give `prunekit train` a router to train.

        Arguments: shape, the numbers of the model; layers, its decoder layers; theta, the base of its rotary
        frequencies.
        Returns: what `prunekit.training.learner.Learner` describes.
        Stops at the first result that is not None. For routers only.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def calibrate(self, prompts: Iterable[CalibrationPrompt], shape: ModelShape) -> Mapping[str, Any]:
        """Find out, on some prompts, what the strategy's options cannot know of a model.

        Arguments: prompts, each of which shows what the dense model does with it; shape, the numbers of the model.
        Returns: plain data for JSON. `prunekit calibrate` writes it with the model, the data and a digest, and the
        strategy reads it back by `read_artefact`.
        Stops at the first result that is not None.
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def predict_harm(
        self, scores: Tensor, keep: Tensor, layer_scores: Tensor, keep_layers: Tensor, state: dict[Any, Any]
    ) -> Tensor:
        """Predict, of one sample, how likely each rung of a budget of risk makes its answer another one.

        Arguments: scores, float (V,), of the sample's visual tokens; keep, bool (R, V), those that each rung leaves, of
        a router at its last site, of others at the first; layer_scores, float (N,), and keep_layers, bool (R, N), the
        same of decoder layers, None where no rung is about layers; state, as the stage's other hooks get it.
        Returns: float (R,), finite, at least 0, comparable between samples; any unit will do. A rung counts at least as
        much as those before it.
        Stops at the first result that is not None; without one it is the share of the scores that leaves. Called for
        each sample, without padding, where a pipeline has `budget: {risk: ...}`.
        """
        raise NotImplementedError


class HostHooks:
    """Implemented by plugin modules in the entry-point group `prunekit`. Import nothing heavy at their top."""

    @hookspec
    def prunekit_register(self, registry: Registry) -> None:
        """Add strategies: `registry.strategy(name, "package.module:Class", summary="one line")` for each.

        Arguments: registry, which signs what it gets with the plugin's distribution.
        Returns: None. Every plugin is called.
        """

    @hookspec
    def prunekit_models(self) -> dict[str, str]:
        """Bring short names of models.

        Returns: {"micro": "package.module:function"}; the function returns the path of a model folder. Every plugin is
        called.
        """
        raise NotImplementedError

    @hookspec
    def prunekit_pipelines(self) -> dict[str, str | PathLike[str]]:
        """Bring named pipelines.

        Returns: {"fastv-k2-r25": absolute path of the YAML file}; `prunekit show fastv-k2-r25` then works anywhere.
        Every plugin is called.
        """
        raise NotImplementedError

    @hookspec
    def prunekit_data(self) -> dict[str, str]:
        """Bring named prompts to train and calibrate on.

        Returns: {"micro-scenes": "package.module:function"}; the function returns a `Source`, see
        `prunekit.training.data`. Every plugin is called.
        """
        raise NotImplementedError

    @hookspec
    def prunekit_commands(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add commands to the `prunekit` program.

        Arguments: subparsers, argparse's; each command sets `run=callable(namespace) -> int`.
        Returns: None. Every plugin is called.
        """


class ObserverHooks:
    """Implemented by plugin modules and by objects given to `prunekit.plugins.register`.

    They are told what happened, with frozen data. An observer that raises becomes a warning and hurts no run.
    """

    @hookspec
    def prunekit_tokens_pruned(self, event: StageEvent) -> None:
        """Learn that a token stage has decided for a prompt batch.

        Arguments: event, what it decided.
        Returns: None. Every observer is called.
        """

    @hookspec
    def prunekit_run_finished(self, report: RunReport) -> None:
        """Learn that a prompt batch has been prefilled.

        Arguments: report, what the prefill did.
        Returns: None. Every observer is called.
        """
