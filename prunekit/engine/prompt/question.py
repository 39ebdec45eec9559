"""The user's words in a prompt: its text without the chat template, system prompt and earlier turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunekit.errors import Unsupported

# Stand for what a user and the model say; no template holds them, and every tokenizer gives them back.
_FIRST, _ANSWER, _SECOND = "qzqwords", "qzqanswer", "qzqmore"


@dataclass(frozen=True)
class _Template:
    """What a chat template writes around a user's words, without special tokens: before, behind, between two turns."""

    head: str
    tail: str
    between: str


def questions(processor: Any, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """The user's words of each row of text token ids, without padding and visual tokens; of several turns the last.

    A prompt that was not written by the processor's chat template counts as the user's words as a whole.
    processor: a processor or a tokenizer. Raises Unsupported for something else.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(getattr(tokenizer, "decode", None)):
        raise Unsupported(
            f"a stage asks for `question`, but {type(processor).__name__} cannot decode token ids; give the model's "
            "processor: apply(model, pipeline, processor=processor)"
        )
    template = _template(processor, tokenizer)
    return tuple(_words(tokenizer.decode(list(ids), skip_special_tokens=True), template) for ids in rows)


def _words(text: str, template: _Template | None) -> str:
    if template is None:
        return text.strip()
    end = _ends_with(text, template.tail)
    text = text if end is None else text[:end]
    if template.between.strip() and template.between in text:
        return text.rpartition(template.between)[2].strip()
    start = _starts_with(text, template.head)
    return text[start or 0 :].strip()


def _template(processor: Any, tokenizer: Any) -> _Template | None:
    """The processor's template, rendered around words that we know; None without one."""
    if not getattr(processor, "chat_template", None):
        return None
    turns = [_turn("user", _FIRST), _turn("assistant", _ANSWER), _turn("user", _SECOND)]
    write = partial(processor.apply_chat_template, add_generation_prompt=True, tokenize=False)
    one = _plain(write(turns[:1]), processor, tokenizer)
    try:
        several = _plain(write(turns), processor, tokenizer)
    except Exception:  # a template may refuse several turns in its own way
        several = ""
    head, _, tail = one.partition(_FIRST)
    between = several.partition(_ANSWER)[2].partition(_SECOND)[0]
    return _Template(head, tail, between)


def _turn(role: str, text: str) -> dict[str, Any]:
    image = [{"type": "image"}] if text == _FIRST else []
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}


def _plain(rendered: str, processor: Any, tokenizer: Any) -> str:
    """What a rendered prompt decodes to: special tokens and image placeholders are gone."""
    placeholder = getattr(processor, "image_token", None)
    rendered = rendered.replace(placeholder, "") if placeholder else rendered
    text: str = tokenizer.decode(tokenizer.encode(rendered, add_special_tokens=False), skip_special_tokens=True)
    return text


def _starts_with(text: str, head: str) -> int | None:
    """Where `text` goes on behind `head`, blanks apart; None: it does not begin so."""
    match = re.match(_pattern(head), text)
    return match.end() if match else None


def _ends_with(text: str, tail: str) -> int | None:
    """Where `tail` begins at the end of `text`, blanks apart; None: it does not end so."""
    match = re.search(_pattern(tail) + r"\Z", text)
    return match.start() if match else None


def _pattern(text: str) -> str:
    """The words of `text` in order, with any blanks around them."""
    return r"\s*" + r"\s*".join(map(re.escape, text.split())) + r"\s*"
