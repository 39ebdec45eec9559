"""Docstrings say what a parameter or field is in a line that begins with its name; on the site these are lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

BEGINS = re.compile(r"^(\w+(?:, \w+)*): ")


class Fields(griffe.Extension):  # type: ignore[misc]
    """An item for each such line, with what follows it."""

    def on_class_members(self, *, cls: Any, **_: Any) -> None:
        """Called by griffe for each class."""
        if cls.docstring is not None:
            cls.docstring.value = _listed(cls.docstring.value, set(cls.members))

    def on_function_instance(self, *, func: Any, **_: Any) -> None:
        """Called by griffe for each function."""
        if func.docstring is not None:
            func.docstring.value = _listed(func.docstring.value, {one.name for one in func.parameters})


def _listed(text: str, known: set[str]) -> str:
    out: list[str] = []
    for line in text.splitlines():
        match = BEGINS.match(line)
        if match and set(match[1].split(", ")) <= known:
            if out and out[-1] and not out[-1].startswith(("- ", "  ")):
                out.append("")
            out.append(f"- **{match[1]}**: {line[match.end() :]}")
        elif out and line and out[-1].startswith(("- **", "  ")):
            out.append(f"  {line}")
        else:
            out.append(line)
    return "\n".join(out)
