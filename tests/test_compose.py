"""How a pipeline comes together: files that it extends, `vars` and `${...}`, `???`, overrides, and all places."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prunekit.errors import SpecError, Where
from prunekit.spec import places, schema
from prunekit.spec.compose import merge
from prunekit.spec.interpolation import MAX_CHAIN, MAX_TEXT, MAX_TEXTS, resolve
from prunekit.spec.places import Node, escape
from prunekit.spec.python_data import from_data
from prunekit.spec.writing import to_yaml
from prunekit.strategy.sites import Keep, Site


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults_of(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        schema.load(source, overrides)
    return [str(fault) for fault in caught.value.faults]


def option(text: str, name: str = "v", *overrides: str) -> Any:
    return schema.load(text, overrides).stages[0].options[name]


@contextmanager
def resolver(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A resolver that the process has registered; OmegaConf 2.4 warns that it has another function for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OmegaConf.register_new_resolver(name, function)
    yield
    OmegaConf.clear_resolver(name)


class TestExtends:
    def test_mappings_merge_deeply_and_keep_the_places_of_both(self, tmp_path: Path) -> None:
        base = write(tmp_path, "base.yaml", "vars: {keep: 0.5, at: 2}\nbudget: {flops: 0.5, text_tokens: 9}\nstages:\n"
                     "  - {use: a, at: '${vars.at}', keep: '${vars.keep}'}\n")  # fmt: skip
        own = write(tmp_path, "own.yaml", "extends: base.yaml\nvars: {keep: 0.25}\nbudget: {flops: 0.25}\n")
        read = schema.load(own)
        assert (read.stages[0].keeps, read.stages[0].sites) == ((Keep(0.25),), (Site(2),))
        assert read.budget is not None and (read.budget.fraction, read.budget.text_tokens) == (0.25, 9)
        assert read.budget.places["flops"] == Where(str(own), 3, 17)
        assert read.budget.places["text_tokens"] == Where(str(base), 2, 35)
        assert read.stages[0].keys["keep"] == Where(str(base), 4, 38)

    @pytest.mark.parametrize("other", ["[1]", "x", "null", "3"])
    def test_what_is_no_mapping_replaces(self, tmp_path: Path, other: str) -> None:
        write(tmp_path, "base.yaml", f"vars: {{a: {other}, b: [1, 2]}}\nstages: [{{use: x, v: '${{vars}}'}}]\n")
        own = write(tmp_path, "own.yaml", "extends: base.yaml\nvars: {b: [3], c: 4}\n")
        plain = OmegaConf.create(f"[{other}]")[0]
        plain = OmegaConf.to_container(plain) if OmegaConf.is_config(plain) else plain
        assert option(own.as_posix()) == {"a": plain, "b": [3], "c": 4}

    def test_a_mapping_over_a_list_says_where_the_list_is(self, tmp_path: Path) -> None:
        base = write(tmp_path, "base.yaml", "vars: {a: [1], b: {c: 1}, d: '${vars.b}'}\nstages: [{use: x}]\n")
        own = write(tmp_path, "own.yaml", "extends: base.yaml\nvars: {a: {q: 1}, b: [2], d: {e: 3}}\nnmae: x\n")
        assert faults_of(own) == [
            f"{own}:2:11: vars.a: is a mapping, but a list at {base}:1:11, which this file extends "
            "(let both be the same, or name the key differently)",
            f"{own}:2:22: vars.b: is a list, but a mapping at {base}:1:19, which this file extends "
            "(let both be the same, or name the key differently)",
            f"{own}:2:30: vars.d: is a mapping, but '${{vars.b}}' at {base}:1:30, which is resolved only after files "
            "are merged (write the whole value in one of the two files)",
            f"{own}:3:1: nmae: unknown key (did you mean 'name'? known keys: {', '.join(schema.TOP_KEYS)})",
        ]

    def test_a_path_is_read_before_anything_is_resolved(self) -> None:
        (fault,) = faults_of("vars: {x: a.yaml}\nextends: ${vars.x}\nstages: [{use: x}]\n")
        assert fault == (
            "<inline>:2:10: extends: must be the path of a pipeline file, not '${vars.x}' "
            "(files are read before ${...} is resolved)"
        )


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
NAMES = st.sampled_from(["a", "b", "c"])
DATA = st.recursive(
    SCALARS.filter(lambda one: not isinstance(one, str) or ("${" not in one and one != "???")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def node(data: Any) -> Node:
    faults: list[Any] = []
    made = from_data(data, "", faults)
    assert not faults
    return made


@given(st.dictionaries(NAMES, DATA), st.dictionaries(NAMES, st.just("???") | DATA))
def test_files_merge_by_the_rules_of_omegaconf(base: dict[str, Any], own: dict[str, Any]) -> None:
    faults: list[Any] = []
    merged = merge(node(base), node(own), "", faults)
    try:
        expected = OmegaConf.to_container(OmegaConf.merge(base, own))
    except Exception:  # a list and a mapping
        assert faults
    else:
        assert not faults and merged.plain() == expected


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: "${" not in key), DATA))
def test_written_yaml_reads_back_the_same(data: dict[str, Any]) -> None:
    faults: list[Any] = []
    tree = places.parse(to_yaml(data), "f", faults)
    assert tree is not None and not faults
    assert repr(tree.plain()) == repr(data)


@given(st.text(alphabet="ab$\\{}: '\"") | st.text())
def test_escaped_text_is_the_text_itself(text: str) -> None:
    data = {"x": text}
    tree = places.parse(to_yaml(data), "f", [])
    assert tree is not None
    faults: list[Any] = []
    assert resolve(tree, faults)[0].plain() == data and not faults
    assert OmegaConf.create({"x": escape(text)}).x == text or text == "???"


class TestInterpolation:
    VARS = "vars: {keep: 0.5, at: 2, r: {a: [1, 2]}, n: null, t: true, s: text}\n"

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("${vars.keep}", 0.5),
            ("${vars.at}", 2),
            ("${vars.t}", True),
            ("${vars.n}", None),
            ("${vars.r}", {"a": [1, 2]}),
            ("${vars.r.a}", [1, 2]),
            ("${vars.r.a[1]}", 2),
            ("${vars.r.a.1}", 2),
            ("${.w}", "w"),
            ("${..[1].w}", "other"),
            ("${...vars.s}", "text"),
            ("x${vars.keep}-${vars.s}", "x0.5-text"),
            ("${vars.${.w2}}", 2),
            ("${oc.select:vars.none,7}", 7),
            ("${oc.decode:'[1, 2]'}", [1, 2]),
            (r"\${vars.keep}", "${vars.keep}"),
            ("$vars {}", "$vars {}"),
        ],
    )
    def test_values(self, text: str, value: object) -> None:
        stages = f"stages:\n  - {{use: x, w: w, w2: at, v: '{text.replace(chr(39), chr(39) * 2)}'}}\n"
        read = option(f"{self.VARS}{stages}  - {{use: y, w: other}}\n")
        assert (read, type(read)) == (value, type(value))

    def test_the_environment_is_read_where_the_file_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "stages: [{use: x, v: '${oc.env:PRUNEKIT_T,0.5}', keep: '${oc.decode:${oc.env:PRUNEKIT_T,0.5}}'}]\n"
        assert (option(text), schema.load(text).stages[0].keeps) == ("0.5", (Keep(0.5),))
        monkeypatch.setenv("PRUNEKIT_T", "0.25")
        assert (option(text), schema.load(text).stages[0].keeps) == ("0.25", (Keep(0.25),))

    def test_values_stand_where_their_interpolation_does(self) -> None:
        read = schema.load("vars:\n  stage: {use: x, keep: 0.5}\nstages:\n  - ${vars.stage}\n")
        assert read.stages[0].keys["keep"] == read.stages[0].where == Where("<inline>", 4, 5)

    def test_overrides_come_before(self) -> None:
        text = self.VARS + "name: p-${vars.keep}\nstages: [{use: x, keep: '${vars.keep}'}]\n"
        read = schema.load(text, ["vars.keep=0.125"])
        assert (read.name, read.stages[0].keeps) == ("p-0.125", (Keep(0.125),))
        assert schema.load(text, ["stages.0.keep=${vars.t}0", "stages.0.keep=1"]).stages[0].keeps == (Keep(1.0),)

    def test_resolvers_of_the_process(self) -> None:
        with resolver("prunekit_test_half", lambda x: x / 2):
            assert option("vars: {a: 3}\nstages: [{use: x, v: '${prunekit_test_half:${vars.a}}'}]\n") == 1.5

    def test_a_resolver_that_gives_no_data_or_fails(self) -> None:
        stage = "{use: x, v: '${prunekit_test_object:}', w: '${prunekit_test_failing:}'}"
        with resolver("prunekit_test_object", object), resolver("prunekit_test_failing", lambda: 1 / 0):
            found = faults_of(f"stages:\n  - {stage}\n")
        assert found[0].startswith("<inline>:2:17: stages[0].v: <object object")
        assert found[1] == "<inline>:2:48: stages[0].w: '${prunekit_test_failing:}' does not resolve: division by zero"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("${vars.kep}", "'${vars.kep}' refers to 'vars.kep', which does not exist (did you mean 'vars.keep'?)"),
            (
                "${nothing}",
                "refers to 'nothing', which does not exist (values for ${...} go under `vars`)",
            ),
            ("${....x}", "'${....x}' refers to '....x', which does not exist"),
            ("${stages[7].use}", "refers to 'stages[7].use', which does not exist (did you mean 'stages[0].use'?)"),
            ("${stages.x}", "does not resolve: Index 'x' (str) is not an int"),
            ("${vars.s.x}", "does not resolve: Error trying to access vars.s.x"),
            ("${oc.env:PRUNEKIT_NONE}", "needs the environment variable 'PRUNEKIT_NONE' (set it, or give a default: $"),
            ("${oc.enw:X}", "needs the resolver 'oc.enw', which does not exist (did you mean 'oc.env'? resolvers of"),
            ("${os.system:ls}", "needs the resolver 'os.system', which does not exist"),
            ("${vars.keep", "is not an interpolation: "),
            ("${}", "is not an interpolation: "),
            ("${.v}", "leads back to itself, in a cycle"),
            ("${.}", "is not an interpolation: "),
            ("${vars.keep}" * 33, "is too long: a text with ${...} has at most 1000 characters and 32 ${...}"),
            ("${vars.keep}" + "x" * MAX_TEXT, "is too long"),
            ("${" * 30 + "x" + "}" * 30, "refers to 'x', which does not exist"),
            ("${oc.decode:" + "[" * 900, "nested too deep"),
        ],
    )
    def test_every_fault_stands_at_its_interpolation(self, text: str, said: str) -> None:
        found = faults_of(f"{self.VARS}stages:\n  - use: x\n    v: '{text}'\n    keep: 7\n")
        assert len(found) == 2 and found[0].startswith("<inline>:4:8: stages[0].v: '${"), found
        assert said in found[0]
        assert found[1].startswith("<inline>:5:11: stages[0].keep: must be a fraction")

    def test_a_value_of_the_wrong_kind_says_where_it_comes_from(self) -> None:
        text = "stages: [{use: x, keep: '${vars.r}'}, {use: x, keep: '${oc.env:PRUNEKIT_NONE,0.5}'}]\n"
        assert faults_of(self.VARS + text) == [
            "<inline>:2:25: stages[0].keep: must be a fraction in (0, 1], not a mapping (it comes from '${vars.r}')",
            "<inline>:2:54: stages[1].keep: must be a fraction in (0, 1], not '0.5' (it comes from "
            "'${oc.env:PRUNEKIT_NONE,0.5}', which is text; ${oc.decode:${oc.env:PRUNEKIT_NONE,0.5}} reads it as YAML)",
        ]

    def test_circles_are_told_whole_and_what_leads_into_a_fault_is_not(self) -> None:
        text = "vars: {a: '${vars.b}', b: '${vars.a}', c: '${nope}', d: '${vars.c}', e: 99999999999999999999}\n"
        found = faults_of(text + "stages: [{use: x, keep: '${vars.d}', at: '${vars.e}', keep_layers: '${vars.c}'}]\n")
        assert [fault.split(": ")[1] for fault in found] == ["vars.e", "vars.c", "vars.a", "vars.b"]
        assert all("leads back to itself, in a cycle (break the cycle)" in fault for fault in found[2:])

    def test_keys_are_not_resolved(self) -> None:
        (fault,) = faults_of("stages: [{use: x, m: {'${vars.a}': 1}}]\n")
        assert fault.startswith("<inline>:1:23: stages[0].m.${vars.a}: ${...} is resolved in values, not in keys")

    def test_vars_are_a_mapping(self) -> None:
        assert faults_of("vars: 3\nstages: [{use: x}]\n") == [
            "<inline>:1:7: vars: must be a mapping, not 3 (such as {keep: 0.5}, for ${vars.keep})"
        ]


class TestExplosions:
    """Small files that ask for much: each ends soon, with a fault."""

    def doubling(self, template: str, levels: int = 40) -> str:
        lines = [f"  a{i}: {template.format(i - 1)}\n" for i in range(1, levels)]
        return "vars:\n  a0: xxxxxxxxxx\n" + "".join(reversed(lines)) + "stages: [{use: x}]\n"

    @pytest.mark.parametrize("template", ["'${{vars.a{0}}}${{vars.a{0}}}'", "['${{vars.a{0}}}', '${{vars.a{0}}}']"])
    def test_doubling(self, template: str) -> None:
        begun = time.monotonic()
        (fault,) = faults_of(self.doubling(template))
        assert "makes all ${...} together longer than 65536 characters" in fault
        assert time.monotonic() - begun < 60

    def test_a_chain_against_the_order_of_the_file(self) -> None:
        def chain(length: int) -> str:
            lines = "".join(f"  a{i}: '${{vars.a{i + 1}}}'\n" for i in range(length))
            return f"vars:\n{lines}  a{length}: 1\nstages: [{{use: x, v: '${{vars.a0}}'}}]\n"

        assert option(chain(MAX_CHAIN - 1)) == 1
        assert all("leads through more than 16 other texts" in fault for fault in faults_of(chain(MAX_CHAIN + 1)))

    def test_many(self) -> None:
        lines = "".join(f"  a{i}: '${{stages[0].use}}'\n" for i in range(MAX_TEXTS + 5))
        (fault,) = faults_of(f"vars:\n{lines}stages: [{{use: x}}]\n")
        assert f"is one of more than {MAX_TEXTS} texts with ${{...}}" in fault


class TestMissing:
    def test_it_must_be_set(self, tmp_path: Path) -> None:
        base = write(
            tmp_path, "base.yaml", "vars:\n  at: ???\nstages:\n  - use: x\n    at: ${vars.at}\n    keep: ???\n"
        )
        assert faults_of(base) == [
            f"{base}:2:7: vars.at: must be set: ??? stands for a value that is missing (such as vars.at=... on the "
            "command line)",
            f"{base}:6:11: stages[0].keep: must be set: ??? stands for a value that is missing (such as "
            "stages[0].keep=... on the command line)",
        ]
        read = schema.load(base, ["vars.at=3", "stages.0.keep=0.5"]).stages[0]
        assert (read.sites, read.keeps) == ((Site(3),), (Keep(0.5),))

    def test_in_a_file_that_extends_it_leaves_the_value(self, tmp_path: Path) -> None:
        write(tmp_path, "base.yaml", "vars: {at: 2}\nstages: [{use: x, at: '${vars.at}'}]\n")
        assert schema.load(write(tmp_path, "own.yaml", "extends: base.yaml\nvars: {at: '???'}\n")).stages[0].sites == (
            Site(2),
        )


class TestOverrides:
    TEXT = "vars: {keep: 0.5, deep: {x: 1}}\nstages: [{use: x, keep: '${vars.keep}'}]\n"

    def test_both_spellings_are_one(self) -> None:
        for spelling in ("stages.0.keep=0.3", "stages[0].keep=0.3"):
            read = schema.load(self.TEXT, [spelling]).stages[0]
            assert (read.keeps, read.keys["keep"]) == ((Keep(0.3),), Where("override 1", 1, 15 + spelling.count("[")))

    def test_mappings_on_the_way_are_made(self) -> None:
        budget = schema.load(self.TEXT, ["budget.flops=0.4", "stages.0.m.n=3"]).budget
        assert budget is not None and budget.fraction == 0.4

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("vars.kep=0.3", "override 1:1:1: vars.kep: there is no 'kep' to set here (did you mean 'keep'?)"),
            ("vars.deep.y=0.3", "override 1:1:1: vars.deep.y: there is no 'y' to set here"),
            ("vars.depe.x=0.3", "override 1:1:1: vars.depe.x: there is no 'depe' to set here (did you mean 'deep'?)"),
            ("vras.keep=0.3", "override 1:1:1: vras: unknown key (did you mean 'vars'?"),
            ("stages[3].keep=0.3", "stages[3].keep: there is no '3' to set here; it has 1 entries, counted from 0"),
            ("stages.0.keep=${vars.kep}", "override 1:1:15: stages[0].keep: '${vars.kep}' refers to 'vars.kep', which"),
            ("stages.0.keep=???", "override 1:1:15: stages[0].keep: must be set"),
            ("stages.0.keep={<<: 3}", "override 1:1:2: <<: merge keys (`<<`) are not supported"),
        ],
    )
    def test_wrong(self, override: str, said: str) -> None:
        (fault,) = faults_of(self.TEXT, override)
        assert said in fault

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            ("stages[0].keep=0.3", "overrides is a list of key=value texts, not str (write overrides=['stages[0].keep"),
            (b"a=b", "not bytes"),
            ({"stages[0].keep": 0.3}, "not dict"),
            (3, "not int"),
            (["name=x", 3, None], "override 2:1:1: is no text"),
        ],
    )
    def test_what_is_no_list_of_text(self, overrides: Any, said: str) -> None:
        with pytest.raises(SpecError) as caught:
            schema.load(self.TEXT, overrides)
        assert said in str(caught.value)


def test_merge_keys_are_told_where_they_stand() -> None:
    assert faults_of("stages:\n  - {use: x, <<: {keep: 0.5}}\n  - use: y\n    '<<': quoted\n<<: {}\n") == [
        "<inline>:2:14: stages[0].<<: merge keys (`<<`) are not supported (use `extends`, or `vars` and ${...})",
        "<inline>:5:1: <<: merge keys (`<<`) are not supported (use `extends`, or `vars` and ${...})",
    ]


PIECES = st.sampled_from(
    [
        "${",
        "}",
        "vars",
        ".",
        "a",
        "b",
        "[",
        "]",
        "0",
        "oc.env:",
        "oc.select:",
        "oc.decode:",
        ",",
        "\\",
        "$",
        "'",
        " ",
        ":",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=6))
@pytest.mark.filterwarnings("ignore:In the sequence")
def test_any_interpolation(texts: list[str]) -> None:
    source = {"vars": dict(zip("abcdef", texts, strict=False)), "stages": [{"use": "x", "v": "${vars.a}"}]}
    try:
        schema.load(source)
    except SpecError as error:
        assert error.faults and str(error)
