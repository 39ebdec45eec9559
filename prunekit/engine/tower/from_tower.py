"""The inputs of the vision tower as hooks get them at the decoder's door and in the decoder."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunekit.engine.tower.notes import encoder_input, per_row
from prunekit.strategy.inputs import requests
from prunekit.strategy.tower_requests import EncoderSpec, resolved

if TYPE_CHECKING:
    from prunekit.engine.prompt.prompt import Prompt
    from prunekit.families.base import Parts
    from prunekit.pipeline.stage import Cut


class FromTower:
    """A part of `View`: what was noted while the pictures of the prompt were encoded."""

    if TYPE_CHECKING:
        place: Cut

        @property
        def parts(self) -> Parts: ...
        @property
        def prompt(self) -> Prompt: ...
        @property
        def ordinals(self) -> Tensor: ...
        @property
        def valid(self) -> Tensor: ...

    @cached_property
    def encoder_attention(self) -> Any:
        return self._noted("encoder_attention")

    @cached_property
    def encoder_keys(self) -> Any:
        return self._noted("encoder_keys")

    @cached_property
    def encoder_values(self) -> Any:
        return self._noted("encoder_values")

    @cached_property
    def encoder_queries(self) -> Any:
        return self._noted("encoder_queries")

    @cached_property
    def features(self) -> Any:
        return self._noted("features")

    @property
    def extras(self) -> Tensor:
        return per_row(self.prompt, None)

    def _noted(self, name: str) -> Any:
        """One tensor for one declaration, a tuple for a tuple."""
        found = tuple(map(self._of_spec, requests(self.place.stage.inputs, name)))
        several = isinstance(self.place.stage.inputs.get(name), tuple)
        return found if several else found[0]

    def _of_spec(self, spec: EncoderSpec) -> Tensor:
        tower = self.parts.tower
        assert tower is not None, "checked by TowerPlan.of"
        known = resolved(spec, self.place.site, len(tower.layers), tower.feature_block)
        if getattr(spec, "of", "patches") == "cls":
            return per_row(self.prompt, known)
        table = encoder_input(self.prompt, known)
        ordinals, valid = self.ordinals.to(table.device), self.valid.to(table.device)
        shape = (*ordinals.shape, *[1] * (table.ndim - 2))
        found = table.gather(1, ordinals.view(shape).expand(*ordinals.shape, *table.shape[2:]))
        return found.masked_fill(~valid.view(shape), 0)
