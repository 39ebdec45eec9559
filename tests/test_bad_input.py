"""Whatever a person may get wrong: what, where, which key, what to do instead; exit code 2 and never a traceback."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import picture, save

from prunekit.cli import main

# id: (file, what stands on stderr, one pattern for each fault; `F` is the file)
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "unknown strategy": (
        "stages:\n  - use: fastvv\n    keep: 0.5\n",
        [r"F:2:10: stages\[0\].use: unknown strategy 'fastvv' \(did you mean 'fastv'\? known: .*see `prunekit list`\)"],
    ),
    "dotted path": (
        "stages:\n  - use: os.system\n",
        [r"F:2:10: stages\[0\].use: unknown strategy 'os.system' \(.*known: aim"],
    ),
    "unknown key": (
        "stages:\n  - use: random\n    kepe: 0.5\n    keep: 0.5\n",
        [r"F:3:5: stages\[0\].kepe: unknown key \(did you mean 'keep'\? known keys: use, at, keep, .*seed\)"],
    ),
    "unknown top key": (
        "satges: []\n",
        [r"F:1:1: satges: unknown key \(did you mean 'stages'\?", r"F:1:1: stages: is missing"],
    ),
    "options level": (
        "stages:\n  - use: skip_layers\n    options: {layers: [1]}\n",
        [r"F:2:5: stages\[0\].layers: is missing", r"F:3:5: stages\[0\].options: unknown key .*layers, what"],
    ),
    "type": (
        "stages:\n  - use: random\n    keep: half\n    seed: 1.5\n",
        [
            r"F:3:11: stages\[0\].keep: must be a fraction in \(0, 1\], not 'half'",
            r"F:4:11: stages\[0\].seed: must be a whole",
        ],
    ),
    "type in a list": (
        "stages:\n  - use: skip_layers\n    layers: [1, two]\n",
        [r"F:3:17: stages\[0\].layers\[1\]: must be a whole number, not 'two'"],
    ),
    "value of a choice": (
        "stages:\n  - use: skip_layers\n    layers: [1]\n    what: atention\n",
        [r"F:4:11: stages\[0\].what: must be 'layer', 'attention' or 'mlp', not 'atention' \(did you mean 'attention'"],
    ),
    "range, too much": (
        "stages:\n  - use: random\n    keep: 25\n",
        [r"F:3:11: stages\[0\].keep: must be a fraction in \(0, 1\], not 25 \(.*keep_tokens.*divide by 100\)"],
    ),
    "range, nothing": (
        "stages:\n  - use: random\n    keep: 0\n",
        [r"F:3:11: stages\[0\].keep: must be a fraction in \(0, 1\], not 0 \(dropping all has strategies of its own"],
    ),
    "range, no number": ("stages:\n  - use: random\n    keep: .nan\n", [r"F:3:11: stages\[0\].keep: .*not nan"]),
    "range, tokens": (
        "stages:\n  - use: random\n    keep_tokens: 0\n",
        [r"F:3:18: stages\[0\].keep_tokens: must be a whole number of tokens, at least 1, not 0"],
    ),
    "tokens as text": (
        "stages:\n  - use: random\n    keep_tokens: '64'\n",
        [r"F:3:18: stages\[0\].keep_tokens: must be a whole number of tokens, at least 1, not '64'"],
    ),
    "two budgets": (
        "stages:\n  - use: random\n    keep: 0.5\n    keep_tokens: 64\n",
        [r"F:4:5: stages\[0\].keep_tokens: this stage has two budgets, `keep` and `keep_tokens` \(remove one"],
    ),
    "no budget": ("stages:\n  - use: random\n", [r"F:2:5: stages\[0\].keep: is missing; 'random' needs `keep`"]),
    "budget of nothing": (
        "stages:\n  - use: random\n    keep_tokens: 3\n    keep_of: current\n",
        [r"F:4:5: stages\[0\].keep_of: says what `keep` is a fraction of, but there is no `keep`"],
    ),
    "base": (
        "stages:\n  - use: random\n    keep: 0.5\n    keep_of: orignal\n",
        [r"F:4:14: stages\[0\].keep_of: must be 'original' or 'current', not 'orignal' \(did you mean 'original'\?\)"],
    ),
    "site": (
        "stages:\n  - use: random\n    at: encodr\n    keep: 0.5\n",
        [r"F:3:9: stages\[0\].at: 'encodr' is not a site; .*\(did you mean 'encoder'\?\)"],
    ),
    "negative site": ("stages:\n  - {use: random, at: -1, keep: 0.5}\n", [r"F:2:23: stages\[0\].at: -1 is not a site"]),
    "reserved site": (
        "stages:\n  - use: random\n    at: decode\n    keep: 0.5\n",
        [r"F:3:9: stages\[0\].at: site 'decode' is reserved: decoding steps see what prefill left"],
    ),
    "site that the strategy does not know": (
        "stages:\n  - use: random\n    at: vision.3\n    keep: 0.5\n",
        [
            r"F:3:9: stages\[0\].at: 'random' cannot act at 'vision.3': it needs 'encoder' or a decoder layer, 0 or "
            "later"
        ],
    ),
    "site that the strategy forbids": (
        "stages:\n  - use: fastv\n    at: encoder\n    keep: 0.5\n",
        [r"F:3:9: stages\[0\].at: 'fastv' cannot act at 'encoder': it needs a decoder layer, 1 or later"],
    ),
    "layer out of range": (
        "stages:\n  - use: fastv\n    at: 10\n    keep: 0.5\n",
        [r"F:3:9: stages\[0\].at: there is no layer 10: the model has layers 0 to 9 \(name an earlier layer\)"],
    ),
    "skipped layer out of range": (
        "stages:\n  - use: skip_layers\n    layers: [9, 10]\n",
        [r"F:3:13: stages\[0\].layers: the model has layers 0 to 9, not \[10\]"],
    ),
    "out of order": (
        "stages:\n  - use: fastv\n    at: 3\n    keep: 0.5\n  - use: fastv\n    at: 2\n    keep: 0.25\n",
        [r"F:6:9: stages\[1\].at: stages are out of order: 'fastv' at '2' stands after 'fastv' at '3' \(list"],
    ),
    "more than is left": (
        "stages:\n  - {use: random, keep: 0.25}\n  - use: fastv\n    keep: 0.5\n",
        [r"F:4:11: stages\[1\].keep: asks for 0.5 of original, but stages\[0\] random leaves only 0.25 of original"],
    ),
    "more than there is": (
        "stages:\n  - use: random\n    keep_tokens: 17\n",
        [r"F:3:18: stages\[0\].keep_tokens: asks for 17 of the 16 visual tokens"],
    ),
    "after everything is gone": (
        "stages:\n  - use: blind\n  - use: fastv\n    keep: 0.5\n",
        [r"F:3:10: stages\[1\].use: 'blind' before it leaves no visual tokens"],
    ),
    "attention of a skipped layer": (
        "stages:\n  - use: skip_layers\n    layers: [1]\n  - use: fastv\n    keep: 0.5\n",
        [r"F:4:5: stages\[1\].at: 'fastv' reads the attention of layer 1, which another stage skips"],
    ),
    "plans that disagree": (
        "stages:\n  - {use: skip_layers, layers: [1]}\n  - {use: skip_layers, layers: [1], what: mlp}\n",
        [r"F:3:32: stages\[1\].layers: plans disagree: layer 1: one stage says skip, another skip_mlp"],
    ),
    "empty": ("", [r"F:1:1: is empty \(a pipeline needs at least `stages:`\)"]),
    "only comments": ("# nothing\n", [r"F:1:1: is empty"]),
    "no stages": ("stages: []\n", [r"F:1:9: stages: is empty"]),
    "a list": ("- use: random\n", [r"F:1:1: must be a mapping with `stages:`"]),
    "stages are no list": (
        "stages:\n  use: random\n",
        [r"F:2:3: stages: must be a list, not a mapping \(write `- use: NAME`\)"],
    ),
    "a stage is a name": ("stages:\n  - random\n", [r"F:2:5: stages\[0\]: must be a mapping, not 'random'"]),
    "a stage without use": (
        "stages:\n  - ues: random\n",
        [r"F:2:5: stages\[0\].use: is missing \(did you mean 'ues'\?\)"],
    ),
    "binary": (
        b"\x89PNG\r\n\x1a\n\x00\xff",
        [r"F:1:1: is binary or not UTF-8 text \(a pipeline is a YAML text file\)"],
    ),
    "zero bytes": (b"stages:\n  - use: \x00\n", [r"F:2:10: character 0x0000 cannot stand in a YAML file"]),
    "utf-16": ("stages: []".encode("utf-16"), [r"F:1:1: is binary or not UTF-8 text"]),
    "huge": (b"#" * (1 << 20) + b"\n", [r"F:1:1: is larger than 1048576 bytes"]),
    "not yaml": ("stages: [\n", [r"F:2:1: not YAML: "]),
    "tabs": ("stages:\n\t- use: random\n", [r"F:2:1: not YAML: .*\(indent with blanks\)"]),
    "an unquoted interpolation": (
        "vars: {keep: ${oc.env:KEEP}}\n",
        [r"F:1:15: not YAML: .*put quotes around a value with \$\{\.\.\.\}"],
    ),
    "two documents": ("stages: []\n---\nstages: []\n", [r"F:2:1: not YAML: expected a single document"]),
    "too deep": ("stages: " + "[" * 100 + "]" * 100 + "\n", [r"F:1:40: not YAML: nested over 32 levels deep"]),
    "duplicate keys": (
        "stages:\n  - use: random\n    keep: 0.5\n    keep: 0.25\n",
        [r"F:4:5: stages\[0\].keep: this key stands here twice \(first on line 3; keep one of them\)"],
    ),
    "tag": (
        "stages:\n  - use: !!python/object/apply:os.system [id]\n",
        [
            r"F:2:10: tag '!!python/object/apply:os.system' is not allowed",
            r"F:2:10: stages\[0\].use: must be text, not a list",
        ],
    ),
    "own tag": ("stages: !mine []\n", [r"F:1:9: tag '!mine' is not allowed", r"F:1:9: stages: is empty"]),
    "anchor bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nstages: [*b]\n",
        [
            "F:1:1: a: unknown key",
            "F:1:4: anchor '&a'",
            "F:2:1: b: unknown key",
            "F:2:4: anchor '&b'",
            r"F:2:8: alias '\*a'",
            r"F:2:12: alias '\*a'",
            r"F:3:10: alias '\*b'",
            r"F:3:10: stages\[0\]: must be a mapping, not nothing",
        ],
    ),
    "one anchor twice": (
        "stages: [{use: &a dense}]\nname: &a x\n",
        [r"F:1:16: anchor '&a' is not allowed \(remove it\)", r"F:2:7: anchor '&a'"],
    ),
    "number that is too large": (
        "stages:\n  - {use: random, keep: 0.5, seed: 99999999999999999999}\n",
        [r"F:2:36: stages\[0\].seed: the number does not fit into 64 bits"],
    ),
    "interpolation to nothing": (
        "vars: {keep: 0.5}\nstages:\n  - use: random\n    keep: ${vars.kep}\n    seed: ${oc.env:PRUNEKIT_NONE}\n",
        [
            r"F:4:11: stages\[0\].keep: '\$\{vars.kep\}' refers to 'vars.kep', which .* \(did you mean 'vars.keep'\?\)",
            r"F:5:11: stages\[0\].seed: .* needs the environment variable 'PRUNEKIT_NONE' \(set it, or give a default",
        ],
    ),
    "interpolation in a cycle": (
        "vars:\n  a: ${vars.b}\n  b: ${vars.a}\nstages:\n  - use: random\n    keep: 5\n",
        [
            r"F:2:6: vars.a: '\$\{vars.b\}' leads back to itself, in a cycle \(break the cycle\)",
            r"F:3:6: vars.b: '\$\{vars.a\}' leads back to itself",
            r"F:6:11: stages\[0\].keep: must be a fraction in \(0, 1\], not 5",
        ],
    ),
    "interpolation of the wrong kind": (
        "vars: {m: {a: 1}}\nstages:\n  - use: random\n    keep: ${vars.m}\n    seed: ${vars.m.a}5x\n",
        [
            r"F:4:11: stages\[0\].keep: must be a fraction in \(0, 1\], not a mapping \(it comes from '\$\{vars.m\}'\)",
            r"F:5:11: stages\[0\].seed: must be a whole number, not '15x' \(.*it comes from '\$\{vars.m.a\}5x'\)",
        ],
    ),
    "interpolation that is none": (
        "stages:\n  - use: random\n    keep: ${vars.keep\n    seed: ${os.system:ls}\n",
        [
            r"F:3:11: stages\[0\].keep: '\$\{vars.keep' is not an interpolation: .* \(close each \$\{ with \};",
            r"F:4:11: stages\[0\].seed: .* needs the resolver 'os.system', which does not exist",
        ],
    ),
    "a value that must be set": (
        "stages:\n  - use: random\n    keep: ???\n",
        [r"F:3:11: stages\[0\].keep: must be set: \?\?\? stands for a value that is missing \(such as stages"],
    ),
    "merge key": (
        "stages:\n  - use: dense\n    <<: {use: random}\n",
        [r"F:3:5: stages\[0\].<<: merge keys \(`<<`\) are not supported \(use `extends`, or `vars` and"],
    ),
    "a range is no list": (
        "stages:\n  - use: skip_layers\n    layers: 2-4\n",
        [r"F:3:13: stages\[0\].layers: must be a list, .*, not '2-4' \(write every number: \[2, 3, 4\]\)"],
    ),
    "name": ("name: ../evil\nstages: [{use: dense}]\n", [r"F:1:7: name: '../evil' must be letters, digits"]),
    "name that is a number": (
        "name: 3\nstages: [{use: dense}]\n",
        [r"F:1:7: name: must be text, not 3 \(put it in quotes\)"],
    ),
    "extends itself": (
        "extends: bad.yaml\n",
        [r"F:1:10: extends: extends itself in a cycle: bad.yaml -> bad.yaml"],
    ),
    "extends what is not there": (
        "extends: [nope.yaml]\n",
        [r"F:1:11: extends\[0\]: no such file: .*nope.yaml"],
    ),
    "extends no path": ("extends: 3\n", [r"F:1:10: extends: must be the path of a pipeline file, not 3"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the program, which must refuse with exit code 2 and say so on stderr alone; returns what it said."""
    assert main.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err and "Traceback" not in err
    return err


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, patterns = FILES[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = refused(capsys, "validate", path, "--model", model).splitlines()
    assert lines[-1] == f"prunekit: {len(patterns)} fault{'s' * (len(patterns) > 1)} in 1 of 1 files"
    assert len(lines) == len(patterns) + 1, lines
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.search(pattern.replace("F:", re.escape(str(path)) + ":"), line), (line, pattern)
    err = refused(capsys, "run", path, "--model", model, "--prompt", "x")
    assert all(line in err for line in lines[:-1])


def test_no_file_a_folder_and_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fastv.yaml").write_text("stages: [{use: dense}]\n")
    near = tmp_path / "fastw.yaml"
    said = refused(capsys, "show", near)
    assert f"no such file: '{near}' (did you mean '{tmp_path / 'fastv.yaml'}'?)" in said
    assert "no such file" in refused(capsys, "show", tmp_path / "no" / "where.yaml")
    assert f"'{tmp_path}' is a directory (name a pipeline file in it)" in refused(capsys, "show", tmp_path)
    assert "is not a regular file" in refused(capsys, "show", "/dev/null")
    assert "cannot read" in refused(capsys, "show", "x" * 5000)


def test_extends_in_a_wider_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\nstages: [{{use: dense}}]\n")
    said = refused(capsys, "validate", tmp_path / "a.yaml")
    assert f"{tmp_path / 'c.yaml'}:1:10: extends: extends itself in a cycle: b.yaml -> c.yaml -> b.yaml" in said


def test_all_faults_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.yaml").write_text("stages: [{use: dense}]\n")
    (tmp_path / "one.yaml").write_text("stages:\n  - use: fastvv\n  - use: random\n    keep: 2\n    sede: 1\n")
    files = [tmp_path / name for name in ("one.yaml", "good.yaml", "none.yaml")]
    assert main.main(["validate", *map(str, files)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{files[1]}: ok (")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [
        f"{files[0]}:2:10", f"{files[0]}:4:11", f"{files[0]}:5:5", "no such file", "prunekit",
    ]  # fmt: skip
    assert main.main(["validate", "--json", *map(str, files)]) == 2
    data = json.loads(capsys.readouterr().out)
    assert [row["ok"] for row in data["files"]] == [False, True, False]
    fault = data["files"][0]["faults"][0]
    assert (fault["file"], fault["line"], fault["col"], fault["key"]) == (str(files[0]), 2, 10, "stages[0].use")
    assert "did you mean 'fastv'?" in fault["hint"]


def test_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("stages:\n  - {use: random, keep: 0.5}\n")
    said = refused(capsys, "show", path, "--set", "stages[0].keep=0.5", "--set", "stages[0].keep=5")
    assert "override 2:1:16: stages[0].keep: must be a fraction in (0, 1], not 5" in said
    assert "stages[0].keep: is missing" in refused(capsys, "show", path, "--set", "stages[0].keep=null")
    said = refused(capsys, "show", path, "--set", "stages.0.keep.x=1")
    assert "there is no 'x' to set here (0.5 holds no values of its own)" in said
    said = refused(capsys, "show", path, "--set", "vars.keep=1")
    assert (
        "vars.keep: there is no 'vars' to set here (an override changes what stands under `vars`; write a new" in said
    )


def test_bare_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good.yaml", "a=b.yaml"):
        (tmp_path / name).write_text("stages:\n  - {use: random, keep: 0.5}\n")
    assert "override 1:1:15: stages[0].keep: must be" in refused(capsys, "show", "good.yaml", "stages.0.keep=5")
    both = ["validate", "good.yaml", "stages.0.keep=0.25", "a=b.yaml", "--json", "stages.0.seed=3"]
    assert main.main(both) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [row["source"] for row in files] == ["good.yaml", "a=b.yaml"]
    assert main.main(["show", "good.yaml", "--json", "stages.0.keep=0.25", "stages.0.seed=3", "name=good"]) == 0
    assert json.loads(capsys.readouterr().out)["sha"] == files[0]["sha"]
    assert "nothing to validate: name a pipeline file" in refused(capsys, "validate", "stages.0.keep=5")
    assert "no such file: 'stages.0.keep=5'" in refused(capsys, "show", "stages.0.keep=5")
    two, unknown = ["show", "good.yaml", "other.yaml"], ["show", "good.yaml", "--foo", "name=x"]
    assert "only strategies are searched and filtered" in refused(capsys, "list", "plugins", "a=b")
    for arguments in (unknown, two):
        with pytest.raises(SystemExit) as stop:
            main.main(arguments)
        assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_every_command_tells_its_own_usage_of_an_argument_that_it_does_not_take(capsys) -> None:
    commands = next(one for one in main.parser()._actions if isinstance(one, argparse._SubParsersAction))
    assert len(commands.choices) > 15
    for name, command in commands.choices.items():
        asked = [one for one in command._actions if not one.option_strings or one.required]
        words = [[*one.option_strings[:1], str(next(iter(one.choices or ["1"])))] for one in asked]
        with pytest.raises(SystemExit) as stop:
            main.main([name, *itertools.chain(*words), "--nothing-of-this-name"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"usage: prunekit {name} "), said
        assert "unrecognized arguments: --nothing-of-this-name" in said, said


def test_an_option_that_is_nearly_right_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        main.main(["show", "fastv-k2-r25", "--resolve-it"])
    assert "unrecognized arguments: --resolve-it (did you mean '--resolved'?)" in capsys.readouterr().err


class TestModels:
    """Models that are not there, not whole, or not of the right kind."""

    PIPELINE = Path(__file__).parent.parent / "strategies" / "pipelines" / "fastv-k2-r25.yaml"

    def refused(self, capsys: pytest.CaptureFixture[str], model: object, *more: object) -> str:
        return refused(capsys, "run", self.PIPELINE, "--prompt", "x", "--model", model, *more)

    def test_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "unknown model 'mirco' (did you mean 'micro'?" in self.refused(capsys, "mirco")
        assert f"no such model folder: '{tmp_path}/none'" in self.refused(capsys, tmp_path / "none")
        assert "is no model folder: it has no config.json" in self.refused(capsys, tmp_path)
        said = self.refused(capsys, "nobody/has-this-model")
        assert "model 'nobody/has-this-model' does not load" in said and "`--download` fetches it" in said

    @pytest.mark.parametrize("config", [b"\xff\xfe\x00", b"", b"{", b"[]", b"{}", b'{"model_type": "no_such_type"}'])
    def test_a_broken_config(self, tmp_path: Path, config: bytes, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "config.json").write_bytes(config)
        assert f"model '{tmp_path}' does not load" in self.refused(capsys, tmp_path)

    def test_a_text_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert "is it a complete vision-language model of transformers?" in self.refused(capsys, tmp_path)

    def test_a_family_that_is_not_supported(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from transformers import Blip2Config

        Blip2Config().save_pretrained(tmp_path)
        said = self.refused(capsys, tmp_path)
        assert "models of type 'blip-2' (Blip2ForConditionalGeneration) have no family file" in said
        assert "its config names no `image_token_id`" in said

    @pytest.mark.parametrize("content", [None, b"", b"garbage" * 100])
    def test_weights_that_are_missing_or_broken(
        self, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = save(tmp_path, layers=4) / "model.safetensors"
        weights.unlink() if content is None else weights.write_bytes(content)
        wrong = "is a config without weights" if content is None else "does not load"
        assert f"model '{tmp_path}' {wrong}" in self.refused(capsys, tmp_path)

    def test_weights_of_fewer_layers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = save(tmp_path, layers=4) / "config.json"
        data = json.loads(config.read_text())
        data["text_config"] |= {"num_hidden_layers": 5, "layer_types": None}
        config.write_text(json.dumps(data))
        assert "has no weights for" in self.refused(capsys, tmp_path)

    def test_weights_of_more_layers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = save(tmp_path, layers=4) / "config.json"
        data = json.loads(config.read_text())
        data["text_config"] |= {"num_hidden_layers": 3, "layer_types": None}
        config.write_text(json.dumps(data))
        said = self.refused(capsys, tmp_path)
        assert "weights that its config has no place for, such as model.language_model.layers.3." in said

    def test_no_processor(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (save(tmp_path, layers=4) / "processor_config.json").unlink()
        assert f"model '{tmp_path}' does not load" in self.refused(capsys, tmp_path)

    def test_no_chat_template(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (save(tmp_path, layers=4) / "chat_template.jinja").unlink()
        assert "brings no chat template" in self.refused(capsys, tmp_path)

    def test_dtype_device_and_attention(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "unknown dtype 'float23' (did you mean 'float32'?" in self.refused(capsys, model, "--dtype", "float23")
        assert "device 'cpuu' cannot be used" in self.refused(capsys, model, "--device", "cpuu")
        assert "does not load" in self.refused(capsys, model, "--attn", "flahs")

    def test_prompt_and_images(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # lmms-eval, once imported by another test, makes Pillow open cut pictures.
        monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
        said = refused(capsys, "run", self.PIPELINE, "--model", model, "--prompt", "<image> what?")
        assert "the prompt holds '<image>', which stands for an image (leave it out; use --image)" in said
        assert "the prompt is empty" in refused(capsys, "run", self.PIPELINE, "--model", model, "--prompt", " ")
        assert f"no such image: '{tmp_path}/no.png'" in self.refused(capsys, model, "--image", tmp_path / "no.png")
        assert "is a directory" in self.refused(capsys, model, "--image", tmp_path)
        broken = picture(tmp_path / "cut.png")
        broken.write_bytes(broken.read_bytes()[:200])
        assert "is not a readable image" in self.refused(capsys, model, "--image", broken)
        broken.write_bytes(b"")
        assert "is not a readable image" in self.refused(capsys, model, "--image", broken)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["shwo"], "invalid choice: 'shwo' (choose from"),
        (["list", "strategy"], "invalid choice: 'strategy'"),
        (["run", "x.yaml"], "required: --model"),
        (["show", "x.yaml", "--text-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["run", "x.yaml", "--model", "m", "--prompt", "p", "--max-new-tokens", "two"], "'two' is not a whole number"),
    ],
)
def test_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"no such folder: '{tmp_path}/x'" in refused(capsys, "list", "pipelines", "--dir", tmp_path / "x")


def test_the_real_program(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("stages:\n  - use: fastvv\n")
    program = [sys.executable, "-m", "prunekit.cli.main"]
    done = subprocess.run([*program, "validate", str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{path}:2:10: stages[0].use: unknown strategy 'fastvv' (did you mean 'fastv'?")
    blocked = {**os.environ, "PRUNEKIT_DISABLE_PLUGINS": "strategies"}
    done = subprocess.run([*program, "validate", str(path)], capture_output=True, text=True, timeout=120, env=blocked)
    assert done.returncode == 2 and "known: none" in done.stderr
