"""Files that appear whole or not at all, and the folder of what can be made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunekit.errors import InputError


class CannotWrite(InputError):
    """A disk is full, a folder is read-only, or a path is no folder: nothing more can be saved."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raise CannotWrite, naming the path, where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"'{path}' cannot be written: {error.strerror or error}") from error


def folder(path: Path) -> None:
    """Make a folder, and the ones above it. Raises CannotWrite where nothing can be put into it."""
    if path.exists() and not path.is_dir():
        raise CannotWrite(f"'{path}' is not a folder (name another one)")
    with saving(path):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise CannotWrite(f"'{path}' cannot be written into (name another folder)")


def cache() -> Path:
    """The folder of what prunekit derives: `PRUNEKIT_CACHE`, else `prunekit` below `XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("PRUNEKIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunekit"


def write(path: Path, content: str | bytes) -> None:
    """Write a file at once: another process sees the old one or the whole new one. The folder must be there.

    Text is UTF-8; half of a surrogate pair, as foreign data may have, becomes its escape, which JSON reads back.

    Raises OSError where it cannot be written, and then leaves nothing behind.
    """
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".prunekit-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
