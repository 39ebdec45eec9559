"""Workers that are plain actors of Ray, one for each device. Results are files, so that Ray only moves work.

https://docs.ray.io/en/latest/ray-core/actors.html; the driver owns the queue and `ray.wait`. An actor that dies is
created again, on whatever machine has room; until it has begun the others go on.
"""

from __future__ import annotations

import os
import re
import socket
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from prunekit_evals.sweep.driver import Died, Event, Finished, Started
from prunekit_evals.sweep.queue import Given
from prunekit_evals.sweep.worker import Report, Setup, Worker

from prunekit.errors import InputError

LOCAL = "local"  # as an address: a cluster of this machine alone, which ends with the sweep
REACH = 5.0  # seconds in which a cluster has to answer
# What of the environment actors get: no keys to anything, which Ray would show.
HANDED_ON = re.compile(
    r"PRUNEKIT_\w+|LMMS_EVAL_DATASETS_CACHE|XDG_CACHE_HOME|HF_(HOME|HUB_CACHE|DATASETS_CACHE|HUB_OFFLINE|DATASETS_OFFLINE)"
    r"|TRANSFORMERS_OFFLINE|TOKENIZERS_PARALLELISM|TQDM_DISABLE"
)


class RayPool:
    """Actors by number. A context manager; on leaving it they are ended, and so is a cluster that it began."""

    def __init__(
        self, setup: Setup, address: str, count: int | None, cells: int, kind: type[Any] = Worker
    ) -> None:
        """Connect. address: of a cluster, `auto` for the one that runs here, or `LOCAL`. kind: whose actors.

        count: of workers, at most one for each cell; None: one for each GPU of the cluster, without GPUs one for so
        many cores as `setup.threads` says. Raises InputError where Ray is not there, or nothing answers.
        """
        if find_spec("ray") is None:
            raise InputError("--ray needs Ray: pip install 'prunekit[ray]' (without --ray this machine is used)")
        _check_answers(address)
        import ray

        self.ray, self.setup, self.kind = ray, setup, kind
        self._began = not ray.is_initialized()
        if self._began:
            self._connect(address)
        resources = ray.cluster_resources()
        self.gpus, self.cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        usual = self.gpus or self.cores // (setup.threads or 1)
        self._size = max(min(count or usual, cells), 1)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}

    @property
    def size(self) -> int:
        """How many workers."""
        return self._size

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self.ray.kill(actor)
        if self._began:
            self.ray.shutdown()

    def start(self, number: int) -> None:
        """Create an actor, in place of a dead one if there was one."""
        share = {"num_cpus": self.setup.threads or 1, "num_gpus": 1 if self.gpus else 0}
        actor = self.ray.remote(self.kind).options(max_restarts=0, max_task_retries=0, **share)
        self._actors[number] = made = actor.remote(self.setup, "cuda" if self.gpus else "cpu")
        self._pending[made.ready.remote()] = number

    def submit(self, number: int, given: Given) -> None:
        """Hand it a job."""
        self._pending[self._actors[number].compute.remote(given)] = number

    def wait(self, seconds: float) -> list[Event]:
        """What happened, as soon as something did, or after so many seconds."""
        ready, _ = self.ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        return [self._event(one, self._pending.pop(one)) for one in ready]

    def _event(self, reference: Any, number: int) -> Event:
        exceptions = self.ray.exceptions
        try:
            told = self.ray.get(reference)
        except (exceptions.RayActorError, exceptions.RayTaskError, exceptions.RaySystemError) as error:
            self.ray.kill(self._actors[number])  # one whose machine is out of reach may still be there
            text = getattr(error, "cause", None) or error
            return Died(number, f"{type(error).__name__}: {' '.join(str(text).split())[:200]}")
        return Finished(number, told) if isinstance(told, Report) else Started(number)

    def _connect(self, address: str) -> None:
        variables = {name: value for name, value in os.environ.items() if HANDED_ON.fullmatch(name)}
        options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        try:
            self.ray.init(
                log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables}, **options
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--ray {address}: {reason} (start a cluster by `ray start --head`, or use --ray without an address)"
            ) from error


def _check_answers(address: str) -> None:
    """Raise InputError where nobody listens at `host:port`: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=REACH).close()
        except (OSError, OverflowError) as error:
            hint = "`ray status` names the cluster that runs here"
            raise InputError(f"--ray {address}: nothing answers there: {error} ({hint})") from error
