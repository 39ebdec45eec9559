"""The sweep behind a section of the board: every strategy that fits a bundled model, at three shares of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from prunekit_evals.studies.catalogue import rows

from prunekit import loading, plugins
from prunekit.strategy.about import about

# Of the options that depend on the depth, what suits thirty layers.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "par": {"weights": "smol", "protect": [0, 1, 11, 19, -1], "keep_layers": 24},
    "skip_layers": {"layers": [4, 5, 6, 12]},
    "freeze_layers": {"layers": [24, 25, 26, 27, 28, 29]},
    "shortgpt": {"drop": 4},
}
MODEL, PROMPTS, LIMIT = "smol", 20, 20
HEAD = """\
# The section of docs/leaderboard on prunekit-smol; written and run by `make leaderboard BOARD_ARGS="--model smol"`.
"""


def write(path: Path) -> None:
    """Write the sweep file, if it is not as it should be."""
    text = written()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def written() -> str:
    """The sweep file, from the strategies that are registered."""
    lines = [HEAD + "name: board-smol", f"models: {MODEL}", "tasks: [pope, gqa, mmbench_en_dev_static]"]
    lines += [f"limit: {LIMIT}", "batch_size: 4", "calibrate:"]
    lines += [f"  - {_flow(one)}" for one in _calibrations()]
    return "\n".join([*lines, "pipelines:", *(f"  - {_flow(one)}" for one in _pipelines()), ""])


def _pipelines() -> Iterator[dict[str, Any]]:
    shape = loading.load_shape(MODEL)
    for entry in plugins.registry().strategies():
        cls = plugins.registry().get_strategy(entry.name)
        found = list(rows.stages(entry.name, cls, about(cls), OPTIONS))
        at_shares = any(share for share, _ in found)
        for share, stage in found:
            if (share is None and at_shares) or entry.name == "dense":
                continue
            built = rows.fitting(stage, shape)
            if isinstance(built, str) and not built.startswith("calibration"):
                continue
            if isinstance(built, str):  # all that it lacks is what `prunekit calibrate` writes
                stage = {**stage, "calibration": f"../../runs/studies/{entry.name}-{MODEL}.json"}
            name = entry.name.replace("_", "-") + ("" if share is None else f"-{100 * share:.0f}")
            yield {"name": name, "stages": [stage]}


def _calibrations() -> Iterator[dict[str, Any]]:
    """What is calibrated for them, each file once: it depends on no budget."""
    done: set[str] = set()
    for one in _pipelines():
        (stage,) = one["stages"]
        if (out := stage.get("calibration")) and out not in done:
            done.add(out)
            asked = {key: value for key, value in stage.items() if key not in ("calibration", "keep")}
            pipeline = {"name": f"{stage['use']}-calibrated", "stages": [asked]}
            yield {"out": out, "pipeline": pipeline, "data": "micro-scenes", "prompts": PROMPTS}


def _flow(data: Mapping[str, Any]) -> str:
    """One line of YAML."""
    return yaml.safe_dump(dict(data), default_flow_style=True, sort_keys=False, width=10_000).strip()
