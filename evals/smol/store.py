"""Where the assembled model lies: once for each content, below a cache folder, found again by its name."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from prunekit_evals.run.files import cache
from prunekit_evals.smol import base

from prunekit.errors import InputError

__all__ = ["assembled", "identity"]

FORMAT = 1  # raise it when the same parts are to be assembled into another folder than before


def identity() -> str:
    """12 hex digits of all that the assembled model follows from: parts, base file, and the way they are put together.

    The base file counts by the hash that it must have, so an assembled model is found without the package.
    """
    from prunekit_evals.smol.assemble import PARTS

    total = hashlib.sha256(f"{FORMAT} {base.SHA256}\n".encode())
    for part in sorted(PARTS.iterdir()):
        total.update(f"{part.name} {part.stat().st_size}\n".encode() + part.read_bytes())
    return total.hexdigest()[:12]


def assembled() -> Path:
    """The folder of the assembled model, which is made if it is not there. Raises InputError.

    It appears whole or not at all: it is made beside its place and renamed. Of two processes that make it at once both
    succeed, and the folder of the first stays.
    """
    from prunekit_evals.smol import assemble

    folder = cache() / f"smol-{identity()}"
    if folder.is_dir():
        return folder
    gguf = base.locate()
    base.check(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="smol-partial-", dir=folder.parent) as beside:
            assemble.write(gguf, Path(beside) / folder.name)
            _publish(Path(beside) / folder.name, folder)
    except OSError as error:
        raise InputError(
            f"prunekit-smol is assembled into '{folder}', which cannot be written: {error.strerror or error}. It takes "
            "550 MB there; name another folder by the environment variable PRUNEKIT_CACHE"
        ) from error
    return folder


def _publish(made: Path, folder: Path) -> None:
    """Rename; a folder that another process published meanwhile is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
