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
NEXT = "copy the folder again, or train anew"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
# The numbers of a decoder that make it the same model for a router.
NUMBERS = ("family", "layers", "hidden", "heads", "head_dim", "attention_params", "mlp_params", "kv_width")


@dataclasses.dataclass(frozen=True)
class RouterFile:
    """What a router's config.json says. model: `NUMBERS` of its LVLM, and `id`, the name it was trained under.

    training: how it was trained, plain data; empty for an untrained one.
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
        name = self.model.get("id") or "without a name"
        return f"the router was made for another model ({name}): {told}; train one for this model: `prunekit train`"


def find(weights: str | Path) -> Path:
    """The folder of a router: the name of one that is shipped, a path, or a hub id that is in the local cache.

    Raises ValueError that says what is missing.
    """
    weights = str(weights)
    shipped = SHIPPED / weights
    if re.fullmatch(r"[\w.-]+", weights) and (shipped / CONFIG).is_file():
        return shipped
    folder = Path(weights).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(weights) and (cached := _cached(weights)) is not None:
        return cached
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if not folder.is_dir():
        names = ", ".join(sorted(path.name for path in SHIPPED.glob("*/"))) or "none"
        raise ValueError(
            f"there is no router '{weights}': no such folder, not in the hub's cache, not shipped ({names}); train one "
            "with `prunekit train`, or write null for an untrained one"
        )
    if missing:
        raise ValueError(
            f"'{weights}' is no router folder: it has no {missing[0]}; name one that `prunekit train` made"
        )
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
        if _of(int, data, "version") > VERSION:
            raise ValueError(f"it has version {data['version']}, which needs a newer prunekit")
        return RouterFile(_architecture(data), _of(dict, data, "model"), _of(dict, data, "training"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{folder / CONFIG}' is not the config of a router: {_said(error)}; {NEXT}") from error


def _architecture(data: Mapping[str, Any]) -> RouterConfig:
    values = _of(dict, data, "architecture")
    fields = {field.name: field for field in dataclasses.fields(RouterConfig)}
    for name in values.keys() - fields.keys():
        raise ValueError(f"its architecture has an unknown '{name}'")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"its architecture lacks '{name}'")
    for name, kind in (("theta", float), ("eps", float), ("scatter", float), ("bias", bool)):
        if not isinstance(values.get(name, fields[name].default), (kind, int) if kind is float else kind):
            raise ValueError(f"its {name} is {values[name]!r}")
    return RouterConfig(**values)


def _of(kind: type, data: Mapping[str, Any], key: str) -> Any:
    if not isinstance(data[key], kind):
        raise ValueError(f"its {key} is {data[key]!r}, which cannot be")
    return data[key]


def check(folder: Path) -> None:
    """Raise ValueError for weights that are not those of the config, by names and shapes alone; no number is read."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Router(read(folder).architecture).state_dict().items()}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: tuple(part.get_shape()) for name, part in parts.items()}
            odd = [name for name, part in parts.items() if not part.get_dtype().startswith(("F", "BF"))]
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, _said(error)) from error
    told = [f"it lacks '{name}'" for name in wanted.keys() - stored.keys()]
    told += [f"'{name}' is none of its parts" for name in stored.keys() - wanted.keys()]
    told += [
        f"'{name}' has the shape {stored[name]}, not {shape}"
        for name, shape in wanted.items()
        if stored.get(name, shape) != shape
    ]
    if told := sorted(told) + [f"'{name}' holds no fractions" for name in odd]:
        raise _damaged(folder, "; ".join(told[:3]))


def load(folder: Path) -> Router:
    """The router of a folder, as its file holds it. Raises ValueError for weights that do not fit its config."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check(folder)
    with torch.device("meta"):
        router = Router(read(folder).architecture)
    try:
        router.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(folder, _said(error)) from error
    for name, value in router.state_dict().items():
        if not bool(value.isfinite().all()):
            raise _damaged(folder, f"'{name}' holds numbers that are not finite")
    return router.eval().requires_grad_(False)


def _damaged(folder: Path, told: str) -> ValueError:
    return ValueError(f"'{folder / WEIGHTS}' does not hold this router: {told}; {NEXT}")


def save(router: Router, folder: Path, model: Mapping[str, Any], training: Mapping[str, Any], card: str) -> None:
    """Write a router folder; each file is complete or absent, also when the process is killed."""
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
