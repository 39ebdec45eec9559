"""Videos from files: which frames of one are shown, and their decoding by PyAV."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from av import VideoFrame
    from PIL.Image import Image

INSTALL = "videos are decoded by PyAV, which is not installed: pip install 'prunekit[video]'"
MAX_FRAMES = 32  # as most models of lmms-eval have it
WHOLE, BLOCK, BLOCKS = 2**26, 2**20, 32


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are shown, by the rule of lmms-eval's `load_video`.

    max_frames: so many, evenly spread from the first to the last, or all where there are fewer. fps: so many a second
    instead, at most `max_frames`; None goes by the count alone. Raises InputError for values that are none.
    """

    max_frames: int = MAX_FRAMES
    fps: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_frames, bool) or not isinstance(self.max_frames, int) or self.max_frames < 1:
            raise InputError(f"max_frames must be a whole number of at least 1, not {self.max_frames!r}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps must be a number of frames a second above 0, not {self.fps!r}")

    def frames(self, total: int, rate: float | None, start: float | None = None, end: float | None = None) -> list[int]:
        """Numbers of the frames that are shown, ascending, of a video of `total` frames at `rate` frames a second.

        start, end: seconds between which the frames lie; None: the ends of the video. At least one frame is shown.
        """
        import numpy as np

        first, last = 0, total - 1
        if rate:
            first = min(math.ceil((start or 0) * rate), last)
            last = last if end is None else max(first, min(math.floor(end * rate), last))
        count = min(last - first + 1, self.max_frames)
        if self.fps is not None and rate:
            count = min(count, int((last - first + 1) / rate * self.fps))
        count = max(count, 1)
        return [int(number) for number in np.linspace(first, last, count, dtype=int)]  # to the float as lmms-eval


@dataclass(frozen=True)
class Clip:
    """A video file, or the piece of it from `start` to `end` in seconds, and which of its frames are shown."""

    path: Path
    sampling: Sampling
    start: float | None = None
    end: float | None = None

    @cached_property
    def identity(self) -> str:
        """16 hex digits of the file and of what is shown of it. A file of more than 64 MiB counts by its size and 32
        blocks. Raises InputError when it cannot be read.
        """
        total = hashlib.sha256(f"{self.sampling} {self.start} {self.end}".encode())
        try:
            size = self.path.stat().st_size
            total.update(str(size).encode())
            with self.path.open("rb") as file:
                while size <= WHOLE and (block := file.read(BLOCK)):
                    total.update(block)
                for number in range(BLOCKS if size > WHOLE else 0):
                    file.seek((size - BLOCK) * number // (BLOCKS - 1))
                    total.update(file.read(BLOCK))
        except OSError as error:
            raise InputError(f"video '{self.path}' cannot be read: {error.strerror}") from error
        return total.hexdigest()[:16]

    @cached_property
    def shown(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The frames, (frames, height, width, 3) bytes, and where they are from, in the words of transformers' video
        processors. Raises InputError when the file cannot be decoded, or PyAV is not installed.
        """
        check_installed()
        try:
            return _decode(self)
        except InputError:
            raise
        except Exception as error:  # decoders raise of their own, OSError, ValueError and more for damaged files
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"video '{self.path}' cannot be decoded: {type(error).__name__}: {reason}") from error

    def images(self) -> list[Image]:
        """The frames as images, for models that take no videos."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.shown[0]]


def takes_videos(processor: Any) -> bool:
    """Whether the model has a way of its own for videos; others get the frames as images."""
    return getattr(processor, "video_processor", None) is not None and bool(getattr(processor, "video_token", None))


def as_videos(clips: Sequence[Clip]) -> dict[str, Any]:
    """What a processor is told of the videos of its prompts, decoded; nothing where there are none."""
    if not clips:
        return {}
    return {
        "videos": [clip.shown[0] for clip in clips],
        "video_metadata": [dict(clip.shown[1]) for clip in clips],
        "do_sample_frames": False,  # they are chosen
    }


def check_installed() -> None:
    """Raise InputError, naming the way to install it, where PyAV is missing."""
    if find_spec("av") is None:
        raise InputError(INSTALL)


def _decode(clip: Clip) -> tuple[np.ndarray, dict[str, Any]]:
    import av

    container: Any = av.open(os.fspath(clip.path))
    with container:
        if not container.streams.video:
            raise InputError(f"'{clip.path}' holds no video")
        return _frames(container, clip)


def _frames(container: Any, clip: Clip) -> tuple[np.ndarray, dict[str, Any]]:
    """The chosen frames, uint8 (frames, height, width, 3), and where they stood in the video."""
    import numpy as np

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate) if stream.average_rate else None
    # Containers such as Matroska do not say how many frames they hold; then packets are counted, not decoded.
    total = said = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    while total:
        wanted = clip.sampling.frames(total, rate, clip.start, clip.end)
        container.seek(0)
        found, decoded = _pick(container.decode(stream), wanted)
        if len(found) == len(wanted):
            return np.stack(found), _origin(total, rate, wanted, *found[0].shape)
        # Many whole files say a few frames more than they have. Where more than a second is missing, one is broken.
        if said - decoded > (rate or 1):
            raise InputError(f"video '{clip.path}' is not whole: {decoded} of its {said} frames are there")
        total = decoded
    raise InputError(f"video '{clip.path}' has no frames")


def _pick(frames: Iterable[VideoFrame], wanted: Sequence[int]) -> tuple[list[np.ndarray], int]:
    """The wanted frames as far as they are there, and how many frames were seen."""
    found, seen, numbers = [], 0, set(wanted)
    for number, frame in enumerate(frames):
        seen = number + 1
        if number in numbers:
            found.append(frame.to_ndarray(format="rgb24"))
        if number >= wanted[-1]:
            break
    return found, seen


def _origin(total: int, rate: float | None, wanted: Sequence[int], height: int, width: int, _: int) -> dict[str, Any]:
    return {
        "total_num_frames": total,
        "fps": rate,
        "duration": total / rate if rate else None,
        "frames_indices": list(wanted),
        "height": height,
        "width": width,
        "video_backend": "pyav",
    }
