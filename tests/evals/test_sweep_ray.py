"""Sweeps on Ray: two nodes on this machine, of which one is killed. A node of Ray is one raylet process."""

import json
import os
import time

import pytest
import sweeping
from prunekit_evals.sweep.cluster import RayPool
from prunekit_evals.sweep.driver import Driver
from prunekit_evals.sweep.orders import Job
from prunekit_evals.sweep.worker import Report, Setup

from prunekit.cli.main import main
from prunekit.errors import InputError

ray = pytest.importorskip("ray")
# Ray leaves sockets and files to the garbage collector, and starts processes that outlive it for a moment.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONBREAKPOINT", "")  # Ray sets it, and this takes it back
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


class Told:
    """Takes the second node away as soon as a first cell is there."""

    def __init__(self, cluster, folder):
        self.cluster, self.second, self.texts = cluster, next(iter(cluster.worker_nodes)), []
        self.folder = folder

    def ended(self, report):
        if self.second is not None:
            (self.folder / f"gone-{self.second.node_id}").touch()  # its worker lives on a while
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = None

    def say(self, text):
        self.texts.append(text)


@pytest.mark.slow
def test_a_node_that_is_killed_takes_nothing_with_it(cluster, tmp_path):
    class Slow:
        """Leaves a line in a file for each job; it is pickled with its code, so that actors need no other. None begins
        before both nodes have a worker.
        """

        def __init__(self, setup, device):
            self.folder, self.node = setup.orders[0], ray.get_runtime_context().get_node_id()
            open(os.path.join(self.folder, f"node-{self.node}"), "w").close()

        def ready(self):
            return True

        def compute(self, given):
            while sum(name.startswith("node-") for name in os.listdir(self.folder)) < 2:
                time.sleep(0.05)
            time.sleep(0.2)
            while os.path.exists(os.path.join(self.folder, f"gone-{self.node}")):
                time.sleep(0.05)
            with open(os.path.join(self.folder, f"job-{given.job.pipeline}"), "a") as file:
                file.write("once\n")
            return Report(given.job, "done", computed=True)

    jobs, told = [Job(0, 0, number) for number in range(8)], Told(cluster, tmp_path)
    with RayPool(Setup((str(tmp_path),), threads=1), cluster.address, None, len(jobs), Slow) as pool:
        assert pool.size == 2
        reports = Driver(jobs, pool, told, retries=2).run()
    assert [(one.job, one.status) for one in reports] == [(job, "done") for job in jobs]
    assert len(told.texts) == 1 and told.texts[0].startswith("worker ") and "died" in told.texts[0]
    assert {path.name for path in tmp_path.glob("job-*")} == {f"job-{number}" for number in range(8)}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_on_two_nodes_of_which_one_is_killed(cluster, checkpoint, data_root, tmp_path, capsys, monkeypatch):
    from prunekit_evals.cli import sweep

    told = Told(cluster, tmp_path)
    usual = sweep._Bar.ended

    def ended(self, report):
        usual(self, report)
        told.ended(report)

    monkeypatch.setattr(sweep._Bar, "ended", ended)
    path, out = sweeping.write(tmp_path, checkpoint, data_root), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--ray", cluster.address, "--json"]) == 0
    said = capsys.readouterr()
    assert "died" in said.err and json.loads(said.out)["computed"] >= 11
    sweeping.check_whole(out)


def test_an_address_at_which_nobody_listens_is_refused_at_once():
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"):
        with pytest.raises(InputError, match=f"--ray {address}: nothing answers there"):
            RayPool(Setup(()), address, None, 1)


def test_without_ray_it_is_said_how_to_get_it(checkpoint, data_root, tmp_path, capsys, monkeypatch):
    from prunekit_evals.sweep import cluster

    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    path = sweeping.write(tmp_path, checkpoint, data_root)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--ray"]) == 2
    assert "pip install 'prunekit[ray]'" in capsys.readouterr().err
