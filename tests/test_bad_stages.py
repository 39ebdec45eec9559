"""What a person may get wrong about sites, lists, routers and positions: every fault with its place, all at once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import (
    EncoderRows,
    Features,
    Keys,
    LayerAction,
    LayerPlan,
    ModelShape,
    Route,
    Rows,
    Site,
    Sites,
    hookimpl,
    strategy,
)
from prunekit.errors import PluginError, SpecError, Unsupported
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.strategy.decisions import TowerShape
from prunekit.strategy.sites import Keep

EVERYWHERE = Sites(tower=True, pixels=True, end=True)
SHAPE = ModelShape("stub", 10, 64, 4, 16, 1, 1, 128, 144, tower=TowerShape(6, 5, leading=1, projects_tokens=True))


@strategy(sites=EVERYWHERE)
class Score:
    @hookimpl
    def score_tokens(self, hidden: Any) -> Any: ...


@strategy(sites=Sites(decoder=False))
class Input:
    """Acts at the decoder input alone."""

    @hookimpl
    def score_tokens(self, hidden: Any) -> Any: ...


@strategy()
class Plain:
    """Takes the usual sites: the decoder input and decoder layers."""

    @hookimpl
    def score_tokens(self, hidden: Any) -> Any: ...


@strategy(sites=Sites(encoder=False))
class Later(Score):
    """Acts at decoder layers, and names none."""


@strategy()
class Previous(Score):
    @hookimpl
    def score_tokens(self, attention: Any) -> Any: ...


@strategy(inputs={"attention": Rows(layer="own")})
class Own(Previous):
    """Reads the layer that it stands in."""


@strategy(inputs={"attention": Rows(layer="next")})
class Ahead(Previous):
    """Looks ahead."""


@strategy(inputs={"attention": Rows(layer="previous"), "keys": Keys(layer="own")})
class Twice(Score):
    """Reads two layers at once."""

    @hookimpl
    def score_tokens(self, attention: Any, keys: Any) -> Any: ...


@strategy()
class Text(Score):
    @hookimpl
    def score_tokens(self, text: Any) -> Any: ...


@strategy(inputs={"encoder_attention": EncoderRows(layer=3), "features": (Features(), Features(projected=True))})
class Encoder(Score):
    @hookimpl
    def score_tokens(self, encoder_attention: Any, features: Any) -> Any: ...


@strategy(extras=("cls",))
class Cls(Score):
    @hookimpl
    def merge_tokens(self, extras: Any) -> Any: ...


@strategy()
class Running(Score):
    """Runs layers on the side."""

    @hookimpl
    def score_tokens(self, forward: Any) -> Any: ...


@strategy()
class Positions(Score):
    @hookimpl
    def score_tokens(self, positions: Any) -> Any: ...


@strategy(inputs={"attention": Rows(undecay=True)})
class Undecay(Previous):
    """Undoes what rotary positions do to far tokens."""


@strategy()
class Router:
    @hookimpl
    def route(self, embeds: Any) -> Route: ...


@strategy(sites=EVERYWHERE)
class TowerRouter(Router):
    """Allows sites that no router can have."""


@strategy(routes=("layers",))
class LayerRouter(Router):
    """Scores layers only."""


@strategy(routes=("tokens",))
class TokenRouter(Router):
    """Scores tokens only."""


@strategy(keep_layers="refused", routes=("layers",))
class Planner(Router):
    """Decides about layers by itself."""


@strategy(keep="optional", keep_layers="refused")
class OwnLayers(Router):
    """Decides about layers by itself, and about tokens by a budget if it is given one."""


@strategy()
class Plan:
    skip: tuple[int, ...]
    what: str = "skip"

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan({layer: LayerAction(self.what) for layer in self.skip})


STRATEGIES = (
    Score, Input, Plain, Later, Previous, Own, Ahead, Twice, Text, Encoder, Cls, Router, LayerRouter, TokenRouter,
    Planner, OwnLayers, Plan, Running, TowerRouter, Positions, Undecay,
)  # fmt: skip


def registry_of(*classes: type[Any]) -> Registry:
    filled = Registry("stub", "stub-dist 1.0")
    for cls in classes:
        filled.strategy(cls.__name__.lower(), f"{__name__}:{cls.__qualname__}")
    return filled


@pytest.fixture
def registry() -> Registry:
    return registry_of(*STRATEGIES)


def one(keys: str) -> str:
    """A pipeline of one stage, on line 2."""
    return f"stages:\n  - {{{keys}}}\n"


def two(first: str, second: str) -> str:
    return f"stages:\n  - {{{first}}}\n  - {{{second}}}\n"


LISTS: dict[str, tuple[str, list[str]]] = {
    "nothing in it": (one("use: score, at: [], keep: 0.5"), ["2:22: at: is empty (name at least one site, such as 2)"]),
    "no site in it": (
        one("use: score, at: [2, encodr], keep: 0.5"),
        ["2:26: at[1]: 'encodr' is not a site; use 'encoder' (the decoder input) or a layer number such as 2 "
         "(did you mean 'encoder'?)"],
    ),
    "a list in it": (one("use: score, at: [2, [4]], keep: 0.5"), ["2:26: at[1]: must be a site, not a list (such as"]),
    "two that are none": (
        one("use: score, at: [true, x], keep: 0.5"),
        ["2:23: at[0]: True is not a site", "2:29: at[1]: 'x' is not a site"],
    ),
    "falling": (
        one("use: score, at: [4, 2], keep: 0.5"),
        ["2:26: at[1]: '2' stands after '4' (list sites in the order of the data, each once)"],
    ),
    "the decoder input after a layer": (
        one("use: score, at: [4, encoder], keep: 0.5"),
        ["2:26: at[1]: 'encoder' stands after '4'"],
    ),
    "after and then inside": (
        one("use: score, at: [2.after, 2.mid], keep: 0.5"),
        ["2:32: at[1]: '2.mid' stands after '2.after'"],
    ),
    "twice": (one("use: score, at: [2, 4, 4], keep: 0.5"), ["2:29: at[2]: '4' stands here twice"]),
    "fewer budgets": (
        one("use: score, at: [2, 4, 6], keep: [0.5, 0.25]"),
        ["2:39: keep: names 2 budgets for 3 sites (one for each site in `at`, or a single one for all)"],
    ),
    "more budgets": (
        one("use: score, at: [2, 4], keep_tokens: [64, 32, 16]"),
        ["2:43: keep_tokens: names 3 budgets for 2 sites"],
    ),
    "budgets for one site": (
        one("use: score, at: 2, keep: [0.5, 0.25]"),
        ["2:31: keep: names 2 budgets, but the stage acts at one site (give `at` a list of as many sites, or one bud"],
    ),
    "budgets without sites": (
        one("use: score, keep: [0.5, 0.25]"),
        ["2:24: keep: names 2 budgets, but the stage acts at one site"],
    ),
    "no budgets": (one("use: score, at: [2, 4], keep: []"), ["2:36: keep: names 0 budgets for 2 sites"]),
    "a bad budget": (
        one("use: score, at: [2, 4], keep: [0.5, 1.25]"),
        ["2:42: keep[1]: must be a fraction in (0, 1], not 1.25 (for a number of tokens write `keep_tokens`, for per"],
    ),
    "two bad budgets": (
        one("use: score, at: [2, 4], keep_tokens: [0, half]"),
        ["2:44: keep_tokens[0]: must be a whole number of tokens, at least 1, not 0 (dropping all has",
         "2:47: keep_tokens[1]: must be a whole number of tokens, at least 1, not 'half'"],
    ),
    "rising": (
        one("use: score, at: [2, 4, 6], keep: [0.5, 0.25, 0.3]"),
        ["2:51: keep[2]: asks for 0.3 of original, but the site before it leaves only 0.25 of original (budgets must"],
    ),
    "rising tokens": (
        one("use: score, at: [2, 4], keep_tokens: [32, 64]"),
        ["2:48: keep_tokens[1]: asks for 64 tokens, but the site before it leaves only 32 tokens"],
    ),
    "two lists of budgets": (
        one("use: score, at: [2, 4], keep: [0.5, 0.25], keep_tokens: [9, 9]"),
        ["2:49: keep_tokens: this stage has two budgets"],
    ),
    "more than there are": (
        one("use: score, at: [2, 4], keep_tokens: [200, 64]"),
        ["2:44: keep_tokens[0]: asks for 200 of the 144 visual tokens that this model has per image"],
    ),
    "more than another stage leaves": (
        two("use: score, keep: 0.25", "use: score, at: [2, 4], keep: [0.5, 0.2]"),
        ["3:37: keep[0]: asks for 0.5 of original, but stages[0] score leaves only 0.25 of original"],
    ),
    "more than a list leaves there": (
        two("use: score, at: [2, 8], keep: [0.5, 0.25]", "use: score, at: 9, keep: 0.3"),
        ["3:31: keep: asks for 0.3 of original, but stages[0] score at '8' leaves only 0.25 of original"],
    ),
    "begins before the stage above": (
        two("use: score, at: 4, keep: 0.5", "use: score, at: [3, 5], keep: 0.25"),
        ["3:23: at[0]: stages are out of order: 'score' at '3' stands after 'score' at '4' (list stages in the order"],
    ),
    "a layer beyond": (
        one("use: score, at: [2, 10, 11], keep: 0.5"),
        ["2:26: at[1]: there is no layer 10: the model has layers 0 to 9", "2:30: at[2]: there is no layer 11"],
    ),
    "for a layer strategy": (
        one("use: plan, skip: [1], at: [2, 4], keep: [0.5, 0.2]"),
        ["2:28: at: 'plan' decides about layers, so it takes no `at`", "2:40: keep: 'plan' decides about layers"],
    ),
}  # fmt: skip

SITES: dict[str, tuple[str, list[str]]] = {
    "no such place": (one("use: score, at: deocder, keep: 1"), ["2:22: at: 'deocder' is not a site"]),
    "no such point": (one("use: score, at: 2.before, keep: 1"), ["2:22: at: '2.before' is not a site"]),
    "a number with a point": (
        one("use: score, at: 2.5, keep: 1"),
        ["2:22: at: 2.5 is not a site (layers are whole numbers, such as 2)"],
    ),
    "nothing": (one("use: score, at: ~, keep: 1"), ["2:22: at: must be a site, not nothing (such as encoder, 2 or"]),
    "a mapping": (one("use: score, at: {layer: 2}, keep: 1"), ["2:22: at: must be a site, not a mapping"]),
    "decoding": (one("use: score, at: decode, keep: 1"), ["2:22: at: site 'decode' is reserved: decoding steps see"]),
    "inside a layer beyond": (
        one("use: score, at: 10.mid, keep: 1"),
        ["2:22: at: there is no layer 10: the model has layers 0 to 9 (name an earlier layer)"],
    ),
    "after a layer beyond": (one("use: score, at: 12.after, keep: 1"), ["2:22: at: there is no layer 12"]),
    "a block beyond": (
        one("use: score, at: vision.6, keep: 1"),
        ["2:22: at: there is no tower block 6: the tower has blocks 0 to 5 (name an earlier one)"],
    ),
    "tower not allowed": (
        one("use: plain, at: vision.3, keep: 1"),
        ["2:22: at: 'plain' cannot act at 'vision.3': it needs 'encoder' or a decoder layer, 0 or later"],
    ),
    "end not allowed": (one("use: plain, at: prefill_end, keep: 1"), ["2:22: at: 'plain' cannot act at 'prefill_end'"]),
    "pixels not allowed": (one("use: plain, at: pixels, keep: 1"), ["2:22: at: 'plain' cannot act at 'pixels'"]),
    "pixels": (
        one("use: score, at: pixels, keep: 1"),
        ["2:22: at: how images reach this model's vision tower is not known"],
    ),
    "decoder not allowed": (one("use: input, at: 2.mid, keep: 1"), ["2:22: at: 'input' cannot act at '2.mid'"]),
    "one of a list not allowed": (
        one("use: plain, at: [encoder, 3, prefill_end], keep: 1"),
        ["2:35: at[2]: 'plain' cannot act at 'prefill_end'"],
    ),
    "nothing has run": (
        one("use: previous, at: 0, keep: 1"),
        ["2:25: at: 'previous' cannot act at '0': attention of the layer before is not there at '0' (name a la"],
    ),
    "nothing has run inside": (
        one("use: previous, at: 0.mid, keep: 1"),
        ["2:25: at: 'previous' cannot act at '0.mid': attention of the layer before is not there"],
    ),
    "own layer before it": (
        one("use: own, at: 3, keep: 1"),
        ["2:20: at: 'own' cannot act at '3': attention of the layer that the site stands in is not there at '3'"],
    ),
    "own layer at the input": (one("use: own, at: encoder, keep: 1"), ["2:20: at: 'own' cannot act at 'encoder'"]),
    "looking ahead from inside": (
        one("use: ahead, at: 3.mid, keep: 1"),
        ["2:22: at: 'ahead' cannot act at '3.mid': attention of the layer ahead is not there at '3.mid'"],
    ),
    "looking ahead from the end": (one("use: ahead, at: 9.after, keep: 1"), ["2:22: at: 'ahead' cannot act at '9.a"]),
    "attention in the tower": (
        one("use: previous, at: vision.3, keep: 1"),
        ["2:25: at: 'previous' asks for attention, which is not there yet at 'vision.3' (name 'encoder' or a later"],
    ),
    "text in the tower": (
        one("use: text, at: vision.2, keep: 1"),
        ["2:21: at: 'text' asks for text, which is not there yet at 'vision.2'"],
    ),
    "extras in the decoder": (
        one("use: cls, at: 2, keep: 1"),
        ["2:20: at: 'cls' takes extras (cls), which are there at 'encoder' only (name 'encoder')"],
    ),
    "inside a skipped layer": (
        two("use: plan, skip: [3]", "use: score, at: 3.mid, keep: 1"),
        ["3:22: at: 'score' cuts inside layer 3, which does not simply run: another stage says skip (move it, or let"],
    ),
    "inside a layer without its MLP": (
        two("use: plan, skip: [3], what: skip_mlp", "use: own, at: 3.mid, keep: 1"),
        ["3:20: at: 'own' cuts inside layer 3, which does not simply run: another stage says skip_mlp"],
    ),
    "inside a frozen layer": (
        two("use: plan, skip: [3], what: freeze", "use: score, at: 3.mid, keep: 1"),
        ["3:22: at: 'score' cuts inside layer 3, which does not simply run: another stage says freeze"],
    ),
    "own layer without attention": (
        two("use: plan, skip: [3], what: skip_attention", "use: own, at: 3.after, keep: 1"),
        ["3:20: at: 'own' reads the attention of layer 3, which another stage skips"],
    ),
    "keys of a filled layer": (
        two("use: plan, skip: [3], what: fill_kv", "use: twice, at: 3.mid, keep: 1"),
        ["3:22: at: 'twice' reads the keys of layer 3, which another stage skips"],
    ),
    "last layer at the end of prefill": (
        two("use: plan, skip: [9]", "use: previous, at: prefill_end, keep: 1"),
        ["3:25: at: 'previous' reads the attention of layer 9, which another stage skips"],
    ),
}  # fmt: skip

KEEP_LAYERS: dict[str, tuple[str, list[str]]] = {
    "none": (
        one("use: router, keep_layers: 0"),
        ["2:32: keep_layers: must be a number of layers, at least 1, or a fraction of them in (0, 1], not 0 (a model"],
    ),
    "none as a fraction": (one("use: router, keep_layers: 0.0"), ["2:32: keep_layers: must be a number of layers"]),
    "negative": (one("use: router, keep_layers: -2"), ["2:32: keep_layers: must be a number of layers"]),
    "more than all": (one("use: router, keep_layers: 1.5"), ["2:32: keep_layers: must be a number of layers"]),
    "text": (one("use: router, keep_layers: half"), ["2:32: keep_layers: must be a number of layers, at least 1"]),
    "quoted": (one("use: router, keep_layers: '8'"), ["2:32: keep_layers: must be a number of layers"]),
    "true": (one("use: router, keep_layers: true"), ["2:32: keep_layers: must be a number .*not true"]),
    "nothing": (one("use: router, keep_layers: ~"), ["2:32: keep_layers: must be a number .*not nothing"]),
    "not a number": (one("use: router, keep_layers: .nan"), ["2:32: keep_layers: must be a number .*not nan"]),
    "infinite": (one("use: router, keep_layers: .inf"), ["2:32: keep_layers: must be a number .*not inf"]),
    "a list": (one("use: router, keep_layers: [8, 4]"), ["2:32: keep_layers: must be a number .*not a list"]),
    "a typing error": (
        one("use: router, keep_layer: 8, keep: 0.5"),
        ["2:19: keep_layer: unknown key (did you mean 'keep_layers'? known keys: use, at, keep, keep_tokens, keep_of,"],
    ),
    "more than the model has": (
        one("use: router, keep_layers: 11"),
        ["2:32: keep_layers: asks for 11 layers, but the model has 10 (name at most 10, or a fraction)"],
    ),
    "of a token strategy": (
        one("use: score, keep: 0.5, keep_layers: 4"),
        ["2:29: keep_layers: 'score' decides about tokens, so it takes no `keep_layers` (remove it)"],
    ),
    "of a layer strategy": (
        one("use: plan, skip: [1], keep_layers: 4"),
        ["2:28: keep_layers: 'plan' decides by itself and takes no `keep_layers`"],
    ),
    "of a router of tokens": (
        one("use: tokenrouter, keep: 0.5, keep_layers: 4"),
        ["2:35: keep_layers: 'tokenrouter' decides about tokens, so it takes no `keep_layers`"],
    ),
    "of one that decides by itself": (
        one("use: planner, keep_layers: 4"),
        ["2:20: keep_layers: 'planner' decides by itself and takes no `keep_layers`"],
    ),
    "of one that decides about layers by itself": (
        one("use: ownlayers, keep: 0.5, keep_layers: 4"),
        ["2:33: keep_layers: 'ownlayers' decides about layers by itself and takes no `keep_layers`"],
    ),
    "missing": (
        one("use: layerrouter"),
        ["2:5: keep_layers: is missing; 'layerrouter' needs `keep_layers` (how many decoder layers run, such as 24,"],
    ),
    "beside static skips": (
        two("use: plan, skip: [3, 4]", "use: router, keep_layers: 9"),
        ["3:32: keep_layers: asks for 9 layers, but another stage skips 3, 4, which leaves 8 (keep fewer layers, or"],
    ),
    "below what is read": (
        two("use: layerrouter, keep_layers: 2", "use: previous, at: [2, 4, 6], keep: 0.5"),
        ["2:37: keep_layers: leaves 2 layers, but other stages read, cut inside or plan layers 1, 3, 5 (keep at least"],
    ),
    "below what is cut": (
        two("use: layerrouter, keep_layers: 0.1", "use: score, at: [2.mid, 4.mid], keep: 0.5"),
        ["2:37: keep_layers: leaves 1 layers, but other stages read, cut inside or plan layers 2, 4"],
    ),
    "below what is planned": (
        two("use: plan, skip: [3, 4], what: freeze", "use: router, keep_layers: 1"),
        ["3:32: keep_layers: leaves 1 layers, but other stages read, cut inside or plan layers 3, 4"],
    ),
}  # fmt: skip

ROUTERS: dict[str, tuple[str, list[str]]] = {
    "no budget": (
        one("use: router"),
        ["2:5: keep: is missing; 'router' needs `keep` or `keep_tokens` or `keep_layers`"],
    ),
    "a site for nothing": (
        one("use: router, at: 2, keep_layers: 4"),
        ["2:19: at: says where tokens leave, but there is no `keep` (add `keep` or `keep_tokens`, or remove it)"],
    ),
    "tokens of a router of layers": (
        one("use: layerrouter, keep_layers: 4, at: 2, keep_tokens: 9"),
        ["2:40: at: 'layerrouter' decides about layers, so it takes no `at`", "2:47: keep_tokens: 'layerrouter' dec"],
    ),
    "budget of one that decides by itself": (
        one("use: planner, keep: 0.5"),
        ["2:20: keep: 'planner' decides about layers, so it takes no `keep`"],
    ),
    "in the tower": (
        one("use: router, at: vision.2, keep: 0.5"),
        ["2:23: at: 'router' cannot act at 'vision.2'"],
    ),
    "before others at the decoder input": (
        two("use: router, at: encoder, keep: 0.5", "use: score, at: encoder, keep: 0.25"),
        ["3:22: at: 'router' routes after all other stages at the decoder input, so also after this one (list it be"],
    ),
    "two about layers": (
        two("use: router, keep_layers: 8", "use: planner"),
        ["3:11: use: stages[0] router already decides which layers run (let one router decide about layers)"],
    ),
    "two that decide by themselves": (
        two("use: planner", "use: ownlayers"),
        ["3:11: use: stages[0] planner already decides which layers run"],
    ),
    "two with budgets of layers": (
        two("use: router, keep: 0.5, keep_layers: 8", "use: layerrouter, keep_layers: 4"),
        ["3:11: use: stages[0] router already decides which layers run"],
    ),
    "more than is left": (
        two("use: score, keep: 0.25", "use: tokenrouter, at: 2, keep: 0.5"),
        ["3:37: keep: asks for 0.5 of original, but stages[0] score leaves only 0.25 of original"],
    ),
    "after everything is gone": (
        two("use: router, at: [2, 3], keep: [0.5, 0.6]", "use: score, at: 2, keep: 0.7"),
        ["2:43: keep[1]: asks for 0.6 of original, but the site before it"],
    ),
    "no key of a router": (one("use: router, keep: 1, depth: 2"), ["2:28: depth: unknown key (known keys: use, at, k"]),
}  # fmt: skip

POSITIONS: dict[str, tuple[str, list[str]]] = {
    text: (
        f"positions: {text}\n" + one("use: score, keep: 0.5"),
        [f"1:12: positions: must be 'keep' or 'renumber', {said}"],
    )
    for text, said in {
        "renumbr": "not 'renumbr' (did you mean 'renumber'?)",
        "Keep": "not 'Keep' (did you mean 'keep'?)",
        "original": "not 'original' ('renumber' closes the gaps that dropped tokens leave)",
        "true": "not true",
        "1": "not 1",
        "0.5": "not 0.5",
        "~": "not nothing",
        "''": "not ''",
        "[keep]": "not a list",
        "{keep: 1}": "not a mapping",
        "'renumber '": "not 'renumber ' (did you mean 'renumber'?)",
    }.items()
} | {
    "a typing error": ("position: keep\n" + one("use: score, keep: 1"), ["1:1: position: unknown key (did you mean"]),
    "in a stage": (one("use: score, keep: 1, positions: keep"), ["2:27: positions: unknown key (known keys: use, at,"]),
}  # fmt: skip


def names(table: dict[str, Any], prefix: str) -> list[Any]:
    return [pytest.param(*case, id=f"{prefix}: {name}") for name, case in table.items()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *names(LISTS, "lists"), *names(SITES, "sites"), *names(KEEP_LAYERS, "keep_layers"), *names(ROUTERS, "routers"),
        *names(POSITIONS, "positions"),
    ],
)  # fmt: skip
def test_every_fault_with_its_place(registry: Registry, text: str, said: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        build.build(text, registry=registry).bind(SHAPE)
    found = [
        re.sub(r"stages\[\d\]\.", "", str(fault).removeprefix("<inline>:"), count=1) for fault in caught.value.faults
    ]
    assert len(found) == len(said), found
    for one_said, one_found in zip(said, found, strict=True):
        pattern = ".*".join(map(re.escape, one_said.split(".*")))
        assert re.match(pattern, one_found), one_found


def test_there_are_at_least_ten_of_each() -> None:
    assert all(len(table) >= 10 for table in (LISTS, SITES, KEEP_LAYERS, ROUTERS, POSITIONS))


def test_defaults_of_several_sites_are_a_schedule() -> None:
    several: Any = (Site(8), Site(16))
    with pytest.raises(ValueError, match=r"it takes one Site; several sites are a schedule"):
        Sites(default=several)
    with pytest.raises(PluginError, match=r"gave \(Site\(.*it gives one Site, and several sites are a schedule"):
        Sites(default=lambda layers: several).resolve(32)


def test_a_default_that_is_not_allowed_is_a_site_that_is_missing(registry: Registry) -> None:
    with pytest.raises(SpecError, match=r"2:5: stages\[0\]\.at: is missing: 'later' needs a decoder layer, 0 or later"):
        build.build(one("use: later, keep: 1"), registry=registry).bind(SHAPE)


@pytest.mark.parametrize("keys", ["use: score, at: vision.3, keep: 1", "use: score, at: vision.0.mid, keep: 1"])
def test_a_tower_that_cannot_be_cut(registry: Registry, keys: str) -> None:
    with pytest.raises(SpecError, match=r"2:22: .*this model's vision tower cannot be cut \(cut at 'encoder' or later"):
        build.build(one(keys), registry=registry).bind(dataclasses.replace(SHAPE, tower=None))


@pytest.mark.parametrize(("use", "name"), [("encoder", "encoder_attention"), ("cls", "extras")])
def test_a_tower_that_cannot_be_read(registry: Registry, use: str, name: str) -> None:
    built = build.build(one(f"use: {use}, keep: 1"), registry=registry)
    assert built.bind(SHAPE).cuts[0].site == Site(None)
    with pytest.raises(SpecError, match=f"'{use}' asks for {name}, but this model's vision tower cannot be read"):
        built.bind(dataclasses.replace(SHAPE, tower=None))


@pytest.mark.parametrize(
    ("keys", "changed", "said"),
    [
        ("use: score, at: 2.mid, keep: 1", {"cuts_inside": False},
         "2:22: .*the layers of stub have no state between attention and MLP that could be cut"),
        ("use: running, at: 2.mid, keep: 1", {},
         "2:24: .*'running' asks for forward, but no layer can be run from '2.mid'"),
        ("use: running, at: prefill_end, keep: 1", {},
         "2:24: .*'running' asks for forward, but no layer can be run from 'prefill_end'"),
        ("use: positions, at: 2, keep: 1", {"rotary": False},
         "2:26: .*'positions' asks for positions, but the stub decoder rotates nothing"),
        ("use: undecay, at: 2, keep: 1", {"rotary": False},
         "2:24: .*'undecay' undoes the decay of rotary positions, but the stub decoder has none"),
        ("use: towerrouter, at: vision.1, keep: 1", {},
         "2:28: .*'towerrouter' decides at the decoder input, after 'vision.1'"),
        ("use: score, at: vision.3, keep: 1", {"tower": TowerShape(6, 2)},
         r"2:22: .*image features are taken after block 2, so a cut behind block 3 changes nothing .* \(cut earlier"),
        ("use: score, at: vision.0, keep: 1", {"tower": TowerShape(6, -1)},
         "2:22: .*image features are the tower's input, so a cut behind block 0 changes nothing"),
        ("use: score, at: [vision.0, 2], keep: 1", {},
         r"2:23: .*in the tower a sample is an image, behind it a prompt, .* \(split the stage in two\)$"),
    ],
)  # fmt: skip
def test_models_that_cannot_do_it(registry: Registry, keys: str, changed: dict[str, Any], said: str) -> None:
    built = build.build(one(keys), registry=registry)
    with pytest.raises(SpecError, match=said):
        built.bind(dataclasses.replace(SHAPE, **changed))


def test_positions_and_attention_of_the_model(registry: Registry) -> None:
    """A model without rotations cannot renumber; masks of an unknown attention cannot be cut, but a pipeline without
    effect needs none.
    """
    renumbering = build.build({**yaml.safe_load(one("use: score, keep: 0.5")), "positions": "renumber"}, (), registry)
    with pytest.raises(SpecError, match="positions: the stub decoder has no rotary positions to renumber"):
        renumbering.bind(dataclasses.replace(SHAPE, rotary=False))
    strange = dataclasses.replace(SHAPE, attention="flex_attention")
    with pytest.raises(Unsupported, match="'flex_attention' is not supported by this version; load the model with"):
        build.build(one("use: score, keep: 0.5"), registry=registry).bind(strange)
    idle = {"stages": [{"use": "dense"}]}
    assert not build.build(idle).bind(strange).acts


PLACES = (
    "vision.1.mid", "vision.1", "vision.2", "encoder", "0", "0.mid", "0.after", "1", "9.after", "prefill_end",
)  # fmt: skip
GOOD: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "one budget for all sites": (
        one("use: score, at: [encoder, 2, 4.mid], keep: 0.5"),
        [("encoder", "0.5 of original"), ("2", "0.5 of original"), ("4.mid", "0.5 of original")],
    ),
    "equal budgets": (
        one("use: score, at: [2, 4], keep: [0.5, 0.5]"),
        [("2", "0.5 of original"), ("4", "0.5 of original")],
    ),
    "a list of one": (one("use: score, at: [2], keep: [0.5]"), [("2", "0.5 of original")]),
    "fractions of what is left may rise": (
        one("use: score, at: [2, 4], keep: [0.25, 0.5], keep_of: current"),
        [("2", "0.25 of current"), ("4", "0.5 of current")],
    ),
    "all sites in order": (
        two(*(f"use: score, at: [{', '.join(sites)}], keep: 1" for sites in (PLACES[:3], PLACES[3:]))),
        [(place, "1 of original") for place in PLACES],
    ),
    "stages between the sites of another": (
        two("use: score, at: [2, 6], keep: [0.5, 0.25]", "use: score, at: 4, keep: 0.3"),
        [("2", "0.5 of original"), ("4", "0.3 of original"), ("6", "0.25 of original")],
    ),
    "own layer after it": (one("use: own, at: 0.after, keep: 1"), [("0.after", "1 of original")]),
    "ahead from the decoder input": (
        one("use: ahead, at: [encoder, 9], keep: 1"),
        [("encoder", "1 of original"), ("9", "1 of original")],
    ),
    "a router after a stage at the decoder input": (
        two("use: score, keep: 0.5", "use: router, keep_tokens: 9, keep_layers: 8"),
        [("encoder", "0.5 of original"), ("encoder", "9 tokens")],
    ),
    "two routers, one of tokens and one of layers": (
        two("use: router, keep: 0.5", "use: router, keep_layers: 8"),
        [("encoder", "0.5 of original")],
    ),
    "a router of layers cuts nothing": (one("use: router, keep_layers: 0.75"), []),
    "one that decides by itself": (one("use: planner"), []),
    "about layers by itself": (one("use: ownlayers"), []),
    "about layers by itself, about tokens by budget": (
        one("use: ownlayers, keep: 0.5"),
        [("encoder", "0.5 of original")],
    ),
    "inside a layer without attention": (
        two("use: plan, skip: [3], what: skip_attention", "use: score, at: 3.mid, keep: 1"),
        [("3.mid", "1 of original")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_just_fits(registry: Registry, name: str) -> None:
    text, expected = GOOD[name]
    built = build.build(text, registry=registry)
    bound = built.bind(SHAPE)
    assert [(str(cut.site), str(cut.keep) if cut.keep else None) for cut in bound.cuts] == expected
    again = build.build(built.resolved, registry=registry)
    assert (again.resolved, again.sha) == (built.resolved, built.sha)


def test_cuts_know_their_number_and_their_layer(registry: Registry) -> None:
    bound = build.build(one("use: score, at: [encoder, 2, 2.mid, 2.after, 5], keep: 1"), registry=registry).bind(SHAPE)
    assert [cut.number for cut in bound.cuts] == [0, 1, 2, 3, 4]
    assert [cut.site.reach for cut in bound.cuts] == [0, 2, 3, 3, 5]
    assert len({id(cut.stage) for cut in bound.cuts}) == 1
    assert bound.cuts[2].label == "stages[0] score at '2.mid'"


def test_what_routers_must_let_run(registry: Registry) -> None:
    bound = build.build(
        two("use: layerrouter, keep_layers: 5", "use: twice, at: [3.mid, 8.after], keep: 0.5"), registry=registry
    ).bind(SHAPE)
    assert bound.protected == {2, 3, 8}
    assert (bound.layer_budget, [stage.use for stage in bound.routers]) == (5, ["layerrouter"])
    half = build.build(one("use: router, keep_layers: 0.45"), registry=registry)
    assert half.bind(SHAPE).layer_budget == 5  # half up
    assert half.stages[0].keep_layers == Keep(0.45)
    for text in ("use: planner", "use: ownlayers", "use: ownlayers, keep: 0.5"):
        bound = build.build(one(text), registry=registry).bind(SHAPE)
        assert bound.layer_budget is None and bound.routers[0].decides_layers
    assert not build.build(one("use: router, keep: 0.5"), registry=registry).stages[0].decides_layers


def test_looking_ahead_protects_nothing(registry: Registry) -> None:
    bound = build.build(one("use: ahead, at: [2, 4], keep: 0.5"), registry=registry).bind(SHAPE)
    assert bound.protected == frozenset()


def test_every_new_key_is_in_the_hash(registry: Registry) -> None:
    texts = [
        one("use: router, keep: 0.5"), one("use: router, keep: 0.5, keep_layers: 8"),
        one("use: router, keep: 0.5, keep_layers: 0.8"), one("use: router, keep: 0.5, at: [encoder, 2]"),
        one("use: router, keep: [0.5, 0.25], at: [encoder, 2]"), one("use: router, keep: 0.5, at: 2.mid"),
        "positions: renumber\n" + one("use: router, keep: 0.5"),
    ]  # fmt: skip
    built = [build.build(text, registry=registry) for text in texts]
    assert len({each.sha for each in built}) == len(texts)
    assert "keep_layers: 8\n" in built[1].resolved and "keep_layers: 0.8\n" in built[2].resolved
    assert "at:\n  - encoder\n  - 2\n  keep:\n  - 0.5\n  - 0.25\n" in built[4].resolved
    assert "positions: renumber\n" in built[6].resolved and built[6].positions == "renumber"
    same = build.build("positions: keep\n" + one("use: router, at: [encoder], keep: [0.5]"), registry=registry)
    assert same.sha == built[0].sha


PLACED = ["vision.1", "encoder", 0, 2, "2.mid", "2.after", 3, "5.mid", 9, "9.after", "prefill_end"]
ODD = st.sampled_from([12, "x", None, 0.5, True, [], "vision.6"])
FRACTIONS, TOKENS = [1, 0.5, 0.4, 0.25, 0.1], [200, 144, 64, 32, 9, 1]


@st.composite
def stages_of_one_kind(draw: st.DrawFn) -> dict[str, Any]:
    """A stage that is often right: sites and budgets in order, keys that its kind takes, and now and then not."""
    use = draw(st.sampled_from([cls.__name__.lower() for cls in STRATEGIES]))
    stage: dict[str, Any] = {"use": use}
    sites = draw(
        st.lists(st.sampled_from(PLACED), min_size=1, max_size=3, unique=True).map(
            lambda x: sorted(x, key=PLACED.index)
        )
    )
    count = len(sites)
    budget, values = draw(st.sampled_from([("keep", FRACTIONS), ("keep_tokens", TOKENS)]))
    keeps = sorted(draw(st.lists(st.sampled_from(values), min_size=count, max_size=count)), reverse=True)
    if use == "plan":
        stage["skip"] = draw(st.lists(st.integers(0, 10), max_size=3))
        stage["what"] = draw(st.sampled_from(["skip", "freeze", "fill_kv", "skip_mlp"]))
    elif "router" in use:
        if use != "layerrouter" and draw(st.booleans()):
            stage |= {"at": sites, budget: keeps}
        if use != "tokenrouter" or not draw(st.booleans()):
            stage["keep_layers"] = draw(st.sampled_from([1, 3, 10, 0.5, 1.0]))
    elif use != "planner":
        stage |= {"at": draw(st.sampled_from([sites, sites[0]])), budget: keeps[0]}
        if isinstance(stage["at"], list) and draw(st.booleans()):
            stage[budget] = keeps
        if budget == "keep" and draw(st.booleans()):
            stage["keep_of"] = "current"
    if draw(st.integers(0, 9)) == 0:
        stage[draw(st.sampled_from(["at", "keep", "keep_tokens", "keep_of", "keep_layers"]))] = draw(ODD)
    return stage


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(stages_of_one_kind(), min_size=1, max_size=3), st.sampled_from([144, None]))
def test_whatever_is_accepted_makes_sense(stages: list[dict[str, Any]], visual: int | None) -> None:
    shape = dataclasses.replace(SHAPE, visual_tokens=visual)
    try:
        built = build.build({"stages": stages}, registry=registry_of(*STRATEGIES))
        bound = built.bind(shape)
    except SpecError as error:
        assert error.faults and all(fault.key and fault.message for fault in error.faults)
        return
    assert list(bound.cuts) == sorted(bound.cuts, key=lambda cut: (cut.site, cut.stage.index))
    fractions = [
        cut.keep.fraction for cut in bound.cuts if cut.keep and cut.keep.fraction and cut.keep.of == "original"
    ]
    assert fractions == sorted(fractions, reverse=True)
    budget = bound.layer_budget
    assert budget is None or len(bound.protected) <= budget <= shape.layers
    again = build.build(built.resolved, registry=registry_of(*STRATEGIES))
    assert (again.resolved, again.sha) == (built.resolved, built.sha)
    assert again.bind(shape).cuts == tuple(
        dataclasses.replace(cut, stage=again.stages[cut.stage.index]) for cut in bound.cuts
    )


def told(registry: Registry, text: str) -> str:
    """The one fault of a pipeline on the model of this file."""
    with pytest.raises(SpecError) as caught:
        build.build(text, registry=registry).bind(SHAPE)
    (fault,) = caught.value.faults
    return str(fault)


def declared(base: type[Any], **keywords: Any) -> Registry:
    """A registry with a subclass of `base` that says so much more, as `mine`."""
    cls = strategy(**keywords)(type("Mine", (base,), {"__module__": __name__}))
    globals()["Mine"] = cls
    return registry_of(cls)


def binds(registry: Registry, *texts: str) -> None:
    for text in texts:
        assert build.build(text, registry=registry).bind(SHAPE).acts


class TestWhatAHintNamesWorks:
    """Whoever does what a message says has a pipeline that binds."""

    @pytest.mark.parametrize("site", ["encoder", "0"])
    def test_attention_where_no_layer_has_run(self, registry: Registry, site: str) -> None:
        said = told(registry, one(f"use: previous, at: {site}, keep: 0.5"))
        assert "(name a layer that another runs before, such as 1; in the strategy Rows(layer='next') reads the" in said
        assert said.endswith("layer ahead, or optional=True gives None there)")
        binds(registry, one("use: previous, at: 1, keep: 0.5"), one(f"use: ahead, at: {site}, keep: 0.5"))
        maybe = declared(Previous, inputs={"attention": Rows(optional=True)})
        binds(maybe, one(f"use: mine, at: {site}, keep: 0.5"))

    def test_the_own_layer(self, registry: Registry) -> None:
        said = told(registry, one("use: own, at: 3, keep: 0.5"))
        assert "(name '3.mid' or '3.after'; Sites(default=Site.parse('2.after'), encoder=False, points=" in said
        binds(registry, one("use: own, at: 3.mid, keep: 0.5"), one("use: own, at: 3.after, keep: 0.5"))
        assert "(name a layer, such as '2.mid'; " in told(registry, one("use: own, at: encoder, keep: 0.5"))
        sites = Sites(default=Site.parse("2.after"), encoder=False, points=("mid", "after"))
        assert "another point of the layer" in told(declared(Own, sites=sites), one("use: mine, at: 3, keep: 0.5"))

    def test_the_layer_ahead(self, registry: Registry) -> None:
        assert "(name an earlier site, such as '3')" in told(registry, one("use: ahead, at: 3.mid, keep: 0.5"))
        binds(registry, one("use: ahead, at: 3, keep: 0.5"))

    @pytest.mark.parametrize(
        ("sites", "site", "code"),
        [
            (Sites(tower=True, encoder=False, decoder=False), "vision.5", "Site.parse('vision.5')"),
            (Sites(encoder=False, lowest=2), "2", "Site(2)"),
            (Sites(encoder=False, points=("after",)), "0.after", "Site.parse('0.after')"),
            (Sites(encoder=False, decoder=False, end=True), "prefill_end", "Site.parse('prefill_end')"),
        ],
    )
    def test_a_strategy_without_a_default_site(self, sites: Sites, site: str, code: str) -> None:
        mine = declared(Score, sites=sites)
        said = told(mine, one("use: mine, keep: 0.5"))
        assert f"(name the site, such as `at: {site}`; in the strategy Sites(default={code}) makes it the" in said
        binds(mine, one(f"use: mine, keep: 0.5, at: {site}"))
        binds(declared(Score, sites=dataclasses.replace(sites, default=eval(code))), one("use: mine, keep: 0.5"))


@strategy()
class Far:
    """Plans layers without any option of them."""

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan({2: LayerAction.SKIP, 99: LayerAction.SKIP})


def test_a_plan_beyond_the_model_names_the_hook_and_no_option_that_is_not_there(registry: Registry) -> None:
    said = told(registry_of(Far), one("use: far"))
    assert said.endswith(
        ":2:5: stages[0]: plan_layers of 'far' names layer 99, but the model has 10, 0 to 9 (name earlier layers)"
    )
    said = told(registry, one("use: plan, skip: [10, 12]"))
    assert "stages[0]: plan_layers of 'plan' names layers 10, 12, but" in said


@pytest.mark.parametrize("needs", ["keep", "keep_layers"])
def test_a_router_needs_what_it_requires_and_no_more(needs: str) -> None:
    """`optional` is what it says: the file may leave it out, and need not have another in its place."""
    other = {"keep": "keep_layers", "keep_layers": "keep"}[needs]
    mine = declared(Router, **{other: "optional"})
    binds(mine, one(f"use: mine, {needs}: 0.5"), one(f"use: mine, {needs}: 0.5, {other}: 0.5"))
    for text in ("use: mine", f"use: mine, {other}: 0.5"):
        assert f"{needs}: is missing; 'mine' needs `{needs}`" in told(mine, one(text))


def test_a_router_that_plans_layers_itself_may_require_a_budget_of_tokens(registry: Registry) -> None:
    binds(registry, one("use: ownlayers"))
    mine = declared(Router, keep_layers="refused")
    binds(mine, one("use: mine, keep: 0.5"))
    assert "keep: is missing; 'mine' needs `keep` or `keep_tokens`" in told(mine, one("use: mine"))


@pytest.mark.parametrize(
    ("override", "cuts"),
    [
        ("stages[0].at=[1, 3.mid]", ["1", "3.mid"]),
        ("stages[0].at[1]=7", ["2", "7"]),
        ("stages[0].at=null", ["encoder"]),
        ("stages[0].keep=null", None),
    ],
)
def test_overrides_of_lists(registry: Registry, override: str, cuts: list[str] | None) -> None:
    text = one("use: score, at: [2, 4], keep: 0.5")
    if cuts is None:
        with pytest.raises(SpecError, match="keep: is missing"):
            build.build(text, [override], registry)
        return
    built = build.build(text, [override], registry)
    assert [str(cut.site) for cut in built.bind(SHAPE).cuts] == cuts
