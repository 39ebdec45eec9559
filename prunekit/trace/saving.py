"""Writing a figure to a file, of the kind that its name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prunekit.errors import InputError
from prunekit.trace import data, html, png
from prunekit.trace.figure import Figure


def _as_json(figure: Figure, path: Path) -> None:
    path.write_text(json.dumps(data.data_of(figure), indent=1) + "\n", encoding="utf-8")


def _as_png(figure: Figure, path: Path) -> None:
    try:
        image = png.draw(figure)
    except ValueError as error:
        raise InputError(f"'{path}' cannot be drawn: {error} (write .html, or trace fewer pipelines)") from error
    image.save(path, optimize=True)


def _as_html(figure: Figure, path: Path) -> None:
    path.write_text(html.page(figure), encoding="utf-8")


KINDS: dict[str, Callable[[Figure, Path], None]] = {".json": _as_json, ".png": _as_png, ".html": _as_html}


def check(path: Path) -> None:
    """Raise InputError for a file of another kind, or that cannot be there."""
    if path.suffix.lower() not in KINDS:
        raise InputError(f"'{path}' is not a kind of file that a trace can be (end it with {', '.join(KINDS)})")
    if path.is_dir():
        raise InputError(f"'{path}' is a directory; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"'{path}' cannot be written: there is no directory '{path.parent}' (make it first)")


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` as JSON, as a PNG, or as one HTML page that needs nothing else; returns the path.

    Raises InputError for another ending, and for a file that cannot be written.
    """
    path = Path(path)
    check(path)
    try:
        KINDS[path.suffix.lower()](figure, path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror or error} (name another file)") from error
    return path
