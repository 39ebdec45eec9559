"""Made-up cells for boards: one pipeline on one task, answered by chance."""

import dataclasses
import json
import random

from prunekit_evals.run import results
from prunekit_evals.run.results import Cell, Conditions, PipelineId, Question, Saved, Timing

CONDITIONS = Conditions(
    model="org/model", identity="abc", data="d1", limit=100, batch_size=8, dtype="float32", device="cpu",
    attention="default", max_new_tokens=1024, system_prompt="", honor_until="stops", prompt_profile="",
    versions={"prunekit": "0.1.0"},
)  # fmt: skip


def cell(
    name, task="pope", *, use="gate", hits=0.7, flops=0.5, count=40, created="1", machine="A", conditions=CONDITIONS
):  # fmt: skip
    resolved = json.dumps({"name": name, "stages": [{"use": use, "keep": 0.25}]}) + "\n"  # JSON is YAML
    dense = use == "dense"
    pipeline = PipelineId(name, f"sha-{name}", dense, resolved, "code")
    draw = random.Random(f"{name} {task}")
    questions = tuple(
        Question(number, "yes", float(draw.random() < hits), f"image {number // 2}") for number in range(count)
    )
    return Cell(
        id=results.cell_id(conditions, pipeline, task), status="done", task=task, label=task, pipeline=pipeline,
        conditions=conditions, created=created, metrics={"accuracy,none": hits}, questions=questions,
        saved=Saved(144, 144 * flops, flops, 1, flops, 1, 1, flops),
        timing=Timing(0.1, count, 0, 5.0, 10.0, None if dense else flops, 8, 5, machine),
    )  # fmt: skip


def dense(task="pope", **rest):
    return cell("dense", task, **{"use": "dense", "hits": 0.9, "flops": 1.0, **rest})


def complete(*tasks):
    """A board that lacks no baseline, with two methods."""
    rows = (("random-r11", "random", 0.2), ("pool-r11", "pool", 0.2), ("small", "downsample", 0.4),
            ("ours", "gate", 0.2), ("theirs", "gate", 0.6))  # fmt: skip
    found = [dense(task) for task in tasks]
    return found + [cell(name, task, use=use, flops=flops) for name, use, flops in rows for task in tasks]


def written(folder, cells):
    """Their files under `folder`, as `prunekit eval` writes them."""
    for one in cells:
        results.write(results.path_of(folder, one), one)
    return folder


def under(**changed):
    """Other conditions."""
    return dataclasses.replace(CONDITIONS, **changed)
