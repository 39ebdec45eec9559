"""Questions that could not be answered: which, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prunekit_evals.run.files import CannotWrite

from prunekit.errors import InputError, PrunekitError

IN_A_ROW = 16  # so many are no accident of single documents


def reason(error: BaseException) -> str:
    """What went wrong, in one line; lmms-eval's retries hide it one level down."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else None
    if isinstance(cause, Exception):
        return reason(cause)
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, PrunekitError) else f"{type(error).__name__}: {text}"


@dataclass
class Unanswered:
    """Task and number of each question that could not be answered, and why.

    tolerant: False: the first one is raised instead.
    """

    tolerant: bool = False
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    _in_a_row: int = 0

    def add(self, task: str, number: int, error: Exception) -> None:
        """Record one, or raise its error: where it is about more than this question, and after 16 in a row."""
        self._in_a_row += 1
        if not self.tolerant or isinstance(error, CannotWrite) or self._in_a_row >= IN_A_ROW:
            raise error
        self.reasons[task, number] = reason(error).removeprefix(f"document {number} of task '{task}': ")

    def interrupt(self) -> None:
        """A question was answered."""
        self._in_a_row = 0

    def of(self, task: str) -> dict[int, str]:
        """Number to reason, of one task."""
        return {number: why for (name, number), why in self.reasons.items() if name == task}


def judge(lost: Mapping[int, str], asked: int, strict: bool) -> None:
    """Raise InputError where questions that could not be answered fail a cell: if strict each one does, else only all.

    lost: number of each such question of `asked`, and why.
    """
    if len(lost) == asked:
        raise InputError(f"no question could be answered: {listed(lost)}")
    if lost and strict:
        count = f"{len(lost)} of {asked} questions could not be answered"
        raise InputError(f"{count}: {listed(lost)} (--unanswered wrong counts them as wrong)")


def listed(reasons: Mapping[int, str], at_most: int = 3) -> str:
    """`document 17: it is truncated; document 20: ...`, the first few of them."""
    named = [f"document {number}: {why}" for number, why in sorted(reasons.items())[:at_most]]
    more = len(reasons) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")
