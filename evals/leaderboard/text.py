"""A board as Markdown."""

from __future__ import annotations

from prunekit_evals.compare import rendering
from prunekit_evals.leaderboard.board import Board, Section


def markdown(board: Board) -> str:
    """Every section's table, with what it lacks, and the command behind each row."""
    apart = "Tables of different conditions are not comparable.\n\n" if len(board.sections) > 1 else ""
    return apart + "\n".join(_section(section) for section in board.sections)


def _section(section: Section) -> str:
    lacks = "".join(f"Note: no {one.baseline} row; make it: `{one.command}`  \n" for one in section.missing)
    commands = "\n".join(command for entry in section.entries for command in entry.commands)
    told = f"<details><summary>Commands</summary>\n\n```\n{commands}\n```\n\n</details>\n"
    return "\n".join([rendering.markdown(section.table), lacks + told])
