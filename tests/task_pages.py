"""Writes which tasks of lmms-eval work into docs/tasks.md and docs/evaluate.md: `python tests/task_pages.py`.

Read off the heads of their YAML files and the names in the code beside them; no task is built and no data is loaded, so
that it takes seconds. A test compares the pages with the lmms-eval that is installed.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- tasks: begin -->", "<!-- tasks: end -->"
# Folders of tasks whose answers are no text, which no config says: what they score are pictures, films or masks.
DRAWN = {
    "WISE", "babyvision_gen", "gedit_bench", "imgedit", "kris_bench", "saco", "structeditbench", "ueval", "vbench",
    "vbvr",
}  # fmt: skip
JUDGES = re.compile(r"llm_judge|\bopenai\b|OPENAI_API|API_TYPE|chat/completions", re.IGNORECASE)
# What evaluations have anyway: prunekit's extra `evals-min`, and what that brings.
THERE = {
    "PIL", "datasets", "evaluate", "huggingface_hub", "jinja2", "lmms_eval", "loguru", "numpy", "openpyxl", "pandas",
    "pytz", "requests", "sacrebleu", "scipy", "tenacity", "torch", "tqdm", "transformers", "yaml", "packaging", "av",
    "accelerate", "filelock", "pyarrow", "pydantic", "regex", "typing_extensions",
}  # fmt: skip
FUNCTION, NOTHING = "!function ", re.compile(r"return( \[\]| None)?")
REFUSED = {
    "draws": "its answers are pictures, films or masks; models that are pruned here write text",
    "sound": "it plays sounds; visual tokens are what is pruned",
}
NEEDS = {
    "video": "PyAV (`prunekit[video]`) and, for models that take videos, torchvision",
    "judge": "a judge behind an API, whose key the task reads from the environment",
    "package": "packages that prunekit does not bring, listed with each task",
}
WORKS = {"images": "images", "text": "text alone: it runs, and there is nothing to prune", "rounds": "several rounds"}
SHORT = {
    "draws": "answers in pictures", "sound": "sounds", "video": "videos", "judge": "needs a judge", "images": "images",
    "text": "text alone", "rounds": "several rounds",
}  # fmt: skip


class Loader(yaml.CSafeLoader):
    """YAML in which `!function utils.f` is text."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


@dataclass(frozen=True)
class Task:
    """What its files say of a task. reasons: keys of REFUSED, NEEDS or WORKS; packages: that have to be installed."""

    name: str
    folder: str
    reasons: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def status(self) -> str:
        if any(reason in REFUSED for reason in self.reasons):
            return "refused"
        return "needs" if any(reason in NEEDS for reason in self.reasons) else "works"


def tasks() -> list[Task]:
    """Every task that is registered, by name."""
    spec = find_spec("lmms_eval")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    found: dict[str, Task] = {}
    for file in sorted(root.rglob("*.yaml")):
        config = _config(file)
        name = config.get("task")
        if isinstance(name, str) and name not in found:
            found[name] = _task(name, file, root, config)
    return [found[name] for name in sorted(found)]


def _task(name: str, file: Path, root: Path, config: Mapping[str, Any]) -> Task:
    folder = file.relative_to(root).parts[0]
    named = [value for value in config.values() if isinstance(value, str) and value.startswith(FUNCTION)]
    modules = {one for value in named if (one := file.parent / f"{value.split()[1].rpartition('.')[0]}.py").is_file()}
    shown = " ".join(_source(file.parent, config.get(key)) for key in ("doc_to_visual", "doc_to_messages"))
    kind = config.get("output_type", "generate_until")
    reasons = []
    if kind == "generate_visual_cot" or folder in DRAWN:
        reasons.append("draws")
    if re.search(r"audio|\.wav", shown):
        reasons.append("sound")
    if (config.get("dataset_kwargs") or {}).get("video") or re.search(r"video|\.mp4", shown):
        reasons.append("video")
    if not name.endswith("_static") and any(JUDGES.search(one) for one in _scoring(file.parent, config)):
        reasons.append("judge")
    packages = sorted({package for module in modules for package in _packages(module)})
    reasons += ["package"] * bool(packages)
    if "multi_round" in kind or "agentic" in kind:
        reasons.append("rounds")
    if "video" not in reasons and "sound" not in reasons:
        reasons.append("images" if shown.strip() else "text")
    return Task(name, folder, tuple(reasons), tuple(packages))


@cache
def _config(file: Path) -> dict[str, Any]:
    """A task's file with what it includes. What is no mapping is none."""
    try:
        config = yaml.load(file.read_text(encoding="utf-8", errors="replace"), Loader)  # noqa: S506  (a safe one, with one tag more)
    except yaml.YAMLError:
        return {}
    if not isinstance(config, dict):
        return {}
    includes = config.pop("include", None) or []
    for other in [includes] if isinstance(includes, str) else includes:
        if (file.parent / other).is_file():
            config = _config((file.parent / other).resolve()) | config
    return config


@cache
def _text(module: Path) -> str:
    return module.read_text(encoding="utf-8", errors="replace")


@cache
def _tree(module: Path) -> ast.Module:
    with warnings.catch_warnings():  # strings with escapes that are none, which as errors would end the parsing
        warnings.simplefilter("ignore")
        return ast.parse(_text(module))


def _source(folder: Path, function: Any) -> str:
    """The name and the text of a function that a config names; empty for none, and for one that gives nothing."""
    if not isinstance(function, str) or not function.startswith(FUNCTION):
        return str(function or "")
    module, _, name = function.removeprefix(FUNCTION).rpartition(".")
    file = folder / f"{module}.py"
    nodes = _tree(file).body if file.is_file() else []
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    if found and all(NOTHING.fullmatch(ast.unparse(node.body[-1])) and len(node.body) < 3 for node in found):
        return ""
    return " ".join([name, *map(ast.unparse, found)])


def _scoring(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """The text of what scores a task: its functions for that, and what of their modules they reach by name."""
    metrics = [one for one in config.get("metric_list") or [] if isinstance(one, dict)]
    named = [config.get("process_results"), *(one.get("aggregation") for one in metrics)]
    for function in {one for one in named if isinstance(one, str) and one.startswith(FUNCTION)}:
        module, _, name = function.removeprefix(FUNCTION).rpartition(".")
        if (file := folder / f"{module}.py").is_file():
            yield _reached(file, name)


@cache
def _reached(module: Path, name: str) -> str:
    defined: dict[str, list[ast.stmt]] = defaultdict(list)
    for node in _tree(module).body:
        for one in _defined(node):
            defined[one].append(node)
    waiting, seen, texts = [name], set(), []
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for node in defined[one]:
            texts.append(ast.unparse(node))
            waiting += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return "\n".join(texts)


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives a meaning to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (one.asname or one.name.partition(".")[0] for one in node.names)
    else:
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


@cache
def _packages(module: Path) -> tuple[str, ...]:
    """What importing a module needs beyond what is there: imports at its top, those in `try` excepted."""
    names = set()
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            names |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    local = {one.stem for one in module.parent.iterdir()}
    return tuple(sorted(names - THERE - local - set(sys.stdlib_module_names)))


def _said(task: Task) -> Iterator[str]:
    for reason in task.reasons:
        if reason == "package":
            yield f"needs {', '.join(task.packages)}"
        else:
            yield SHORT[reason]


def table(all_tasks: list[Task]) -> str:
    """How many tasks work, need something or are refused, and why."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for task in all_tasks:
        for reason in task.reasons:
            counts[task.status][reason] += 1
    total = Counter(task.status for task in all_tasks)
    lines = [f"Of the {len(all_tasks)} tasks that lmms-eval {version('lmms-eval')} registers:", ""]
    lines += ["| | tasks | what they show, need or want |", "| --- | --- | --- |"]
    for status, texts in (("works", WORKS), ("needs", NEEDS), ("refused", REFUSED)):
        lines.append(f"| **{status}** | **{total[status]}** | |")
        found = counts[status]
        lines += [f"| | {found[reason]} | {text} |" for reason, text in texts.items() if found[reason]]
    return "\n".join(lines)


def page(all_tasks: list[Task]) -> str:
    """docs/tasks.md: every task, by the folder that it lies in."""
    folders: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for task in all_tasks:
        folders[task.folder, task.status, "; ".join(_said(task))].append(f"`{task.name}`")
    rows = "\n".join(
        f"| {folder} | {status} | {why} | {', '.join(names)} |"
        for (folder, status, why), names in sorted(folders.items())
    )
    return f"""# Tasks of lmms-eval

Written by `tests/task_pages.py` from the configs of the lmms-eval that is installed, and from the names in the code
beside them. It says what a task asks for, not that it was run: the standard image tasks, `videomme`,
`mvbench_action_antonym` and `mlvu_dev` run in the tests, on small data in their schemas.
[Evaluate](evaluate.md#which-tasks) says how.

{table(all_tasks)}

A task may have several reasons.

| folder | | why | tasks |
| --- | --- | --- | --- |
{rows}
"""


def summary(text: str, all_tasks: list[Task]) -> str:
    """docs/evaluate.md with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(all_tasks)}\n{END}{rest.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """What is in each page now."""
    found = tasks()
    evaluate = DOCS / "evaluate.md"
    return {DOCS / "tasks.md": page(found), evaluate: summary(evaluate.read_text(encoding="utf-8"), found)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
