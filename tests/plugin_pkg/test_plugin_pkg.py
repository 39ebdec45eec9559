"""A real distribution, built and installed by pip into a folder of its own: found, used and blocked as any plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installed the distribution into; built from a copy, so that the sources stay clean."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE, work / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", "--no-index",
               "--no-deps", "--no-build-isolation", "--target", work / "site", work / "source"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return work / "site"


def run(installed, *command, **variables):
    """Run a command with the plugin importable; its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRUNEKIT_")}
    environment |= {"PYTHONPATH": str(installed), **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def strategies(output):
    return {entry["name"]: entry for entry in json.loads(output)["strategies"]}


def test_list_shows_it_with_its_origin(installed):
    command = shutil.which("prunekit", path=Path(sys.executable).parent)
    assert command, "the program `prunekit` is installed beside python"
    listed = strategies(run(installed, command, "list", "--json"))
    assert listed["corner"]["origin"] == "prunekit-example 1.2"
    assert listed["corner"]["plugin"] == "example"
    assert "corner" in run(installed, command, "list")
    assert "corner" not in strategies(run(installed, command, "list", "--json", PRUNEKIT_DISABLE_PLUGINS="example"))


def test_without_it_nothing_knows_it(tmp_path):
    command = shutil.which("prunekit", path=Path(sys.executable).parent)
    assert "corner" not in strategies(run(tmp_path, command, "list", "--json"))


def test_its_authors_own_tests_pass(installed):
    """The contract kit works from outside: a stranger's test file of a dozen lines."""
    checks = HERE / "checks" / "corner_checks.py"
    output = run(installed, sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider",
                 "--rootdir", str(installed), str(shutil.copy(checks, installed)))  # fmt: skip
    assert " passed" in output
    assert int(output.split(" passed")[0].split()[-1]) >= 10


def test_a_wrapper_sees_every_call_of_the_stage_that_it_wraps(installed):
    """Two instances of a strategy; the wrapper around the second sees its calls, both prompt batches, and no others."""
    seen = json.loads(run(installed, sys.executable, "-W", "error", str(HERE / "checks" / "run_watched.py")))
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
