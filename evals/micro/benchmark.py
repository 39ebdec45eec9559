"""The held-out benchmark, written in the schemas of the standard tasks for lmms-eval's own task files.

`write(data_root)` lays out `data_root/lmms-lab-encoder/<dataset>/` so that the unmodified tasks load it
when datasets are looked up relative to `data_root`. Scenes are disjoint from all that training saw.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from prunekit_evals.micro import facts
from prunekit_evals.micro.compose import Scene, scene
from prunekit_evals.micro.questions import LETTERS, Question, ask
from prunekit_evals.micro.tables import Column, write_table
from prunekit_evals.run import stamp
from prunekit_evals.run.stamp import QUESTIONS, STAMP, TASKS

ORGANISATION = "lmms-lab-encoder"
SAMPLED = 12
BENCHMARK_SEEDS = 1 << 20  # each task has a range of its own above; training scenes start at 1 << 40

Item = tuple[Scene, Question]

# A third of GQA's questions are of one fact, the others of two (relation, same_color, kind_by_color) or three hops.
GQA_SHARES = {
    "color": 0.1, "object_by_color": 0.1, "object_by_place": 0.08, "where": 0.1, "relation": 0.12, "same_color": 0.15,
    "kind_by_color": 0.11, "where_same": 0.13, "kind_same": 0.11,
}  # fmt: skip
MMBENCH_SHARES = {
    "choice_existence": 0.2, "choice_color": 0.2, "choice_where": 0.2, "choice_object": 0.2, "choice_word": 0.2,
}  # fmt: skip
SCIENCE_SHARES = {"hint_color": 0.4, "hint_place": 0.3, "hint_like": 0.3}
TEXT_SHARES = {"read": 0.7, "read_like": 0.3}
# Among how many answers a family's are spread evenly; nouns and words may take twice their share.
ANSWER_CAPS = {
    "color": 6, "where": 4, "relation": 4, "object_by_color": 16, "object_by_place": 16, "same_color": 16,
    "kind_by_color": 4, "where_same": 4, "kind_same": 4, "read": 12, "read_like": 12,
}  # fmt: skip
MMBENCH_L2 = {"identity": "coarse_perception", "attribute": "finegrained_perception (instance-level)",
              "localization": "finegrained_perception (instance-level)", "reading": "coarse_perception"}  # fmt: skip


def _seeds(task: str) -> Iterator[int]:
    start = BENCHMARK_SEEDS + (TASKS.index(task) << 16)
    return iter(range(start, start + (1 << 16)))


def _rng(shown: Scene) -> np.random.Generator:
    return np.random.default_rng([shown.seed, 4])


def _balanced(seeds: Iterator[int], family: str, count: int) -> list[Item]:
    """`count` questions, one a scene; no answer takes more than its even share (nouns: twice that)."""
    most = -(-count // ANSWER_CAPS.get(family, 4))
    drawn: Counter[str] = Counter()
    items: list[Item] = []
    while len(items) < count:
        shown = scene(next(seeds))
        question = ask(shown, _rng(shown), family)
        if question is not None and drawn[question.answer] < most:
            drawn[question.answer] += 1
            items.append((shown, question))
    return items


def _shares(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `count`; the first family takes what rounding leaves."""
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
        category = ("random", "popular", "adversarial")[i // 2 % 3]
        items.append(_first(seeds, partial(facts.existence, yes=i % 2 == 0, category=category)))
    return items


def _first(seeds: Iterator[int], ask: Callable[[Scene, np.random.Generator], Question | None]) -> Item:
    """The next scene that admits the question, and the question."""
    while True:
        shown = scene(next(seeds))
        question = ask(shown, _rng(shown))
        if question is not None:
            return shown, question


def mme_items(count: int) -> list[Item]:
    """Pairs on one image, yes then no, about existence, color, position and written words in turn."""
    seeds = _seeds("mme")
    kinds = (facts.existence, facts.verify_color, facts.verify_place, facts.verify_word)
    items = []
    for i in range(count // 2):
        kind: Callable[..., Question | None] = kinds[i % len(kinds)]
        shown, question = _first(seeds, partial(kind, yes=True))
        # The same generator state for both: the pair is about the same thing wherever the family allows.
        contrary = kind(shown, _rng(shown), yes=False)
        items += [(shown, question), (shown, contrary or question)]
    return items


def gqa_items(count: int) -> list[Item]:
    """Open questions with answers of one or two words."""
    return _mixed("gqa", count, GQA_SHARES)


def mmbench_items(count: int) -> list[Item]:
    """Four choices, no context."""
    return _mixed("mmbench_en_dev_static", count, MMBENCH_SHARES)


def scienceqa_items(count: int) -> list[Item]:
    """Four choices that only the image and the context together decide between."""
    return _mixed("scienceqa_img", count, SCIENCE_SHARES)


def textvqa_items(count: int) -> list[Item]:
    """What signs say; a third of the questions name the sign by the color of a thing."""
    return _mixed("textvqa_val", count, TEXT_SHARES)


ITEMS: dict[str, Callable[[int], list[Item]]] = {
    "pope": pope_items, "mme": mme_items, "gqa": gqa_items,
    "mmbench_en_dev_static": mmbench_items, "scienceqa_img": scienceqa_items,
    "textvqa_val": textvqa_items,
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
    names = {"existence": "existence", "verify_color": "color", "verify_place": "position", "verify_word": "OCR"}
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
    images = {"id": Column("string", ids), "image": Column("image", [s.image for s, _ in items])}
    write_table(root / "GQA", "testdev_balanced_instructions", "testdev", asked)
    write_table(root / "GQA", "testdev_balanced_images", "testdev", images)


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


def _textvqa(root: Path, items: list[Item]) -> None:
    columns = {
        "image_id": Column("string", [f"scene-{s.seed}" for s, _ in items]),
        "question_id": Column("int64", list(range(len(items)))),
        "question": Column("string", [q.text for _, q in items]),
        "image": Column("image", [s.image for s, _ in items]),
        "image_width": Column("int64", [s.image.shape[1] for s, _ in items]),
        "image_height": Column("int64", [s.image.shape[0] for s, _ in items]),
        "answers": Column("strings", [[q.answer] * 10 for _, q in items]),
        "ocr_tokens": Column("strings", [[t.noun for t in s.signs] for s, _ in items]),
        "set_name": Column("string", ["val"] * len(items)),
    }
    write_table(root / "textvqa", "default", "validation", columns)


WRITERS = {
    "pope": _pope, "mme": _mme, "gqa": _gqa, "mmbench_en_dev_static": _mmbench, "scienceqa_img": _scienceqa,
    "textvqa_val": _textvqa,
}  # fmt: skip


def digest(count: int = SAMPLED) -> str:
    """12 hex digits of the first `count` questions of each task with their images: of the content, not the code."""
    total = hashlib.sha256()
    for task in TASKS:
        for shown, question in ITEMS[task](count):
            total.update(f"{task} {shown.seed} {question!r}\n".encode() + shown.image.tobytes())
    return total.hexdigest()[:12]


def write(data_root: str | Path, questions_per_task: int = QUESTIONS) -> None:
    """Write every task's data set below `data_root`; does nothing where the same version lies already."""
    root = Path(data_root)
    stamped, wanted = root / STAMP, stamp.text(questions_per_task)
    if stamped.exists() and stamped.read_text() == wanted:
        return
    stamped.unlink(missing_ok=True)
    for task in TASKS:
        WRITERS[task](root / ORGANISATION, ITEMS[task](questions_per_task))
    stamped.write_text(wanted)
