"""Keep maps for a page: pictures named like their pipelines, as `prunekit trace --thumbnails` writes them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunekit_evals.run.reading import Skipped

from prunekit.errors import InputError

KINDS = {".webp": ("WEBP", "image/webp"), ".png": ("PNG", "image/png")}  # suffix: Pillow's name, and a browser's
LARGEST = 60_000  # bytes of one: a page with many rows stays below its limit


@dataclass(frozen=True)
class Picture:
    """An image as a data address, with its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Pictures:
    """Name of a pipeline -> its keep map; and what was left out."""

    of: Mapping[str, Picture] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()


def read(folder: Path) -> Pictures:
    """The pictures in a folder; what is none is left out by name. Raises InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"no folder '{folder}' of keep maps (make it: `prunekit trace NAME... --thumbnails {folder}`)")
    found, skipped = {}, []
    for path in sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith(".")):
        try:
            found[path.stem] = _picture(path)
        except (OSError, ValueError, InputError) as error:
            skipped.append(Skipped(path, f"no keep map: {error}"))
    return Pictures(found, tuple(skipped))


def _picture(path: Path) -> Picture:
    from PIL import Image

    if path.suffix not in KINDS:
        raise InputError(f"neither {' nor '.join(KINDS)}")
    data = path.read_bytes()
    if len(data) > LARGEST:
        raise InputError(f"{len(data) / 1000:.0f} kB, and at most {LARGEST // 1000} have room in a page")
    kind, mime = KINDS[path.suffix]
    with Image.open(path, formats=[kind]) as image:
        size = image.size
        image.verify()
    return Picture(f"data:{mime};base64,{base64.b64encode(data).decode()}", *size)
