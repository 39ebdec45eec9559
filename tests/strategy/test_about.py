"""What lists and cards say of a strategy follows from its declaration and hooks, an outsider's as well."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from prunekit import EncoderRows, LayerPlan, Route, Rows, Site, Sites, hookimpl, plugins, strategy
from prunekit.strategy.about import GROUPS, about


def scoring(*names: str, **declared: Any) -> type[Any]:
    scope: dict[str, Any] = {}
    exec(f"def score_tokens(self, {', '.join(names)}): ...", scope)
    return strategy(**declared)(
        type("Mine", (), {"__module__": __name__, "score_tokens": hookimpl(scope["score_tokens"])})
    )


def selecting(*names: str, **declared: Any) -> type[Any]:
    scope: dict[str, Any] = {}
    exec(f"def select_tokens(self, {', '.join(names)}): ...", scope)
    return strategy(**declared)(
        type("Mine", (), {"__module__": __name__, "select_tokens": hookimpl(scope["select_tokens"])})
    )


@strategy(paper="https://example.org/paper", group="mine")
class Layered:
    """A layer strategy with an option that has to be given."""

    layers: tuple[int, ...]

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan()


@strategy(sites=lambda self: Sites(default=Site(self.at_layer), encoder=False))
class Depending:
    """Where it acts depends on an option that has to be given."""

    at_layer: int

    @hookimpl
    def score_tokens(self, hidden: Any) -> Any:
        return hidden


@strategy()
class Routing:
    """A router that sees everything."""

    @hookimpl
    def route(self, embeds: Any) -> Route:
        return Route()

    @hookimpl
    def learner(self, shape: Any) -> None:
        return None


@pytest.mark.parametrize("name", ["text", "text_hidden", "text_ids", "text_keys", "text_values", "question"])
def test_who_asks_for_words_may_see_them(name: str) -> None:
    assert about(scoring("hidden", name)).text_aware
    assert not about(scoring("hidden")).text_aware


@pytest.mark.parametrize("queries", ["last", "text", "after", "all", "visual"])
def test_attention_of_visual_queries_alone_is_blind(queries: Any) -> None:
    told = about(scoring("attention", inputs={"attention": Rows(queries=queries)}))
    assert told.attention == ("decoder",)
    assert told.text_aware == (queries != "visual")


def test_what_a_request_needs() -> None:
    assert about(scoring("encoder_attention")).needs == ("a CLS token in the vision tower",)
    mean = about(scoring("encoder_attention", inputs={"encoder_attention": EncoderRows(query="mean")}))
    assert mean.needs == ("a vision tower that can be read",) and mean.attention == ("tower",)
    assert about(scoring("question")).needs == ("a processor, for the user's words",)


def test_the_group_is_where_it_acts_unless_said() -> None:
    assert about(scoring("hidden")).group == "before the decoder"
    assert about(scoring("hidden", sites=Sites(default=Site(3)))).group == "in the decoder"
    assert about(scoring("hidden", group="mine")).group == "mine"
    assert (about(Layered).group, about(Layered).link, about(Layered).sites) == (
        "mine",
        "https://example.org/paper",
        (),
    )
    assert about(Routing).group == "routers" and not about(Routing).training_free


def test_options_without_a_default_do_not_matter() -> None:
    told = about(Depending)
    assert told.kind == "token" and told.count == "fixed" and about(Layered).kind == "layer"


@pytest.mark.parametrize(
    ("declared", "count", "servable"),
    [
        ({}, "fixed", True),
        ({"keep": "optional"}, "given", True),
        ({"keep": "refused"}, "own", False),
        ({"keep": "refused", "fixed_count": True}, "fixed", True),
        ({"keep": "refused", "drops_all": True}, "fixed", True),
        ({"keep": "optional", "schedule": {Site(8): 0.5}, "sites": Sites(encoder=False)}, "fixed", False),
        ({"keep": "optional", "schedule": {Site(8): None}, "sites": Sites(encoder=False)}, "given", False),
        ({"keep": "optional", "schedule": {Site(8): 0.5}, "fixed_count": False}, "given", True),
    ],
)
def test_counts(declared: dict[str, Any], count: str, servable: bool) -> None:
    told = about(selecting("hidden", "count", **declared))
    assert (told.count, told.servable) == (count, servable)


def test_a_subclass_says_the_same_unless_it_says_anew() -> None:
    first = scoring("hidden", paper="2401.00001", code="owner/name@1a2b3c4")
    second = strategy(code="other/name@1a2b3c4:folder/file.py")(type("Other", (first,), {"__module__": __name__}))
    assert (about(second).paper, about(second).code) == ("2401.00001", "other/name@1a2b3c4:folder/file.py")


NAMES = [entry.name for entry in plugins.registry().strategies()]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_the_declaration_says(name: str) -> None:
    """A reader of the file and a reader of the list see one paper and one commit."""
    cls = plugins.registry().get_strategy(name)
    told = about(cls)
    text = f"{sys.modules[cls.__module__].__doc__} {inspect.getdoc(cls)}"
    assert told.link in text and told.code.partition(":")[0] in text
    commits = set(re.findall(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,}", text))
    assert not commits or told.code in commits, (
        f"declare code={sorted(commits)} in {Path(str(inspect.getsourcefile(cls))).name}"
    )
    assert told.group in GROUPS
    assert told.group == "baselines" or told.link or told.code, (
        f"{name} has neither a paper nor code, and is no baseline"
    )


def test_nobody_is_called_servable_who_reads_the_prompt() -> None:
    served = {name for name in NAMES if about(plugins.registry().get_strategy(name)).servable}
    assert {"divprune", "visionzip", "vispruner", "random", "pool", "tome"} <= served
    assert not served & {"fastv", "mmtok", "trim", "cdpruner", "cdpruner_embeds", "vtw", "par", "pixelprune"}
