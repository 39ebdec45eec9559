"""One progress bar over all cells, on stderr."""

from __future__ import annotations

from types import TracebackType

from prunekit_evals.run.results import Cell
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bar:
    """A bar over all cells and one over the questions of the cell in work. A context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
            transient=True,
        )  # fmt: skip
        self._all: TaskID | None = None
        self._one: TaskID | None = None
        self._cells = 0

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, cells: int) -> None:
        """So many cells are to be computed."""
        self._cells = cells
        if cells:
            self._all = self._bars.add_task("cells", total=cells)

    def cell(self, pipeline: str, task: str, questions: int) -> None:
        """A cell begins."""
        self._drop()
        self._one = self._bars.add_task(f"{task}  {pipeline}", total=questions)

    def advance(self, questions: int) -> None:
        """So many more questions are answered."""
        if self._one is not None:
            self._bars.advance(self._one, questions)

    def end(self, cell: Cell) -> None:
        """A cell is written. Where there is no terminal, each cell is a line."""
        self._drop()
        if self._all is not None:
            self._bars.advance(self._all)
        if cell.status == "failed":
            self.console.print(f"failed: {cell.label} {cell.pipeline.name}: {cell.error}", markup=False, style="red")
        elif not self.console.is_terminal:
            self.console.print(f"done: {cell.label} {cell.pipeline.name}", markup=False)

    def _drop(self) -> None:
        if self._one is not None:
            self._bars.remove_task(self._one)
            self._one = None
