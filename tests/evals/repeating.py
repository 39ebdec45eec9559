"""The commands of a board's rows, as a user would call them: what they make has to be the very cells of the rows."""

import shlex

from prunekit_evals.cli import commands
from prunekit_evals.leaderboard import board
from prunekit_evals.run.variants import Variation
from prunekit_evals.runner import Runner, Silent

from prunekit.cli.main import parser


def check(cells, folder, monkeypatch, **folders):
    """Each printed command, through the parser, plans the cells of its row. folders: what `DIR` stands for, by option.

    Returns the commands.
    """
    monkeypatch.chdir(folder)
    said = []
    for section in board.of_cells(cells).sections:
        if section.chosen:
            (folder / section.chosen.file).write_text(section.chosen.text)
        for entry in section.entries:
            for run in entry.runs:
                if run.file:
                    (folder / run.file).write_text(run.yaml)
                said.append(run.command)
                again = planned(run.command, folder / "again", folders)
                mine = {cell.task: cell.id for cell in entry.cells if cell.pipeline.resolved == run.yaml}
                assert {task: again[task] for task in mine} == mine and set(again) == set(mine), run.command
    return said


def planned(command, out, folders):
    """Task -> identity of the cell that a command would compute."""
    words = shlex.split(command)
    for option, path in folders.items():
        flag = f"--{option.replace('_', '-')}"
        if flag in words:
            assert words[words.index(flag) + 1] == "DIR"
            words[words.index(flag) + 1] = str(path)
    assert words[:2] == ["prunekit", "eval"]
    namespace = parser().parse_args(words[1:])
    namespace.out = out
    pipelines = commands.load_all(namespace.pipelines, Variation(), dense=not namespace.no_dense)
    runner = Runner(commands.plan_of(namespace, pipelines), Silent())
    (one,) = pipelines
    return {named.name: runner.path(named.name, one).stem.rpartition(".")[2] for named in runner.plan.tasks}
