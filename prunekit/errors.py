"""One error tree. Every message says what is wrong, where, and what to do next; the program exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place in a file; line and column count from 1. `file` may also be `override 2` or `<inline>`."""

    file: str
    line: int
    col: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a pipeline.

    where: None when the pipeline did not come from text (a dict).
    key: path of the key, such as `stages[1].keep`; empty when the whole file is meant.
    hint: what to do next; empty when the message says it.
    """

    where: Where | None
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        parts = [str(self.where) if self.where else "", self.key, self.message]
        text = ": ".join(part for part in parts if part)
        return f"{text} ({self.hint})" if self.hint else text


class PrunekitError(Exception):
    """Anything that prunekit refuses or that a plugin got wrong."""


class SpecError(PrunekitError, ValueError):
    """A pipeline that cannot be read, built or bound to a model. `faults` holds every fault, `str` lists them all."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))


class UnknownName(PrunekitError, LookupError):
    """A name that nothing registered. `message` and `hint` are the two halves of the text."""

    def __init__(self, kind: str, name: str, names: Iterable[str]) -> None:
        self.kind, self.name, self.names = kind, name, tuple(sorted(names))
        self.message = f"unknown {kind} '{name}'"
        listed = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        self.hint = f"{did_you_mean(name, self.names)}known: {listed or 'none'}; see `prunekit list`"
        super().__init__(f"{self.message} ({self.hint})")


class DuplicateName(PrunekitError, ValueError):
    """Two plugins, or one plugin twice, registered the same name. Both origins are named."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        self.kind, self.name, self.first, self.second = kind, name, first, second
        super().__init__(
            f"{kind} '{name}' is registered twice: by {first} and by {second} "
            "(rename one, or block one plugin: `prunekit -p no:NAME ...`, PRUNEKIT_DISABLE_PLUGINS=NAME)"
        )


class PluginError(PrunekitError, RuntimeError):
    """A plugin that does not load, or a strategy whose hook raised or returned something that is no decision."""


class Unsupported(PrunekitError, RuntimeError):
    """This pipeline or this call cannot run on this model; raised before any compute."""


class InputError(PrunekitError, ValueError):
    """A file, model folder, image, task or argument that is not usable."""


class PrunekitWarning(UserWarning):
    """Something that a reader of the results should know."""


class DeprecatedHook(PrunekitWarning, DeprecationWarning):
    """A hook, or one of its arguments, that a later version will not have: the plugin that names it goes on to work."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean 'fastv'? ` with a trailing blank, or an empty string when none of `names` is close to `name`."""
    folded = {one.casefold(): one for one in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f"did you mean '{folded[close[0]]}'? " if close else ""
