"""One JSON file for each (model, pipeline, task): a table's cell, with all that is needed to trust or repeat it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from prunekit_evals.run import files

from prunekit.errors import InputError
from prunekit.video_files import MAX_FRAMES

SCHEMA = 1
KIND = "prunekit-cell"
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
CELL_FILE = re.compile(r"\.[0-9a-f]{10}\.json$")


@dataclass(frozen=True)
class Conditions:
    """What a result depends on besides pipeline and task. Only cells with equal conditions stand in one table.

    model: as the user wrote it; identity: of its weights. dtype: `checkpoint` leaves it to the checkpoint.
    data: identity of the task data. limit: questions asked for, None for all. subset_seed: they were drawn with it;
    None: they are the first ones. max_frames, fps: of videos, see `video_files.Sampling`. code: identity of the code
    that ran.
    """

    model: str
    identity: str
    data: str
    limit: int | None
    batch_size: int
    dtype: str
    device: str
    attention: str
    max_new_tokens: int
    system_prompt: str
    honor_until: str
    prompt_profile: str
    versions: Mapping[str, str]
    subset_seed: int | None = None
    max_frames: int = MAX_FRAMES
    fps: float | None = None

    def title(self) -> str:
        """One line for the head of a table."""
        drawn = "" if self.subset_seed is None else f" drawn with seed {self.subset_seed}"
        limit = "all questions" if self.limit is None else f"{self.limit} questions a task{drawn}"
        return f"{self.model} ({self.identity}), {limit}, batch {self.batch_size}, {self.dtype}, {self.device}"


@dataclass(frozen=True)
class PipelineId:
    """Which pipeline. `dense`: whether it changes nothing. resolved: its canonical YAML, every default filled in.

    seeds: those that its stages draw with, in their order; results of older versions have them in `resolved` only.
    """

    name: str
    sha: str
    dense: bool
    resolved: str
    code: str
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Question:
    """One question: its number in the data, the answer after the task's filters, its score in [0, 1] if it has one.

    group: the identity of its images: questions of one group are about one image and no independent draws. None: it has
    no image, or none was recorded (results of older versions name only those of MME).
    document: the data's own name for it, where it has one. text: what was asked; target: what is right. Results of
    older versions have none of the three. error: why it could not be answered; such an answer is empty and wrong.
    """

    number: int
    answer: str
    score: float | None
    group: str | None = None
    document: str = ""
    text: str = ""
    target: str = ""
    error: str = ""


@dataclass(frozen=True)
class Saved:
    """What was computed, as means over the questions; fractions are of the dense model's totals.

    FLOPs are of the language model's prefill; `whole_flops_fraction` has the vision tower and the projector in it, and
    is None where their cost is not known.
    """

    visual_tokens: float
    kept_tokens: float
    prefill_flops: float
    dense_prefill_flops: float
    flops_fraction: float
    kv_bytes: float
    dense_kv_bytes: float
    kv_fraction: float
    whole_flops_fraction: float | None = None


@dataclass(frozen=True)
class Executed:
    """What the decoder did in the prefills, as their reports say: the proof that a row pruned. Means over questions.

    layer_tokens: that entered each layer. layers_run: layers that computed something.
    off_budget: questions for which a stage kept another number of tokens than its budget asked for; `notes` of the cell
    say which.
    """

    layer_tokens: tuple[float, ...]
    layers_run: float
    off_budget: int = 0


@dataclass(frozen=True)
class Foretold:
    """What the pipeline's budgets say of the same prompts without computing. Means over questions.

    flops: the least and the most that `Saved.prefill_flops` can be; they differ where a stage decides by itself how
    many tokens it leaves, or a router which layers run. layer_tokens: the most that can enter each layer.
    """

    flops: tuple[float, ...]
    layer_tokens: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """Measured wall times; answers that came from a journal are in none of them.

    seconds: of `generate`, a question, with what the vision tower took for it, if only for another pipeline of the run;
    None when nothing was computed in this run.
    prefill_ms, dense_prefill_ms: medians for one batch of `prefill_batch` prompts, taken alternately in one run.
    prefill_ratio: the median of the ratios of neighbours; None when it was not measured, as for the dense model itself.
    machine: what measured them; empty in results of older versions. Answers do not depend on it, times do.
    """

    seconds: float | None
    computed: int
    journaled: int
    prefill_ms: float | None = None
    dense_prefill_ms: float | None = None
    prefill_ratio: float | None = None
    prefill_batch: int = 0
    prefill_rounds: int = 0
    machine: str = ""


@dataclass(frozen=True)
class Cell:
    """The result of one pipeline on one task. A failed cell has an `error` and no questions.

    task: lmms-eval's name; label: the name to show, `micro/...` for the bundled benchmark.
    metrics: as lmms-eval reports them, `<metric>,<filter>`.
    unsound: questions, or continuations that were compared, for which the model computed NaN or infinity; `notes` say
    where. empty: questions that the model answered with nothing.
    executed, foretold: None where nothing was reported, in results of older versions, and where budgets cannot tell.
    """

    id: str
    status: Literal["done", "failed"]
    task: str
    label: str
    pipeline: PipelineId
    conditions: Conditions
    created: str
    error: str = ""
    task_version: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    saved: Saved | None = None
    timing: Timing | None = None
    notes: tuple[str, ...] = ()
    unsound: int = 0
    empty: int = 0
    executed: Executed | None = None
    foretold: Foretold | None = None

    @property
    def unanswered(self) -> dict[int, str]:
        """Number of each question that could not be answered, and why."""
        return {one.number: one.error for one in self.questions if one.error}

    @property
    def scores(self) -> dict[int, float]:
        """Question number to score, where there is one."""
        return {one.number: one.score for one in self.questions if one.score is not None}

    @property
    def groups(self) -> dict[int, str]:
        """Question number to the identity of its images, where there is one."""
        return {one.number: one.group for one in self.questions if one.group is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return {"kind": KIND, "schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` made. Raises InputError for anything else, naming what is wrong."""
        kind, schema = data.get("kind"), data.get("schema")
        if kind != KIND or schema != SCHEMA:
            newer = kind == KIND and isinstance(schema, int) and schema > SCHEMA
            told = "; a newer prunekit wrote it" * newer
            raise InputError(f"not a cell of schema {SCHEMA}: kind {kind!r}, schema {schema!r}{told}")
        rest = {name: value for name, value in data.items() if name not in ("kind", "schema")}
        if unknown := sorted(rest.keys() - {one.name for one in fields(cls)}):
            raise InputError(f"a cell with {', '.join(map(repr, unknown))}, which this version does not know")
        try:
            rest["pipeline"] = PipelineId(**{key: _plain(value) for key, value in rest["pipeline"].items()})
            rest["conditions"] = Conditions(**rest["conditions"])
            rest["questions"] = tuple(Question(**one) for one in rest["questions"])
            rest["saved"] = Saved(**rest["saved"]) if rest["saved"] else None
            rest["timing"] = Timing(**rest["timing"]) if rest["timing"] else None
            rest["notes"] = tuple(rest["notes"])
            for name, kind in (("executed", Executed), ("foretold", Foretold)):
                if rest.get(name):
                    rest[name] = kind(**{key: _plain(value) for key, value in rest[name].items()})
            return cls(**rest)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"a damaged cell: {error}") from error


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def cell_id(conditions: Conditions, pipeline: PipelineId, task: str) -> str:
    """10 hex digits of all that a cell depends on."""
    about = [asdict(conditions), pipeline.sha, pipeline.code, task, SCHEMA]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:10]


def cell_path(out: Path, conditions: Conditions, pipeline: PipelineId, task: str) -> Path:
    """`out/<model>/<pipeline>/<task>.<id>.json`."""
    model = UNSAFE.sub("-", Path(conditions.model).name if Path(conditions.model).is_absolute() else conditions.model)
    name = f"{UNSAFE.sub('-', task)}.{cell_id(conditions, pipeline, task)}.json"
    return out / model.strip("-.") / UNSAFE.sub("-", pipeline.name) / name


def path_of(out: Path, cell: Cell) -> Path:
    """Where a cell of this run lies."""
    return cell_path(out, cell.conditions, cell.pipeline, cell.task)


def write(path: Path, cell: Cell) -> None:
    """Write a cell at once: another process sees the old file or the whole new one. Raises `files.CannotWrite`."""
    with files.saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(cell.to_json(), indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Cell:
    """Read a cell. Raises InputError, naming the file, when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is not a result: {error}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"'{path}' is not a result: it holds no mapping")
    try:
        return Cell.from_json(data)
    except InputError as error:
        raise InputError(f"'{path}' is {error}") from error
