"""Files that appear whole or not at all, and the folder of what can be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache() -> Path:
    """The folder of what prunekit derives: `PRUNEKIT_CACHE`, else `prunekit` below `XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("PRUNEKIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunekit"


def write(path: Path, text: str) -> None:
    """Write text at once: another process sees the old file or the whole new one. The folder must be there.

    Raises OSError where it cannot be written, and then leaves nothing behind.
    """
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=".prunekit-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
