"""Several processes train the router that one trains, and it is trained in bfloat16, both by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import prunekit
from prunekit import loading
from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.testing.tiny import tiny_inputs
from prunekit.training.processes import Processes

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_checkpoint import picture, save

STAGE = {"use": "par", "weights": None, "seed": 0, "width": 16, "protect": [0], "keep": 0.25, "keep_layers": 4}
RECIPE = {
    "steps": 3, "batch": 5, "held_out": 3, "candidates": 3, "answer_tokens": 2, "lr": 1e-3, "measure_every": 2,
    "replay": 2,
}  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """Arguments of `prunekit`; the folder of the router is missing at their end."""
    save(tmp_path / "tiny", layers=6)
    rows = []
    for number in range(12):
        picture(tmp_path / f"{number}.png", number)
        words = " ".join(f"w{10 + (number * 7 + place * 13) % 100}" for place in range(2 + number % 7))
        rows.append({"image": f"{number}.png", "prompt": words})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "par.json").write_text(json.dumps({"stages": [STAGE]}))
    given = ["train", str(tmp_path / "par.json"), "--model", str(tmp_path / "tiny")]
    given += ["--data", str(tmp_path / "data.jsonl"), *(f"--train={key}={value}" for key, value in RECIPE.items())]
    return [*given, "--out"]


def curve(folder):
    return json.loads((folder / "config.json").read_text())["training"]["curve"]


def test_two_processes_train_the_router_that_one_trains(command, tmp_path, capsys):
    """Batches of five and three held-out prompts, so that shares are uneven."""
    assert main.main([*command, str(tmp_path / "one")]) == 0
    capsys.readouterr()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "prunekit"]
    done = subprocess.run(
        [*launch, *command, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("router in") == 1 and done.stderr.count("step 3/3") == 1, "one speaks for both"
    one, two = (load_file(tmp_path / name / "router.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_bfloat16_trains_saves_and_is_used(command, tmp_path):
    """The router is kept in float32; the model, and the router in it, compute in bfloat16 when it is used."""
    given = [*command, str(tmp_path / "half"), "--dtype", "bfloat16", "--train", "router_dtype=bfloat16"]
    assert main.main(given) == 0
    assert main.main([*command, str(tmp_path / "full")]) == 0
    half, full = (load_file(tmp_path / name / "router.safetensors") for name in ("half", "full"))
    assert all(value.dtype == torch.float32 for value in half.values())
    assert any(not torch.equal(half[name], full[name]) for name in half)
    assert all(0 <= row["held_out"] < 100 for row in curve(tmp_path / "half"))
    model, _ = loading.load(tmp_path / "tiny", "bfloat16")
    use = {**STAGE, "weights": str(tmp_path / "half"), "width": None}
    with prunekit.apply(model, {"stages": [use]}) as run:
        model.generate(**tiny_inputs((1, 2), (9, 5), dtype=torch.bfloat16), max_new_tokens=3, do_sample=False)
    assert run.report.kept_tokens == (4, 8) and {len(plan.layers) for plan in run.report.plans} == {2}


def test_a_process_that_does_not_find_the_others(monkeypatch):
    """Without a launcher there is nobody else; each of two such processes would train on half of the data."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # Accelerate writes them; so they are taken out again
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Accelerate looks around once in a process, and what another test made it see counts for all after it.
    for state in (PartialState, AcceleratorState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(InputError, match=r"2 processes do not find each other: .*torchrun"):
        Processes("cpu")


def test_a_batch_that_is_smaller_than_the_processes():
    alone = Processes()
    alone.check_batch(1)
    alone.count = 3
    with pytest.raises(InputError, match="3 processes cannot share a batch of 2"):
        alone.check_batch(2)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "prunekit", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("prunekit ")
