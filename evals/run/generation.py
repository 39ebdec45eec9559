"""From a task's generation arguments to what is handed to `generate`, and from its output to the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunekit_evals.run.settings import HonorUntil

from prunekit.errors import InputError

# What a task may say about generation; anything else in its file (`image_aspect_ratio`, ...) is for other adapters.
PASSED = (
    "num_beams", "top_p", "top_k", "min_new_tokens", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
)  # fmt: skip
FEW_SHOT_BREAK = "\n\n"  # lmms-eval puts it into every task whose file has no `until`; it would cut reasoning answers


@dataclass(frozen=True)
class Decoding:
    """How to decode: keyword arguments of `generate`, and the strings at which an answer ends."""

    arguments: tuple[tuple[str, Any], ...]
    stops: tuple[str, ...]

    @property
    def searches(self) -> bool:
        """Whether it is a beam search, which repeats what a prompt brings for every beam."""
        return (dict(self.arguments).get("num_beams") or 1) > 1

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


def decoding(task: Mapping[str, Any], max_new_tokens: int, honor_until: HonorUntil = "stops") -> Decoding:
    """Read a task's generation arguments, which are not changed.

    max_new_tokens: for tasks that name no length. honor_until: `stops` cuts at the task's stop strings but not at the
    few-shot break, `all` also there, `none` nowhere. Temperature 0 or none means greedy. Raises InputError for
    values that are none.
    """
    arguments: dict[str, Any] = {name: task[name] for name in PASSED if task.get(name) is not None}
    length = task.get("max_new_tokens", task.get("max_gen_toks"))
    arguments["max_new_tokens"] = _whole("max_new_tokens", max_new_tokens if length is None else length)
    temperature = task.get("temperature")
    arguments["do_sample"] = bool(task.get("do_sample", temperature)) and temperature != 0
    if arguments["do_sample"] and temperature is not None:
        arguments["temperature"] = float(temperature)
    if not arguments["do_sample"]:
        # Named as None, so that neither the task's nor the checkpoint's sampling settings warn about being unused.
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    return Decoding(tuple(sorted(arguments.items())), _stops(task.get("until"), honor_until))


def _stops(until: object, honor_until: HonorUntil) -> tuple[str, ...]:
    if honor_until not in ("stops", "all", "none"):
        raise InputError(f"honor_until={honor_until!r} is not one of stops, all, none")
    listed = [until] if isinstance(until, str) else list(until) if isinstance(until, list | tuple) else []
    if honor_until == "none":
        return ()
    return tuple(stop for stop in listed if stop and (honor_until == "all" or stop != FEW_SHOT_BREAK))


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)
