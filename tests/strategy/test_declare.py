"""Declaring strategies: what is misspelt or contradicts itself is an error at import that names the right word."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from prunekit import EncoderRows, Features, Keys, Route, Rows, Site, Sites, hookimpl, strategy
from prunekit.errors import PluginError
from prunekit.hookspecs import ImageHooks, LayerHooks, RouterHooks, StatementHooks, TokenHooks
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.strategy.declare import HOOKS, Declaration
from prunekit.strategy.inputs import INPUTS, REQUESTS, region_of


class Body:
    """What most classes below have: one hook."""

    @hookimpl
    def score_tokens(self, hidden: Any) -> Any:
        return hidden


class RouterBody:
    @hookimpl
    def route(self, embeds: Any) -> Any:
        return Route()


def declared(body: type[Any] = Body, **keywords: Any) -> Callable[[], Any]:
    return lambda: strategy(**keywords)(type("Mine", (body,), {"__module__": __name__}))


def with_names(**names: Any) -> Callable[[], Any]:
    """A class with these names in its body; annotated where the value is a type."""
    fields = {name: value for name, value in names.items() if isinstance(value, type)}
    body = {name: value for name, value in names.items() if name not in fields}
    return lambda: strategy()(type("Mine", (Body,), {"__module__": __name__, "__annotations__": fields, **body}))


def marked(name: str, *arguments: str) -> Any:
    """A hook implementation with these arguments."""
    scope: dict[str, Any] = {}
    exec(f"def {name}(self, {', '.join(arguments)}): ...", scope)
    return hookimpl(scope[name])


def none_of() -> Any: ...


def two_of(first: Any, second: Any) -> Any: ...


NONE: Any = none_of
TWO: Any = two_of
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a keyword": (declared(site=Site(2)), "takes no 'site' (did you mean 'sites'? it takes sites, inputs, keep"),
    "another keyword": (declared(per_samples=True), "takes no 'per_samples' (did you mean 'per_sample'?"),
    "a policy": (declared(keep="requird"), "`keep` is 'requird'; did you mean 'required'? it is 'required',"),
    "an old flag": (declared(takes_keep=False), "takes no 'takes_keep'"),
    "a flag": (declared(trainable="yes"), "`trainable` is 'yes'; it is True or False"),
    "sites": (declared(sites=("encoder",)), "`sites` is ('encoder',); write Sites(...) there"),
    "an unknown extra": (declared(extras=("registers",)), "`extras` is ('registers',); it is a tuple of 'cls'"),
    "extras as text": (declared(extras="cls"), "`extras` is 'cls'; it is a tuple of 'cls', such as ('cls',)"),
    "routes of nothing": (declared(RouterBody, routes=()), "`routes` is (); name at least one"),
    "a request for nothing": (declared(inputs={"hidden": Rows()}), "'hidden', for which nothing can be requested"),
    "a misspelt request": (declared(inputs={"atention": Rows()}), "did you mean 'attention'?"),
    "a request of another kind": (declared(inputs={"keys": Rows()}), "inputs['keys'] is Rows("),
    "no dict of requests": (declared(inputs=[Rows()]), "it is a dict such as {'attention': Rows(...)}"),
    "a schedule of numbers": (declared(schedule={2: 0.5}), "2 is no Site"),
    "a schedule of too much": (declared(schedule={Site(2): 1.5}), "1.5 at '2' is no fraction in (0, 1]"),
    "a schedule that rises": (declared(schedule={Site(4): 0.5, Site(2): 0.25}), "fractions must not rise"),
    "a schedule without budgets": (
        declared(type("S", (), {"select_tokens": marked("select_tokens", "valid")}), schedule={Site(2): 0.5},
                 keep="refused"),
        "0.5 at '2' is a default budget, which keep='refused' takes none of",
    ),
    "a schedule that leaves open what is asked for": (
        declared(schedule={Site(2): None}), "None at '2' is for strategies that may decide by themselves",
    ),
    "a schedule of a router": (declared(RouterBody, schedule={Site(2): 0.5}), "is for strategies with token hooks"),
    "scores that nobody cuts": (declared(keep="refused"), "only scores, so how many tokens stay comes from `keep`"),
    "an attribute of old": (with_names(sites=Sites()), "is an argument of the decorator: @strategy(sites=...)"),
    "a class variable": (
        lambda: strategy()(type("Mine", (Body,), {"__annotations__": {"inputs": "ClassVar[dict]"}, "inputs": {}})),
        "is an argument of the decorator: @strategy(inputs=...)",
    ),
    "a misspelt attribute": (with_names(site=Sites()), "'site' is neither an option nor a keyword of @strategy (did"),
    "an option without a type": (with_names(order=2), "an option has an annotation, as in `order: float = 0.5`"),
    "a misspelt statement": (with_names(flop=lambda self: 0), "'flop' is no hook (did you mean 'flops'?"),
    "a misspelt hook": (with_names(score_token=marked("score_token", "hidden")), "did you mean 'score_tokens'?"),
    "a public helper": (with_names(distance=lambda self: 0), "'distance' is no hook (hooks are"),
    "an unmarked hook": (with_names(select_tokens=lambda self, valid: valid), "select_tokens is not marked; put @hook"),
    "an unmarked statement": (with_names(check=lambda self, shape: None), "check is not marked"),
    "a misspelt argument": (
        with_names(select_tokens=marked("select_tokens", "hiden")), "select_tokens has no argument 'hiden' (did you"
    ),
    "an argument of another hook": (with_names(merge_tokens=marked("merge_tokens", "scores")), "no argument 'scores'"),
    "an option named as a key": (with_names(keep_tokens=int), "'keep_tokens' cannot be an option (rename it)"),
    "an option named as a keyword": (with_names(extras=int), "'extras' cannot be an option; it is an argument of @str"),
    "an option named as a hook": (with_names(files=str), "'files' cannot be an option (rename it)"),
    "a dataclass already": (
        lambda: strategy()(dataclasses.make_dataclass("Mine", [], bases=(Body,))), "leave out @dataclass"
    ),
    "nothing to do": (lambda: strategy()(type("Mine", (), {})), "implements none of score_tokens, select_tokens,"),
    "no parentheses": (lambda: strategy(type("Mine (", (Body,), {})), "with nothing to say write @strategy()"),
    "an argument with a default": (
        with_names(select_tokens=hookimpl(lambda self, hidden=None: hidden)),
        "select_tokens would never get 'hidden', which has a default; write it without",
    ),
    "a budget that nobody asks for": (
        declared(type("S", (), {"select_tokens": marked("select_tokens", "valid")})),
        "select_tokens does not name `count`, so what the file says in `keep` would do nothing: name it, or w",
    ),
    "a budget that scores alone know": (
        declared(type("S", (Body,), {"select_tokens": marked("select_tokens", "scores")}), keep="optional"),
        "select_tokens does not name `count`",
    ),
    "a schedule of three": (
        declared(schedule=lambda self, layers, block: {Site(2): 0.5}),
        "`schedule`: its function takes (self, layers, block); did you mean 'blocks'? it is called with the strategy "
        "and the number of decoder layers, and gets `blocks` where it names that",
    ),
    "a schedule of one": (declared(schedule=lambda layers: {Site(2): 0.5}), "`schedule`: its function takes (layers);"),
    "a schedule of blocks alone": (declared(schedule=lambda self, blocks: {}), "its function takes (self, blocks); it"),
    "a schedule where it may not act": (
        declared(schedule={Site.parse("vision.2"): 0.5}), "`schedule`: `sites` does not allow 'vision.2': it needs 'enc"
    ),
    "sites of two": (declared(sites=lambda self, layers: Sites()), "`sites`: its function takes (self, layers); it is"),
    "inputs of nothing": (declared(inputs=NONE), "its function takes (); it is called with the strategy"),
    "one site": (declared(sites=Site(2)), "write Sites(default=...) with it"),
    "tokens that no router cuts": (
        declared(RouterBody, routes=("tokens",), keep="refused"),
        "a router scores tokens, and `keep` in the file says how many stay, so with keep='refused' none would leave: "
        "leave out keep='refused'; what decides by itself how many stay is a token strategy with select_tokens",
    ),
    "tokens that a router cuts perhaps": (
        declared(RouterBody, routes=("tokens",), keep="optional"), "so without it this router would do nothing: leave"
    ),
    "tokens beside layers that no router cuts": (
        declared(RouterBody, keep="refused"), "none would leave: leave it out, or write routes=('layers',)"
    ),
    "layers that a router plans perhaps": (
        declared(RouterBody, routes=("layers",), keep_layers="optional"), "a router without any budget would do nothing"
    ),
    "two budgets of which none is needed": (
        declared(RouterBody, keep="optional", keep_layers="optional"), "a router without any budget would do nothing"
    ),
    "a budget of layers for tokens": (
        declared(RouterBody, routes=("tokens",), keep_layers="required"), "`keep_layers` says nothing of a router of to"
    ),
    "a budget of tokens for layers": (
        declared(RouterBody, routes=("layers",), keep="optional"), "`keep` says nothing of a router of layers (leave it"
    ),
    "routes of a token strategy": (declared(routes=("tokens",)), "`routes` is for routers (leave it out)"),
    "layers of a token strategy": (declared(keep_layers="refused"), "`keep_layers` is for routers"),
    "extras of a router": (declared(RouterBody, extras=("cls",)), "`extras` is for strategies with token hooks (leave"),
    "a router that drops all": (declared(RouterBody, drops_all=True), "`drops_all` is for strategies with token hooks"),
    "sites of layers": (
        declared(type("L", (), {"plan_layers": marked("plan_layers", "shape")}), sites=Sites()),
        "`sites` is for strategies with token hooks and routers (leave it out)",
    ),
    "a paper by its title": (declared(paper="FastV"), "`paper` is 'FastV'; it is an arXiv id such as '2403.06764', or"),
    "a repository without a commit": (declared(code="owner/name"), "`code` is 'owner/name'; it is a repository at a"),
    "a heading in capitals": (declared(group="Baselines"), "`group` is 'Baselines'; it is a heading in lower case"),
    "a count that is given": (declared(fixed_count=False), "`fixed_count` is for strategies that decide by themselves"),
    "a count in words": (declared(fixed_count="yes"), "`fixed_count` is 'yes'; it is True or False"),
    "two strategies": (declared(type("Two", (Body, RouterBody), {})), "a router is a strategy of its own: make it two"),
    "extras that are not declared": (
        with_names(merge_tokens=marked("merge_tokens", "extras")), "asks for `extras` but declares none"
    ),
    "the batch for one sample": (
        declared(type("F", (), {"score_tokens": marked("score_tokens", "forward")}), per_sample=True),
        "`forward` runs the whole batch; leave out per_sample",
    ),
}  # fmt: skip


REQUESTED: dict[str, tuple[Callable[[], Any], str]] = {
    "queries of nothing": (lambda: Rows(queries=NONE), "queries: its function takes (); it is called with Prompt"),
    "a block of two": (lambda: EncoderRows(layer=TWO), "layer: its function takes (first, second); it is called"),
    "features of nothing": (lambda: Features(layer=NONE), "layer: its function takes (); it is called with the nu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTED)
def test_functions_in_requests_can_be_called(name: str) -> None:
    make, said = REQUESTED[name]
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value), caught.value


def test_functions_that_can_be_called_are_taken() -> None:
    """With defaults, bound, from a library, or as a class: whatever takes what it is given."""
    declared(schedule=lambda self, layers, blocks: {Site(2): 0.5})()
    declared(schedule=lambda self, layers, *, blocks=1, more=2: {Site(2): 0.5})()
    declared(schedule=lambda *both: {Site(2): 0.5}, inputs=dict)()
    assert Features(layer=abs) and Sites(default=functools.partial(Site, place="layer"))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, TypeError])
def test_a_schedule_that_fails_is_told_as_the_plugin_s(error: type[Exception]) -> None:
    def schedule(self: Any, layers: int) -> Any:
        raise error("on purpose")

    made = declared(schedule=schedule)()
    with pytest.raises(PluginError, match=f"`schedule` of Mine failed with {error.__name__}: .*on purpose"):
        made.__prunekit__.schedule_of(made(), 8, 1)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_at_import(name: str) -> None:
    make, said = WRONG[name]
    with pytest.raises(PluginError) as caught:
        make()
    assert said in str(caught.value) and "Mine (" in str(caught.value), caught.value


def test_a_strategy_is_a_frozen_dataclass_whose_fields_are_its_options() -> None:
    @strategy(sites=Sites(default=Site(2)))
    class Power(Body):
        LARGEST = 8
        order: float = 2.0
        _cache: int = dataclasses.field(default=0, init=False)

        def _helper(self) -> float:
            return self.order

    assert Power(3.0) == Power(order=3.0) and Power().LARGEST == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        Power().order = 1.0  # type: ignore[misc]
    assert Power.__prunekit__ == Declaration(sites=Sites(default=Site(2)))  # type: ignore[attr-defined]


def test_options_choose_inputs_and_sites() -> None:
    @strategy(
        inputs=lambda self: {"attention": Rows(rope=self.rope)},
        sites=lambda self: Sites(default=Site(2), encoder=not self.rope),
    )
    class Choosing(Body):
        rope: bool = True

        @hookimpl
        def score_tokens(self, attention: Any) -> Any:
            return attention

    registry = registry_of(Choosing)
    first, second = (build({"stages": [{"use": "it", "keep": 0.5, "rope": rope}]}, registry=registry).stages[0]
                     for rope in (True, False))  # fmt: skip
    assert (first.inputs["attention"].rope, second.inputs["attention"].rope) == (True, False)
    assert (first.sites.encoder, second.sites.encoder) == (False, True)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [({"inputs": lambda self: {"keys": Rows()}}, "inputs['keys']"), ({"sites": lambda self: 3}, "it gives Sites(...)")],
)
def test_functions_that_give_something_else(keywords: dict[str, Any], said: str) -> None:
    made = strategy(**keywords)(type("Mine", (Body,), {"__module__": __name__}))
    with pytest.raises(PluginError) as caught:
        made.__prunekit__.inputs_of(made())
        made.__prunekit__.sites_of(made())
    assert said in str(caught.value)


def registry_of(cls: type[Any]) -> Registry:
    """A registry with this class under the name `it`."""
    holder = sys.modules[__name__]
    holder.__dict__["Held"] = cls
    registry = Registry("stub", "stub-dist 1.0")
    registry.strategy("it", f"{__name__}:Held")
    return registry


class TestTable:
    def test_specifications_take_what_the_table_says(self) -> None:
        import pluggy

        manager = pluggy.PluginManager("prunekit")
        for hooks in (TokenHooks, ImageHooks, LayerHooks, RouterHooks, StatementHooks):
            manager.add_hookspecs(hooks)
        for hook, names in HOOKS.items():
            assert tuple(getattr(manager.hook, hook).spec.argnames) == names, hook

    def test_names_are_unique_for_each_hook(self) -> None:
        for hook in ("score_tokens", "select_tokens", "merge_tokens", "route"):
            names = [one.name for one in INPUTS if hook in one.hooks]
            assert len(names) == len(set(names))

    def test_requests(self) -> None:
        assert REQUESTS["attention"] is Rows and REQUESTS["text_keys"] is Keys
        assert REQUESTS["encoder_attention"] is EncoderRows

    @pytest.mark.parametrize(
        ("site", "region"),
        [("pixels", "pixels"), ("vision.1.mid", "tower"), ("encoder", "encoder"), (0, "decoder"),
         ("2.after", "decoder"), ("prefill_end", "end")],
    )  # fmt: skip
    def test_regions(self, site: object, region: str) -> None:
        assert region_of(Site.parse(site)) == region


@pytest.mark.parametrize("before", ["", "import prunekit.strategy.sites; ", "import prunekit.pipeline.build; "])
def test_the_decorator_is_there_whatever_was_imported_before(before: str) -> None:
    code = (
        f"{before}from prunekit import hookimpl, strategy\n"
        "@strategy(keep='refused')\nclass A:\n    @hookimpl\n    def select_tokens(self, valid): return valid\n"
        "print(A())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "A()\n", done.stderr


def test_a_subclass_inherits_what_it_does_not_say_anew() -> None:
    @strategy(sites=Sites(default=Site(3)), per_sample=True)
    class Base(Body):
        order: float = 2.0

    @strategy(per_sample=False)
    class Derived(Base):
        more: int = 1

    declaration = Derived.__prunekit__  # type: ignore[attr-defined]
    assert (declaration.sites.default, declaration.per_sample) == (Site(3), False)
    assert [one.name for one in dataclasses.fields(Derived)] == ["order", "more"]
