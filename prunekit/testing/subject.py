"""A strategy on a tiny model, as the checks of its contract see it: what it is, and its runs, each made once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch

import prunekit
from prunekit import Pipeline, Site, families, plugins
from prunekit.errors import SpecError, Unsupported
from prunekit.strategy import declare
from prunekit.strategy.about import about
from prunekit.verify.comparison import Replay, generate, replayed
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.proof import proved_parts
from prunekit.verify.stock import StockRun, stock_run_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.families.base import Parts
    from prunekit.records import RunReport

STEPS = 3
# Images and words of each row: one prompt, left-padded ones with one and two images, one row among them without any,
# and text alone.
BATCHES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "one": {"images": (1,), "text": (9,)},
    "ragged": {"images": (1, 2, 1), "text": (14, 6, 9)},
    "mixed": {"images": (2, 0, 1), "text": (5, 30, 8)},
    "text": {"images": (0, 0), "text": (9, 5)},
})  # fmt: skip
BUDGETS = ("keep", "keep_tokens", "keep_layers")
USUAL = {"keep": 0.4}


class Setting(Protocol):
    """What a contract says of its strategy; `prunekit.testing.contract.StrategyContract` describes each."""

    @property
    def use(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def keep(self) -> Mapping[str, Any] | None: ...
    @property
    def at_most(self) -> bool: ...
    @property
    def may_keep_more(self) -> bool: ...
    def model(self) -> PreTrainedModel: ...
    def inputs(self, **rows: Any) -> dict[str, Tensor]: ...
    def row(self, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]: ...
    def processor(self) -> Any: ...


@dataclass(frozen=True)
class Traits:
    """What a strategy class is, known without an instance.

    kind: `token`, `image`, `layer` or `router`. tokens: tokens leave by it; layers: it is a router of layers, with a
    budget of them if `counts_layers`. takes_keep: the file may say how many tokens stay; needs_keep: it must, where it
    names sites; optional: it need not. fixed: it then leaves that many. drops_all: it leaves none. extras: it takes CLS
    tokens. pixels: it acts before the tower. video: it looks at what is special of videos.
    """

    kind: str
    tokens: bool
    layers: bool
    counts_layers: bool
    takes_keep: bool
    needs_keep: bool
    optional: bool
    fixed: bool
    drops_all: bool
    extras: bool
    pixels: bool
    video: bool

    @classmethod
    def of(cls, strategy: type[Any]) -> Traits:
        told, declared, keys = about(strategy), strategy.__prunekit__, declare.stage_keys(strategy)
        tokens = told.kind == "token" or declare.routes_tokens(strategy)
        return cls(
            kind=told.kind,
            tokens=tokens,
            layers=declare.routes_layers(strategy),
            counts_layers="keep_layers" in keys,
            takes_keep=tokens and "keep" in keys,
            needs_keep=tokens and declared.keep == "required",
            optional=tokens and declared.keep == "optional",
            fixed=tokens and "keep" in keys and not declared.drops_all,
            drops_all=declared.drops_all,
            extras=bool(declared.extras),
            pixels=told.kind == "token" and told.sites == ("pixels",),
            video=told.group == "video" or "videos" in told.asks,
        )


class Subject:
    """The strategy that a contract is about. Batches are named as in `BATCHES`; `keys` are those of its stage."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.use = setting.use
        self.options: dict[str, Any] = dict(setting.options)
        self._batches: dict[str, dict[str, Tensor]] = {}
        self._dense: dict[str, Tensor] = {}
        self._stock: dict[str, StockRun] = {}
        self._runs: dict[str, tuple[RunReport, Tensor]] = {}
        self._replays: dict[str, Replay] = {}

    @cached_property
    def cls(self) -> type[Any]:
        return plugins.registry().get_strategy(self.use)

    @cached_property
    def traits(self) -> Traits:
        return Traits.of(self.cls)

    @cached_property
    def model(self) -> Any:
        return self.setting.model()

    @cached_property
    def parts(self) -> Parts:
        return proved_parts(self.model)

    @cached_property
    def shape(self) -> prunekit.ModelShape:
        return families.shape_of(self.model)

    @property
    def budget(self) -> dict[str, Any]:
        """The budget where a check needs just one: as the contract says it, else a usual one."""
        if self.setting.keep is not None:
            return dict(self.setting.keep)
        return {**(USUAL if self.traits.takes_keep else {}), **self._needed({*USUAL} if self.traits.takes_keep else ())}

    def _needed(self, named: Collection[str]) -> dict[str, Any]:
        """Of a router with two budgets that other one which its stage needs beside those that are `named`."""
        if not self.traits.counts_layers:
            return {}
        declared = self.cls.__prunekit__
        if "keep_layers" not in named and (not self.traits.takes_keep or declared.keep != "required"):
            return {} if declared.keep_layers == "optional" else {"keep_layers": 1.0 if named else 0.7}
        tokens = {"keep", "keep_tokens"} & {*named}
        return {"keep": 1.0} if self.traits.needs_keep and declared.keep_layers == "optional" and not tokens else {}

    def stage(self, **keys: Any) -> dict[str, Any]:
        """Its stage as a pipeline file has it."""
        named = {*BUDGETS} & keys.keys()
        budget = self._needed(named) if named else self.budget
        if "at" in keys and not {*BUDGETS} & {*budget, *keys} and self.traits.needs_keep:
            budget = dict(USUAL)  # its schedule is for sites of its own
        return {"use": self.use, **self.options, **budget, **keys}

    def build(self, **keys: Any) -> Pipeline:
        """A pipeline of it alone."""
        return self._alone(self.stage(**keys))

    def unbudgeted(self) -> Pipeline:
        """The same where the file says no `keep`."""
        return self._alone({"use": self.use, **self.options, **self._needed(())})

    def _alone(self, stage: Mapping[str, Any]) -> Pipeline:
        return prunekit.load({"name": self.use, "stages": [dict(stage)]})

    @cached_property
    def misfit(self) -> str:
        """Why nothing can be tried on the contract's model, and what to change; empty: it can."""
        try:
            pipeline = self.build()
        except SpecError as error:
            return f"SpecError: {error}\n`options` of the contract says what its stage needs beside `at` and `keep`"
        try:
            shape = self.shape
        except Exception as error:
            return f"`model()` of the contract failed with {type(error).__name__}: {error}"
        try:
            pipeline.bind(shape)
        except (SpecError, Unsupported) as error:
            made = f"a {shape.family} with {shape.layers} layers, is none for it: {error}"
            return f"the contract's model, {made}\noverride `model()` of the contract to give one that is"
        return ""

    def allows(self, site: int | str) -> bool:
        """It may act at this site, written as in a pipeline file."""
        return self.build().stages[0].sites.reason_against(Site.parse(site)) is None

    def batch(self, name: str) -> dict[str, Tensor]:
        if name not in self._batches:
            self._batches[name] = self.setting.inputs(**BATCHES[name])
        return self._batches[name]

    def dense(self, batch: str) -> Tensor:
        """Logits of a prefill and one decoding step of the stock model, (B, 2, vocabulary)."""
        if batch not in self._dense:
            with Float64Throughout():
                self._dense[batch] = _logits(self.model, self.batch(batch))
        return self._dense[batch]

    def run(self, batch: str, **keys: Any) -> tuple[RunReport, Tensor]:
        """The report of a prefill with one decoding step, and its logits (B, 2, vocabulary)."""
        key = json.dumps([batch, keys], default=str)
        if key not in self._runs:
            self._runs[key] = self.apply(self.build(**keys), self.batch(batch))
        return self._runs[key]

    def apply(
        self, pipeline: Pipeline, inputs: Mapping[str, Tensor], model: Any = None, quiet: bool = True
    ) -> tuple[RunReport, Tensor]:
        """The same of any pipeline and prompt batch. model: another than the contract's. quiet: without warnings."""
        model = self.model if model is None else model
        exact = Float64Throughout() if model.dtype == torch.float64 else torch.no_grad()
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore", prunekit.PrunekitWarning)
            with exact, prunekit.apply(model, pipeline, processor=self.setting.processor()) as run:
                logits = _logits(model, inputs)
        assert run.report is not None
        return run.report, logits

    def exact(self, batch: str, pipeline: Pipeline | None = None, steps: int = STEPS, **keys: Any) -> Replay:
        """A run with decoding steps beside the masked reference. pipeline: None is that of the strategy alone."""
        key = json.dumps([batch, steps, keys], default=str)
        if pipeline is None and key in self._replays:
            return self._replays[key]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", prunekit.PrunekitWarning)
            found = replayed(
                self.model, self.parts, pipeline or self.build(**keys), self.batch(batch), steps,
                stock_run=self._stock_run(batch), processor=self.setting.processor(),
            )  # fmt: skip
        if pipeline is None:
            self._replays[key] = replace(found, cache=None)
        return found

    def _stock_run(self, batch: str) -> StockRun | None:
        if self.parts.opaque is not None:
            return None
        if batch not in self._stock:
            with Float64Throughout():
                self._stock[batch] = stock_run_of(self.model, self.batch(batch), STEPS + 1)
        return self._stock[batch]


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(generate(model, inputs, max_new_tokens=2).logits, 1)
