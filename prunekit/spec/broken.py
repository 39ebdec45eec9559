"""What to do about text that is no YAML, where its lines show what was meant."""

from __future__ import annotations

import re

from prunekit.errors import Where

NO_BLANK = re.compile(r"\s*(?:- )?\s*(\w+):([^\s:/\\].*)")
DASH = re.compile(r"\s*-(\w+\s*:.*)")
INDENTED = ("expected <block end>", "mapping values are not allowed", "did not find expected key")


def hint(problem: str, text: str, place: Where) -> str:
    """For PyYAML's `problem` at `place`; empty where nothing can be said."""
    lines = text.splitlines()
    if "'\\t'" in problem:
        return "indent with blanks"
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    if line[max(0, place.col - 2) : place.col] == "${":
        return "between { and } or [ and ] put quotes around a value with ${...}"
    near = [one for one in lines[max(0, place.line - 3) : place.line] if one.strip()]
    for one in reversed(near):
        if match := DASH.fullmatch(one):
            return f"put a blank after the dash: `- {match[1].strip()}`"
        if "expected ':'" in problem and (match := NO_BLANK.fullmatch(one)):
            return f"put a blank after the colon: `{match[1]}: {match[2].strip()}`"
    if any(one in problem for one in INDENTED) and len(near) > 1:
        return _indentation(near)
    return ""


def _indentation(near: list[str]) -> str:
    """near: lines that are not empty, the last one where reading stopped."""
    own, before = _column(near[-1]), _column(near[-2])
    if own == before:
        return ""
    return f"keys that belong together begin in one column: here {own}, in the line before {before}"


def _column(line: str) -> int:
    """Where its first key begins, from 1."""
    return len(line) - len(line.lstrip(" -")) + 1
