"""Checkpoints of a training: one file, complete or absent, from which training resumes as if it had never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prunekit.errors import InputError

NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a training is: steps done. curve: measurements so far, in order, plain data."""

    step: int
    curve: tuple[Mapping[str, float], ...] = ()


def save(
    folder: Path, progress: Progress, identity: Mapping[str, Any], now: nn.Module, base: nn.Module, optimizer: Optimizer
) -> None:
    """Write the checkpoint: the router, the one that its candidates come from, and the optimizer."""
    from safetensors.torch import save_file

    tensors = {f"now.{name}": value for name, value in now.state_dict().items()}
    tensors |= {f"base.{name}": value for name, value in base.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"step": progress.step, "curve": list(progress.curve), "identity": dict(identity)}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{NAME}.part"
    save_file(plain, part, metadata={"prunekit": json.dumps(metadata)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)


def restore(
    folder: Path, identity: Mapping[str, Any], now: nn.Module, base: nn.Module, optimizer: Optimizer
) -> Progress | None:
    """Load the checkpoint into these; None when there is none. Raises InputError for one of another training."""
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["prunekit"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(f"'{path}' is no checkpoint of a training: {error} (remove it, or use --restart)") from error
    mine = json.loads(json.dumps(dict(identity)))
    if metadata["identity"] != mine:
        other = sorted(key for key in {*mine, *metadata["identity"]} if mine.get(key) != metadata["identity"].get(key))
        raise InputError(
            f"'{path}' belongs to another training: {', '.join(other)} differ (name another folder, or use --restart)"
        )
    now.load_state_dict(_under(tensors, "now."))
    base.load_state_dict(_under(tensors, "base."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return Progress(int(metadata["step"]), tuple(metadata["curve"]))


def remove(folder: Path) -> None:
    """Delete the checkpoint, if there is one."""
    (folder / NAME).unlink(missing_ok=True)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
