"""Shared by all tests. Heavy packages are imported inside fixtures, so that tests of the light parts stay light."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# One thread: tiny tensors gain nothing from more, and results are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No hub is asked. `prunekit eval` sets these as well, whichever test is the first to call it.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every machine, however busy it is.
settings.register_profile("prunekit", deadline=None, derandomize=True)
settings.load_profile("prunekit")

# Written by pytest for each test, and by torch when its compiler is first imported.
OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """Tests may run in any order, so none may change what the next one sees; put back, so that one failure is one."""
    environment, torch_state, registered = dict(os.environ), _torch_state(), _registered()
    yield
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name) and name not in OTHERS
    }
    for name in changed:
        os.environ.pop(name, None)
        if name in environment:
            os.environ[name] = environment[name]
    after, plugins = _torch_state(), _registered()
    if torch_state is not None and after != torch_state:
        _restore_torch(torch_state)
    assert not changed, f"the test leaves other environment variables: {', '.join(sorted(changed))}"
    assert torch_state is None or after == torch_state, f"the test leaves torch with {after}, not {torch_state}"
    assert registered is None or plugins in (None, registered), f"the test leaves {plugins}, not {registered}"


def _torch_state() -> dict[str, Any] | None:
    """What decides how torch computes in this process; None before it is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "distributed"):
        return None
    distributed = torch.distributed
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "process group": distributed.is_available() and distributed.is_initialized(),
    }


def _restore_torch(state: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(state["threads"])
    torch.set_default_dtype(state["dtype"])
    torch.set_default_device(state["device"])
    torch.set_grad_enabled(state["grad"])
    torch.use_deterministic_algorithms(state["deterministic"])
    if not state["process group"] and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _registered() -> tuple[str, ...] | None:
    """The names of the registered plugins; None where no plugin manager was made yet, or the last was forgotten."""
    plugins = sys.modules.get("prunekit.plugins")
    if plugins is None or not plugins.manager.cache_info().currsize:
        return None
    return tuple(sorted(name for name, plugin in plugins.manager().list_name_plugin() if plugin is not None))
