"""The CLIP model that a vision tower was taken from: what `trim` and `cdpruner` compare patches and words in.

CLIP: https://arxiv.org/abs/2103.00020. Nothing is downloaded: its files lie in a folder, or in the Hub's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ModelShape, Unsupported, hookimpl


@dataclass(frozen=True)
class ClipPair:
    """norm, visual: from tower features (n, W) to the common space (n, D). text: the text tower; words: its projection.

    tokenize: from text to token ids without start and end. start, end: these ids. longest: of a text with them.
    """

    norm: nn.Module
    visual: nn.Linear
    text: nn.Module
    words: nn.Module
    tokenize: Callable[[str], list[int]]
    start: int
    end: int
    longest: int

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """Patches in the common space, float (n, D), from the features of a tower block (n, W). Not normalised.

        Raises Unsupported for features of another width.
        """
        width, mine = self.visual.weight.shape[1], features.shape[-1]
        if mine != width:
            raise Unsupported(f"clip: its vision tower is {width} wide, this model's {mine}; name its own pair")
        projected: Tensor = self.visual(self.norm(features.to(self.visual.weight)))
        return projected

    @torch.no_grad()
    def segments(self, text: str) -> Tensor:
        """A text in the common space, one row for each run of as many tokens as the tower takes: (segments, D)."""
        ids, room = self.tokenize(text), self.longest - 2
        runs = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
        device = self.visual.weight.device
        pooled = [
            self.text(input_ids=torch.tensor([[self.start, *run, self.end]], device=device)).pooler_output
            for run in runs
        ]
        projected: Tensor = self.words(torch.cat(pooled))
        return projected


def folder_of(clip: Path | str) -> Path:
    """Where the files of `clip`, a folder or a hub id, lie. Raises ValueError, beginning with the option's name."""
    from transformers.utils import cached_file

    if isinstance(clip, Path):
        if not (clip / "config.json").is_file():
            raise ValueError(f"clip: '{clip}' is no folder of a CLIP model: there is no config.json")
        return clip
    try:
        return Path(cached_file(clip, "config.json", local_files_only=True)).parent
    except OSError as error:
        raise ValueError(
            f"clip: '{clip}' is neither a folder nor a model in this machine's Hub cache; nothing is downloaded"
        ) from error


def files_of(clip: Path | str) -> list[Path]:
    """The files that decide what it computes. Raises ValueError where its weights are missing."""
    folder = folder_of(clip)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"clip: there are no weights (*.safetensors) in '{folder}'")
    return [folder / "config.json", *weights, *(path for path in sorted(folder.glob("*.json")) if "token" in path.name)]


def _config(clip: Path | str) -> Any:
    """Of the CLIP model. Raises ValueError for files that are none."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder_of(clip), local_files_only=True)
    except OSError as error:
        raise ValueError(f"clip: the config.json of '{clip}' cannot be read: {error}") from error
    if config.model_type != "clip":
        raise ValueError(f"clip: '{clip}' is a {config.model_type}, not a complete CLIP model with its text tower")
    return config


def check_pair(clip: Path | str, shape: ModelShape) -> None:
    """Raise ValueError for what is no CLIP model, or whose vision tower cannot be that of the model."""
    vision, tower = _config(clip).vision_config, shape.tower
    theirs = (vision.num_hidden_layers, vision.hidden_size, 1)
    if tower is None or (tower.blocks, tower.width, tower.leading) != theirs:
        wanted = f"{vision.num_hidden_layers} blocks of width {vision.hidden_size} and a CLS token"
        has = "no tower that can be read" if tower is None else f"{tower.blocks} blocks of width {tower.width}"
        without = " without one" if tower and not tower.leading else ""
        raise ValueError(
            f"clip: its vision tower has {wanted}, this model {has}{without}; name the CLIP model that the tower was "
            "taken from"
        )


@functools.lru_cache(maxsize=2)
def load(clip: Path | str, dtype: torch.dtype, device: torch.device) -> ClipPair:
    """What is needed of the model, in this dtype. Raises ValueError where files are missing."""
    from transformers import AutoTokenizer, CLIPModel

    folder = files_of(clip)[0].parent
    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=dtype, attn_implementation="eager")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = model.eval().requires_grad_(False)
    return ClipPair(
        model.vision_model.post_layernorm.to(device), model.visual_projection.to(device),
        model.text_model.to(device), model.text_projection.to(device),
        lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.text_config.max_position_embeddings,
    )  # fmt: skip


def text_flops(clip: Path | str, tokens: int) -> int:
    """What the text tower costs for so many tokens."""
    config = _config(clip).text_config
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return 2 * tokens * config.num_hidden_layers * (layer + 2 * config.hidden_size * tokens)


@dataclass(frozen=True)
class Paired:
    """What strategies share that read the question with this text tower.

    clip: the CLIP model that the vision tower was taken from: a folder, or a hub id in this machine's cache, such as
    openai/clip-vit-large-patch14-336 for LLaVA-1.5.
    """

    clip: Path | str

    @hookimpl
    def files(self) -> Sequence[Path]:
        """The CLIP model's."""
        return files_of(self.clip)

    @hookimpl
    def check(self, shape: ModelShape) -> None:
        """Raise ValueError, `clip: ...`, for a CLIP model that the tower was not taken from."""
        check_pair(self.clip, shape)

    def _pair(self, like: Tensor) -> ClipPair:
        """The model, in the dtype and on the device of a tensor."""
        return load(self.clip, like.dtype, like.device)

    def _text_flops(self, tokens: int) -> int:
        """What the text tower costs for so many tokens."""
        return text_flops(self.clip, tokens)
