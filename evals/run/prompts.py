"""From lmms-eval's requests to prompts: what is asked, and with which images."""

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

if TYPE_CHECKING:
    from PIL.Image import Image

Message = dict[str, Any]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Prompt:
    """One question in the model's own words: `text` with the image placeholders, and the images in order."""

    text: str
    images: tuple[Image, ...]

    def digest(self) -> str:
        """A hash of the words and the pixels."""
        return hashlib.sha256(f"{self.image_id} {self.text}".encode()).hexdigest()[:32]

    @cached_property
    def image_id(self) -> str | None:
        """16 hex digits of the pixels: questions about the same images share them. None without an image."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return total.hexdigest()[:16] if self.images else None


def from_messages(asked: Sequence[Mapping[str, Any]], processor: Any, system_prompt: str) -> Prompt:
    """The prompt of a chat request: messages whose content lists `text` and `image` parts (the image under `url`).

    A system prompt takes the place of the task's own. A placeholder in a text is text. Raises Unsupported for video
    and audio, InputError for a model without a chat template.
    """
    images: list[Image] = []
    messages: list[Message] = []
    for message in asked:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({"role": message["role"], "content": [_part(part, images) for part in parts]})
    if system_prompt:
        system = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
        messages = [system, *(message for message in messages if message["role"] != "system")]
    return Prompt(render(processor, texts_only(messages, processor)), tuple(images))


def from_visuals(
    visuals: Sequence[Any], context: str, processor: Any, system_prompt: str, own: bool = False
) -> Prompt:
    """The prompt of a simple request. Images stand first, unless the task wrote one placeholder for each of them.

    own: whether the data itself has the placeholder; it is text then.
    """
    pieces = [context] if own else context.split(placeholder(processor))
    parts: list[Message] = [{"type": "image", "url": visual} for visual in visuals]
    if parts and len(pieces) == len(parts) + 1:
        texts = [{"type": "text", "text": piece} for piece in pieces]
        mixed = [one for pair in zip(texts, [*parts, None], strict=True) for one in pair]
        parts = [one for one in mixed if one is not None and one.get("text") != ""]
    else:
        parts.append({"type": "text", "text": context})
    return from_messages([{"role": "user", "content": parts}], processor, system_prompt)


def placeholder(processor: Any) -> str:
    """What stands for an image in the text of a simple request."""
    return getattr(processor, "image_token", None) or "<image>"


def render(processor: Any, messages: Sequence[Message]) -> str:
    """The words that the model sees, up to where its answer begins."""
    if not getattr(processor, "chat_template", None):
        raise InputError("the model brings no chat template, so its prompt format is not known")
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _part(part: Mapping[str, Any], images: list[Image]) -> Message:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        images.append(_image(part.get("url", part.get("image"))))
        return {"type": "image"}
    raise Unsupported(f"the task shows a {kind}; this version prunes images only")


def _image(source: Any) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, str | Path) and Path(source).suffix.lower() in IMAGE_SUFFIXES:
        return read_image(source)
    raise Unsupported(f"the task shows {str(source)[:60]!r}; this version prunes images only")
