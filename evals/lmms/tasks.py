"""lmms-eval's own tasks, unmodified: found by name, built from local data where there is some, and cut to a limit."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunekit_evals.lmms import parts
from prunekit_evals.lmms.own import identity
from prunekit_evals.run import files

from prunekit import video_files
from prunekit.errors import InputError, UnknownName

INSTALL = (
    "lmms-eval is not installed: pip install 'prunekit[evals]', or without its heavy dependencies "
    "pip install 'prunekit[evals-min]' && pip install --no-deps 'lmms-eval>=0.7.3,<0.8'"
)
NAMED = re.compile(r"^(task|group|tag)\s*:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
MICRO = "micro"  # how tasks of the bundled benchmark are labelled
BUNDLED = (MICRO, "smol")  # models that learned from its scenes, and are asked it where no data is named
STAMP = "prunekit-micro.json"
HARNESS_CACHE = "LMMS_EVAL_DATASETS_CACHE"
PAIRED = re.compile(r"mme($|_)")  # tasks whose metric wants both questions about an image


@dataclass(frozen=True)
class Named:
    """A task's place in lmms-eval. `kind` is `task`, `group` or `tag`; `file` its YAML; `own`: it is the user's."""

    name: str
    kind: str
    file: Path
    own: bool = False


@dataclass(frozen=True)
class Data:
    """Where tasks take their data: a folder with `<organisation>/<dataset>/`, or None for the hub's cache.

    identity: changes when the data does. micro: whether it is the bundled benchmark, whose results must not be taken
    for those of the real one. rows: of each task the questions that are asked, by number and in this order; None: all.
    """

    root: Path | None
    identity: str
    micro: bool
    rows: Mapping[str, Sequence[int]] | None = None

    def label(self, task: str) -> str:
        """The name of a task in results."""
        return f"{MICRO}/{task}" if self.micro else task


@dataclass(frozen=True)
class Built:
    """A task ready to be asked. limit: questions to ask, None for all; `chat` whether it is asked in messages.

    numbers: what the questions are numbered in the data, where they were drawn; None: as they are asked.
    """

    name: str
    task: Any
    manager: Any
    chat: bool
    questions: int
    limit: int | None
    numbers: tuple[int, ...] | None = None


def check_installed() -> None:
    """Raise InputError, naming both ways to install it, when lmms-eval is not there."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(INSTALL)


def find(names: Sequence[str], include: Path | None = None) -> list[Named]:
    """The tasks of these names, found without importing lmms-eval. Raises UnknownName, or InputError for a group.

    include: a folder with the user's own tasks, none of which may have a name that lmms-eval has.
    """
    check_installed()
    index = _index()
    if include is not None:
        own = _read_index(include.resolve(), own=True)
        _check_own(include, own, index)
        index |= own
    named = []
    for name in dict.fromkeys(names):
        if name not in index:
            raise UnknownName("task", name, (one.name for one in index.values() if one.kind == "task"))
        if index[name].kind != "task":
            raise InputError(f"'{name}' is a {index[name].kind} of tasks; name its tasks, see {index[name].file}")
        named.append(index[name])
    return named


def data_at(root: Path | None) -> Data:
    """The data under `root`. Raises InputError when it is no folder."""
    if root is None:
        return Data(None, "hub", False)
    if not root.is_dir():
        raise InputError(f"data root '{root}' is not a folder; it holds <organisation>/<dataset>/ as the hub does")
    stamp = root / STAMP
    if stamp.is_file():
        return Data(root, hashlib.sha256(stamp.read_bytes()).hexdigest()[:12], True)
    total = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            about = file.stat()
            total.update(f"{file.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return Data(root, total.hexdigest()[:12], False)


def build(
    named: Named, data: Data, limit: int | None, prompt_profile: str | None = None, subset_seed: int | None = None
) -> Built:
    """Build one task object, with its data loaded.

    data: as `data_of` gives it. prompt_profile: the model name whose prompts the task's file may bring, such as
    `qwen_vl`. subset_seed: draw the questions of the limit; None: the first ones. Raises InputError when the data is
    not there.
    """
    manager = _manager(named, prompt_profile)
    with _needing(named.name):
        config = manager._get_config(named.name)
    chat = config.get("output_type", "generate_until") not in ("loglikelihood", "multiple_choice")
    if not named.own:
        _check_data(named.name, config, data)
    with _inside(data, _videos_of(named.name, config, data)):
        task = _load(manager, named.name, "chat" if chat else "simple")
    if data.rows is not None:
        rows = tuple(data.rows[named.name])
        return Built(named.name, parts.select(task, rows), manager, chat, len(rows), None, rows)
    docs = task.eval_docs_no_media
    count = len(docs) if limit is None else min(limit, len(docs))
    if count == len(docs):
        return Built(named.name, task, manager, chat, count, None)
    groups = docs["question_id"] if PAIRED.match(named.name) else range(len(docs))
    if subset_seed is not None:
        numbers = drawn(groups, count, subset_seed)
        _choose(task, numbers)
        return Built(named.name, task, manager, chat, len(numbers), None, numbers)
    count = whole_groups(groups, count)
    return Built(named.name, task, manager, chat, count, None if count == len(docs) else count)


def drawn(groups: Sequence[Any], limit: int, seed: int) -> tuple[int, ...]:
    """The fewest questions, at least `limit`, that random whole groups have, in the order of the data."""
    order = list(dict.fromkeys(groups))
    random.Random(seed).shuffle(order)
    rank = {group: place for place, group in enumerate(order)}
    sizes = Counter(groups)
    wanted = next(n for n, total in enumerate(accumulate(sizes[group] for group in order), 1) if total >= limit)
    return tuple(number for number, group in enumerate(groups) if rank[group] < wanted)


def _choose(task: Any, numbers: Sequence[int]) -> None:
    """Leave only these questions in a task."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    both = [task.dataset] if task.dataset_no_image is task.dataset else [task.dataset, task.dataset_no_image]
    for dataset in both:
        dataset[split] = dataset[split].select(numbers)


def whole_groups(groups: Sequence[Any], limit: int) -> int:
    """The smallest number of leading questions, at least `limit`, that splits no group."""
    remaining = Counter(groups)
    open_groups = 0
    begun: set[Any] = set()
    for place, group in enumerate(groups):
        if group not in begun:
            begun.add(group)
            open_groups += 1
        remaining[group] -= 1
        open_groups -= remaining[group] == 0
        if place + 1 >= limit and not open_groups:
            return place + 1
    return len(groups)


def micro_data(folder: Path, questions: int = 600) -> Data:
    """The bundled benchmark, written into `folder` if it is not there."""
    from filelock import FileLock
    from prunekit_evals.micro import benchmark

    files.folder(folder)
    with files.saving(folder), FileLock(folder / ".lock"):
        benchmark.write(folder, questions_per_task=questions)
    return data_at(folder)


def data_for(model: str, names: Sequence[str], root: Path | None, out: Path) -> Data:
    """Where tasks of these names take their data: `root`, else of a bundled model the bundled benchmark, written below
    `out` once, else the hub's cache. Names may be written `micro/...`. Raises InputError where they do not fit.
    """
    named_so = [name for name in names if name.startswith(f"{MICRO}/")]
    if root is not None or not (model in BUNDLED or len(named_so) == len(names)):
        data = data_at(root)
        if not data.micro and named_so:
            raise InputError(f"tasks {', '.join(names)}: micro/... is the bundled benchmark; name all so, or none")
        return data
    from prunekit_evals.micro import benchmark

    for name in names:
        if name.removeprefix(f"{MICRO}/") not in benchmark.TASKS:
            listed = ", ".join(benchmark.TASKS)
            raise InputError(f"the bundled benchmark has no task '{name}' (it has {listed}; else give --data-root)")
    return micro_data(out / "data" / MICRO)


def _index() -> dict[str, Named]:
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(INSTALL)
    return _read_index(Path(spec.submodule_search_locations[0]) / "tasks")


def _read_index(root: Path, own: bool = False) -> dict[str, Named]:
    index: dict[str, Named] = {}
    for folder, _, within in os.walk(root):
        for file in sorted(within):
            if file.endswith(".yaml"):
                path = Path(folder, file)
                for kind, name in NAMED.findall(path.read_text(encoding="utf-8", errors="replace")):
                    if name not in index or index[name].kind == "tag":
                        index[name] = Named(name, kind, path, own)
    return index


def _check_own(folder: Path, own: dict[str, Named], index: dict[str, Named]) -> None:
    """Raise InputError for a folder of tasks that cannot be used."""
    if not folder.is_dir():
        raise InputError(f"--include-path '{folder}' is not a folder; it holds YAML files of lmms-eval")
    if not own:
        raise InputError(f"--include-path '{folder}': no file `*.yaml` in it says `task: NAME`")
    for name in own.keys() & index.keys():
        if own[name].kind != "tag":
            raise InputError(f"'{own[name].file}': lmms-eval has '{name}' itself (give your task another name)")


def data_of(named: Named, data: Data) -> Data:
    """Where a task takes its data: `data`, but one of the user's own what its file says. Raises InputError for a file
    that lmms-eval cannot read.
    """
    if not named.own:
        return data
    try:
        config = _manager(named)._get_config(named.name)
        return Data(named.file.parent, f"own-{identity(named.file, config)}", False)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"'{named.file}' is no task of lmms-eval: {type(error).__name__}: {said}") from error


def _manager(named: Named, prompt_profile: str | None = None) -> Any:
    from lmms_eval.tasks import TaskManager

    # The whole index takes seconds to read; one folder takes none.
    folder = [str(named.file.parent)]
    return TaskManager("ERROR", include_path=folder, include_defaults=False, model_name=prompt_profile)


def _check_data(name: str, config: dict[str, Any], data: Data) -> None:
    wanted = config.get("dataset_path")
    if data.root is None or not wanted or (data.root / wanted).exists():
        return
    present = sorted(path.relative_to(data.root).as_posix() for path in data.root.glob("*/*") if path.is_dir())
    listed = ", ".join(present) or "nothing"
    raise InputError(f"task '{name}' needs '{data.root / wanted}', which is not there (there is: {listed})")


def _videos_of(name: str, config: dict[str, Any], data: Data) -> Path | None:
    """The folder to stand in for `HF_HOME`, in which tasks look for their videos: the data root where they are there.

    None leaves it. Raises InputError where they are in neither and nothing may be fetched, and without PyAV.
    """
    from huggingface_hub import constants

    about = config.get("dataset_kwargs") or {}
    if about.get("video"):
        video_files.check_installed()
    folder = about.get("cache_dir")
    if not about.get("video") or not folder:
        return None
    if data.root is not None and (data.root / folder).exists():
        return data.root.resolve()
    usual = Path(os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface"))) / folder
    if not usual.exists() and constants.HF_HUB_OFFLINE:
        places = ([] if data.root is None else [str(data.root / folder)]) + [str(usual)]
        raise InputError(f"task '{name}' looks for its videos in {' or '.join(places)}, which is not there")
    return None


def _load(manager: Any, name: str, kind: str) -> Any:
    from tenacity import RetryError

    try:
        return manager.load_task_or_group([name], kind)[name]
    except RetryError as error:  # lmms-eval tries five times and then hides what went wrong
        cause = error.last_attempt.exception()
        reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
        raise InputError(
            f"the data of task '{name}' does not load: {reason} (name a folder with it by --data-root, or let the hub "
            "be asked by --download, after `hf auth login`)"
        ) from cause


@contextmanager
def _needing(name: str) -> Iterator[None]:
    """Say which module a task's own code lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"the code of task '{name}' needs the module '{error.name}', which is not installed (docs/tasks.md lists "
            "what tasks need beside prunekit)"
        ) from error


@contextmanager
def _inside(data: Data, home: Path | None = None) -> Iterator[None]:
    """Be in the data root while a task is built: dataset names such as `org/name` are then folders, not hub ids.

    The datasets library caches what it read under that name alone, so that another data root, or the same one with
    other files, would be answered with the rows of the first. Each version of the data gets a cache of its own.
    home: where tasks find their videos, which they read off `HF_HOME` while they are built; None leaves it.
    """
    if data.root is None:
        yield
        return
    import datasets
    from lmms_eval.api import task as harness

    forget = harness._resolve_hf_datasets_cache_dir.cache_clear  # it asks the environment once
    root = data.root.resolve()
    usual = Path(datasets.config.HF_DATASETS_CACHE)
    cache = root / ".cache" / data.identity if data.micro else usual / f"prunekit-{data.identity}"
    before = Path.cwd()
    variables = {name: os.environ.get(name) for name in (HARNESS_CACHE, "HF_HOME")}
    os.environ[HARNESS_CACHE] = str(cache)
    if home is not None:
        os.environ["HF_HOME"] = str(home)
    datasets.config.HF_DATASETS_CACHE = cache  # GQA's own code loads a second data set, without asking lmms-eval where
    forget()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)
        forget()
        datasets.config.HF_DATASETS_CACHE = usual
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
