"""Images from files, and upright: the one way in which every command reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def upright(image: Image) -> Image:
    """An image as people see it, in RGB: turned as its EXIF orientation says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def read_image(path: str | Path, named: str = "") -> Image:
    """The image of a file, upright. Raises InputError where there is none, or where it is damaged or truncated.

    named: where the path comes from, for the message.
    """
    import PIL.Image

    where = f"'{path}'{named}"
    try:
        with PIL.Image.open(path) as image:
            return upright(image)
    except FileNotFoundError as error:
        raise InputError(f"no such image: {where}") from error
    except IsADirectoryError as error:
        raise InputError(f"{where} is a directory; name an image file") from error
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{where} is not a readable image: {error}") from error
