"""What was measured, as one JSON file beside the page, and what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit_evals.micro import model_path
from prunekit_evals.micro.record import Part
from prunekit_evals.run.identity import versions
from prunekit_evals.run.stamp import VERSION
from prunekit_evals.studies.par.cells import Row
from prunekit_evals.studies.par.parts import Routers

from prunekit.loading import model_identity

Results = Mapping[str, Any]


def load(path: Path) -> dict[str, Any]:
    """The file; empty where there is none."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return figures


def save(path: Path, results: Results) -> None:
    """One line for each part, so that a change shows in a diff without filling the screen."""
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in results.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def about(routers: Routers, questions: int) -> dict[str, Any]:
    """What figures depend on."""
    return {**now(), "questions": questions, "router": router_of(routers), "versions": versions()}


def now() -> dict[str, str]:
    """The bundled model and its benchmark as they are."""
    return {"model": str(model_identity(model_path())), "benchmark": VERSION}


def router_of(routers: Routers) -> dict[str, Any]:
    """The router under study: its options, whether it is trained, its file's digest, its architecture and training."""
    from prunekit_strategies.par import files

    weights = routers.stage.get("weights")
    options = {key: value for key, value in routers.stage.items() if key != "use"}
    if weights is None:
        return {"options": options, "trained": False}
    folder = files.find(str(weights))
    told = files.read(folder)
    return {
        "options": options, "trained": bool(told.training["steps"]), "steps": told.training["steps"],
        "digest": hashlib.sha256((folder / files.WEIGHTS).read_bytes()).hexdigest()[:12],
        "width": told.architecture.width, "depth": told.architecture.depth, "attention": told.architecture.attention,
        "curve": [told.training["curve"][0], told.training["curve"][-1]],
    }  # fmt: skip


def rows(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """Rows by label."""
    return {label: Row.of(one) for label, one in data.items()}


def part(rows: Mapping[str, Row]) -> Part:
    """Answers by task and row, for means and paired differences; rows have the same questions."""
    tasks = next(iter(rows.values())).right
    return Part({task: {label: list(row.right[task]) for label, row in rows.items()} for task in tasks})
