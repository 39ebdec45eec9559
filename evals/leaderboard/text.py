"""A board as Markdown."""

from __future__ import annotations

import re

from prunekit_evals.compare import rendering
from prunekit_evals.leaderboard.board import Board, Section
from prunekit_evals.leaderboard.commands import UNRECORDED


def markdown(board: Board) -> str:
    """Every section's table, with what it lacks, and the command behind each row."""
    apart = "Tables of different conditions are not comparable.\n\n" if len(board.sections) > 1 else ""
    return apart + "\n".join(_section(section) for section in board.sections)


def _section(section: Section) -> str:
    lacks = [f"Note: no {one.baseline} row; make it:\n\n{_fenced(one.command)}\n" for one in section.missing]
    commands = "\n".join(run.command for entry in section.entries for run in entry.runs)
    told = f"<details><summary>Commands</summary>\n\n{_fenced(commands)}{_chosen(section)}\n\n</details>\n"
    return "\n".join([rendering.markdown(section.table), *lacks, told])


def _chosen(section: Section) -> str:
    """The file of questions that the commands name, if they name one."""
    one = section.chosen
    if one is None:
        return ""
    return f"\n\n`{one.file}`:\n\n{_fenced(one.text)}" if one.text else f"\n\n{UNRECORDED.format(file=one.file)}"


def _fenced(text: str) -> str:
    """As it is, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
