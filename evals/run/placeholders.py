"""What stands for an image in a prompt, such as `<image>`, and what becomes of it where a question has it as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def placeholders(processor: Any) -> tuple[str, ...]:
    """All special words of a processor for what it shows, the longest first: `<image>`, `<|video_pad|>` and the like.

    Processors keep each as an attribute whose name ends with `_token`.
    """
    named = ((name, getattr(value, "content", value)) for name, value in vars(processor).items())
    found = {word for name, word in named if name.endswith("_token") and isinstance(word, str) and len(word) > 1}
    return tuple(sorted(found, key=lambda word: (-len(word), word)))


def as_text(text: str, processor: Any) -> str:
    """The text with a space behind the first letter of each placeholder: `< image>` is read as text."""
    for word in placeholders(processor):
        text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def texts_only(messages: Iterable[Mapping[str, Any]], processor: Any) -> list[dict[str, Any]]:
    """The messages with `as_text` in their text parts: only image parts stand for images."""
    return [
        {**message, "content": [
            {**part, "text": as_text(part["text"], processor)} if part["type"] == "text" else part
            for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip


def holds(doc: Any, word: str) -> bool:
    """Whether a row of data has the word in any text of it."""
    if isinstance(doc, str):
        return word in doc
    if isinstance(doc, Mapping):
        return any(holds(one, word) for one in doc.values())
    return isinstance(doc, Sequence) and not isinstance(doc, bytes) and any(holds(one, word) for one in doc)
