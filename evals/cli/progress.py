"""One progress bar over all cells, on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from prunekit_evals.run.results import Cell
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

DAY = 86_400.0


def about(seconds: float) -> str:
    """A time in words, such as `4 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Bar:
    """A bar over all cells and one over the questions of the cell in work. A context manager.

    saved: cells that this run has written.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=DAY,
        )  # fmt: skip
        self._all: TaskID | None = None
        self._one: TaskID | None = None
        self._cells = self.saved = 0
        self._begun = time.monotonic()

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, cells: int) -> None:
        """So many cells are to be computed."""
        self._cells, self._begun = cells, time.monotonic()
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
        self.saved += 1
        if cell.status == "failed":
            self.console.print(f"failed: {cell.label} {cell.pipeline.name}: {cell.error}", markup=False, style="red")
        elif not self.console.is_terminal:
            self.console.print(f"done: {cell.label} {cell.pipeline.name} ({self._left()})", markup=False)

    def _left(self) -> str:
        """`3 of 12, about 4 min left`, if all cells take what those so far did."""
        took = (time.monotonic() - self._begun) / self.saved * (self._cells - self.saved)
        return f"{self.saved} of {self._cells}" + (f", about {about(took)} left" if self.saved < self._cells else "")

    def _drop(self) -> None:
        if self._one is not None:
            self._bars.remove_task(self._one)
            self._one = None
