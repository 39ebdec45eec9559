"""The contract of a strategy, as a test class that pytest collects. In a test file of the strategy's own package:

    from prunekit.testing.contract import contract

    TestCorner = contract("corner", options={"corner": "top-left"})

That is all: the name must be registered (through the entry-point group, or `prunekit.plugins.register`). The class runs
the strategy on a tiny random LLaVA in float64, on batches with left padding, several images and rows without any; where
patches leave before the tower, on one with a tower for images of any size.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import prunekit
from prunekit import Pipeline, Site, families, plugins
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.declare import TOKEN_STARTS, implements, is_image, is_router, takes_keep
from prunekit.testing.tiny import PATCH, TinyWords, row_of, tiny_inputs, tiny_llava
from prunekit.verify.equivalence import Equivalence, assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.strategies import DRAWN, with_own

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.records import RunReport

RAGGED: Mapping[str, Any] = MappingProxyType({"images": (1, 2, 1), "text": (14, 6, 9)})
MIXED: Mapping[str, Any] = MappingProxyType({"images": (2, 0, 1), "text": (5, 30, 8)})


class StrategyContract:
    """What holds for every strategy. Use `contract`, which picks the class that fits.

    use: its registered name. options: the YAML keys that it needs, beside `use`, `at` and `keep`.
    at_most: it may leave fewer tokens than asked for (a pool that rounds down to a grid).
    keep: the budget of the tests that need one, empty for a strategy that takes none.
    """

    use: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    at_most: ClassVar[bool] = False
    keep: ClassVar[Mapping[str, Any]] = {}

    def model(self) -> PreTrainedModel:
        """A stock model in float64; override it, and `inputs`, to hold the strategy to the contract on another."""
        return tiny_llava(tower="pixtral" if self.cuts_pixels else "clip")

    def inputs(self, **rows: Any) -> dict[str, Tensor]:
        """A prompt batch for that model, of `images` and `text` as `tiny_inputs` takes them."""
        return tiny_inputs(**rows, sizes=self.cuts_pixels)

    def row(self, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """Row `row` of such a batch as a batch of its own, without padding."""
        return row_of(dict(inputs), row)

    @property
    def cuts_pixels(self) -> bool:
        """By default patches leave before the tower, which then has to take images of any size."""
        stage = self.build().stages[0]
        return stage.is_token and any(site.place == "pixels" for site in stage.known_sites or ())

    def processor(self) -> Any:
        """What reads the prompt as text, for strategies that ask for `question`; that of another model is its own."""
        return TinyWords()

    def build(self, **keys: Any) -> Pipeline:
        """A pipeline of this strategy alone; `keys` such as `at` and `keep` replace the usual ones."""
        budget = {} if {"keep", "keep_tokens"} & keys.keys() else dict(self.keep)
        return prunekit.load({"name": self.use, "stages": [{"use": self.use, **self.options, **budget, **keys}]})

    def run(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], **keys: Any) -> tuple[RunReport, Tensor]:
        """The report of a prefill with one decoding step, and its logits (B, 2, vocabulary)."""
        with Float64Throughout(), prunekit.apply(model, self.build(**keys), processor=self.processor()) as run:
            output = generate(model, inputs, max_new_tokens=2)
        assert run.report is not None
        return run.report, torch.stack(output.logits, 1)

    def exact(self, inputs: Mapping[str, Tensor], **keys: Any) -> Equivalence:
        """Three decode steps equal the masked reference."""
        return assert_equivalent(self.model(), self.build(**keys), inputs, steps=3, processor=self.processor())

    @property
    def cls(self) -> type[Any]:
        return plugins.registry().get_strategy(self.use)

    def test_says_where_it_comes_from(self) -> None:
        """The docstring of the class or of its module links the paper, or says that it is a baseline."""
        module = sys.modules[self.cls.__module__]
        text = f"{module.__doc__ or ''} {inspect.getdoc(self.cls) or ''}"
        assert "https://" in text or "baseline" in text.lower(), f"{self.cls} names no paper and is no baseline"
        assert plugins.registry().strategy_entry(self.use).summary, "the registered name needs a one-line summary"

    def test_is_frozen_configuration(self) -> None:
        """A frozen dataclass, so that an instance cannot remember anything between runs."""
        assert dataclasses.is_dataclass(self.cls) and self.cls.__dataclass_params__.frozen, (  # type: ignore[attr-defined]
            f"{self.cls} must be frozen"
        )
        model, pipeline = self.model(), self.build()
        before = dict(vars(pipeline.stages[0].strategy))
        with prunekit.apply(model, pipeline, processor=self.processor()):
            generate(model, self.inputs(), max_new_tokens=1)
        assert vars(pipeline.stages[0].strategy) == before

    def test_the_same_run_gives_the_same_result(self) -> None:
        model, inputs = self.model(), self.inputs(**RAGGED)
        (first, logits), (second, again) = self.run(model, inputs), self.run(model, inputs)
        assert first == second
        assert torch.equal(logits, again)

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """Each row alone gives the decisions and logits that it has in a batch with others."""
        model, inputs = self.model(), self.inputs(**RAGGED)
        together, logits = self.run(model, inputs)
        for row in range(together.samples):
            alone, single = self.run(model, self.row(inputs, row))
            assert [event.kept[row] for event in together.events] == [event.kept[0] for event in alone.events]
            assert together.layer_tokens[row] == alone.layer_tokens[0]
            assert (logits[row] - single[0]).abs().max() < 1e-9

    def test_equals_the_masked_reference(self) -> None:
        for rows in (RAGGED, MIXED):
            self.exact(self.inputs(**rows))


class LayerContract(StrategyContract):
    """A strategy that decides about layers only."""

    def test_every_token_stays(self) -> None:
        report, _ = self.run(self.model(), self.inputs(**RAGGED))
        assert report.events == ()
        assert report.kept_tokens == report.visual_tokens

    def test_the_plan_names_layers_of_the_model(self) -> None:
        report, _ = self.run(self.model(), self.inputs(**RAGGED))
        for plan in report.plans:
            assert plan.layers <= set(range(len(report.layer_tokens[0])))


class ImageContract(StrategyContract):
    """A strategy that makes images smaller."""

    def test_one_size_keeps_all_tokens(self) -> None:
        """Of a tower that takes one size; the report says through how many pixels it has seen."""
        report, _ = self.run(self.model(), self.inputs(**RAGGED))
        assert report.kept_tokens == report.visual_tokens
        assert report.events[0].resized is not None

    def test_any_size_leaves_the_tokens_of_the_smaller_image(self) -> None:
        """And equals the stock model's encoder on it."""
        model, inputs = tiny_llava(tower="pixtral"), tiny_inputs(**RAGGED, sizes=True)
        found = assert_equivalent(model, self.build(), inputs, steps=3, processor=self.processor())
        sizes = found.report.events[0].resized or ()
        cells = tuple(sum(height * width for height, width in row) // PATCH**2 for row in sizes)
        assert found.report.kept_tokens == cells


class TokenContract(StrategyContract):
    """A strategy that decides about visual tokens."""

    def allows(self, site: int | str) -> bool:
        """The strategy may act at this site, written as in a pipeline file."""
        return self.build().stages[0].sites.reason_against(Site.parse(site)) is None

    def test_text_stays(self) -> None:
        """What leaves a sample is visual tokens, as many as the report says."""
        report, _ = self.run(self.model(), self.inputs(**MIXED))
        at_end = any(event.site == "prefill_end" for event in report.events)
        left = report.kv_tokens if at_end else report.layer_tokens
        for prompt, visual, kept, layers in zip(
            report.prompt_tokens, report.visual_tokens, report.kept_tokens, left, strict=True
        ):
            assert layers[-1] == prompt - visual + kept

    def test_every_site_that_it_allows_is_exact(self) -> None:
        """Of each kind of place one, of decoder layers the first that it allows and the last."""
        layers = len(self.run(self.model(), self.inputs())[0].layer_tokens[0])
        tried = 0
        inside = [f"{layer}.{point}" for point in ("mid", "after") for layer in (0, layers - 1)]
        before = [layer for layer in (0, 1, layers - 1) if self.allows(layer)]
        for site in ("pixels", "vision.0.mid", "vision.0", "encoder", *(before or inside), "prefill_end"):
            if self.allows(site):
                result = self.exact(self.inputs(**RAGGED), at=site)
                assert result.report.events[0].site == str(site)
                tried += 1
        assert tried, "no site is allowed"

    def test_it_follows_another_stage(self) -> None:
        """Where an earlier stage has thinned the tokens, it chooses among the kept ones."""
        layers = len(self.run(self.model(), self.inputs())[0].layer_tokens[0])
        places = (
            layers - 2,
            f"{layers - 2}.mid",
            f"{layers - 2}.after",
            "encoder",
            "prefill_end",
            "vision.1",
            "pixels",
        )
        behind = next(site for site in places if self.allows(site))
        ahead = {"vision.1": "vision.0", "pixels": "pixels"}.get(str(behind), "encoder")
        first = {"use": DRAWN, "keep": 0.8, "at": ahead}
        second = {"use": self.use, **self.options, **self.keep, "at": behind}
        registry = with_own(plugins.registry())
        pipeline = prunekit.load({"name": self.use, "stages": [first, second]}, registry=registry)
        result = assert_equivalent(self.model(), pipeline, self.inputs(**MIXED), steps=2, processor=self.processor())
        for before, after in zip(*(event.kept for event in result.report.events), strict=True):
            assert set(after) <= set(before)


class KeepContract(TokenContract):
    """A token strategy that is told how many tokens to keep."""

    keep: ClassVar[Mapping[str, Any]] = {"keep": 0.4}

    def test_it_keeps_what_it_is_told_to(self) -> None:
        """Fractions of 16 and 32 tokens, rounded half up, and absolute numbers; `at_most` allows fewer, never more.

        Inside the tower every image is a sample of its own. Of several default sites the last one counts.
        """
        asked: list[tuple[dict[str, Any], tuple[int, ...]]] = [
            ({"keep": 0.25}, (8, 0, 4)),
            ({"keep": 0.47}, (15, 0, 8)),
            ({"keep": 0.01}, (1, 0, 1)),
            ({"keep_tokens": 7}, (7, 0, 7)),
            ({"keep_tokens": 16}, (16, 0, 16)),
        ]
        for keys, counts in asked:
            report, _ = self.run(self.model(), self.inputs(**MIXED), **keys)
            kept = tuple(map(len, report.events[-1].kept))
            if Site.parse(report.events[-1].site).in_tower:
                counts = tuple(counts[-1] * images for images in MIXED["images"])
            if self.at_most:
                # A pool leaves at least one token of each image, however few were asked for.
                limits = tuple(max(count, images) for count, images in zip(counts, MIXED["images"], strict=True))
                assert all(0 < got <= limit for got, limit in zip(kept, limits, strict=True) if limit), (keys, kept)
                assert kept[1] == 0
            else:
                assert kept == counts, keys

    def test_keeping_everything_is_dense(self) -> None:
        """With declared extras only the counts are, since an extra takes the slot of a visual token."""
        model, inputs = self.model(), self.inputs(**MIXED)
        report, logits = self.run(model, inputs, keep=1.0)
        assert report.kept_tokens == report.visual_tokens
        if self.build().stages[0].extras:
            return
        with Float64Throughout():
            dense = torch.stack(generate(model, inputs, max_new_tokens=2).logits, 1)
        assert (logits - dense).abs().max() < 1e-9


class DropAllContract(TokenContract):
    """A token strategy that leaves no visual token (`drops_all`)."""

    def test_nothing_is_left(self) -> None:
        report, _ = self.run(self.model(), self.inputs(**MIXED))
        assert report.kept_tokens == (0, 0, 0)


class RouterContract(KeepContract):
    """A router that decides about tokens and layers."""

    def test_as_many_layers_run_as_it_is_told(self) -> None:
        """For every sample, whatever it chooses; what it has to let run does run."""
        model, inputs = self.model(), self.inputs(**MIXED)
        shape = families.shape_of(model)
        protected = self.build().bind(shape).protected
        for count in range(max(len(protected), 1), shape.layers + 1):
            report, _ = self.run(model, inputs, keep_layers=count)
            for plan in report.plans:
                skipped = {layer for layer, action in plan if action is LayerAction.SKIP}
                assert len(skipped) == shape.layers - count and not skipped & protected

    def test_skipped_layers_are_exact(self) -> None:
        """As many as may be skipped."""
        shape = families.shape_of(self.model())
        least = max(len(self.build().bind(shape).protected), 1)
        for rows in (RAGGED, MIXED):
            self.exact(self.inputs(**rows), keep_layers=least)


def contract(
    use: str, options: Mapping[str, Any] | None = None, *, at_most: bool = False, keep: Mapping[str, Any] | None = None
) -> type[StrategyContract]:
    """A test class for the strategy registered as `use`; bind it to a name that begins with `Test`.

    options: YAML keys without which the strategy cannot be built. at_most: it may keep fewer tokens than asked for.
    keep: the budget of the tests that need just one; None is `{"keep": 0.4}` for a strategy that takes one.
    Raises UnknownName when nothing registered the name.
    """
    cls = plugins.registry().get_strategy(use)
    base: type[StrategyContract]
    if is_router(cls):
        base = RouterContract
    elif is_image(cls):
        base = ImageContract
    elif not any(implements(cls, hook) for hook in TOKEN_STARTS):
        base = LayerContract
    elif cls.__prunekit__.drops_all:
        base = DropAllContract
    else:
        base = KeepContract if takes_keep(cls) else TokenContract
    members: dict[str, Any] = {"use": use, "options": dict(options or {}), "at_most": at_most, "__doc__": base.__doc__}
    return type(f"Test_{use}", (base,), members | ({} if keep is None else {"keep": dict(keep)}))
