"""Pipelines from OmegaConf, numpy and dataclasses, structured options, and resolved files that load alike."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import prunekit
from prunekit import plugins
from prunekit.cli import main
from prunekit.errors import InputError, SpecError
from prunekit.registry import Registry
from prunekit.spec import schema
from prunekit.spec.places import escaped
from prunekit.testing.tiny import tiny_inputs, tiny_llava

APP = {
    "keep": 0.5,
    "model": {"layers": [3, 4]},
    "pipeline": {
        "name": "p-${keep}",
        "stages": [
            {"use": "random", "at": "${model.layers[0]}", "keep": "${keep}"},
            {"use": "skip_layers", "layers": "${model.layers}"},
        ],
    },
}
PLAIN = {
    "name": "p-0.5",
    "stages": [{"use": "random", "at": 3, "keep": 0.5}, {"use": "skip_layers", "layers": [3, 4]}],
}
# Before 2.4, OmegaConf knew no Literal and no union with a list.
NEW = pytest.mark.skipif(
    omegaconf.__version__ < "2.4", reason="structured configs with Literal came with OmegaConf 2.4"
)


def faults_of(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        prunekit.load(source, overrides)
    return [str(fault) for fault in caught.value.faults]


class TestContainers:
    def test_a_part_of_an_application_is_resolved_where_it_belongs(self) -> None:
        config = OmegaConf.create(APP)
        OmegaConf.set_readonly(config, True)
        OmegaConf.set_struct(config, True)
        pipeline = prunekit.load(config.pipeline)
        assert (pipeline.sha, pipeline.source) == (prunekit.load(PLAIN).sha, "<dict>")

    def test_parts_in_a_dict_and_a_list_of_stages(self) -> None:
        config = OmegaConf.create(APP)
        assert prunekit.load({"name": "p-0.5", "stages": config.pipeline.stages}).sha == prunekit.load(PLAIN).sha
        stages = prunekit.load(config.pipeline.stages)
        assert stages.sha == prunekit.load({"stages": PLAIN["stages"]}).sha
        assert prunekit.load({**PLAIN, "stages": list(config.pipeline.stages)}).sha == prunekit.load(PLAIN).sha

    def test_a_whole_configuration_with_vars_of_its_own(self) -> None:
        config = OmegaConf.create({"vars": {"k": 0.25}, "stages": [{"use": "random", "keep": "${vars.k}"}]})
        assert prunekit.load(config).stages[0].keeps == prunekit.load(OmegaConf.to_container(config)).stages[0].keeps
        # Here it is resolved already, so that this would change nothing.
        (fault,) = faults_of(config, "vars.k=0.5")
        assert fault.startswith("override 1:1:1: vars.k: there is no 'vars' to set here (an override changes what")
        assert prunekit.load(OmegaConf.to_container(config), ["vars.k=0.5"]).stages[0].keeps[0].fraction == 0.5

    def test_all_faults_at_once(self) -> None:
        stages = [
            {"use": "random", "keep": "${nope}", "seed": "${oc.env:PRUNEKIT_NONE}"},
            {"use": "fastvv", "at": "???"},
        ]
        found = faults_of(OmegaConf.create({"stages": stages, "nmae": 3}))
        assert [fault.partition(": ")[0] for fault in sorted(found)] == [
            "nmae", "stages[0].keep", "stages[0].seed", "stages[1].at", "stages[1].use",
        ]  # fmt: skip
        assert any("stages[0].keep: does not resolve: Interpolation key 'nope' not found" in fault for fault in found)
        assert any("stages[1].at: must be set: ??? stands for" in fault for fault in found)

    def test_what_is_missing_may_be_an_override(self) -> None:
        config = OmegaConf.create({"stages": [{"use": "random", "keep": "???"}]})
        assert prunekit.load(config, ["stages.0.keep=0.5"]).stages[0].keeps[0].fraction == 0.5

    def test_resolved_text_is_not_resolved_again(self) -> None:
        config = OmegaConf.create({"a": "\\${b}", "stages": [{"use": "x", "v": "${a}"}]})
        assert config.a == "${b}"
        assert schema.load({"stages": config.stages}).stages[0].options == {"v": "${b}"}

    @pytest.mark.parametrize("value", [b"x", object(), {1, 2}], ids=["bytes", "object", "set"])
    def test_what_no_file_could_hold(self, value: object) -> None:
        config = OmegaConf.create({"stages": [{"use": "random", "keep": 0.5}]}, flags={"allow_objects": True})
        config.stages[0].seed = value
        (fault,) = faults_of(config)
        assert "is not plain data" in fault


def test_apply_takes_what_load_takes() -> None:
    config = OmegaConf.create({"keep": 0.25, "p": {"stages": [{"use": "random", "keep": "${keep}"}]}})
    model, inputs = tiny_llava(), tiny_inputs(images=(1,))
    for source, overrides, kept in ((config.p, (), 4), (config.p.stages, ["stages.0.keep=0.5"], 8)):
        with prunekit.apply(model, source, overrides) as run:
            model(**inputs)
        assert run.report is not None and run.report.kept_tokens == (kept,)
    with (
        pytest.raises(InputError, match="overrides change a pipeline as it is read"),
        prunekit.apply(model, prunekit.load(config.p), ["stages.0.keep=0.5"]),
    ):
        pass


@dataclass
class MyStage:
    use: str = "random"
    keep: float = 0.5
    seed: int = 3


@dataclass
class MyPipeline:
    name: str = "mine"
    stages: list[MyStage] = field(default_factory=lambda: [MyStage(), MyStage(keep=0.25)])


class TestStructured:
    def test_a_pipeline(self) -> None:
        first, second = (
            {"use": "random", "keep": 0.5, "seed": 3},
            {"use": "random", "keep": 0.25, "seed": 3},
        )
        expected = prunekit.load({"name": "mine", "stages": [first, second]}).sha
        for source in (OmegaConf.structured(MyPipeline), MyPipeline(), MyPipeline):
            assert prunekit.load(source).sha == expected  # type: ignore[arg-type]
        assert prunekit.load(MyPipeline(), ["name=other"]).name == "other"  # type: ignore[arg-type]

    @NEW
    def test_every_strategy_is_one(self) -> None:
        registry = plugins.registry()
        for entry in registry.strategies():
            assert OmegaConf.is_dict(OmegaConf.structured(registry.get_strategy(entry.name)))

    def test_options_of_a_strategy(self) -> None:
        cls = plugins.registry().get_strategy("random")
        options = OmegaConf.merge(OmegaConf.structured(cls), {"seed": 7})
        stage = {"use": "random", "keep": 0.5}
        for one in (OmegaConf.merge(stage, options), {**stage, **options}):
            assert prunekit.load({"stages": [one]}).stages[0].strategy.seed == 7
        with pytest.raises(omegaconf.ValidationError):
            OmegaConf.merge(OmegaConf.structured(cls), {"seed": "x"})

    @NEW
    def test_options_with_choices_and_lists(self) -> None:
        skip = plugins.registry().get_strategy("skip_layers")
        options = OmegaConf.structured(skip(layers=(3, 4), what="mlp"))
        made = prunekit.load({"stages": [{"use": "skip_layers", **options}]}).stages[0].strategy
        assert made == skip(layers=(3, 4), what="mlp")
        unset = OmegaConf.merge({"use": "skip_layers"}, OmegaConf.structured(skip))
        assert faults_of({"stages": [unset]})[0].startswith("stages[0].layers: must be set: ??? stands for a value")
        with pytest.raises(omegaconf.ValidationError, match="'mlpp'"):
            OmegaConf.merge(options, {"what": "mlpp"})


@pytest.mark.parametrize(
    ("number", "same"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.array(3), 3),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (Path("x/y"), "x/y"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_numbers_of_numpy_and_paths_are_pythons_own(number: object, same: object) -> None:
    value = schema.load({"stages": [{"use": "x", "v": number}]}).stages[0].options["v"]
    assert (value, type(value)) == (same, type(same))


def test_numbers_of_numpy_give_the_same_hash() -> None:
    one = prunekit.load(
        {"stages": [{"use": "random", "at": np.int32(2), "keep": np.float64(0.5), "seed": np.int64(9)}]}
    )
    assert one.sha == prunekit.load({"stages": [{"use": "random", "at": 2, "keep": 0.5, "seed": 9}]}).sha


def test_arrays_are_no_numbers() -> None:
    (fault,) = faults_of({"stages": [{"use": "random", "keep": np.array([0.5])}]})
    assert fault.startswith("stages[0].keep: array([0.5]) is not plain data")


class TestSecondFaults:
    """A value with a fault gets no other, and what it would have been is compared with nothing."""

    @pytest.mark.parametrize(
        ("stages", "keys"),
        [
            ("[{use: fastv, at: 3, keep: 0.5}, {use: fastv, at: -1, keep: 0.5}]", ["stages[1].at"]),
            ("[{use: fastv, at: 99999999999999999999, keep: 0.5}]", ["stages[0].at"]),
            ("[{use: random, keep: 0.1}, {use: fastv, at: 4, keep: 99999999999999999999}]", ["stages[1].keep"]),
            ("[{use: random, keep: 0.1, seed: 99999999999999999999}]", ["stages[0].seed"]),
            ("[{use: fastv, at: 5, keep: 0.5}, {use: fastv, at: '${nope}', keep: 0.5}]", ["stages[1].at"]),
            ("[{use: '${nope}', keep: 0.5}]", ["stages[0].use"]),
            ("[{use: skip_layers, layers: ['${nope}', 3]}]", ["stages[0].layers[0]"]),
            ("[{use: skip_layers, layers: '${nope}', what: '???'}]", ["stages[0].layers", "stages[0].what"]),
        ],
    )
    def test_there_is_one(self, stages: str, keys: list[str]) -> None:
        assert [fault.split(": ")[1] for fault in faults_of(f"stages: {stages}\n")] == keys


@pytest.mark.parametrize(
    ("layers", "hint"),
    [
        ("24-28", "write every number: [24, 25, 26, 27, 28]"),
        ("24..28", "write every number: [24, 25, 26, 27, 28]"),
        ("24", "write [24]"),
        ("two", ""),
        ("'24'", ""),
        ("0.5", ""),
    ],
)
def test_the_hint_for_what_is_no_list(layers: str, hint: str) -> None:
    (fault,) = faults_of(f"stages: [{{use: skip_layers, layers: {layers}}}]\n")
    text = layers if layers[0] in "'0" or layers == "24" else repr(layers)
    said = f"<inline>:1:37: stages[0].layers: must be a list, each entry a whole number, not {text}"
    assert fault == said + (f" ({hint})" if hint else "")


TEXTS = st.text() | st.text(alphabet="${}\\.vars:?~ 0e1", max_size=8)
OPTIONS = TEXTS | st.integers(-(2**63), 2**63 - 1) | st.booleans()
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NAMED = st.dictionaries(st.text(max_size=3).filter(lambda key: "${" not in key), st.lists(FLOATS | TEXTS, max_size=2))


@prunekit.strategy()
class Anything:
    """Takes options of all kinds and drops nothing."""

    text: str | int | bool | None = None
    many: tuple[str | int | bool, ...] = ()
    named: dict[str, tuple[float | str, ...]] = field(default_factory=dict)
    folder: Path | None = None

    @prunekit.hookimpl
    def plan_layers(self, shape: Any) -> Any:
        raise AssertionError("never bound")


def registry() -> Registry:
    made = Registry()
    made.strategy("anything", f"{__name__}:Anything")
    return made


class TestResolved:
    @settings(deadline=None)
    @given(st.fixed_dictionaries({}, optional={"text": OPTIONS, "many": st.lists(OPTIONS), "named": NAMED}))
    def test_it_loads_to_the_same_hash(self, options: dict[str, Any]) -> None:
        try:
            first = prunekit.load({"name": "n", "stages": [{"use": "anything", **escaped(options)}]}, (), registry())
        except SpecError as error:  # a text that is exactly ???
            assert all("must be set" in str(fault) for fault in error.faults)
            return
        again = prunekit.load(first.resolved, (), registry())
        assert (again.sha, again.resolved, again.stages[0].strategy) == (
            first.sha, first.resolved, first.stages[0].strategy,
        )  # fmt: skip
        assert yaml.safe_load(first.resolved)["name"] == "n"

    @pytest.mark.parametrize("name", [entry.name for entry in plugins.registry().pipelines()])
    def test_shown_pipelines_load_to_the_same_hash(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main.main(["show", "--resolved", name]) == 0
        copy = tmp_path / "copy.yaml"
        copy.write_text(capsys.readouterr().out)
        assert prunekit.load(copy).sha == prunekit.load(name).sha

    def test_vars_and_what_it_extends_are_gone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "base.yaml").write_text("vars: {k: 0.5}\nstages:\n  - {use: random, keep: '${vars.k}'}\n")
        own = tmp_path / "own.yaml"
        own.write_text("extends: base.yaml\nvars: {k: 0.25}\n")
        assert main.main(["show", str(own), "--resolved", "stages.0.seed=3"]) == 0
        shown = capsys.readouterr().out
        assert shown == "name: own\nstages:\n- use: random\n  at: encoder\n  keep: 0.25\n  seed: 3\n"
        assert prunekit.load(shown).sha == prunekit.load(own, ["stages.0.seed=3"]).sha


class TestPaths:
    def load(self, source: Any, *overrides: str) -> prunekit.Pipeline:
        return prunekit.load(source, overrides, registry())

    def test_they_start_from_the_file_that_names_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("files/sub/w.bin", "elsewhere/w.bin", "home/w.bin"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path / "elsewhere")
        base = tmp_path / "files" / "base.yaml"
        base.write_text("stages:\n  - use: anything\n    folder: sub/w.bin\n")
        own = tmp_path / "own.yaml"
        own.write_text("extends: files/base.yaml\n")
        for path in (base, own):
            assert self.load(path).stages[0].strategy.folder == tmp_path / "files" / "sub" / "w.bin"
        text = "{stages: [{use: anything, folder: w.bin}]}"
        here = tmp_path / "elsewhere" / "w.bin"
        assert self.load(text).stages[0].strategy.folder == here
        assert self.load({"stages": [{"use": "anything", "folder": Path("w.bin")}]}).stages[0].strategy.folder == here
        assert self.load(base, "stages[0].folder=w.bin").stages[0].strategy.folder == here
        assert self.load(base, f"stages[0].folder={here}").stages[0].strategy.folder == here
        assert self.load(base, "stages[0].folder=~/w.bin").stages[0].strategy.folder == tmp_path / "home" / "w.bin"

    def test_a_variable_starts_where_it_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("base/w.bin", "own/w.bin", "elsewhere/w.bin"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        monkeypatch.chdir(tmp_path / "elsewhere")
        base, own = tmp_path / "base" / "p.yaml", tmp_path / "own" / "p.yaml"
        base.write_text("vars: {w: w.bin, v: '${vars.w}'}\nstages: [{use: anything, folder: '${vars.v}'}]\n")
        own.write_text("extends: ../base/p.yaml\nvars: {w: w.bin}\n")
        folders = [self.load(*source).stages[0].strategy.folder for source in ((base,), (own,), (own, "vars.w=w.bin"))]
        assert [folder.resolve().parent.name for folder in folders] == ["base", "own", "elsewhere"]
        base.write_text("vars: {w: w}\nstages: [{use: anything, folder: '${vars.w}.bin'}]\n")
        assert self.load(base).stages[0].strategy.folder == tmp_path / "base" / "w.bin"

    def test_the_hash_takes_name_and_content_not_where_it_lies(self, tmp_path: Path) -> None:
        made = {}
        for folder, content in (("a", "x"), ("b", "x"), ("c", "y")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "w.bin").write_text(content)
            path = tmp_path / folder / "p.yaml"
            path.write_text("stages: [{use: anything, folder: w.bin}]\n")
            made[folder] = self.load(path)
        assert made["a"].sha == made["b"].sha != made["c"].sha
        assert made["a"].resolved != made["b"].resolved
        assert self.load(made["a"].resolved).sha == made["a"].sha

    @pytest.mark.parametrize(("value", "said"), [("3", "not 3"), ("''", "not ''"), ("[a]", "not a list")])
    def test_what_is_no_path(self, value: str, said: str) -> None:
        with pytest.raises(SpecError, match=rf"stages\[0\]\.folder: must be a path, {re.escape(said)}"):
            self.load(f"stages: [{{use: anything, folder: {value}}}]\n")

    def test_a_router_beside_the_file_and_a_shipped_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from prunekit_strategies.par import files

        (tmp_path / "routers").mkdir()
        (tmp_path / "routers" / "mine").symlink_to(files.find("micro"))
        path = tmp_path / "p.yaml"
        path.write_text("stages: [{use: par, weights: routers/mine, keep: 0.5, keep_layers: 0.8}]\n")
        monkeypatch.chdir("/")
        assert prunekit.load(path).stages[0].strategy.weights == tmp_path / "routers" / "mine"
        shipped = prunekit.load(path, ["stages[0].weights=micro"])
        assert shipped.stages[0].strategy.weights == "micro" and "weights: micro" in shipped.resolved
        (fault,) = faults_of(path, "stages[0].weights=routers/mine")
        assert "there is no router 'routers/mine'" in fault
