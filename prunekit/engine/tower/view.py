"""What hooks may ask for before and inside the vision tower: the visual tokens of each input as they stand there.

Before the decoder input every image or video is a sample of its own: `generate` encodes them before anything says in
which row of the prompt each will stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import blank, leftmost, take
from prunekit.engine.tower.encoding import Encoding
from prunekit.engine.tower.record import of_declared, row_of_declared
from prunekit.errors import Unsupported
from prunekit.families.images import cells
from prunekit.pipeline.cut import Cut
from prunekit.strategy.inputs import OF_TOWER, TOKEN_HOOKS, cut_for_sample, inputs_of, region_of
from prunekit.strategy.sites import Site
from prunekit.strategy.tower_requests import EncoderSpec

# The parts of the way of the data in which each input exists.
_REGIONS = {one.name: one.regions for hook in TOKEN_HOOKS for one in inputs_of(hook)}


@dataclass(frozen=True)
class ImageView:
    """What a stage may ask for that makes images smaller."""

    encoding: Encoding

    def get(self, name: str) -> Any:
        """The input of the hook with this name."""
        if name == "seed":
            return self.encoding.seeds
        return tuple(image.detach().clone() for image in self.encoding.images)


@dataclass(frozen=True)
class TowerView:
    """The visual tokens that reach one cut at `pixels` or in the tower. B counts images and videos, V is without tokens
    that have no patch.

    states: float (R, T, W), those of the tower's tokens at the site; empty at `pixels`. present: bool (B, all visual
    tokens of an input).
    counts: of each input, how many remain. count: how many to keep, None if the stage takes no `keep`.
    """

    encoding: Encoding
    place: Cut
    states: Tensor
    present: Tensor
    counts: tuple[int, ...]
    count: tuple[int, ...] | None

    @property
    def state(self) -> dict[Any, Any]:
        return self.encoding.stage_states.setdefault(self.place.stage.index, {})

    @property
    def cut(self) -> int:
        return self.place.number

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.place.sites

    @cached_property
    def ordinals(self) -> Tensor:
        """Their numbers among the visual tokens of their input, int64 (B, V), meaningless on padding."""
        return leftmost(self.present, max(self.counts))

    @cached_property
    def valid(self) -> Tensor:
        columns = torch.arange(self.ordinals.shape[1], device=self.ordinals.device)
        return columns < torch.tensor(self.counts, device=self.ordinals.device)[:, None]

    def pick(self, x: Tensor, padding: float = 0) -> Tensor:
        """Of a table of all visual tokens (B, all, ...) those that remain, (B, V, ...)."""
        return blank(take(x, self.ordinals, 1), self.valid, padding)

    @cached_property
    def hidden(self) -> Tensor:
        states = self.states if self.place.stage.trainable else self.states.detach()
        return self.pick(self.encoding.patches.mean(states))

    @property
    def patches(self) -> Tensor:
        encoding, holder = self.encoding, self.encoding.needs.tower.images
        assert holder is not None and holder.cell is not None, "checked when the pipeline was bound"
        squares = [cells(image.detach(), holder.cell) for image in encoding.images]
        table = torch.nn.utils.rnn.pad_sequence(squares, batch_first=True)
        return self.pick(table)

    @cached_property
    def coords(self) -> Tensor:
        """The number of the input is 0: its prompt is not known yet."""
        coords = self._table[..., :5].clone()
        coords[..., 0] = torch.where(self.valid, 0, -1)
        return coords

    @property
    def index(self) -> Tensor:
        """int64 (B, V), -1 on padding."""
        return self.ordinals.masked_fill(~self.valid, -1)

    @property
    def frames(self) -> Tensor:
        return self._table[..., 0]

    @property
    def videos(self) -> Tensor:
        return self.valid & (self.encoding.visual.modality.name == "video")

    @cached_property
    def cls_crops(self) -> Tensor:
        """The number of the input is 0."""
        rows = [torch.tensor([(0, crop) for crop in range(len(row))]) for row in self.encoding.patches.rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(self.valid.device)

    @property
    def places(self) -> Tensor:
        return self._table[..., 5:].clone()

    @cached_property
    def _table(self) -> Tensor:
        """As `VisualInputs.coords`, int64 (B, V, 9)."""
        tables = torch.nn.utils.rnn.pad_sequence(self.encoding.visual.coords, batch_first=True, padding_value=-1)
        return self.pick(tables.to(self.valid.device), -1)

    @property  # made anew each time: a hook may write to what it gets
    def sizes(self) -> Tensor:
        return self.pick(self.encoding.sizes, 1)

    @property
    def seed(self) -> tuple[int, ...]:
        return self.encoding.seeds

    @cached_property
    def _of_tower(self) -> dict[str, Any]:
        """Inputs that the stage's strategy declares, once each."""
        return {}

    def get(self, name: str) -> Any:
        """The input of hooks with this name. Raises Unsupported for those that need a prompt."""
        if region_of(self.place.site) not in _REGIONS[name]:
            raise Unsupported(f"{name} is not there at '{self.place.site}': inside the tower there is no prompt yet")
        if name == "valid":
            return self.valid.clone()  # a hook that writes to it harms nobody
        if name not in OF_TOWER:
            return getattr(self, name)
        if name not in self._of_tower:
            self._of_tower[name] = of_declared(self.place.stage.inputs, name, self._declared)
        return self._of_tower[name]

    def of_sample(self, name: str, b: int) -> Any:
        """Input `name` of image or video b: unpadded, without the batch axis; `state` is a dict of its own."""
        value, count = self.get(name), self.counts[b]
        if name in OF_TOWER:
            return row_of_declared(self.place.stage.inputs, name, value, b, count, len(self.encoding.patches.rows[b]))
        return cut_for_sample(name, value, b, {"V": count, "E": len(self.encoding.patches.rows[b])})

    def _declared(self, spec: EncoderSpec) -> Tensor:
        table = self.encoding.table(self.encoding.needs.resolve(spec, self.place.site))
        return table if getattr(spec, "of", "patches") == "cls" else self.pick(table)
