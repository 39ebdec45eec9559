"""One rule of the contract of a strategy: what it means, what usually breaks it, and how a failure says so."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.testing.subject import Subject, Traits

WIDTH = 110


class ContractFailure(AssertionError):
    """A strategy breaks its contract. The text says which rule, what was found, what the rule means, and what usually
    breaks it.
    """


class Broken(Exception):
    """Raised inside a check: what was found."""


def expect(holds: object, found: str) -> None:
    """Raises Broken with what was found, unless it holds."""
    if not holds:
        raise Broken(found)


@dataclass(frozen=True)
class Check:
    """One rule. name: as in test ids. means: the rule. breaks: what usually breaks it. concerns: which strategies it is
    for; run: raises Broken where it does not hold.
    """

    name: str
    means: str
    breaks: str
    concerns: Callable[[Traits], bool]
    run: Callable[[Subject], None]

    def __call__(self, subject: Subject) -> None:
        """Raises ContractFailure where the strategy breaks the rule, and where anything else fails on the way."""
        __tracebackhide__ = True
        try:
            self.run(subject)
        except Broken as broken:
            raise ContractFailure(self.text(subject.use, str(broken))) from None
        except Exception as error:
            raise ContractFailure(self.text(subject.use, f"{type(error).__name__}: {error}")) from error

    def text(self, use: str, found: str) -> str:
        """The message of a failure."""
        parts = [f"strategy '{use}' breaks its contract: {self.name}"]
        for label, said in (("found", found), ("the rule", self.means), ("often because of", self.breaks)):
            parts += [f"  {label}:", textwrap.indent(_wrapped(said), "    ")]
        return "\n".join(parts)


def check(
    means: str, breaks: str, concerns: Callable[[Traits], bool] = lambda traits: True
) -> Callable[[Callable[[Subject], None]], Check]:
    """A function of a subject becomes a check, under its own name with hyphens."""

    def make(run: Callable[[Subject], None]) -> Check:
        return Check(run.__name__.replace("_", "-"), means, breaks, concerns, run)

    return make


def shown(rows: Iterable[object], most: int = 6) -> str:
    """The first of some values, for a message."""
    listed = list(rows)
    return ", ".join(map(str, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _wrapped(text: str) -> str:
    """Long lines broken; lines of tables and reports stay."""
    return "\n".join(line if "  " in line else textwrap.fill(line, WIDTH) for line in text.splitlines())
