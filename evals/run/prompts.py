"""From lmms-eval's requests to prompts: what is asked, and with which images and videos."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit_evals.run.placeholders import texts_only

from prunekit.errors import InputError, Unsupported
from prunekit.image_files import read_image, upright
from prunekit.video_files import Clip, Sampling, takes_videos

if TYPE_CHECKING:
    from PIL.Image import Image

Message = dict[str, Any]
# What lmms-eval takes a file for; any other is a video.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}
AUDIO_SUFFIXES = {".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"}


@dataclass(frozen=True)
class Prompt:
    """One question in the model's own words: `text` with the placeholders, and the images and videos in order."""

    text: str
    images: tuple[Image, ...]
    videos: tuple[Clip, ...] = ()

    @property
    def shape(self) -> tuple[bool, tuple[int, ...]]:
        """Prompts of one shape may share a batch: whether it has images, and how many frames each video shows.

        Decodes the videos. Raises InputError for one that cannot be.
        """
        return bool(self.images), tuple(len(clip.shown[0]) for clip in self.videos)

    @property
    def is_visual(self) -> bool:
        """Whether it shows anything."""
        return bool(self.images or self.videos)

    def digest(self) -> str:
        """A hash of the words, the pixels of images, and the files of videos with what is shown of them."""
        return hashlib.sha256(f"{self.image_id} {self.text}".encode()).hexdigest()[:32]

    @cached_property
    def image_id(self) -> str | None:
        """16 hex digits of the images and videos: questions about the same ones share them. None without any."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        for clip in self.videos:
            total.update(clip.identity.encode())
        return total.hexdigest()[:16] if self.is_visual else None


def from_messages(
    asked: Sequence[Mapping[str, Any]], processor: Any, system_prompt: str, sampling: Sampling | None = None
) -> Prompt:
    """The prompt of a chat request: messages whose content lists `text`, `image` and `video` parts (under `url`).

    A system prompt takes the place of the task's own. A placeholder in a text is text. sampling: which frames of videos
    are shown; None: the default. A model that takes no videos gets their frames as images. Raises Unsupported for
    audio, InputError for a model without a chat template or one that leaves videos out, and for an image or a video
    that cannot be decoded.
    """
    images: list[Image] = []
    videos: list[Clip] = []
    messages: list[Message] = []
    for message in asked:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        shown = [one for part in parts for one in _part(part, images, videos, sampling or Sampling(), processor)]
        messages.append({"role": message["role"], "content": shown})
    if system_prompt:
        system = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
        messages = [system, *(message for message in messages if message["role"] != "system")]
    text = render(processor, texts_only(messages, processor))
    if videos and text.count(processor.video_token) != len(videos):
        raise InputError(f"the model's chat template does not write {processor.video_token!r} once for each video")
    return Prompt(text, tuple(images), tuple(videos))


def from_visuals(
    visuals: Sequence[Any], context: str, processor: Any, system_prompt: str, sampling: Sampling | None = None,
    own: bool = False,
) -> Prompt:  # fmt: skip
    """The prompt of a simple request. What it shows stands first, unless the task wrote an image placeholder for each.

    own: whether the data itself has the placeholder; it is text then.
    """
    pieces = [context] if own else context.split(placeholder(processor))
    parts: list[Message] = [{"type": _kind(visual), "url": visual} for visual in visuals]
    if parts and len(pieces) == len(parts) + 1:
        texts = [{"type": "text", "text": piece} for piece in pieces]
        mixed = [one for pair in zip(texts, [*parts, None], strict=True) for one in pair]
        parts = [one for one in mixed if one is not None and one.get("text") != ""]
    else:
        parts.append({"type": "text", "text": context})
    return from_messages([{"role": "user", "content": parts}], processor, system_prompt, sampling)


def placeholder(processor: Any) -> str:
    """What stands for an image in the text of a simple request."""
    return getattr(processor, "image_token", None) or "<image>"


def render(processor: Any, messages: Sequence[Message]) -> str:
    """The words that the model sees, up to where its answer begins."""
    if not getattr(processor, "chat_template", None):
        raise InputError("the model brings no chat template, so its prompt format is not known")
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _part(
    part: Mapping[str, Any], images: list[Image], videos: list[Clip], sampling: Sampling, processor: Any
) -> list[Message]:
    """A part as templates know it; what it shows goes into `images` or `videos`."""
    if part["type"] == "text":
        return [{"type": "text", "text": part["text"]}]
    source = part.get("url", part.get("image", part.get("video")))
    # Of files the name decides: lmms-eval takes every .webm for a sound.
    kind = part["type"] if part["type"] == "video" and not isinstance(source, Mapping) else _kind(source)
    if kind == "image":
        images.append(_image(source))
        return [{"type": "image"}]
    if kind != "video":
        raise Unsupported(f"the task has {kind} in a prompt; this version prunes images and videos only")
    clip = _clip(source, part, sampling)
    if takes_videos(processor):
        videos.append(clip)
        return [{"type": "video"}]
    frames = clip.images()
    images += frames
    return [{"type": "image"}] * len(frames)


def _kind(visual: Any) -> str:
    """`image`, `video` or `audio`, by the names of files as lmms-eval tells them apart."""
    if isinstance(visual, Mapping):
        return "audio" if "array" in visual else str(visual.get("type", "video"))
    if not isinstance(visual, str | Path):
        return "image"
    suffix = Path(visual).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else "video"


def _clip(source: Any, part: Mapping[str, Any], sampling: Sampling) -> Clip:
    """The video of a part: a path, or a mapping with the path and where in it the task's piece begins and ends."""
    piece: dict[str, Any] = {**part, **source} if isinstance(source, Mapping) else dict(part)
    path = piece.get("path") or piece.get("video") or piece.get("url") if isinstance(source, Mapping) else source
    if not isinstance(path, str | Path):
        raise Unsupported(f"the task shows {type(path).__name__} as a video; this version decodes video files only")
    start, end = (piece.get(f"video_{edge}", piece.get(f"{edge}_time")) for edge in ("start", "end"))
    return Clip(Path(path), sampling, *(None if edge is None else float(edge) for edge in (start, end)))


def _image(source: Any) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, str | Path):
        return read_image(source)
    raise Unsupported(f"the task shows {type(source).__name__} as an image; give a picture of PIL or a file")
