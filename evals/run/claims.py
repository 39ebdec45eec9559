"""Which process computes a cell: the one that holds its lock. The kernel lets go of the locks of a dead process.

Processes that share a results folder so share its work. On a file system without locks filelock falls back to files
that exist, which it takes away where their process is dead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from prunekit_evals.run import files


@contextmanager
def claim(cell: Path) -> Iterator[bool]:
    """Hold the claim on a cell, by its file; False, at once, while another process holds it.

    The lock file goes once the cell is there: who waits for it looks for the cell first. Raises `files.CannotWrite`.
    """
    path = lock_of(cell)
    lock = FileLock(path)
    with files.saving(path), suppress(Timeout):  # which is an OSError, too
        cell.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    if not lock.is_locked:
        yield False
        return
    try:
        yield True
        if cell.is_file():
            path.unlink(missing_ok=True)
    finally:
        lock.release()


def lock_of(cell: Path) -> Path:
    """The file that a claim on a cell locks; it says nothing about whether somebody holds it."""
    return cell.with_suffix(".lock")
