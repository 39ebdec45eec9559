"""The held-out benchmark, written in the schemas of the standard tasks for lmms-eval's own task files.

``write(data_root)`` lays out ``data_root/lmms-lab-encoder/<dataset>/`` so that the unmodified tasks load it
when datasets are looked up relative to ``data_root``. Scenes are disjoint from all that training saw.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from . import questions as ask
from .compose import Scene, scene
from .questions import LETTERS, Question
from .tables import Column, write_table

TASKS: tuple[str, ...] = ("pope", "mme", "gqa", "mmbench_en_dev_static", "scienceqa_img")
ORGANISATION = "lmms-lab-encoder"
STAMP = "prunekit-micro.json"
BENCHMARK_SEEDS = 1 << 20  # each task has a range of its own above; training scenes start at 1 << 40

Item = tuple[Scene, Question]

GQA_SHARES = {"color": 0.25, "object_by_color": 0.2, "object_by_place": 0.2, "where": 0.2, "relation": 0.15}
MMBENCH_SHARES = {"choice_existence": 0.25, "choice_color": 0.25, "choice_where": 0.25, "choice_object": 0.25}
SCIENCE_SHARES = {"hint_color": 0.5, "hint_place": 0.5}  # contexts that name a theme were not learned
ANSWER_CAPS = {"color": 6, "where": 4, "relation": 4, "object_by_color": 24, "object_by_place": 24}
MMBENCH_L2 = {"identity": "coarse_perception", "attribute": "finegrained_perception (instance-level)",
              "localization": "finegrained_perception (instance-level)"}  # fmt: skip


def _seeds(task: str) -> Iterator[int]:
    start = BENCHMARK_SEEDS + (TASKS.index(task) << 16)
    return iter(range(start, start + (1 << 16)))


def _rng(shown: Scene) -> np.random.Generator:
    return np.random.default_rng([shown.seed, 4])


def _balanced(seeds: Iterator[int], family: str, count: int) -> list[Item]:
    """``count`` questions, one a scene; no answer takes more than its even share (nouns: twice that)."""
    most = -(-count // ANSWER_CAPS.get(family, 4))
    given: Counter[str] = Counter()
    items: list[Item] = []
    while len(items) < count:
        shown = scene(next(seeds))
        question = ask.ask(shown, _rng(shown), family)
        if question is not None and given[question.answer] < most:
            given[question.answer] += 1
            items.append((shown, question))
    return items


def _shares(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to ``count``; the first family takes what rounding leaves."""
    counts = {family: int(count * share) for family, share in shares.items()}
    counts[next(iter(counts))] += count - sum(counts.values())
    return counts


def _mixed(task: str, count: int, shares: dict[str, float]) -> list[Item]:
    seeds = _seeds(task)
    parts = [_balanced(seeds, family, n) for family, n in _shares(count, shares).items()]
    return [item for group in itertools.zip_longest(*parts) for item in group if item is not None]


def pope_items(count: int) -> list[Item]:
    """Existence questions: a third each with random, popular and adversarial negatives, half of them yes."""
    seeds = _seeds("pope")
    items = []
    for i in range(count):
        shown = scene(next(seeds))
        category = ("random", "popular", "adversarial")[i // 2 % 3]
        items.append((shown, ask.existence(shown, _rng(shown), i % 2 == 0, category)))
    return items


def mme_items(count: int) -> list[Item]:
    """Pairs on one picture, yes then no, about existence, color and position in turn."""
    seeds = _seeds("mme")
    kinds: tuple[Callable[..., Question], ...] = (ask.existence, ask.verify_color, ask.verify_place)
    items = []
    for i in range(count // 2):
        shown = scene(next(seeds))
        # The same generator state for both: the pair is about the same thing wherever the family allows.
        items += [(shown, kinds[i % 3](shown, _rng(shown), yes)) for yes in (True, False)]
    return items


def gqa_items(count: int) -> list[Item]:
    """Open questions with answers of one or two words."""
    return _mixed("gqa", count, GQA_SHARES)


def mmbench_items(count: int) -> list[Item]:
    """Four choices, no context."""
    return _mixed("mmbench_en_dev_static", count, MMBENCH_SHARES)


def scienceqa_items(count: int) -> list[Item]:
    """Four choices that only the picture and the context together decide between."""
    return _mixed("scienceqa_img", count, SCIENCE_SHARES)


ITEMS: dict[str, Callable[[int], list[Item]]] = {
    "pope": pope_items, "mme": mme_items, "gqa": gqa_items,
    "mmbench_en_dev_static": mmbench_items, "scienceqa_img": scienceqa_items,
}  # fmt: skip


def _pope(root: Path, items: list[Item]) -> None:
    columns = {
        "id": Column("string", [str(i) for i in range(len(items))]),
        "question_id": Column("string", [str(i) for i in range(len(items))]),
        "question": Column("string", [q.text for _, q in items]),
        "answer": Column("string", [q.answer.lower() for _, q in items]),
        "image_source": Column("string", [f"scene-{s.seed}" for s, _ in items]),
        "image": Column("image", [s.image for s, _ in items]),
        "category": Column("string", [q.category for _, q in items]),
    }
    write_table(root / "POPE", "default", "test", columns)


def _mme(root: Path, items: list[Item]) -> None:
    names = {"existence": "existence", "verify_color": "color", "verify_place": "position"}
    columns = {
        "question_id": Column("string", [f"{names[q.family]}/{s.seed}.png" for s, q in items]),
        "image": Column("image", [s.image for s, _ in items]),
        "question": Column("string", [f"{q.text} Please answer yes or no." for _, q in items]),
        "answer": Column("string", [q.answer for _, q in items]),
        "category": Column("string", [names[q.family] for _, q in items]),
    }
    write_table(root / "MME", "default", "test", columns)


def _gqa(root: Path, items: list[Item]) -> None:
    ids = [f"scene-{s.seed}" for s, _ in items]
    asked = {
        "id": Column("string", [str(i) for i in range(len(items))]),
        "imageId": Column("string", ids),
        "question": Column("string", [q.text for _, q in items]),
        "answer": Column("string", [q.answer for _, q in items]),
        "fullAnswer": Column("string", [q.answer for _, q in items]),
        "isBalanced": Column("bool", [True] * len(items)),
        "semanticStr": Column("string", [q.family for _, q in items]),
    }
    pictures = {"id": Column("string", ids), "image": Column("image", [s.image for s, _ in items])}
    write_table(root / "GQA", "testdev_balanced_instructions", "testdev", asked)
    write_table(root / "GQA", "testdev_balanced_images", "testdev", pictures)


def _mmbench(root: Path, items: list[Item]) -> None:
    letters = {x: Column("string", [q.choices[i] for _, q in items]) for i, x in enumerate(LETTERS)}
    columns = {
        "index": Column("int64", list(range(len(items)))),
        "question": Column("string", [q.text for _, q in items]),
        "hint": Column("string", ["nan"] * len(items)),
        "answer": Column("string", [q.answer for _, q in items]),
        **letters,
        "category": Column("string", [q.category for _, q in items]),
        "image": Column("image", [s.image for s, _ in items]),
        "source": Column("string", ["prunekit-micro"] * len(items)),
        "L2-category": Column("string", [MMBENCH_L2[q.category] for _, q in items]),
        "comment": Column("string", ["nan"] * len(items)),
        "split": Column("string", ["dev"] * len(items)),
    }
    write_table(root / "MMBench", "en", "dev", columns)


def _scienceqa(root: Path, items: list[Item]) -> None:
    empty = Column("string", [""] * len(items))
    columns = {
        "image": Column("image", [s.image for s, _ in items]),
        "question": Column("string", [q.text for _, q in items]),
        "choices": Column("strings", [list(q.choices) for _, q in items]),
        "answer": Column("int8", [LETTERS.index(q.answer) for _, q in items]),
        "hint": Column("string", [q.hint for _, q in items]),
        "task": Column("string", ["closed choice"] * len(items)),
        "grade": empty,
        "subject": Column("string", ["prunekit-micro"] * len(items)),
        "topic": Column("string", [q.family for _, q in items]),
        "category": Column("string", [q.category for _, q in items]),
        "skill": empty,
        "lecture": empty,
        "solution": empty,
    }
    write_table(root / "ScienceQA", "ScienceQA-IMG", "test", columns)


WRITERS = {
    "pope": _pope, "mme": _mme, "gqa": _gqa, "mmbench_en_dev_static": _mmbench, "scienceqa_img": _scienceqa,
}  # fmt: skip


def _version() -> str:
    """Hash of all that the questions and pictures depend on."""
    here = Path(__file__).resolve().parent
    names = ("benchmark.py", "tables.py", "compose.py", "lexicon.py", "questions.py", "sprites.py", "icons/sheet.png")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()


def write(data_root: str | Path, questions_per_task: int = 600) -> None:
    """Write every task's data set below ``data_root``; does nothing where the same version lies already."""
    root = Path(data_root)
    stamp = root / STAMP
    wanted = json.dumps({"version": _version(), "questions_per_task": questions_per_task, "tasks": TASKS}, indent=1)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    for task in TASKS:
        WRITERS[task](root / ORGANISATION, ITEMS[task](questions_per_task))
    stamp.write_text(wanted)
