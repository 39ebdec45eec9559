"""Inputs of token hooks, drawn at random at the widths of LLaVA-1.5-7B: a selection without a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from prunekit_evals.bench import llava_7b
from torch import Tensor

from prunekit.pipeline.stage import Stage
from prunekit.strategy import inputs as table
from prunekit.strategy.decoder_requests import Keys, Rows, Values
from prunekit.strategy.sites import ENCODER, Site
from prunekit.strategy.tower_requests import EncoderRows

# Letters of the table of inputs, but for V: hidden and head of the decoder, width and head of the tower, text, a CLS
# token, axes of rotary positions with cosines and sines, and of the pixels of a visual token: frames, colours, rows and
# columns.
HEADS, HEAD, TOWER_HEADS, TOWER_HEAD = 32, 128, 16, 64
SIZES: Mapping[str, int] = {
    "B": 1, "H": HEADS * HEAD, "W": TOWER_HEADS * TOWER_HEAD, "T": 64, "E": 1, "P": 1, "R": 2 * HEAD, "F": 2, "C": 3,
    "Y": 28, "X": 28,
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """What the engine's views give, for one sample with an image of `side` squared tokens.

    stage: what is asked. video: frames, each of that side. count: tokens to leave. Raises LookupError for an input that
    only a model has.
    """

    stage: Stage
    side: int
    count: int | None
    video: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.side**2 * self.video

    @property
    def counts(self) -> tuple[int, ...]:
        """The same for each sample."""
        return (self.tokens,)

    @property
    def valid(self) -> Tensor:
        """No padding."""
        return torch.ones(1, self.tokens, dtype=torch.bool)

    @property
    def sizes(self) -> Tensor:
        """Nothing was merged before."""
        return torch.ones(1, self.tokens)

    @cached_property
    def site(self) -> Site:
        """The first of the sites that it takes by itself."""
        placed = self.stage.placements(32, 23)
        return placed[0][0] if placed else ENCODER

    @cached_property
    def _known(self) -> dict[str, Any]:
        return {}

    def get(self, name: str) -> Any:
        """An input of the whole batch; drawn once."""
        if name not in self._known:
            self._known[name] = self._made(name)
        return self._known[name]

    def of_sample(self, name: str, b: int) -> Any:
        """An input of one sample."""
        lengths = {"V": self.tokens, "T": SIZES["T"], "E": 1, "S": self.tokens + SIZES["T"]}
        value = self.get(name)
        if isinstance(value, tuple) and name in table.REQUESTS:
            return tuple(one[b] for one in value)
        return table.cut_for_sample(name, value, b, lengths)

    def _made(self, name: str) -> Any:
        plain: dict[str, Callable[[], Any]] = {
            "count": lambda: (self.count,), "seed": lambda: (self.seed,), "state": dict,
            "cut": lambda: 0, "sites": lambda: (self.site,), "question": lambda: ("What is in the image?",),
            "coords": self._coords, "places": lambda: self._coords()[..., 1:], "frames": self._frames,
            "videos": lambda: torch.full((1, self.tokens), self.video > 1), "shape": llava_7b.shape,
            "index": lambda: torch.arange(self.tokens)[None], "valid": lambda: self.valid, "sizes": lambda: self.sizes,
            "positions": lambda: torch.arange(self.tokens)[None, :, None],
            "cls_crops": lambda: torch.zeros(1, 1, 2, dtype=torch.int64),
            "text_valid": self._all_text, "text_after": lambda: self._all_text() & (torch.arange(SIZES["T"]) >= 8),
            "text_ids": lambda: torch.arange(SIZES["T"])[None], "norm": lambda: lambda states: states,
            "project": lambda: self._project, "extras_valid": lambda: torch.ones(1, 1, dtype=torch.bool),
        }  # fmt: skip
        if name in plain:
            return plain[name]()
        row = next(one for one in table.INPUTS if one.name == name and one.hooks != ("route",))
        if row.kind != "float":
            raise LookupError(f"'{name}' is what only a model gives")
        asked = table.requests(self.stage.inputs, name)
        drawn = tuple(self._float(row, request) for request in asked or (None,))
        return drawn if len(asked) > 1 else drawn[0]

    def _float(self, row: table.Input, request: Any) -> Tensor:
        shape = [self.tokens if letter == "V" else SIZES.get(letter, 0) for letter in row.axes.split()]
        if getattr(request, "of", "") == "cls":
            shape[1] = 1
        if isinstance(request, Keys | Values):
            shape[2:] = {"mean": [HEAD], "concat": [HEADS * HEAD]}.get(request.heads, [HEADS, HEAD])
        elif row.name in ("encoder_keys", "encoder_values", "encoder_queries"):
            shape[2:] = [TOWER_HEAD] if request.heads == "mean" else [TOWER_HEADS, TOWER_HEAD]
        elif isinstance(request, EncoderRows | Rows) and request.heads == "none":
            shape.append(TOWER_HEADS if isinstance(request, EncoderRows) else HEADS)
        elif getattr(request, "projected", False):
            shape[-1] = SIZES["H"]
        if isinstance(request, Rows) and request.over == "none":
            many = {"last": 1, "visual": self.tokens, "all": self.tokens + SIZES["T"]}
            shape.append(many.get(str(request.queries), SIZES["T"]))
        number = [one.name for one in table.INPUTS].index(row.name)
        generator = torch.Generator().manual_seed(self.seed + number)
        values = torch.randn(shape, generator=generator)
        return values.softmax(1) if isinstance(request, EncoderRows | Rows) else values

    def _coords(self) -> Tensor:
        """(1, V, 5): image, row, column, rows, columns."""
        place = torch.arange(self.side**2).repeat(self.video)
        side = torch.full_like(place, self.side)
        return torch.stack([torch.zeros_like(place), place // self.side, place % self.side, side, side], -1)[None]

    def _frames(self) -> Tensor:
        return torch.arange(self.video).repeat_interleave(self.side**2)[None]

    def _all_text(self) -> Tensor:
        return torch.ones(1, SIZES["T"], dtype=torch.bool)

    def _project(self, states: Tensor) -> Tensor:
        """As a projector of two layers maps single tokens; of which numbers is the same."""
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(states.shape[-1], SIZES["H"], generator=generator) / states.shape[-1] ** 0.5
        return states @ weight
