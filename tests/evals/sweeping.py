"""A sweep over the tiny model, and what must be true of its results whatever happened on the way."""

import os
import subprocess
import sys

from prunekit_evals.run import reading, results

PIPELINES = ("random-r25", "stride-r11", "fastv-k2-r25")
TASKS = ("pope", "mme", "scienceqa_img")


def write(folder, checkpoint, data_root, limit=6):
    path = folder / "sweep.yaml"
    path.write_text(
        f"models: {checkpoint}\ntasks: [{', '.join(TASKS)}]\ndata_root: {data_root}\nlimit: {limit}\nbatch_size: 2\n"
        f"timing: false\npipelines: [{', '.join(PIPELINES)}]\n"
    )
    return path


def start(path, out, *words):
    """`prunekit sweep` as a process of its own, one thread a worker. What it says goes nowhere."""
    command = [sys.executable, "-m", "prunekit", "sweep", str(path), "--out", str(out), "--threads", "1", *words]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)


def written(out):
    """Each cell's file, with what tells two writings of it apart."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*.json") if is_cell(path)}


def is_cell(path):
    return bool(results.CELL_FILE.search(path.name)) and ".files" not in str(path)


def answers(out):
    """What was answered, by task and pipeline."""
    return {(cell.task, cell.pipeline.name): cell.questions for cell in reading.read([out]).cells}


def check_whole(out):
    """Every cell once, done, with nothing left beside it."""
    cells = reading.read([out]).cells
    assert len(cells) == len({cell.id for cell in cells}) == len(TASKS) * (len(PIPELINES) + 1)
    assert {cell.status for cell in cells} == {"done"}
    assert all(cell.timing.computed + cell.timing.journaled == len(cell.questions) for cell in cells)
    assert [path.name for suffix in ("lock", "jsonl") for path in out.rglob(f"*.{suffix}")] == []
