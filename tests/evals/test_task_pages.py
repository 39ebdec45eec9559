"""The pages about lmms-eval's tasks say what the installed one has."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import task_pages


@pytest.fixture(scope="module")
def found():
    return task_pages.tasks()


def test_the_pages_are_current(found, monkeypatch):
    monkeypatch.setattr(task_pages, "tasks", lambda: found)
    for path, text in task_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python tests/task_pages.py"


@pytest.mark.parametrize(
    ("name", "status", "reasons"),
    [
        ("pope", "works", {"images"}),
        ("seedbench_ppl", "works", {"images"}),
        ("hellaswag", "works", {"text"}),
        ("mmbench_en_dev", "needs", {"judge", "images"}),
        ("mlvu_dev", "needs", {"video"}),
        ("videomme", "needs", {"video", "package"}),
        ("ovo_forward", "needs", {"video", "rounds"}),
        ("librispeech_test_clean", "refused", {"sound"}),
        ("gedit_bench", "refused", {"draws"}),
    ],
)
def test_what_is_known_of_some(found, name, status, reasons):
    (task,) = [one for one in found if one.name == name]
    assert task.status == status and reasons <= set(task.reasons)


def test_every_visual_chain_of_thought_is_refused(found):
    """By its output type; those that draw without one are a list, whose folders are there."""
    assert {one.folder for one in found} >= task_pages.DRAWN
    assert sum("draws" in one.reasons for one in found) > 31
