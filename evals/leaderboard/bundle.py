"""The JavaScript that draws the plots: Vega, Vega-Lite and Vega-Embed in one script, from what is installed.

vl-convert puts it together in seconds, and each time alike; so it is kept in the user's cache.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from prunekit_evals.run import files

PACKAGE = "vl-convert-python"


def bundle() -> str:
    """The script, which the installed version of vl-convert makes."""
    import vl_convert

    kept = _kept()
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    script = str(vl_convert.javascript_bundle())
    with suppress(OSError):  # a home that cannot be written to costs time and nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write(kept, script)
    return script


def _kept() -> Path:
    return files.cache() / f"{PACKAGE}-{version(PACKAGE)}.js"
