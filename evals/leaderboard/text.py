"""A board as Markdown."""

from __future__ import annotations

import re

from prunekit_evals.compare import rendering
from prunekit_evals.leaderboard.board import Board, Section


def markdown(board: Board) -> str:
    """Every section's table, with what it lacks, and the command behind each row."""
    apart = "Tables of different conditions are not comparable.\n\n" if len(board.sections) > 1 else ""
    return apart + "\n".join(_section(section) for section in board.sections)


def _section(section: Section) -> str:
    lacks = [f"Note: no {one.baseline} row; make it:\n\n{_fenced(one.command)}\n" for one in section.missing]
    commands = "\n".join(run.command for entry in section.entries for run in entry.runs)
    told = f"<details><summary>Commands</summary>\n\n{_fenced(commands)}\n\n</details>\n"
    return "\n".join([rendering.markdown(section.table), *lacks, told])


def _fenced(text: str) -> str:
    """As it is, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
