"""A real distribution, its wheel built and installed into an environment of its own: found, used and blocked as any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from prunekit import plugins

HERE = Path(__file__).parent


STRATEGIES = {"corner", "sandwich", "by_length", "blend", "moving"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an empty environment into which the wheel was installed; it borrows the packages of this one.

    Built from a copy, so that the sources stay clean.
    """
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE, work / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    done_by(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work / "dist", work / "source")
    done_by(sys.executable, "-m", "venv", "--without-pip", work / "venv")
    python, (wheel,) = work / "venv" / "bin" / "python", (work / "dist").glob("*.whl")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(work / "venv"), "platbase": str(work / "venv")}))
    borrowed = sysconfig.get_path("purelib")
    (packages / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")
    done_by(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-input", "--no-index", "--no-deps",
            "--disable-pip-version-check", wheel)  # fmt: skip
    assert (packages / "prunekit_example" / "moving.py").exists()
    return python


def done_by(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def run(*command, **variables):
    """The output of a command, which sees no plugin but those that are installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRUNEKIT_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment | variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def strategies(output):
    return {entry["name"]: entry for entry in json.loads(output)["strategies"]}


def test_list_shows_it_with_its_origin(installed):
    prunekit = (installed, "-m", "prunekit")
    listed = json.loads(run(*prunekit, "list", "--json"))
    rows = {entry["name"]: entry for entry in listed["strategies"]}
    assert {name for name, row in rows.items() if row["origin"] == "prunekit-example 1.2"} == STRATEGIES
    assert {rows[name]["plugin"] for name in STRATEGIES} == {"example"}
    plugin = next(one for one in listed["plugins"] if one["name"] == "example")
    assert (plugin["version"], plugin["broken"], plugin["hooks"]) == ("1.2", "", ["prunekit_register"])
    assert plugin["file"].endswith("site-packages/prunekit_example/plugin.py")
    text = run(*prunekit, "-p", "no:example-watch", "list", "plugins")
    assert "[prunekit-example 1.2]" in text and "example-watch" not in text
    blocked = strategies(run(*prunekit, "list", "--json", PRUNEKIT_DISABLE_PLUGINS="example"))
    assert not STRATEGIES & set(blocked) and "fastv" in blocked


def test_without_it_nothing_knows_it():
    assert not STRATEGIES & {entry.name for entry in plugins.registry().strategies()}


def test_its_authors_own_tests_pass(installed, tmp_path):
    """The contract kit works from outside: a stranger's test file, and its pytest plugin for the strategy of videos."""
    checks = shutil.copy(HERE / "checks" / "own_checks.py", tmp_path)
    output = run(installed, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:randomly", "-p",
                 "prunekit.testing.pytest_plugin", "--strategy", "moving", "--rootdir", tmp_path, checks,
                 HF_HUB_OFFLINE="1")  # fmt: skip
    assert "skipped" not in output
    assert int(output.split(" passed")[0].split()[-1]) >= 90


def test_a_wrapper_sees_every_call_of_the_stage_that_it_wraps(installed):
    """Two instances of a strategy; the wrapper around the second sees its calls, both prompt batches, and no others."""
    seen = json.loads(run(installed, "-W", "error", HERE / "checks" / "run_watched.py"))
    # 16 and 32 visual tokens, half of them left by the first stage, padded to the wider row; then the second batch.
    assert seen["calls"] == [
        ["score_tokens", [2, 16, 5], [2, 16]],
        ["select_tokens", [2, 16], [4, 8]],
        ["score_tokens", [1, 8, 5], [1, 8]],
        ["select_tokens", [1, 8], [4]],
    ]
    assert seen["after"] == len(seen["calls"]), "unregistered, it sees no more"
    assert seen["unchanged"], "watching changes nothing"
    assert seen["finished"] == ["watched"] * 6, "the observer was told of every prompt batch"
    assert seen["origin"] == "prunekit-example 1.2"
    assert {"example", "example-watch", "strategies"} <= set(seen["plugins"])


def test_a_wrapper_in_this_process_can_change_the_outcome():
    """Wrapping is more than watching: what the wrapper returns is what counts."""
    import prunekit
    from prunekit.testing.tiny import tiny_inputs, tiny_llava

    class Reversed:
        @prunekit.hookimpl(wrapper=True)
        def score_tokens(self):
            return -(yield)

    model, pipeline = tiny_llava(), prunekit.load({"name": "f", "stages": [{"use": "fastv", "keep": 0.5}]})

    def kept():
        with prunekit.apply(model, pipeline) as run:
            model(**tiny_inputs())
        return set(run.report.events[0].kept[0])

    usual = kept()
    pipeline.stages[0].manager.register(Reversed(), name="reversed")
    assert kept() == set(range(16)) - usual, "the lower half instead of the upper"
    pipeline.stages[0].manager.unregister(name="reversed")
    assert kept() == usual
