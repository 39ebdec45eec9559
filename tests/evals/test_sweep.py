"""`prunekit sweep` as it runs: workers, deaths, other processes on the same folder."""

import json
import multiprocessing.forkserver
import os
import random
import signal
import threading
import time
from collections import deque
from pathlib import Path

import pytest
import sweeping
from prunekit_evals.run import results
from prunekit_evals.sweep import driver, spec
from prunekit_evals.sweep.driver import Died, Driver, Finished, Started
from prunekit_evals.sweep.orders import Job
from prunekit_evals.sweep.worker import Report

from prunekit.cli.main import main
from prunekit.errors import PrunekitError

REPRODUCE = Path(__file__).parents[2] / "docs" / "reproduce"
JOBS = [Job(0, 0, number) for number in range(6)]


class Pool:
    """Workers that do as they are told: `script` says what follows each submission, "done", "held" or "die"."""

    def __init__(self, size, script, births=99):
        self.size, self.script, self.births = size, deque(script), births
        self.events, self.submitted = deque(), []

    def start(self, number):
        self.births -= 1
        self.events.append(Started(number) if self.births >= 0 else Died(number, "no room"))

    def submit(self, number, given):
        self.submitted.append(given)
        what = self.script.popleft() if self.script else "done"
        status = "failed" if given.lost else what
        report = Report(given.job, status, "", given.lost)
        self.events.append(Died(number, "it burned") if what == "die" else Finished(number, report))

    def wait(self, seconds):
        events, self.events = list(self.events), deque()
        return events


class Told:
    def __init__(self):
        self.reports, self.texts = [], []

    def ended(self, report):
        self.reports.append(report)

    def say(self, text):
        self.texts.append(text)


def drive(pool, retries=1):
    told = Told()
    return Driver(JOBS, pool, told, retries).run(), told


def test_every_job_is_reported_once_and_in_order():
    reports, told = drive(Pool(2, []))
    assert [one.job for one in reports] == JOBS
    assert sorted(one.job.pipeline for one in told.reports) == list(range(6))


def test_a_job_of_a_dead_worker_is_taken_up_by_the_next():
    pool = Pool(1, ["done", "die"])
    reports, told = drive(pool)
    assert [one.status for one in reports] == ["done"] * 6
    assert [given.job.pipeline for given in pool.submitted] == [0, 1, 1, 2, 3, 4, 5]
    assert told.texts == ["worker 0 died (it burned)"]


def test_a_job_that_kills_every_worker_is_written_as_failed():
    reports, told = drive(Pool(1, ["done", "die", "die"]))
    lost = [one for one in reports if one.status == "failed"]
    assert [one.error for one in lost] == ["2 workers died at it, the last: it burned"]
    assert len(told.reports) == 6


def test_what_others_compute_is_looked_at_again(monkeypatch):
    monkeypatch.setattr(driver, "LOOK", 0.01)
    pool = Pool(1, ["held", "held", "done"])
    reports, _ = drive(pool)
    assert [one.status for one in reports] == ["done"] * 6
    assert len(pool.submitted) == 8


def test_a_sweep_ends_where_no_worker_is_left(monkeypatch):
    with pytest.raises(PrunekitError, match=r"no worker is left: each died, the last: no room"):
        drive(Pool(2, [], births=0))
    monkeypatch.setattr(driver, "PATIENCE", 0.0)
    never = Pool(1, [])
    never.start = lambda number: None
    with pytest.raises(PrunekitError, match="no worker could be started within 0 s"):
        drive(never)


def workers():
    """The processes of the pool that this process began."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    return children(server) if server else []


def children(pid):
    """The processes that a process has begun."""
    try:
        texts = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [int(child) for text in texts for child in text.split()]


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_sweep_whose_workers_are_killed_loses_and_repeats_nothing(checkpoint, data_root, tmp_path, capsys):
    """Three kills, each as soon as one more answer or cell is there; a last worker stays alive."""
    path, out = sweeping.write(tmp_path, checkpoint, data_root), tmp_path / "out"
    seen, killed, over = {}, [], threading.Event()

    def watch():
        while not over.is_set():
            seen.update({one: mark for one, mark in sweeping.written(out).items() if one not in seen})
            lines = sum(1 for _ in out.rglob("*.journal.jsonl"))
            if len(killed) < 3 and lines and len(seen) > 2 * len(killed) and (found := workers()):
                killed.append(random.choice(found))
                kill(killed[-1:])
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert main(["sweep", str(path), "--out", str(out), "--workers", "2", "--threads", "1", "--json"]) == 0
    finally:
        over.set()
        watcher.join()
    said = capsys.readouterr()
    assert len(killed) == 3 and said.err.count("died (killed by SIGKILL)") == 3
    sweeping.check_whole(out)
    assert {one: mark for one, mark in sweeping.written(out).items() if one in seen} == seen  # written once
    assert 9 <= json.loads(said.out)["computed"] <= 12  # a worker may die when its cell is written, and not yet told
    before = sweeping.written(out)
    assert main(["sweep", str(path), "--out", str(out), "--workers", "1", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0
    assert sweeping.written(out) == before


def test_a_dry_run_computes_nothing(checkpoint, data_root, tmp_path, capsys):
    path = sweeping.write(tmp_path, checkpoint, data_root)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run", "limit=3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{checkpoint}: pope, mme, scienceqa_img", "  dense", "  random-r25", "  stride-r11", "  fastv-k2-r25",
        "12 cells",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert main(["sweep", str(path), "--ray", "127.0.0.1:1", "tasks=popee"]) == 2
    assert "unknown task 'popee'" in capsys.readouterr().err
    assert main(["sweep", str(path), "--out", str(path)]) == 2
    assert f"--out {path}: File exists (name a folder" in capsys.readouterr().err


def test_every_sweep_of_the_cards_is_read_and_one_runs(data_root, tmp_path, capsys):
    """Of the bundled model; that they are those of today's cards `tests/evals/test_catalogue.py` says."""
    files = sorted(REPRODUCE.glob("*.yaml"))
    assert len(files) > 50
    for file in files:
        read = spec.load(file)
        assert [one.model for one in read.models] == ["micro"] and len(read.tasks) == 4 and read.options["limit"] == 40
        assert read.pipelines[0].source.data["name"].data.startswith(file.stem)
    words = ("limit=2", "tasks=[pope]", f"data_root={data_root}", "--workers", "1", "--threads", "1")
    assert main(["sweep", str(REPRODUCE / "stride.yaml"), *words, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["pipeline"] for one in found["cells"]} == {
        "dense", *(f"{name}-{share}" for name in ("stride", "random") for share in (0.5, 0.25, 0.11)),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_at_random_moments(checkpoint, data_root, tmp_path):
    """Of the whole program or of one worker; in the end every cell is there once, with the answers of a calm run."""
    path, out = sweeping.write(tmp_path, checkpoint, data_root, limit=24), tmp_path / "out"
    chance, seen, kills = random.Random(3), {}, 0
    process = sweeping.start(path, out, "--workers", "2")
    try:
        while kills < 20:
            time.sleep(chance.uniform(0.2, 6))
            seen.update({one: mark for one, mark in sweeping.written(out).items() if one not in seen})
            below = [each for one in children(process.pid) for each in children(one)]
            whole = process.poll() is not None or not below or chance.random() < 0.4
            if process.poll() is None:
                kill([process.pid] if whole else [chance.choice(below)])
                kills += 1
            if whole:
                process.wait()
                if len(seen) == 12:  # all there before the kills are used up: the last six are taken away
                    for one in chance.sample(sorted(seen), 6):
                        one.unlink()
                        del seen[one]
                process = sweeping.start(path, out, "--workers", "2")
    finally:
        if kills < 20:
            process.kill()
    assert process.wait(timeout=1000) == 0
    sweeping.check_whole(out)
    assert {one: mark for one, mark in sweeping.written(out).items() if one in seen} == seen
    calm = tmp_path / "calm"
    assert sweeping.start(path, calm, "--workers", "2").wait(timeout=1000) == 0
    assert sweeping.answers(calm) == sweeping.answers(out)
    assert all(results.read(one).status == "done" for one in sweeping.written(out))
