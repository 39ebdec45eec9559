"""The `prunekit` program: what it prints, in words and as JSON, its exit codes, and that light commands stay light."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_checkpoint import picture, save

from prunekit import hookimpl, loading, plugins
from prunekit.cli import catalogue, main
from prunekit.cli import list as listing
from prunekit.cli import run as running
from prunekit.errors import PrunekitWarning, SpecError
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.strategy.about import GROUPS
from prunekit.strategy.decisions import ModelShape

ROOT = Path(__file__).parent.parent
PIPELINES = ROOT / "strategies" / "pipelines"
ANY_SIZE = {"pixelprune", "evs-r25"}  # for towers that take images of any size, which the bundled model has not
PROGRAM = [sys.executable, "-m", "prunekit.cli.main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return picture(tmp_path / "image.png")


@pytest.fixture
def extra() -> Iterator[ModuleType]:
    """A plugin module, registered for one test; give it hooks before the program runs."""
    module = ModuleType("extra")
    yield module
    if any(one.name == "extra" for one in plugins.described()):
        plugins.unregister("extra")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """The program's stdout; nothing may stand on stderr."""
    assert main.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


class TestList:
    def test_everything_by_kind(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "list", "--dir", PIPELINES)
        kinds = [line for line in out.splitlines() if line and not line.startswith(" ")]
        assert kinds == list(listing.KINDS)
        for entry in plugins.registry().strategies():
            assert f"  {entry.name} " in out and entry.summary in out

    def test_json_carries_origins(self, capsys: pytest.CaptureFixture[str]) -> None:
        data = json.loads(run(capsys, "list", "--json", "--dir", PIPELINES))
        assert list(data) == list(listing.KINDS)
        fastv = next(row for row in data["strategies"] if row["name"] == "fastv")
        assert fastv["origin"].startswith("prunekit 0.") and fastv["plugin"] == "strategies" and fastv["summary"]
        assert "micro" in [row["name"] for row in data["models"]]
        assert "prunekit_register" in next(row for row in data["plugins"] if row["name"] == "strategies")["hooks"]
        assert len(data["pipelines"]) == len(list(PIPELINES.glob("*.yaml")))

    def test_one_kind(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(json.loads(run(capsys, "list", "models", "--json"))) == ["models"]
        assert run(capsys, "list", "strategies").startswith("strategies\n  baselines\n    blind")

    def test_strategies_stand_in_groups_in_the_order_of_the_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = run(capsys, "list", "strategies").splitlines()
        heads = [line.strip() for line in out if line.startswith("  ") and not line.startswith("   ")]
        assert heads == [one for one in GROUPS if one in heads] and len(heads) >= 8
        names = [line.split()[0] for line in out if line.startswith("    ")]
        assert sorted(names) == [entry.name for entry in plugins.registry().strategies()]

    @pytest.mark.parametrize(
        "words", ["2403.06764", "arXiv:2403.06764v2", "https://arxiv.org/abs/2403.06764", "FastV@d1"]
    )
    def test_one_strategy_is_found_by_paper_or_code(self, capsys: pytest.CaptureFixture[str], words: str) -> None:
        out = run(capsys, "list", "strategies", words)
        assert "  fastv: most attended" in out and "studied        pkunlp-icler/FastV@d165972" in out
        (row,) = json.loads(run(capsys, "list", "strategies", words, "--json"))["strategies"]
        assert (row["name"], row["text_aware"], row["attention"], row["sites"]) == (
            "fastv",
            True,
            ["decoder"],
            ["decoder"],
        )

    def test_words_must_all_be_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "visionzip: attended by CLS" in run(capsys, "list", "strategies", "CLS", "zip")
        assert main.main(["list", "strategies", "fastvv"]) == 2
        assert "no strategy has 'fastvv' (did you mean 'fastv'?" in capsys.readouterr().err

    def test_filters_are_the_facts(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Each of them leaves some out, and lets through what its fact says."""
        every = {row["name"]: row for row in json.loads(run(capsys, "list", "strategies", "--json"))["strategies"]}

        def names(*options: str) -> set[str]:
            return {
                row["name"] for row in json.loads(run(capsys, "list", "strategies", *options, "--json"))["strategies"]
            }

        for option in catalogue.FILTERS:
            assert set() < names(option) < set(every), option
        for one, other in (("--text-aware", "--text-blind"), ("--attention", "--attention-free"),
                           ("--trained", "--training-free")):  # fmt: skip
            assert names(one) | names(other) == set(every) and not names(one) & names(other)
        decoder = names("--site", "decoder", "--training-free", "--text-aware")
        assert {"fastv", "dart", "cdpruner"} <= decoder and not {"par", "v2drop", "trim", "divprune"} & decoder
        assert names("--group", "baselines") == {name for name, row in every.items() if row["group"] == "baselines"}
        assert names("--site", "end", "--servable") == set()
        assert "none" in run(capsys, "list", "strategies", "--site", "end", "--servable")

    def test_only_strategies_are_searched(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["list", "models", "micro"], ["list", "--servable"]):
            assert main.main(arguments) == 2
            assert "only strategies are searched" in capsys.readouterr().err

    def test_a_strategy_that_does_not_import_is_told(
        self, capsys: pytest.CaptureFixture[str], extra: ModuleType
    ) -> None:
        def registers(registry: Registry) -> None:
            registry.strategy("shattered", "prunekit_nowhere:Nothing", summary="gone")

        extra.prunekit_register = hookimpl(registers)  # type: ignore[attr-defined]
        plugins.register(extra, "extra")
        out = run(capsys, "list", "strategies")
        assert "  do not import\n    shattered" in out and "No module named 'prunekit_nowhere'" in out
        assert "shattered" not in run(capsys, "list", "strategies", "--training-free")

    def test_pipelines_say_what_they_are_and_broken_ones_are_told(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "a.yaml").write_text("# First line.\n# Second.\nstages: [{use: x}]\n")
        (tmp_path / "b.yml").write_text("description: Said inside.\nstages: [{use: x}]\n")
        (tmp_path / "c.yaml").write_text("stages: 3\n")
        (tmp_path / "notes.txt").write_text("no pipeline")
        out = run(capsys, "list", "pipelines", "--dir", tmp_path).splitlines()
        assert out[1:3] == [f"  a  First line.  [{tmp_path / 'a.yaml'}]", f"  b  Said inside.  [{tmp_path / 'b.yml'}]"]
        assert "broken: must be a list, not 3; see `prunekit validate" in out[3] and len(out) == 4

    def test_shipped_pipelines_are_listed_by_name_from_anywhere(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        rows = json.loads(run(capsys, "list", "pipelines", "--json"))["pipelines"]
        assert [row["name"] for row in rows] == sorted(file.stem for file in PIPELINES.glob("*.yaml"))
        row = next(row for row in rows if row["name"] == "dense")
        assert row["summary"] == "The model as it is: the row that every other pipeline is compared with."
        assert (row["origin"], row["plugin"], row["faults"]) == ("prunekit 0.1.0", "strategies", 0)
        assert Path(row["file"]) == PIPELINES / "dense.yaml"


class TestNames:
    """A registered pipeline goes by its name, in every command; a file of that name goes first."""

    def test_a_name_is_its_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shown = run(capsys, "show", "compose")
        assert shown == run(capsys, "show", PIPELINES / "compose.yaml")
        assert run(capsys, "validate", "compose", "--syntax") == "compose: ok\n"
        assert build.build("compose").sha == build.build(PIPELINES / "compose.yaml").sha
        Path("compose").write_text("name: mine\nstages: [{use: dense}]\n")
        assert build.build("compose").name == "mine"

    def test_an_unknown_name_gets_suggestions_and_hides_no_other_fault(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        with pytest.raises(SpecError, match=r"'compos', and no pipeline .*did you mean 'compose'"):
            build.build("compos")
        with pytest.raises(SpecError, match=r"^no such file: 'compos\.yaml'"):
            build.build("compos.yaml")
        (tmp_path / "bad.yaml").write_text("stages: 3\n")
        assert main.main(["validate", "compos", str(tmp_path / "bad.yaml")]) == 2
        stderr = capsys.readouterr().err
        assert "did you mean 'compose'?" in stderr and "bad.yaml:1:9: stages: must be a list" in stderr


class TestShow:
    def test_the_resolved_pipeline(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        built = build.build(PIPELINES / "compose.yaml")
        out = run(capsys, "show", PIPELINES / "compose.yaml")
        assert built.sha in out and built.resolved in out
        assert "stages[1] fastv: Keep the visual tokens that the last prompt token attends to most" in out
        saved = tmp_path / "again.yaml"  # what is shown is a pipeline file again
        saved.write_text(out.partition("\nstages\n")[0])
        assert build.build(saved).sha == built.sha

    def test_on_a_model_without_its_weights(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
        out = run(capsys, "show", PIPELINES / "compose.yaml", "--model", tmp_path, "--text-tokens", 10)
        assert f"on {tmp_path} (llava, 10 layers, 16 visual tokens an image)" in out
        assert "stages[0] divprune: at encoder, keeps 0.5 of original\n" in out
        assert "stages[1] fastv: at 4, keeps 0.125 of original\n" in out
        assert "  skip: layers 7\n  positions: kept\n" in out
        assert "    18 18 18 18 12 12 12 12 12 12\n" in out

    def test_json(self, capsys: pytest.CaptureFixture[str], model: Path) -> None:
        arguments = ("show", PIPELINES / "compose.yaml", "--json", "--set", "stages[0].keep=0.25", "--set", "name=mine")
        data = json.loads(run(capsys, *arguments, "--model", model, "--text-tokens", 10))
        assert data["name"] == "mine" and data["positions"] == "keep" and data["budget"] is None
        assert data["model"]["tokens_at_most"] is False and "projector" in data["model"]["flops_of"]
        assert data["stages"][0]["keep"] == 0.25 and data["stages"][2]["layers"] == [7]
        assert data["model"]["layer_tokens"] == [14] * 4 + [12] * 6
        assert data["model"]["kv_tokens"] == [14] * 4 + [12] * 3 + [0] + [12] * 2
        assert data["model"]["plan"] == {"prefill": {"7": "skip"}}
        assert [cut["site"] for cut in data["model"]["cuts"]] == ["encoder", "4"] and data["model"]["routers"] == []
        low, high = data["model"]["prefill_flops_fraction"]
        assert 0 < low == high < 14 / 26
        assert data["model"]["kv_fraction"] == pytest.approx([(14 * 4 + 12 * 5) / 260] * 2)
        assert "model" not in json.loads(run(capsys, *arguments))

    def test_a_model_whose_tokens_depend_on_the_image_shows_none(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shape = ModelShape("stub", 10, 8, 2, 4, 1, 1, 16, None)
        monkeypatch.setattr(loading, "load_shape", lambda name, download: shape)
        out = run(capsys, "show", PIPELINES / "compose.yaml", "--model", "any")
        assert "image-dependent visual tokens an image" in out and "FLOPs" not in out


class TestValidate:
    def test_good_files(self, capsys: pytest.CaptureFixture[str]) -> None:
        every = sorted(PIPELINES.glob("*.yaml"))
        files = [path for path in every if path.stem not in (*ANY_SIZE, "par-smol")]
        out = run(capsys, "validate", *files, "--model", "micro")  # to which the router of par.yaml belongs
        assert out.splitlines() == [f"{path}: ok ({build.build(path).sha})" for path in files]
        data = json.loads(run(capsys, "validate", files[0], "--json"))
        assert data["files"] == [{"source": str(files[0]), "ok": True, "sha": build.build(files[0]).sha, "faults": []}]

    def test_syntax_alone_knows_no_strategy(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        path = tmp_path / "unknown.yaml"
        path.write_text("stages: [{use: not-installed-here, keep: 0.5}]\n")
        assert run(capsys, "validate", path, "--syntax") == f"{path}: ok\n"


class TestRun:
    def test_an_answer_and_a_report(self, capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
        arguments = ("run", PIPELINES / "compose.yaml", "--model", model, "--prompt", "w9 w12", "--max-new-tokens", 4)
        data = json.loads(run(capsys, *arguments, "--image", image, "--json", "--compare-dense"))
        assert len(data["answer"].split()) <= 4 and data["answer"] and data["dense_answer"]
        assert data["sha"] == data["report"]["sha"] == build.build(PIPELINES / "compose.yaml").sha
        assert data["report"]["visual_tokens"] == [16] and data["report"]["kept_tokens"] == [2]
        shown = json.loads(
            run(capsys, "show", PIPELINES / "compose.yaml", "--model", model, "--json", "--text-tokens", 4)
        )
        assert data["report"]["prompt_tokens"] == [20]
        assert data["report"]["layer_tokens"] == [shown["model"]["layer_tokens"]]
        assert data["report"]["kv_tokens"] == [shown["model"]["kv_tokens"]]
        promised = shown["model"]["prefill_flops_fraction"][0] + shown["model"]["decision_flops_fraction"]
        assert data["report"]["cost"]["flops_fraction"] == pytest.approx(promised)
        assert data["report"]["cost"]["kv_fraction"] == pytest.approx(shown["model"]["kv_fraction"][0])
        out = run(capsys, *arguments, "--image", image)
        assert out.startswith(data["answer"] + "\n\npipeline compose (") and "visual tokens 16 -> 8" in out
        compared = run(capsys, *arguments, "--image", image, "--compare-dense")
        assert compared.startswith(f"dense:  {data['dense_answer']}  (")
        assert f"\npruned: {data['answer']}  (" in compared

    def test_the_dense_answer_is_the_unpruned_models(
        self, capsys: pytest.CaptureFixture[str], model: Path, image: Path
    ) -> None:
        loaded, processor = loading.load(model, device="cpu")
        from PIL import Image

        inputs = running.prepare(processor, "w9 w12", [Image.open(image).convert("RGB")])
        expected, _ = running.answer(loaded, processor, inputs, 4)
        arguments = ("--model", model, "--image", image, "--prompt", "w9 w12", "--max-new-tokens", 4, "--device", "cpu")
        assert json.loads(run(capsys, "run", PIPELINES / "dense.yaml", *arguments, "--json"))["answer"] == expected
        blind = json.loads(run(capsys, "run", PIPELINES / "blind.yaml", *arguments, "--json", "--compare-dense"))
        assert blind["dense_answer"] == expected != blind["answer"]

    def test_without_an_image_it_runs_dense_and_says_so(self, capsys: pytest.CaptureFixture[str], model: Path) -> None:
        arguments = ["run", str(PIPELINES / "fastv-k2-r25.yaml"), "--model", str(model), "--prompt", "w9", "--json"]
        assert main.main(arguments) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)["report"]
        assert report["kept_tokens"] == [0] and len({*report["layer_tokens"][0]}) == 1
        assert "no visual tokens" in report["notes"][0] and f"prunekit: warning: {report['notes'][0]}" in err

    def test_several_images(self, capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
        arguments = ("run", PIPELINES / "random-r25.yaml", "--model", model, "--prompt", "w9", "--json")
        data = json.loads(run(capsys, *arguments, "--image", image, "--image", image, "--max-new-tokens", 1))
        assert data["report"]["visual_tokens"] == [32] and data["report"]["kept_tokens"] == [8]

    def test_overrides_dtype_and_attention(self, capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
        arguments = (
            "run",
            PIPELINES / "random-r25.yaml",
            "--model",
            model,
            "--prompt",
            "w9",
            "--json",
            "--image",
            image,
        )
        more = ("--dtype", "float64", "--attn", "eager", "--set", "stages[0].keep=0.5", "--max-new-tokens", 1)
        assert json.loads(run(capsys, *arguments, *more))["report"]["kept_tokens"] == [8]


class TestLoading:
    def test_precision_and_place(self, model: Path) -> None:
        import torch

        loaded, processor = loading.load(model, device="cpu")
        assert (loaded.dtype, loaded.device.type, loaded.training) == (torch.float32, "cpu", False)
        assert type(processor.image_processor).__name__.endswith("Pil")  # type: ignore[attr-defined]
        assert loading.load(model, dtype=torch.bfloat16, device="cpu", attn="eager")[0].dtype == torch.bfloat16

    def test_names(self, model: Path, extra: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        extra.where = lambda: str(model)  # type: ignore[attr-defined]
        extra.prunekit_models = hookimpl(lambda: {"tiny": "extra:where", "gone": "extra:nowhere"})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "extra", extra)
        plugins.register(extra, "extra")
        assert loading.resolve("tiny") == model == loading.resolve(str(model)) == loading.resolve(model)
        assert loading.resolve("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"

    def test_a_shape_needs_no_weights(self, model: Path, tmp_path: Path) -> None:
        from prunekit.families import shape_of

        (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
        assert loading.load_shape(tmp_path) == shape_of(loading.load(model, device="cpu")[0])


class TestProgram:
    def command(self, extra: ModuleType, function: Any) -> None:
        @hookimpl
        def prunekit_commands(subparsers: Any) -> None:
            subparsers.add_parser("extra").set_defaults(run=function)

        extra.prunekit_commands = prunekit_commands  # type: ignore[attr-defined]
        plugins.register(extra, "extra")

    def test_plugins_bring_commands(self, extra: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        self.command(extra, lambda namespace: 7)
        assert main.main(["extra"]) == 7

    def test_a_command_of_a_plugin_may_not_replace_one(
        self, extra: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is left out, with the commands that it could add before."""

        def commands(subparsers: Any) -> None:
            subparsers.add_parser("first")
            subparsers.add_parser("list")

        extra.prunekit_commands = hookimpl(commands)  # type: ignore[attr-defined]
        plugins.register(extra, "extra")
        assert main.main(["list", "plugins"]) == 0
        out, err = capsys.readouterr()
        assert "'extra' of module extra is left out: prunekit_commands raised ArgumentError" in err
        assert "  extra       broken: prunekit_commands raised ArgumentError" in out
        assert "first" not in main.parser().format_help()

    def test_a_defect_is_one_line_and_exit_code_1(self, extra: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        def fails(namespace: argparse.Namespace) -> int:
            raise RuntimeError("boom")

        self.command(extra, fails)
        assert main.main(["extra"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "prunekit: unexpected RuntimeError: boom (this is a defect; --debug shows where)\n")
        for arguments in (["--debug", "extra"], ["extra", "--debug"]):
            assert main.main(arguments) == 1
            assert "Traceback" in capsys.readouterr().err

    def test_debug_of_a_refusal_keeps_its_exit_code(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["show", "--debug", "nowhere.yaml"]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and err.splitlines()[-1].startswith("prunekit: error: no such file")

    def test_interrupted(self, extra: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        def stops(namespace: argparse.Namespace) -> int:
            raise KeyboardInterrupt

        self.command(extra, stops)
        assert main.main(["extra"]) == 130
        assert capsys.readouterr().err == "prunekit: interrupted\n"

    def test_warnings_of_prunekit_are_one_line(self, extra: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        def warns(namespace: argparse.Namespace) -> int:
            warnings.warn("look here", PrunekitWarning, stacklevel=1)
            return 0

        self.command(extra, warns)
        assert main.main(["extra"]) == 0
        assert capsys.readouterr().err == "prunekit: warning: look here\n"

    def test_a_reader_that_goes_away_is_no_error(self) -> None:
        with subprocess.Popen([*PROGRAM, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=60) == 141

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        from prunekit import __version__

        with pytest.raises(SystemExit) as stop:
            main.main(["--version"])
        assert stop.value.code == 0 and capsys.readouterr().out == f"prunekit {__version__}\n"

    @pytest.mark.parametrize("command", ["list", "show", "validate", "run"])
    def test_every_command_explains_itself_with_an_example(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main.main([command, "--help"])
        out = capsys.readouterr().out
        assert f"example: prunekit {command}" in out and "--json" in out

    @pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["validate", "--syntax", "FILES"]])
    def test_light_commands_do_not_import_torch(self, arguments: list[str]) -> None:
        files = [str(path) for path in PIPELINES.glob("*.yaml")]
        given = [*arguments[:-1], *files] if arguments[-1] == "FILES" else arguments
        code = (
            "import sys\nfrom prunekit.cli.main import main\n"
            f"try:\n    code = main({given!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
            "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'lmms_eval', 'numpy')))"
        )
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
        print(f"{' '.join(arguments)}: {time.perf_counter() - start:.2f} s")
        assert (done.returncode, done.stderr) == (0, "")

    def test_output_may_go_where_only_ascii_goes(self, tmp_path: Path) -> None:
        path = tmp_path / "caf\u00e9.yaml"
        path.write_text("# caf\u00e9\nstages: [{use: dense}]\n", encoding="utf-8")
        ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        for arguments in (["list", "pipelines", "--dir", str(tmp_path)], ["validate", str(path)]):
            done = subprocess.run([*PROGRAM, *arguments], capture_output=True, timeout=120, env=ascii_only)
            assert (done.returncode, done.stderr) == (0, b"")
