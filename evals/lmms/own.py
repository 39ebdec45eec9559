"""Tasks of the user's own: YAML files of lmms-eval in a folder, over data beside them or anywhere on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def identity(file: Path, config: Mapping[str, Any]) -> str:
    """12 hex digits of what a task's results depend on: its YAML, the code beside it, and the local data it names.

    Data that rows name in turn, such as image files in a JSON table, is not seen.
    """
    total = hashlib.sha256(file.read_bytes())
    for code in sorted(file.parent.glob("*.py")):
        total.update(code.name.encode() + code.read_bytes())
    for path in sorted(set(_files(file.parent, config))):
        with path.open("rb") as data:
            while piece := data.read(CHUNK):
                total.update(piece)
    return total.hexdigest()[:12]


def _files(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a task's config names, relative to the folder or absolute; of folders all that is in them."""
    for text in _texts([config.get("dataset_path"), config.get("dataset_kwargs")]):
        path = folder / text
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() != folder.resolve():
            yield from (one for one in path.rglob("*") if one.is_file())
        elif "*" in text and not Path(text).is_absolute():
            yield from (one for one in folder.glob(text) if one.is_file())


def _texts(data: Any) -> Iterator[str]:
    inside: Iterable[Any] = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    if isinstance(data, str) and data:
        yield data
    for one in inside:
        yield from _texts(one)
