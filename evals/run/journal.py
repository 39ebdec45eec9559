"""The answer journal: one JSON line an answer, so that a run that was killed goes on where it was.

A key is a hash of all that an answer depends on (`key_of`), so a journal can be shared by runs and never lies. A line
that was being written when the process died is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from prunekit_evals.run import files


@dataclass(frozen=True)
class Facts:
    """What the prefill of one question cost: token counts, FLOPs and KV bytes, and the same of the dense model.

    tower_flops, dense_tower_flops: of the vision tower and the projector; None where they are not known.
    sound: False where the model computed NaN or infinity for it, as `RunReport.unsound` says.
    prompt_tokens: all of the prompt. layer_tokens: that entered each decoder layer. layers_run: layers that computed
    something of it. missed: decisions that kept another number than the budget asked for: the stage with its site, the
    number asked for, the number kept.
    """

    visual_tokens: int
    kept_tokens: int
    prefill_flops: int
    dense_prefill_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    tower_flops: int | None = None
    dense_tower_flops: int | None = None
    sound: bool = True
    prompt_tokens: int = 0
    layer_tokens: Sequence[int] = ()
    layers_run: int = 0
    missed: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True)
class Answer:
    """One answer. `facts` is None when the pipeline reported nothing."""

    text: str
    input_tokens: int
    output_tokens: int
    facts: Facts | None = None


def key_of(**parts: Any) -> str:
    """A hash of everything that an answer depends on; the parts must be plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """Answers by key, kept in a file. A context manager that may be used again; `Journal(None)` remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there. Raises `files.CannotWrite` when `path` cannot be a journal."""
        self.path = path
        self._known: dict[str, Answer] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                text = file.read().decode(errors="replace")
                if text and not text.endswith("\n"):
                    file.write(b"\n")  # so that the torn line does not swallow the next one
        except OSError as error:
            raise files.CannotWrite(f"journal '{path}' cannot be used: {error.strerror}") from error
        for line in text.splitlines():
            self._remember(line)

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> Answer | None:
        """The answer that was journaled under `key`, or None."""
        return self._known.get(key)

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Write answers through to the disk; after this call they survive a kill. Raises `files.CannotWrite`."""
        if self.path is None:
            return
        with files.saving(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            for key, answer in answers:
                self._known[key] = answer
                self._file.write(json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the answers stay known."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _remember(self, line: str) -> None:
        try:
            data = json.loads(line)
            facts = Facts(**_tuples(data["facts"])) if data["facts"] else None
            self._known[data["key"]] = Answer(data["text"], data["input_tokens"], data["output_tokens"], facts)
        except (ValueError, KeyError, TypeError):
            return  # torn by a kill, or not ours: the question is simply answered again


def _tuples(data: Any) -> Any:
    """JSON's lists as the tuples that they were, at any depth."""
    if isinstance(data, Mapping):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(map(_tuples, data)) if isinstance(data, list) else data
