"""Prompts to train on: a registered source, or a JSONL file with image paths. Answers are never needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from prunekit import plugins
from prunekit.errors import InputError, UnknownName
from prunekit.image_files import read_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One prompt: its images and the question."""

    images: tuple[Image, ...]
    prompt: str


class Source(Protocol):
    """Samples by number; the same number always gives the same sample.

    digest: names the content, so that a training does not go on with other data.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class JsonLines:
    """A file whose lines are {"image": path or list of paths, "prompt": text}; paths are relative to its folder."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read '{path}': {error.strerror}") from error
        self.path, self.digest = path, hashlib.sha256(content).hexdigest()[:16]
        lines = content.decode("utf-8", errors="replace").splitlines()
        self.rows = [self._row(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not self.rows:
            raise InputError(f"'{path}' holds no prompts")

    def _row(self, number: int, line: str) -> tuple[tuple[Path, ...], str]:
        try:
            data = json.loads(line)
            images = [data["image"]] if isinstance(data["image"], str) else list(data["image"])
            paths = tuple(self.path.parent / image for image in images)
            if not isinstance(data["prompt"], str) or not data["prompt"].strip() or not paths:
                raise ValueError("empty")
        except (ValueError, KeyError, TypeError) as error:
            hint = '{"image": "cat.png", "prompt": "Is there a cat?"}'
            raise InputError(f"{self.path}:{number}: is not a prompt with an image (write {hint})") from error
        return paths, data["prompt"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        paths, prompt = self.rows[index]
        return Sample(tuple(read_image(path, f", named in '{self.path}'") for path in paths), prompt)


def source(name: str) -> Source:
    """The data of this name, or the JSONL file at this path. Raises InputError, UnknownName."""
    registry = plugins.registry()
    names = tuple(entry.name for entry in registry.sources())
    if name in names:
        data: Source = registry.get_source(name)()
        return data
    if Path(name).exists() or name.endswith((".jsonl", ".json")) or "/" in name:
        return JsonLines(Path(name))
    raise UnknownName("data", name, (*names, "a .jsonl file"))


def order(total: int, seed: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, each permutation complete before the next begins."""
    numbers: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(numbers) < count:
        numbers += torch.randperm(total, generator=generator)[: count - len(numbers)].tolist()
    return numbers


def encode(processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Model inputs of a batch, padded on the left, each prompt in the model's chat template.

    Raises InputError when the model brings no chat template, or a prompt holds its image placeholder.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError("the model brings no chat template, so its prompt format is not known")
    placeholder = getattr(processor, "image_token", None)
    texts = []
    for sample in samples:
        if placeholder and placeholder in sample.prompt:
            raise InputError(
                f"a prompt holds '{placeholder}', which stands for an image: {sample.prompt!r} (leave it out: images "
                "come before the text)"
            )
        content = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.prompt}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    tokenizer = processor.tokenizer
    begin = getattr(tokenizer, "bos_token", None)
    before = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        return dict(
            processor(
                text=texts, images=[list(sample.images) for sample in samples], return_tensors="pt", padding=True,
                add_special_tokens=not (begin and all(text.startswith(begin) for text in texts)),
            )
        )  # fmt: skip
    finally:
        tokenizer.padding_side = before
