"""What hooks may ask for at a site inside the vision tower: the visual tokens of each picture as they stand there.

Inside the tower every picture is a sample of its own: `generate` encodes pictures before anything says in which row of
the prompt each will stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import leftmost
from prunekit.errors import Unsupported
from prunekit.pipeline.stage import Cut
from prunekit.strategy.inputs import OF_TOWER, requests

if TYPE_CHECKING:
    from prunekit.engine.tower.run import TowerRun

@dataclass(frozen=True)
class TowerView:
    """The visual tokens that reach one cut in the tower. B counts pictures, V is without tokens that have no patch.

    states: float (R, T, W), those of the tower's tokens at the site. left: bool (B, all visual tokens of a picture).
    counts: of each picture, how many are left. count: how many to leave, None if the stage takes no `keep`.
    """

    run: TowerRun
    place: Cut
    states: Tensor
    left: Tensor
    counts: tuple[int, ...]
    count: tuple[int, ...] | None

    @property
    def state(self) -> dict[Any, Any]:
        return self.run.stage_states.setdefault(self.place.stage.index, {})

    @property
    def cut(self) -> int:
        return self.place.number

    @cached_property
    def ordinals(self) -> Tensor:
        """Their numbers among the visual tokens of their picture, int64 (B, V), meaningless on padding."""
        return leftmost(self.left, max(self.counts))

    @cached_property
    def valid(self) -> Tensor:
        columns = torch.arange(self.ordinals.shape[1], device=self.ordinals.device)
        return columns < torch.tensor(self.counts, device=self.ordinals.device)[:, None]

    def pick(self, x: Tensor, padding: float = 0) -> Tensor:
        """Of a table of all visual tokens (B, all, ...) those that are left, (B, V, ...)."""
        ordinals, valid = self.ordinals.to(x.device), self.valid.to(x.device)
        shape = (*ordinals.shape, *[1] * (x.ndim - 2))
        found = x.gather(1, ordinals.view(shape).expand(*ordinals.shape, *x.shape[2:]))
        return found.masked_fill(~valid.view(shape), padding)

    @cached_property
    def hidden(self) -> Tensor:
        states = self.states
        if not self.place.stage.trainable:
            states = states.detach()
        return self.pick(self.run.units.mean(states))

    @cached_property
    def places(self) -> Tensor:
        """Number of the picture in its own prompt, unknown here and 0; then as `Modality.coords`: int64 (B, V, 6)."""
        tables = self.run.places
        table = torch.full((len(tables), self.left.shape[1], 6), -1, dtype=torch.int64, device=self.left.device)
        for number, found in enumerate(tables):
            table[number, : len(found), 0], table[number, : len(found), 1:] = 0, found.to(table.device)
        return self.pick(table, -1)

    @property
    def coords(self) -> Tensor:
        return self.places[..., [0, 2, 3, 4, 5]]

    @property
    def frames(self) -> Tensor:
        return self.places[..., 1]

    @cached_property
    def sizes(self) -> Tensor:
        return self.pick(self.run.sizes, 1)

    @property
    def seed(self) -> tuple[int, ...]:
        return self.run.seeds

    def of_sample(self, name: str, b: int) -> Any:
        """Input `name` of picture b: unpadded, without the batch axis; `state` is a dict of the picture's own."""
        value = getattr(self, name)
        if name == "state":
            return value.setdefault(b, {})
        if value is None or name == "cut":
            return value
        if name in ("count", "seed"):
            return value[b]
        if isinstance(value, tuple):
            return tuple(one[b, : self.counts[b]] for one in value)
        return value[b, : self.counts[b]]

    def __getattr__(self, name: str) -> Any:
        """An input of the tower, as the stage's strategy declares it."""
        if name not in OF_TOWER:
            raise Unsupported(f"{name} is not there at '{self.place.site}': inside the tower there is no prompt yet")
        declared = requests(self.place.stage.inputs, name)
        found = tuple(self._input(spec) for spec in declared)
        several = isinstance(self.place.stage.inputs.get(name), tuple)
        return found if several else found[0]

    def _input(self, spec: Any) -> Tensor:
        found = self.run.table(self.run.plan.resolve(spec, self.place.site))
        return found if getattr(spec, "of", "patches") == "cls" else self.pick(found)
