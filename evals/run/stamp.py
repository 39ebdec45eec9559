"""What tells a written copy of the bundled benchmark from others: its version, its tasks, its number of questions."""

from __future__ import annotations

import hashlib
import json

STAMP = "prunekit-micro.json"  # the file beside the data sets that says so
TASKS: tuple[str, ...] = ("pope", "mme", "gqa", "mmbench_en_dev_static", "scienceqa_img", "textvqa_val")
QUESTIONS = 600  # of each task, unless somebody asks for another number
# Names what is asked and shown. A test holds it against `benchmark.digest`, which takes seconds: whoever changes a
# question or an image writes the new one here, and older results stand apart from newer ones.
VERSION = "89d73a83f128"


def text(questions: int = QUESTIONS) -> str:
    """The file's content."""
    return json.dumps({"version": VERSION, "questions_per_task": questions, "tasks": TASKS}, indent=1)


def identity(content: str = text()) -> str:
    """What results call the data of such a file."""
    return hashlib.sha256(content.encode()).hexdigest()[:12]
