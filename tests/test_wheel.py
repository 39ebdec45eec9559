"""The wheel holds all that a user needs, which is everything but studies and tests, and works without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import PACKAGES, ROOT, build

MAX_MIB = 26  # the weights of each of the two bundled models take 12 at most

PRUNE = """
import json, sys
import prunekit, prunekit_strategies, prunekit_evals, torch
from prunekit.testing.tiny import tiny_inputs, tiny_llava

model, inputs = tiny_llava(), tiny_inputs()
with prunekit.apply(model, {"name": "w", "stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}) as run:
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
homes = [module.__file__ for module in (prunekit, prunekit_strategies, prunekit_evals)]
print(json.dumps({"homes": homes, "kept": run.report.kept_tokens}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=250)
    return target


def outside(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the installed wheel before anything else."""
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )


def test_holds_every_file_but_the_studies(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "studies"} & set(path.parts)
    }
    assert "prunekit_strategies/pipelines/fastv-k2-r25.yaml" in names
    assert names == expected, "list packages and package-data in pyproject.toml"
    assert wheel.stat().st_size < MAX_MIB * 2**20


def test_carries_licence_and_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    lines = texts["entry_points.txt"].splitlines()
    wanted = ("prunekit = prunekit.cli.main:main", "strategies = prunekit_strategies.plugin", "[lmms_eval.models]")
    assert [line for line in wanted if line not in lines] == []


def test_lists_what_is_registered(site: Path, tmp_path: Path) -> None:
    done = outside(site, tmp_path, "-m", "prunekit.cli.main", "list", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    names = {kind: {row["name"] for row in rows} for kind, rows in listed.items()}
    assert {"dense", "fastv", "divprune", "skip_layers"} <= names["strategies"]
    assert {"micro", "smol"} <= names["models"]


def test_lists_and_shows_the_shipped_pipelines_by_name(site: Path, tmp_path: Path) -> None:
    done = outside(site, tmp_path, "-m", "prunekit.cli.main", "list", "pipelines", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["pipelines"]}
    assert set(rows) == {file.stem for file in (ROOT / "strategies" / "pipelines").glob("*.yaml")}
    assert all(row["summary"] and not row["faults"] for row in rows.values())
    assert Path(rows["fastv-k2-r25"]["file"]).is_relative_to(site)
    done = outside(site, tmp_path, "-m", "prunekit.cli.main", "show", "fastv-k2-r25")
    assert done.returncode == 0, done.stderr
    assert "use: fastv" in done.stdout and str(site) in done.stdout


def test_prunes(site: Path, tmp_path: Path) -> None:
    done = outside(site, tmp_path, "-c", PRUNE)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kept"] == [4]
    assert all(Path(home).is_relative_to(site) for home in result["homes"]), result["homes"]


def test_finds_the_bundled_model(site: Path, tmp_path: Path) -> None:
    done = outside(site, tmp_path, "-m", "prunekit.cli.main", "show", "fastv-k2-r25", "--model", "micro")
    assert done.returncode == 0, done.stderr
    assert "on micro" in done.stdout
