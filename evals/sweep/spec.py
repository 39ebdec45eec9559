"""A sweep file as data: what is to be evaluated. Every fault is told at once, at its place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from prunekit_evals.run import settings
from prunekit_evals.run.settings import Asked
from prunekit_evals.run.variants import KEY, MOST, Variation

from prunekit.errors import Fault, SpecError, Where, did_you_mean
from prunekit.spec.budget_keys import Budget, read_budget
from prunekit.spec.compose import Kind, Source, compose
from prunekit.spec.places import Node, escaped

KIND = Kind("sweep", "pipelines", "see docs/sweep.md")
MODEL_KEYS = ("model", "dtype", "attn", "batch_size")
# A model says what it is loaded as, and a worker where it runs.
OPTIONS = tuple(name for name in settings.names(Asked) if name not in ("dtype", "attn", "device"))
TOP_KEYS = (
    "name", "description", "extends", "vars", "models", "tasks", "pipelines", "seeds", "budgets", "dense", "data_root",
    "include_path", "timing", "calibrate", *OPTIONS,
)  # fmt: skip
REFERENCE_KEYS = ("pipeline", "name", "set", "grid", "seeds")
CALIBRATION_KEYS = ("out", "pipeline", "data", "prompts", "seed")
PROMPTS = 20  # of a calibration, as of `prunekit calibrate`
SUFFIXES = {".yaml", ".yml", ".json"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelChoice:
    """A model of the sweep. batch_size: None takes the sweep's. key, where: of its entry."""

    model: str
    dtype: str | None = None
    attn: str | None = None
    batch_size: int | None = None
    key: str = ""
    where: Where | None = None


@dataclass(frozen=True)
class PipelineChoice:
    """An entry of `pipelines`: where the pipeline comes from, and its variants.

    key, where: of the entry; places: of the values that vary, by their key in the pipeline.
    """

    source: Source
    variation: Variation
    key: str
    where: Where | None
    places: dict[str, Where | None] = field(default_factory=dict)

    def at_home(self, fault: Fault) -> Fault:
        """A fault of the pipeline, at the place in the sweep file that is to blame where it names none of its own."""
        key = f"{self.key}.{fault.key}" if fault.key else self.key
        if fault.where is not None and not fault.where.file.startswith("override "):
            return replace(fault, key=key) if isinstance(self.source, Node) else fault
        return replace(fault, where=self.places.get(fault.key, self.where), key=key)


@dataclass(frozen=True)
class Calibration:
    """A file that pipelines of the sweep name, and what `prunekit calibrate` is told to make it. source: a pipeline."""

    out: Path
    source: Source
    data: str
    prompts: int
    seed: int


@dataclass(frozen=True)
class SweepSpec:
    """A sweep as its file says it.

    tasks: names with the place of each. dense: whether the unpruned model stands beside. data_root, include_path: as of
    `prunekit eval`. calibrations: files that are made first where they are not there. options: of `runner.Plan`, those
    that the file has.
    """

    name: str
    models: tuple[ModelChoice, ...]
    tasks: tuple[tuple[str, Where | None], ...]
    pipelines: tuple[PipelineChoice, ...]
    budgets: tuple[Budget, ...] = ()
    dense: bool = True
    data_root: Path | None = None
    include_path: Path | None = None
    calibrations: tuple[Calibration, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def load(source: str | PathLike[str], overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a sweep file. overrides: `key=value`, as of pipelines. Raises SpecError with every fault of the file.

    Whether pipelines, tasks and models exist is not known yet.
    """
    faults: list[Fault] = []
    composed = compose(source, overrides, frozenset(TOP_KEYS), faults, KIND)
    if composed.values is None:
        raise SpecError(faults)
    reader = _Reader([])
    spec = reader.sweep(composed.values, composed.name)
    faults += composed.resolution.judge(reader.faults)
    if faults:
        raise SpecError(faults)
    return spec


@dataclass
class _Reader:
    """Reads nodes; what is wrong with one is a fault, and something harmless stands for it."""

    faults: list[Fault]

    def sweep(self, values: dict[str, Node], name: str) -> SweepSpec:
        self.known(values, "", TOP_KEYS)
        for key in ("models", "tasks", "pipelines"):
            if key not in values:
                self.faults.append(Fault(None, key, "is missing", "a sweep needs models, tasks and pipelines"))
        seeds = self.whole(values.get("seeds"), "seeds") or 1
        timing = self.boolean(values.get("timing"), "timing", True)
        if "calibrate" in values and len(self.entries(values, "models")) > 1:
            message = "a calibration is of one model, and the sweep has several"
            self.faults.append(Fault(values["calibrate"].key, "calibrate", message, "write a sweep for each model"))
        return SweepSpec(
            self.text(values.get("name"), "name") or name,
            tuple(self.model(one, key) for one, key in self.entries(values, "models")),
            tuple((self.text(one, key) or "", one.where) for one, key in self.entries(values, "tasks")),
            tuple(self.pipeline(one, key, seeds) for one, key in self.entries(values, "pipelines")),
            tuple(budget for one, key in self.entries(values, "budgets") if (budget := self.budget(one, key))),
            self.boolean(values.get("dense"), "dense", True),
            self.folder(values, "data_root"),
            self.folder(values, "include_path"),
            tuple(self.calibration(one, key) for one, key in self.entries(values, "calibrate")),
            {**self.options(values), "timing": timing},
        )

    def options(self, values: dict[str, Node]) -> dict[str, Any]:
        read = settings.read(Asked, {key: values[key] for key in OPTIONS if key in values}, self.faults)
        if read.get("subset_seed") is not None and "limit" not in values:
            message = "draws the questions of `limit`, which is not there"
            self.faults.append(Fault(values["subset_seed"].key, "subset_seed", message, "for instance limit: 100"))
        return read

    def folder(self, values: dict[str, Node], key: str, path: str = "") -> Path | None:
        text = self.text(values.get(key), f"{path}.{key}" if path else key)
        return values[key].folder / text if text is not None else None

    def model(self, node: Node, key: str) -> ModelChoice:
        if isinstance(node.data, str) and node.data:
            return ModelChoice(node.data, key=key, where=node.where)
        values = self.mapping(node, key, MODEL_KEYS, "model", "a name, or a mapping with `model:`")
        return ModelChoice(
            self.text(values.get("model"), f"{key}.model") or "",
            self.one_of(values.get("dtype"), f"{key}.dtype", DTYPES),
            self.text(values.get("attn"), f"{key}.attn"),
            self.whole(values.get("batch_size"), f"{key}.batch_size"),
            key,
            node.where,
        )

    def pipeline(self, node: Node, key: str, seeds: int) -> PipelineChoice:
        if isinstance(node.data, str) and node.data:
            return PipelineChoice(_file(node), Variation(seeds=seeds), key, node.where)
        if isinstance(node.data, dict) and ("stages" in node.data or "extends" in node.data):
            if "name" not in node.data:
                self.faults.append(Fault(node.where, f"{key}.name", "is missing", "rows are called by it"))
            return PipelineChoice(node, Variation(seeds=seeds), key, node.where)
        told = "the name or file of a pipeline, or a mapping with `pipeline:` or `stages:`"
        values = self.mapping(node, key, REFERENCE_KEYS, "pipeline", told)
        source = values.get("pipeline")
        if self.text(source, f"{key}.pipeline") is None or source is None:
            return PipelineChoice("", Variation(), key, node.where)
        places: dict[str, Where | None] = {}
        overrides = [f"name='{name}'"] if (name := self.text(values.get("name"), f"{key}.name")) else []
        for one, value in self.keyed(values.get("set"), f"{key}.set", places):
            overrides.append(f"{one}={_written(value)}")
        grid = {}
        for one, value in self.keyed(values.get("grid"), f"{key}.grid", places):
            grid[one] = self.values(value, f"{key}.grid.{one}")
        own = self.whole(values.get("seeds"), f"{key}.seeds") or seeds
        variation = Variation(tuple(overrides), grid, own)
        if (count := len(variation.points())) > MOST:
            self.faults.append(Fault(node.where, f"{key}.grid", f"makes {count} pipelines; at most {MOST}"))
        return PipelineChoice(_file(source), variation, key, node.where, places)

    def calibration(self, node: Node, key: str) -> Calibration:
        values = self.mapping(node, key, CALIBRATION_KEYS, "out", "a mapping with `out`, `pipeline` and `data`")
        self.faults += [
            Fault(node.where, f"{key}.{name}", "is missing", "see docs/sweep.md")
            for name in ("pipeline", "data")
            if name not in values
        ]
        source = values.get("pipeline", node)
        return Calibration(
            self.folder(values, "out", key) or Path(),
            source if isinstance(source.data, dict) else _file(source),
            self.text(values.get("data"), f"{key}.data") or "",
            self.whole(values.get("prompts"), f"{key}.prompts") or PROMPTS,
            self.whole(values.get("seed"), f"{key}.seed", 0) or 0,
        )

    def budget(self, node: Node, key: str) -> Budget | None:
        own: list[Fault] = []
        budget = read_budget(node, own)
        self.faults += [replace(fault, key=key + fault.key.removeprefix("budget")) for fault in own]
        return budget

    def keyed(self, node: Node | None, key: str, places: dict[str, Where | None]) -> list[tuple[str, Node]]:
        """The entries of `set` or `grid`; remembers the place of each in `places`."""
        if node is None:
            return []
        if not isinstance(node.data, dict):
            message, hint = f"must be a mapping, not {node}", "such as {stages.0.keep: 0.5}"
            self.faults.append(Fault(node.where, key, message, hint))
            return []
        for one, value in node.data.items():
            if not KEY.fullmatch(one) or one == "name":
                hint = "such as stages.0.keep" if one != "name" else "`name` beside `pipeline` gives it another one"
                self.faults.append(Fault(value.key, f"{key}.{one}", "is no key to set in a pipeline", hint))
            places[re.sub(r"\.(\d+)", r"[\1]", one)] = value.where
        return list(node.data.items())

    def values(self, node: Node, key: str) -> tuple[str, ...]:
        """What a key of a grid takes."""
        if not isinstance(node.data, list) or not node.data:
            self.faults.append(Fault(node.where, key, f"must be a list of values, not {node}", "such as [0.5, 0.25]"))
            return ("null",)
        texts = [_written(one) for one in node.data]
        for number, text in enumerate(texts):
            if text in texts[:number]:
                self.faults.append(Fault(node.data[number].where, f"{key}[{number}]", f"{text} stands here twice"))
        return tuple(texts)

    def entries(self, values: dict[str, Node], key: str) -> list[tuple[Node, str]]:
        """The entries of a list, with the key of each; a single one may stand alone. null takes out what a file that
        is extended has, but not what a sweep needs.
        """
        node = values.get(key)
        if node is None or (node.data is None and key in ("budgets", "calibrate")):
            return []
        if not isinstance(node.data, list):
            return [(node, key)]
        if not node.data:
            self.faults.append(Fault(node.where, key, "is empty", "name at least one, or leave the key out"))
        return [(one, f"{key}[{number}]") for number, one in enumerate(node.data)]

    def mapping(self, node: Node, key: str, keys: Sequence[str], needs: str, told: str) -> dict[str, Node]:
        if not isinstance(node.data, dict):
            self.faults.append(Fault(node.where, key, f"must be {told}, not {node}"))
            return {}
        self.known(node.data, key, keys)
        if needs not in node.data:
            near = did_you_mean(needs, node.data).strip()
            self.faults.append(Fault(node.where, f"{key}.{needs}", "is missing", near or f"write {told}"))
        return node.data

    def known(self, values: dict[str, Node], path: str, keys: Sequence[str]) -> None:
        for key, node in values.items():
            if key not in keys:
                hint = f"{did_you_mean(key, keys)}known keys: {', '.join(keys)}"
                self.faults.append(Fault(node.key, f"{path}.{key}" if path else key, "unknown key", hint))

    def text(self, node: Node | None, key: str) -> str | None:
        if node is None or (isinstance(node.data, str) and node.data):
            return None if node is None else str(node.data)
        hint = "put it in quotes" if isinstance(node.data, int | float) else ""
        self.faults.append(Fault(node.where, key, f"must be text, not {node}", hint))
        return None

    def one_of(self, node: Node | None, key: str, words: Sequence[str]) -> str | None:
        text = self.text(node, key)
        if node is not None and text is not None and text not in words:
            hint = f"{did_you_mean(text, words)}one of {', '.join(words)}"
            self.faults.append(Fault(node.where, key, f"must not be {node}", hint))
        return text

    def whole(self, node: Node | None, key: str, least: int = 1) -> int | None:
        if node is None:
            return None
        if isinstance(node.data, int) and not isinstance(node.data, bool) and node.data >= least:
            return node.data
        self.faults.append(Fault(node.where, key, f"must be a whole number, at least {least}, not {node}"))
        return None

    def boolean(self, node: Node | None, key: str, default: bool) -> bool:
        if node is None:
            return default
        if not isinstance(node.data, bool):
            self.faults.append(Fault(node.where, key, f"must be true or false, not {node}"))
        return bool(node.data)


def _file(node: Node) -> str:
    """The pipeline that a text names: a file, beside the one in which it is written, or a name."""
    text = str(node.data)
    if Path(text).suffix in SUFFIXES or "/" in text:
        return str(node.folder / text)
    return text


def _written(node: Node) -> str:
    """A value as an override has it."""
    return json.dumps(escaped(node.plain()), ensure_ascii=False)
