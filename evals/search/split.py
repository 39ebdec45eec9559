"""Questions to calibrate on and questions held out, disjoint by image over all tasks; and how many each rung asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunekit.errors import InputError

# Of each image, in the order in which images are asked, the numbers of its questions.
Part = tuple[tuple[int, ...], ...]
LEAST = 10  # questions of a task on the first rung: fewer tell nothing


@dataclass(frozen=True)
class Split:
    """Task -> part: what candidates are asked, and what only the report asks."""

    calibration: Mapping[str, Part]
    held_out: Mapping[str, Part]


def split(shown: Mapping[str, Sequence[frozenset[str]]], calibration: int, held_out: int, seed: int) -> Split:
    """At least so many questions of each task for either part, whole images only; the seed draws them.

    shown: task -> for each question the identities of its images. Questions that share an image, also with questions
    of another task, are on one side; one without images stands for itself. Raises InputError for a task that has too
    few.
    """
    sides: tuple[dict[str, list[tuple[int, ...]]], ...] = ({task: [] for task in shown}, {task: [] for task in shown})
    taken = [dict.fromkeys(shown, 0), dict.fromkeys(shown, 0)]
    wanted = calibration, held_out
    ordered = sorted(_together(shown).items(), key=lambda item: _order(seed, item[0]))
    for _, together in ordered:
        # All that is asked about an image goes to the side that first needs one of its questions.
        side = 0 if any(taken[0][task] < calibration for task in together) else 1
        for task, numbers in together.items():
            if taken[side][task] < wanted[side]:
                sides[side][task].append(numbers)
                taken[side][task] += len(numbers)
    for task, questions in shown.items():
        if taken[0][task] < calibration or taken[1][task] < held_out:
            raise InputError(
                f"task '{task}' has {len(questions)} questions about "
                f"{len({one for images in questions for one in images})} images: of these {taken[0][task]} can be "
                f"calibrated on and {taken[1][task]} held out, not {calibration} and {held_out} (ask for fewer: "
                "`calibration`, `held_out`)"
            )
    calibrated, rest = ({task: tuple(part) for task, part in side.items()} for side in sides)
    return Split(calibrated, rest)


def rungs(part: Part, levels: int, factor: int) -> tuple[tuple[int, ...], ...]:
    """The questions that each rung adds to those of the rungs before; each has about `factor` times as many in all."""
    total = sum(map(len, part))
    added: list[tuple[int, ...]] = []
    images, asked = iter(part), 0
    for level in range(levels):
        wanted, new = math.ceil(total / factor ** (levels - 1 - level)), []
        while asked < wanted:
            image = next(images)
            new += image
            asked += len(image)
        added.append(tuple(new))
    return tuple(added)


def levels_of(questions: int, factor: int) -> int:
    """How many rungs so many questions of a task allow: the first asks `LEAST` of them or more."""
    levels = 1
    while questions / factor**levels >= LEAST:
        levels += 1
    return levels


def _together(shown: Mapping[str, Sequence[frozenset[str]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Task -> questions, of each set of questions that images connect, by one identity in it."""
    leader: dict[str, str] = {}

    def lead(one: str) -> str:
        while leader.setdefault(one, one) != one:
            leader[one] = one = leader[leader[one]]  # halves the way for the next
        return one

    questions = [(task, number, images or {f"{task} {number}"}) for task, number, images in _each(shown)]
    for _, _, images in questions:
        first, *others = sorted(map(lead, images))
        for other in others:
            leader[other] = first
    found: dict[str, dict[str, list[int]]] = {}
    for task, number, images in questions:
        found.setdefault(lead(min(images)), {}).setdefault(task, []).append(number)
    return {name: {task: tuple(numbers) for task, numbers in one.items()} for name, one in found.items()}


def _each(shown: Mapping[str, Sequence[frozenset[str]]]) -> Iterator[tuple[str, int, frozenset[str]]]:
    return ((task, number, images) for task, of_task in shown.items() for number, images in enumerate(of_task))


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
