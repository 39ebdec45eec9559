"""Building pipelines from strategies of every make, binding them to models, and stages that plugins can wrap."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pluggy
import pytest

from prunekit import LayerAction, LayerPlan, ModelShape, Rows, Site, Sites, hookimpl, loading, strategy
from prunekit.errors import PluginError, SpecError
from prunekit.pipeline import build as building
from prunekit.registry import Registry
from prunekit.strategy.decisions import TowerShape
from prunekit.strategy.declare import HOOKS
from prunekit.strategy.sites import ENCODER, Keep

# What the engine hands to hooks that nobody asked for is None.
NOTHING = dict.fromkeys(set(HOOKS["select_tokens"]) - {"valid", "count"})
SHAPE = ModelShape("stub", 10, 64, 4, 16, 1, 1, 128, 144)


@strategy()
class Score:
    """Scores tokens."""

    seed: int = 0

    @hookimpl
    def score_tokens(self, hidden: Any) -> Any:
        return hidden


@strategy()
class Select:
    """Selects tokens by itself."""

    @hookimpl
    def select_tokens(self, valid: Any, count: Any) -> Any:
        return valid


@strategy(sites=Sites(default=Site(2), encoder=False, lowest=1), inputs={"attention": Rows()})
class Attend:
    """Reads attention."""

    @hookimpl
    def score_tokens(self, attention: Any) -> Any:
        return attention


@strategy(sites=Sites())
class Careless(Attend):
    """Reads attention but allows every site."""


@strategy(sites=Sites(default=lambda layers: Site(layers // 2)), keep="refused", drops_all=True)
class DropAll:
    """Drops everything, by default half-way."""

    @hookimpl
    def select_tokens(self, valid: Any) -> Any:
        return valid & False


@strategy()
class Plan:
    """Plans layers."""

    layers: tuple[int, ...]
    what: Literal["skip", "skip_attention", "skip_mlp"] = "skip"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: name at least one")
        if len(self.layers) > 5:
            raise ValueError("that is too much")
        if 13 in self.layers:
            raise RuntimeError("unlucky")

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        if 11 in self.layers:
            raise ValueError("layers: 11 is odd")
        if 12 in self.layers:
            raise KeyError("oh")
        return LayerPlan({layer: LayerAction(self.what) for layer in self.layers})


@strategy()
class Typed:
    """Has a field of every kind that a file can hold."""

    whole: int = 0
    number: float = 0.0
    text: str = ""
    flag: bool = False
    maybe: int | None = None
    word: Literal["mean", "max", 3] = "mean"
    run: tuple[float, ...] = ()
    pair: tuple[int, str] = (0, "")
    many: list[int] = dataclasses.field(default_factory=list)
    named: dict[str, float] = dataclasses.field(default_factory=dict)
    either: int | str = 0
    anything: Any = None
    hidden: int = dataclasses.field(default=0, init=False)

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan()


@dataclasses.dataclass(frozen=True)
class Undeclared:
    @hookimpl
    def plan_layers(self) -> LayerPlan:
        return LayerPlan()


@strategy()
class OddField(Score):
    path: Path | bytes = b""


@strategy()
class LostField(Score):
    path: "NoSuchType" = 0  # type: ignore[name-defined]  # noqa: F821, UP037


@strategy()
class NoPlan:
    @hookimpl
    def plan_layers(self) -> Any:
        return {3: "skip"}


@strategy()
class OddPlan:
    what: Literal["text", "key", "list", "decode"]

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        wrong: dict[str, Any] = {"text": {1: "skip"}, "key": {"1": LayerAction.SKIP}, "list": [1]}
        return LayerPlan(wrong[self.what]) if self.what in wrong else LayerPlan({}, {1: "frozen"})  # type: ignore[dict-item]


@pytest.fixture
def registry() -> Registry:
    filled = Registry("stub", "stub-dist 1.0")
    plans = (Plan, NoPlan, OddPlan)
    for cls in (Score, Select, Attend, Careless, DropAll, Typed, Undeclared, OddField, LostField, *plans):
        filled.strategy(cls.__name__.lower(), f"{__name__}:{cls.__name__}")
    return filled


def build(registry: Registry, *stages: dict[str, Any], origin: str | None = None) -> building.Pipeline:
    return building.build({"name": "test", "stages": list(stages)}, registry=registry)


def faults(registry: Registry, *stages: dict[str, Any], shape: ModelShape | None = None) -> list[str]:
    """What is wrong, as text; with a shape, what is wrong on that model."""
    with pytest.raises(SpecError) as caught:
        built = build(registry, *stages)
        if shape:
            built.bind(shape)
    return [str(fault) for fault in caught.value.faults]


class TestBuild:
    def test_stages_hold_what_the_file_says_and_the_rest_by_default(self, registry: Registry) -> None:
        built = building.build(
            "name: n\nstages:\n  - use: score\n    at: 3\n    keep: 0.5\n  - {use: plan, layers: [1]}\n",
            registry=registry,
        )
        score, plan = built.stages
        assert (score.sites_given, score.keeps, score.strategy, score.label) == (
            (Site(3),),
            (Keep(0.5),),
            Score(0),
            "stages[0] score",
        )
        assert (score.is_token, score.is_layer, plan.is_token, plan.is_layer) == (True, False, False, True)
        assert (plan.sites_given, plan.keeps, plan.strategy) == (None, (), Plan((1,)))
        assert (built.name, built.source) == ("n", "<inline>")

    def test_the_resolved_form_fills_in_defaults_and_builds_the_same(self, registry: Registry) -> None:
        built = build(
            registry,
            {"use": "score", "keep": 1},
            {"use": "score", "at": 0, "keep": 0.5, "keep_of": "current"},
            {"use": "attend", "keep_tokens": 9},
            {"use": "plan", "layers": [1, 2]},
            {"use": "dropall"},
        )
        assert built.resolved == (
            "name: test\nstages:\n"
            "- use: score\n  at: encoder\n  keep: 1.0\n  seed: 0\n"
            "- use: score\n  at: 0\n  keep: 0.5\n  keep_of: current\n  seed: 0\n"
            "- use: attend\n  at: 2\n  keep_tokens: 9\n"
            "- use: plan\n  layers:\n  - 1\n  - 2\n  what: skip\n"
            "- use: dropall\n"
        )
        again = building.build(built.resolved, registry=registry)
        assert (again.resolved, again.sha) == (built.resolved, built.sha)

    def test_the_hash_is_of_what_runs(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        base = {"use": "score", "keep": 0.5}
        sha = build(registry, base).sha
        assert len(sha) == 16 and int(sha, 16) >= 0
        assert build(registry, {**base, "seed": 0, "at": "encoder"}).sha == sha
        text = "# said otherwise\nname: test\ndescription: other\nstages: [{keep: 5.0e-1, use: score}]\n"
        assert building.build(text, registry=registry).sha == sha
        different = [{**base, "seed": 1}, {**base, "at": 0}, {**base, "keep": 0.25}, {"use": "score", "keep_tokens": 1}]
        assert len({sha, *(build(registry, stage).sha for stage in different)}) == 5
        newer = Registry("stub", "stub-dist 1.1")
        newer.strategy("score", f"{__name__}:Score")
        assert build(newer, base).sha != sha
        monkeypatch.setattr("prunekit.version.VERSION", "99.0")
        assert build(registry, base).sha != sha

    def test_lists_become_tuples_and_whole_numbers_numbers(self, registry: Registry) -> None:
        options = {
            "whole": 3, "number": 2, "text": "t", "flag": True, "maybe": None, "word": 3, "run": [1, 0.5],
            "pair": [1, "a"], "many": [1], "named": {"a": 1}, "either": "x", "anything": {"deep": [1]},
        }  # fmt: skip
        strategy = build(registry, {"use": "typed", **options}).stages[0].strategy
        expected = {**options, "number": 2.0, "run": (1.0, 0.5), "pair": (1, "a"), "named": {"a": 1.0}}
        assert {key: getattr(strategy, key) for key in options} == expected
        assert isinstance(strategy.number, float) and isinstance(strategy.run[0], float)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("whole", 1.5, "whole: must be a whole number, not 1.5"),
            ("whole", True, "whole: must be a whole number, not true"),
            ("whole", "3", "whole: must be a whole number, not '3' (remove the quotes)"),
            ("number", True, "number: must be a number, not true"),
            ("number", float("nan"), "number: must be a number, not nan (it must be finite)"),
            ("text", 3, "text: must be text, not 3 (put it in quotes)"),
            ("flag", "yes", "flag: must be true or false, not 'yes' (write true or false)"),
            ("flag", 1, "flag: must be true or false, not 1"),
            ("maybe", "x", "maybe: must be a whole number, not 'x'"),
            ("word", "maen", "word: must be 'mean', 'max' or 3, not 'maen' (did you mean 'mean'?)"),
            ("word", 3.0, "word: must be 'mean', 'max' or 3, not 3.0"),
            ("run", 3, "run: must be a list, each entry a number, not 3 (write [3])"),
            ("run", [1, "a"], "run[1]: must be a number, not 'a'"),
            ("pair", [1], "pair: must have 2 entries, not 1"),
            ("pair", ["a", "b"], "pair[0]: must be a whole number, not 'a'"),
            ("many", {}, "many: must be a list, each entry a whole number, not a mapping"),
            ("named", [1], "named: must be a mapping, not a list"),
            ("named", {"a": "b"}, "named.a: must be a number, not 'b'"),
            ("either", [1], "either: must be a whole number or text, not a list"),
            ("hidden", 1, "hidden: unknown key"),
            ("nubmer", 1, "nubmer: unknown key (did you mean 'number'? known keys: use, whole, number"),
        ],
    )
    def test_options_are_checked_against_the_fields(self, registry: Registry, key: str, value: Any, said: str) -> None:
        (fault,) = faults(registry, {"use": "typed", key: value})
        assert fault.startswith(f"stages[0].{said}")

    def test_faults_of_several_stages_come_together_in_file_order(self, registry: Registry) -> None:
        text = (
            "stages:\n  - use: scroe\n    keep: 0.5\n  - use: score\n    seed: x\n"
            "  - use: plan\n    at: 3\n    layers: [a]\n    keep_tokens: 0\n"
        )
        with pytest.raises(SpecError) as caught:
            building.build(text, registry=registry)
        assert [(str(one.where), one.key) for one in caught.value.faults] == [
            ("<inline>:2:10", "stages[0].use"),
            ("<inline>:4:5", "stages[1].keep"),
            ("<inline>:5:11", "stages[1].seed"),
            ("<inline>:7:5", "stages[2].at"),
            ("<inline>:8:14", "stages[2].layers[0]"),
            ("<inline>:9:5", "stages[2].keep_tokens"),
            ("<inline>:9:18", "stages[2].keep_tokens"),
        ]

    @pytest.mark.parametrize(
        ("stage", "said"),
        [
            ({"use": "score"}, "stages[0].keep: is missing; 'score' needs `keep` or `keep_tokens`"),
            ({"use": "dropall", "keep": 0.5}, "stages[0].keep: 'dropall' decides by itself and takes no `keep`"),
            ({"use": "plan", "layers": [1], "at": 2}, "stages[0].at: 'plan' decides about layers, so it takes no `at`"),
            ({"use": "plan", "layers": [1], "keep_tokens": 2}, "stages[0].keep_tokens: 'plan' decides about layers"),
            ({"use": "plan"}, "stages[0].layers: is missing (give a list, each entry a whole number)"),
            ({"use": "plan", "layers": []}, "stages[0].layers: name at least one"),
            ({"use": "plan", "layers": [1, 2, 3, 4, 5, 6]}, "stages[0]: that is too much"),
        ],
    )  # fmt: skip
    def test_what_a_stage_may_not_say(self, registry: Registry, stage: dict[str, Any], said: str) -> None:
        (fault,) = faults(registry, stage)
        assert fault.startswith(said)

    @pytest.mark.parametrize(
        ("use", "said"),
        [
            ("undeclared", "strategy 'undeclared' (test_pipeline:Undeclared) from stub-dist 1.0 is not declared"),
            ("oddfield", "which a pipeline file cannot hold"),
            ("lostfield", "field types of LostField cannot be read"),
        ],
    )
    def test_a_broken_strategy_is_the_plugins_fault(self, registry: Registry, use: str, said: str) -> None:
        stage = {"use": use, "keep": 0.5} | ({"path": 3} if use == "oddfield" else {})
        with pytest.raises(PluginError) as caught:
            build(registry, stage)
        assert said in str(caught.value)

    def test_an_option_check_that_crashes_is_the_plugins_fault(self, registry: Registry) -> None:
        with pytest.raises(
            PluginError, match=r"strategy 'plan' .* from stub-dist 1\.0 failed on its options: RuntimeError: unlucky"
        ):
            build(registry, {"use": "plan", "layers": [13]})


class TestStage:
    def test_requests_are_what_the_implementations_name(self, registry: Registry) -> None:
        score, select, attend = build(
            registry, {"use": "score", "keep": 0.5}, {"use": "select", "keep": 0.5}, {"use": "attend", "keep": 0.5}
        ).stages
        assert score.requests("score_tokens") == {"hidden"}
        assert "scores" in score.requests("select_tokens")  # the default selection
        assert select.requests("select_tokens") == {"valid", "count"}
        assert select.requests("score_tokens") == select.requests("merge_tokens") == frozenset()
        assert [one.asks_for("attention") for one in (score, select, attend)] == [False, False, True]

    def test_a_plugin_wraps_one_of_two_equal_stages_and_sees_every_call(self, registry: Registry) -> None:
        first, second = build(registry, {"use": "select", "keep": 0.5}, {"use": "select", "keep": 0.5}).stages
        assert first.strategy == second.strategy
        seen: list[Any] = []

        class Wrapper:
            @hookimpl(wrapper=True)
            def select_tokens(self, count: Any) -> Iterator[None]:
                result = yield
                seen.append((count, result))
                return result

        first.manager.register(Wrapper())
        for number in range(3):
            assert first.hook.select_tokens(valid=number, count=(number,), **NOTHING) == number
            assert second.hook.select_tokens(valid=number, count=(number,), **NOTHING) == number
        assert seen == [((number,), number) for number in range(3)]
        assert isinstance(first.manager, pluggy.PluginManager) and first.manager is not second.manager

    def test_tracing_reaches_stages(
        self, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("PRUNEKIT_TRACE_PLUGINS", "1")
        build(registry, {"use": "plan", "layers": [1]}).bind(SHAPE)
        assert capsys.readouterr().err == "hook plan_layers(shape) -> strategy\n"


class TestBind:
    def test_sites_defaults_and_plans(self, registry: Registry) -> None:
        built = build(
            registry, {"use": "score", "keep": 0.5}, {"use": "plan", "layers": [0]}, {"use": "attend", "keep": 0.25},
            {"use": "plan", "layers": [4], "what": "skip_mlp"}, {"use": "dropall"},
        )  # fmt: skip
        bound = built.bind(SHAPE)
        assert [(cut.site, cut.stage.use) for cut in bound.cuts] == [
            (ENCODER, "score"), (Site(2), "attend"), (Site(5), "dropall"),
        ]  # fmt: skip
        assert dict(bound.plan.actions) == {0: LayerAction.SKIP, 4: LayerAction.SKIP_MLP}
        assert (bound.name, bound.sha, bound.positions) == (built.name, built.sha, built.positions)
        assert (bound.stages, bound.shape) == (built.stages, SHAPE)
        assert built.bind(dataclasses.replace(SHAPE, layers=32)).cuts[2].site == Site(16)

    @pytest.mark.parametrize(
        ("stages", "said"),
        [
            (
                [{"use": "score", "at": 10, "keep": 1}],
                "stages[0].at: there is no layer 10: the model has layers 0 to 9",
            ),
            (
                [{"use": "attend", "at": "encoder", "keep": 1}],
                "cannot act at 'encoder': it needs a decoder layer, 1 or later",
            ),
            (
                [{"use": "attend", "at": 0, "keep": 1}],
                "stages[0].at: 'attend' cannot act at '0': it needs layer 1 or later",
            ),
            (
                [{"use": "careless", "at": 0, "keep": 1}],
                "'careless' cannot act at '0': attention of the layer before is not there at '0' (name a layer that "
                "another runs before, such as 1; in the strategy Rows(layer='next') reads the layer ahead, or "
                "optional=True gives None there)",
            ),
            (
                [{"use": "careless", "keep": 1}],
                "'careless' cannot act at 'encoder': attention of the layer before is not there at 'encoder'",
            ),
            (
                [{"use": "score", "at": 4, "keep": 0.5}, {"use": "score", "at": 3, "keep": 0.25}],
                "stages[1].at: stages are out of order: 'score' at '3' stands after 'score' at '4'",
            ),
            (
                [{"use": "score", "keep": 0.25}, {"use": "score", "keep": 0.5}],
                "stages[1].keep: asks for 0.5 of original, but stages[0] score leaves only 0.25 of original",
            ),
            (
                [{"use": "score", "keep_tokens": 20}, {"use": "score", "keep_tokens": 21}],
                "stages[1].keep_tokens: asks for 21 tokens, but stages[0] score leaves only 20 tokens",
            ),
            (
                [{"use": "score", "keep": 0.25}, {"use": "score", "keep_tokens": 37}],
                "stages[1].keep_tokens: asks for 37 tokens, but stages[0] score leaves only 0.25 of original",
            ),
            ([{"use": "score", "keep_tokens": 145}], "stages[0].keep_tokens: asks for 145 of the 144 visual tokens"),
            (
                [{"use": "dropall", "at": 2}, {"use": "score", "at": 3, "keep": 1}],
                "stages[1].use: 'dropall' before it leaves no",
            ),
            (
                [{"use": "plan", "layers": [3, 10]}],
                "stages[0].layers: plan_layers of 'plan' names layer 10, but the model has 10, 0 to 9 (name earlier",
            ),
            ([{"use": "plan", "layers": [11]}], "stages[0].layers: 11 is odd"),
            (
                [{"use": "plan", "layers": [3]}, {"use": "plan", "layers": [3], "what": "skip_mlp"}],
                "stages[1].layers: plans disagree: layer 3: one stage says skip, another skip_mlp",
            ),
            (
                [{"use": "attend", "at": 2, "keep": 1}, {"use": "plan", "layers": [1]}],
                "stages[0].at: 'attend' reads the attention of layer 1, which another stage skips",
            ),
            (
                [{"use": "plan", "layers": [1], "what": "skip_attention"}, {"use": "attend", "keep": 1}],
                "stages[1].at: 'attend' reads the attention of layer 1, which another stage skips",
            ),
        ],
    )
    def test_what_does_not_fit_the_model(self, registry: Registry, stages: list[dict[str, Any]], said: str) -> None:
        (fault,) = faults(registry, *stages, shape=SHAPE)
        assert said in fault

    @pytest.mark.parametrize(
        "stages",
        [
            [{"use": "score", "keep": 0.25}, {"use": "score", "keep": 0.25}],
            [{"use": "score", "keep": 0.25}, {"use": "score", "keep": 0.9, "keep_of": "current"}],
            [{"use": "score", "keep": 0.25}, {"use": "score", "keep_tokens": 36}],
            [{"use": "score", "keep_tokens": 144}],
            [{"use": "score", "at": 3, "keep": 0.5}, {"use": "score", "at": 3, "keep": 0.25}],
            [{"use": "attend", "at": 2, "keep": 1}, {"use": "plan", "layers": [1], "what": "skip_mlp"}],
            [{"use": "attend", "at": 2, "keep": 1}, {"use": "plan", "layers": [0, 2]}],
            [{"use": "score", "at": 9, "keep": 1}, {"use": "dropall", "at": 9}],
            [{"use": "plan", "layers": [3]}, {"use": "plan", "layers": [3, 4]}],
        ],
    )
    def test_what_just_fits(self, registry: Registry, stages: list[dict[str, Any]]) -> None:
        assert len(build(registry, *stages).bind(SHAPE).cuts) == sum("layers" not in stage for stage in stages)

    def test_picture_dependent_models_are_not_second_guessed(self, registry: Registry) -> None:
        open_shape = dataclasses.replace(SHAPE, visual_tokens=None)
        build(registry, {"use": "score", "keep": 0.25}, {"use": "score", "keep_tokens": 9999}).bind(open_shape)

    def test_everything_that_does_not_fit_is_told_with_its_place(self, registry: Registry) -> None:
        text = (
            "stages:\n  - {use: attend, at: 40, keep: 0.5}\n  - {use: score, at: 41, keep_tokens: 600}\n"
            "  - {use: plan, layers: [99]}\n"
        )
        with pytest.raises(SpecError) as caught:
            building.build(text, registry=registry).bind(SHAPE)
        assert [(str(one.where), one.key) for one in caught.value.faults] == [
            ("<inline>:2:23", "stages[0].at"),
            ("<inline>:3:22", "stages[1].at"),
            ("<inline>:3:39", "stages[1].keep_tokens"),
            ("<inline>:4:25", "stages[2].layers"),
        ]

    def test_what_needs_no_model_to_be_seen_is_told_at_once(self, registry: Registry) -> None:
        text = "stages:\n  - {use: attend, at: 4, keep: 0.5}\n  - {use: score, at: 3, keep: 0.6}\n  - {use: nobody}\n"
        with pytest.raises(SpecError) as caught:
            building.build(text, registry=registry)
        assert [(str(one.where), one.key) for one in caught.value.faults] == [
            ("<inline>:3:22", "stages[1].at"),
            ("<inline>:3:31", "stages[1].keep"),
            ("<inline>:4:11", "stages[2].use"),
        ]

    def test_a_planner_that_crashes_or_returns_no_plan(self, registry: Registry) -> None:
        with pytest.raises(
            PluginError, match=r"stages\[0\] plan from stub-dist 1\.0: plan_layers failed with KeyError"
        ):
            build(registry, {"use": "plan", "layers": [12]}).bind(SHAPE)
        with pytest.raises(PluginError, match=r"plan_layers must return a LayerPlan, not {3: 'skip'}"):
            build(registry, {"use": "noplan"}).bind(SHAPE)

    @pytest.mark.parametrize(
        ("what", "said"),
        [
            ("text", "LayerPlan has 'skip' for layer 1 in `actions`; write LayerAction.SKIP"),
            ("key", "LayerPlan has '1' in `actions`; layers are whole numbers from 0"),
            ("list", "LayerPlan(actions=[1]): it takes a dict such as {3: LayerAction.SKIP}"),
            ("decode", "LayerPlan has 'frozen' for layer 1 in `decode`; write one of LayerAction.RUN, "),
        ],
    )
    def test_a_plan_of_something_else(self, registry: Registry, what: str, said: str) -> None:
        with pytest.raises(PluginError) as caught:
            build(registry, {"use": "oddplan", "what": what}).bind(SHAPE)
        assert "stages[0] oddplan from stub-dist 1.0: plan_layers failed with" in str(caught.value)
        assert said in str(caught.value) and "in_decoding" not in str(caught.value)


ANY_SIZE = {"pixelprune", "evs-r25"}  # for towers that take images of any size
FILES = sorted((Path(__file__).parent.parent / "strategies" / "pipelines").glob("*.yaml"))
DEEP = next(path for path in FILES if path.stem == "par-smol")  # a router of its own, and layers by number


def test_the_pipeline_of_the_deep_bundled_model_fits_it() -> None:
    built = building.build(DEEP)
    assert built.name == DEEP.stem and built.bind(loading.load_shape("smol")).acts
    with pytest.raises(SpecError, match="made for another model"):
        built.bind(loading.load_shape("micro"))


@pytest.mark.parametrize("path", [path for path in FILES if path != DEEP], ids=lambda path: path.stem)
def test_the_pipeline_files_fit_the_bundled_model_and_llava(path: Path) -> None:
    built = building.build(path)
    assert built.name == path.stem
    if "weights: micro" in path.read_text():  # its router belongs to one model; an untrained one fits any
        built = building.build(path, ["stages[0].weights=null"])
    own = path.stem in ANY_SIZE
    for layers, visual, blocks in ((10, 144, 6), (32, 576, 24)):
        tower = TowerShape(blocks, blocks - 2, leading=1, projects_tokens=True, images="any" if own else "whole")
        bound = built.bind(dataclasses.replace(SHAPE, layers=layers, visual_tokens=visual, tower=tower))
        assert bound.acts is (path.stem != "dense")
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and re.match(rf"#   prunekit (run|eval) {path.stem} --model ", second)
    assert ("--model micro " in second) is not own


def test_what_only_decoding_leaves_out_is_not_dense() -> None:
    late = {"use": "skip_layers", "layers": [1], "phase": "decode"}
    assert building.build({"stages": [late]}).bind(SHAPE).acts
    assert not building.build({"stages": [{"use": "dense"}]}).bind(SHAPE).acts


def test_there_are_pipeline_files() -> None:
    assert len(FILES) >= 10
