"""The JavaScript that draws the plots: Vega, Vega-Lite and Vega-Embed in one script, from what is installed.

vl-convert puts it together in seconds, and each time alike; so it is kept in the user's cache.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

PACKAGE = "vl-convert-python"


def bundle() -> str:
    """The script, which the installed version of vl-convert makes."""
    import vl_convert

    kept = _kept()
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    script = str(vl_convert.javascript_bundle())
    with suppress(OSError):  # a home that cannot be written to costs time and nothing else
        _keep(kept, script)
    return script


def _kept() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "prunekit" / f"{PACKAGE}-{version(PACKAGE)}.js"


def _keep(path: Path, script: str) -> None:
    """At once: another process sees no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(script)
    os.replace(name, path)
