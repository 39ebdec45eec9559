"""Calibration artefacts: what a strategy found out about a model on some prompts, as one JSON file that a stage names.

{"prunekit": "0.1.0", "strategy": "vtw", "model": {...}, "data": {...}, "result": {...}, "digest": "..."}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunekit.strategy.decisions import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 16 * 2**20


class CalibrationPrompt(Protocol):
    """One prompt of a calibration, on a frozen model. Everything is computed when asked for."""

    @property
    def visual(self) -> Tensor:
        """Which positions of the prompt hold visual tokens: bool (S,)."""

    def logits(self, stages: Sequence[Mapping[str, Any]] = (), wrapper: object | None = None) -> Tensor:
        """Logits of the token behind the prompt, float32 (vocabulary,), under a pipeline of `stages`; without, dense.

        stages: as a pipeline file has them, such as [{"use": "vtw", "at": 5}]. wrapper: an object whose
        `@hookimpl(wrapper=True)` hooks stand around those of the first stage: they see what it is given at each of its
        sites, and may answer in its place.
        """

    def states(self) -> Sequence[Tensor]:
        """States of the dense model, float (S, H): what enters each decoder layer, and what leaves the last one.

        Before the final norm; N + 1 tensors for N layers.
        """


@dataclass(frozen=True)
class Artefact:
    """What a calibration wrote down.

    strategy: the registered name. model: `id` (its weights), `family`, `layers`, `hidden`. data: `name`, `digest`,
    `prompts` (how many were used). result: what the strategy's `calibrate` returned.
    """

    prunekit: str
    strategy: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """12 hex digits of the whole content."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:12]

    def refusal(self, shape: ModelShape) -> str | None:
        """Why it is not of a model with these numbers; None if it may be."""
        wanted = {"family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
        if all(self.model.get(name) == value for name, value in wanted.items()):
            return None
        told = (", ".join(f"{name} {numbers.get(name)}" for name in wanted) for numbers in (self.model, wanted))
        return "it is of a model with {}; this one has {}".format(*told)

    def _content(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("prunekit", "strategy", "model", "data", "result")}

    def write(self, path: str | PathLike[str]) -> None:
        """Write the file, as a whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps({**self._content(), "digest": self.digest}, indent=1) + "\n", encoding="utf-8")
        part.replace(target)


def read_artefact(path: str | PathLike[str], strategy: str) -> Artefact:
    """The artefact at `path`, which a calibration of `strategy` wrote.

    Raises ValueError for a file that is missing, no artefact, of another strategy, or changed since it was written.
    """
    hint = f"write one with `prunekit calibrate`; this stage uses '{strategy}'"
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        data = json.loads(raw) if len(raw) <= MAX_BYTES else None
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror} ({hint})") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is no calibration artefact: {error} ({hint})") from error
    kinds = {"prunekit": str, "strategy": str, "model": dict, "data": dict, "result": dict, "digest": str}
    if not isinstance(data, dict) or any(not isinstance(data.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"'{path}' is no calibration artefact ({hint})")
    if data["strategy"] != strategy:
        raise ValueError(f"'{path}' is a calibration of '{data['strategy']}' ({hint})")
    digest = data.pop("digest")
    artefact = Artefact(**{name: data[name] for name in kinds if name != "digest"})
    if artefact.digest != digest:
        raise ValueError(f"'{path}' was changed since it was written: its digest is {artefact.digest}, not {digest}")
    return artefact
