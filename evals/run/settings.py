"""How questions are asked: settings that `prunekit eval`, sweep files and search files share, each declared once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prunekit.errors import Fault, Where
from prunekit.video_files import MAX_FRAMES

if TYPE_CHECKING:
    from prunekit.spec.places import Node

HonorUntil = Literal["stops", "all", "none"]


def about(help: str, metavar: str = "", least: int | None = None, above: float | None = None) -> Mapping[str, Any]:
    """What is said of a setting beside its type and its default. least, above: which numbers it takes."""
    return {"help": help, "metavar": metavar, "least": least, "above": above}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How answers are made, and what becomes of questions without one. All but `unanswered` is recorded."""

    batch_size: int = field(default=8, metadata=about("questions that are answered together", "N", least=1))
    dtype: str | None = field(
        default=None, metadata=about("float32, bfloat16, float16; default: float32 on the CPU", "T")
    )
    device: str | None = field(default=None, metadata=about("cpu, cuda, cuda:1; default: a GPU if there is one", "D"))
    attn: str | None = field(default=None, metadata=about("attention implementation: sdpa, eager", "A"))
    max_new_tokens: int = field(default=1024, metadata=about("for tasks that name no length", "N", least=1))
    system_prompt: str = field(default="", metadata=about("put before every question", "TEXT"))
    honor_until: HonorUntil = field(
        default="stops", metadata=about("cut answers at the task's stop strings: all but the few-shot break, all, none")
    )
    prompt_profile: str | None = field(
        default=None, metadata=about("use the prompts that tasks have for this model name, as qwen_vl", "NAME")
    )
    max_frames: int = field(
        default=MAX_FRAMES,
        metadata=about("of a video, evenly spread; with --fps the most that are shown", "N", least=1),
    )
    fps: float | None = field(default=None, metadata=about("frames of a video for each of its seconds", "F", above=0.0))
    unanswered: Literal["wrong", "fail"] = field(
        default="wrong",
        metadata=about(
            "questions that cannot be answered, such as one with a damaged image, are named and count as wrong, or "
            "fail their cell at its end"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Asked(Answers):
    """The same, and which questions of each task are asked. limit: None asks all."""

    limit: int | None = field(
        default=None, metadata=about("questions a task, not all of them (never splits a pair of MME)", "N", least=1)
    )
    subset_seed: int | None = field(
        default=None, metadata=about("draw the questions of --limit at random, not the first ones", "N", least=0)
    )


def names(cls: type[Any]) -> tuple[str, ...]:
    """Of the settings of `Answers`, `Asked`, or a class that has them."""
    return tuple(one.name for one in dataclasses.fields(cls))


def read(
    cls: type[Any],
    nodes: Mapping[str, Node],
    faults: list[Fault],
    others: Sequence[str] = (),
    start: Where | None = None,
) -> dict[str, Any]:
    """The values of a file that fit the fields of `cls`; what does not is a fault at its place.

    others: keys that the file has besides, for suggestions. start: the place of what is missing.
    """
    from prunekit.strategy import options

    tables = {key: node for name, one in nodes.items() for key, node in one.table(name).items()}
    plain = {key: node.plain() for key, node in nodes.items()}
    problems: list[options.Problem] = []
    folders = {key: node.folder for key, node in tables.items()}
    fitted = options.check(cls, plain, others, problems, folders)
    for one in problems:
        node = tables.get(one.key)
        where = start if node is None else node.key if one.unknown else node.where
        faults.append(Fault(where, one.key, one.message, one.hint))
    wrong = {one.key.partition("[")[0] for one in problems}
    sound = {key: value for key, value in fitted.items() if key not in wrong}
    for one in dataclasses.fields(cls):
        least, above, value = one.metadata.get("least"), one.metadata.get("above"), sound.get(one.name)
        told = f"at least {least}" if least is not None and value is not None and value < least else ""
        told = f"above {above:g}" if above is not None and value is not None and value <= above else told
        if told:
            faults.append(Fault(tables[one.name].where, one.name, f"must be {told}, not {value:g}"))
            del sound[one.name]
    return sound
