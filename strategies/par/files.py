"""Router folders of PAR (https://arxiv.org/abs/2412.06458): `config.json`, `router.safetensors` and a card, README.md.

A folder says for which model its router was made, by the numbers of that model's decoder; a router for another is
refused, since its scores would mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prunekit_strategies.par.config import RouterConfig
from prunekit_strategies.par.router import Router

from prunekit import ModelShape

FORMAT = "prunekit-router"
VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "router.safetensors", "README.md"
SHIPPED = Path(__file__).parent / "routers"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
# The numbers of a decoder that make it the same model for a router.
NUMBERS = ("family", "layers", "hidden", "heads", "head_dim", "attention_params", "mlp_params", "kv_width")


@dataclasses.dataclass(frozen=True)
class RouterFile:
    """What a router's config.json says. model: `NUMBERS` of its LVLM, and `id`, the name it was trained under.

    training: how it was trained, plain data; empty for one that was not.
    """

    architecture: RouterConfig
    model: Mapping[str, Any]
    training: Mapping[str, Any]

    def refusal(self, shape: ModelShape) -> str | None:
        """Why it does not belong to a model with these numbers; None if it does."""
        wrong = [name for name in NUMBERS if self.model.get(name) != getattr(shape, name)]
        if not wrong:
            return None
        told = ", ".join(f"{name} {self.model.get(name)}, not {getattr(shape, name)}" for name in wrong[:3])
        return f"the router was made for another model ({self.model.get('id') or 'without a name'}): {told}"


def find(weights: str) -> Path:
    """The folder of a router: the name of one that is shipped, a path, or a hub id that is in the local cache.

    Raises ValueError that says what is not there.
    """
    shipped = SHIPPED / weights
    if re.fullmatch(r"[\w.-]+", weights) and (shipped / CONFIG).is_file():
        return shipped
    folder = Path(weights).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(weights) and (cached := _cached(weights)) is not None:
        return cached
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in SHIPPED.glob("*/"))) or "none"
        raise ValueError(
            f"there is no router '{weights}': no such folder, not in the hub's cache, not shipped ({known})"
        )
    if missing:
        raise ValueError(f"'{weights}' is no router folder: it has no {missing[0]}")
    return folder


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def read(folder: Path) -> RouterFile:
    """What the folder's config says. Raises ValueError for a file that is none of a router."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        if data["version"] > VERSION:
            raise ValueError(f"it has version {data['version']}, which needs a newer prunekit")
        return RouterFile(RouterConfig(**data["architecture"]), data["model"], data["training"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{folder / CONFIG}' is not the config of a router: {_said(error)}") from error


def load(folder: Path) -> Router:
    """The router of a folder, as its file holds it. Raises ValueError for weights that do not fit its config."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        router = Router(read(folder).architecture)
    try:
        router.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"'{folder / WEIGHTS}' does not hold this router: {_said(error)}") from error
    return router.eval().requires_grad_(False)


def save(router: Router, folder: Path, model: Mapping[str, Any], training: Mapping[str, Any], card: str) -> None:
    """Write a router folder; each file is complete or not there, also when the process is killed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": FORMAT, "version": VERSION, "architecture": dataclasses.asdict(router.config),
        "model": dict(model), "training": dict(training),
    }  # fmt: skip
    state = {name: value.detach().cpu().contiguous() for name, value in router.state_dict().items()}
    part = folder / f".{WEIGHTS}.part"
    save_file(state, part)
    os.replace(part, folder / WEIGHTS)
    for name, text in ((CARD, card), (CONFIG, json.dumps(data, indent=2) + "\n")):
        (folder / f".{name}.part").write_text(text, encoding="utf-8")
        os.replace(folder / f".{name}.part", folder / name)


def numbers_of(shape: ModelShape, model_id: str) -> dict[str, Any]:
    """What a router folder says of its model."""
    return {"id": model_id, **{name: getattr(shape, name) for name in NUMBERS}}


def loaded(folder: Path, dtype: torch.dtype, device: torch.device) -> Router:
    """A router ready to run; read once, and again when its file has changed."""
    stat = (folder / WEIGHTS).stat()
    return _loaded(folder, stat.st_mtime_ns, stat.st_size, dtype, device)


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path, mtime: int, size: int, dtype: torch.dtype, device: torch.device) -> Router:
    return load(folder).to(device=device, dtype=dtype)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    return f"there is no {error}" if isinstance(error, KeyError) else first
