"""Parts of a task's questions: which images each question is about, and the task with some of its questions alone."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prunekit_evals.lmms.requests import flat

from prunekit.errors import InputError


def select(task: Any, numbers: Sequence[int]) -> Any:
    """The same task with these questions alone, in this order; the task that is given stays as it is.

    Its questions are numbered anew, from 0. Raises InputError for a task whose questions are in no data set of the
    datasets library.
    """
    split = _split(task)
    part = copy.copy(task)
    for name in ("dataset", "dataset_no_image"):
        splits = getattr(task, name, None)
        if splits is None or not hasattr(splits[split], "select"):
            raise InputError(f"task '{task.config.task}' cannot be asked in parts: its questions are in no data set")
        changed = type(splits)(splits)
        changed[split] = splits[split].select(list(numbers))
        setattr(part, name, changed)
    return part


def images(task: Any, chat: bool) -> list[frozenset[str]]:
    """For each question the identities of its images, 16 hex digits of their pixels, or of a video's file.

    chat: whether the task is asked in messages. Every image is read once: of ten thousand questions a minute. A
    question whose images cannot be read has none; whoever asks it is told why.
    """
    docs = task.dataset[_split(task)]
    return [_of(task, docs, number, chat) for number in range(len(docs))]


def _of(task: Any, docs: Any, number: int, chat: bool) -> frozenset[str]:
    with suppress(Exception):
        return frozenset(map(_identity, _shown(task, docs[number], chat)))
    return frozenset()


def _split(task: Any) -> str:
    """The split that is asked, as the harness chooses it."""
    return str(task.config.test_split if task.has_test_docs() else task.config.validation_split)


def _shown(task: Any, doc: Any, chat: bool) -> Iterator[Any]:
    if not (chat and callable(task.config.doc_to_messages)):
        yield from flat(task.doc_to_visual(doc))
        return
    for message in task.doc_to_messages(doc):
        parts = message["content"] if isinstance(message["content"], list) else []
        yield from (part.get("url", part.get(part["type"])) for part in parts if part["type"] != "text")


def _identity(visual: Any) -> str:
    """Of pixels, whatever holds them; of what is no image, of its file or of what it is written as."""
    from PIL import Image

    if isinstance(visual, Image.Image):
        told = f"{visual.size}".encode() + visual.convert("RGB").tobytes()
    elif isinstance(visual, str | Path) and Path(visual).is_file():
        with Path(visual).open("rb") as file:
            told = hashlib.file_digest(file, "sha256").digest()
    else:
        told = repr(visual).encode()
    return hashlib.sha256(told).hexdigest()[:16]
