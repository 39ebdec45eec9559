"""What hooks may ask for, computed when asked: the visual tokens of a prompt batch as they stand at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.engine.decoder import aside
from prunekit.engine.decoder.forward import Forward
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.readings import Readings, Run, taken
from prunekit.engine.decoder.site_tokens import SiteTokens
from prunekit.engine.prompt.prompt import Prompt
from prunekit.engine.prompt.question import questions
from prunekit.engine.tokens.layout import blank, take
from prunekit.engine.tokens.streams import main_stream
from prunekit.engine.tower import record
from prunekit.families.base import Parts
from prunekit.pipeline.cut import Cut
from prunekit.strategy import decoder_requests
from prunekit.strategy import inputs as table
from prunekit.strategy.decisions import ModelShape
from prunekit.strategy.sites import Site


@dataclass(frozen=True, repr=False)
class View:
    """The visual tokens that reach one stage. Its properties named in the hook specifications are the inputs of hooks.

    What hooks get is theirs: writing to it changes nothing of the model.
    tokens: those that reach the site. hidden_states: float (B, K, H), physical, as they enter it; of several streams,
    (B, K, streams, H). count: how many
    visual tokens to leave, None if the stage takes no `keep`.
    """

    readings: Readings
    here: Here
    place: Cut
    tokens: SiteTokens
    hidden_states: Tensor
    count: tuple[int, ...] | None

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens of each row."""
        return self.tokens.counts

    @property
    def parts(self) -> Parts:
        return self.tokens.state.parts

    @property
    def prompt(self) -> Prompt:
        return self.tokens.state.prompt

    @property
    def shape(self) -> ModelShape:
        return self.tokens.state.bound.shape

    @property
    def state(self) -> dict[Any, Any]:
        return self.tokens.state.stage_states.setdefault(self.place.stage.index, {})

    @property
    def cut(self) -> int:
        return self.place.number

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.place.sites

    @property
    def ordinals(self) -> Tensor:
        return self.tokens.ordinals

    @property
    def valid(self) -> Tensor:
        return self.tokens.valid.clone()

    @cached_property
    def hidden(self) -> Tensor:
        return taken(self._main(self.hidden_states), self.tokens.slots, self.tokens.valid)

    @cached_property
    def previous_hidden(self) -> Tensor:
        number = decoder_requests.layer_before(self.place.site, self.tokens.state.bound.shape.layers)
        assert number is not None, "checked by Needs.of"
        run = self.readings.runs[number]
        columns = self.readings.columns(run, self.tokens.positions)
        return taken(self._main(run.hidden), columns, self.tokens.valid)

    def _main(self, states: Tensor) -> Tensor:
        """Of hidden states of several streams, the one that strategies see."""
        return self._attached(main_stream(states, self.parts.stream))

    def _attached(self, states: Tensor) -> Tensor:
        return states if self.place.stage.trainable else states.detach()

    @cached_property
    def _coords(self) -> Tensor:
        """As `Prompt.coords`, of the tokens that reach the site: int64 (B, V, 10)."""
        return blank(take(self.prompt.coords, self.tokens.ordinals, 1), self.tokens.valid, -1)

    @property
    def coords(self) -> Tensor:
        return self._coords[..., [0, 2, 3, 4, 5]]

    @property
    def frames(self) -> Tensor:
        return self._coords[..., 1].clone()

    @property
    def places(self) -> Tensor:
        return self._coords[..., 6:].clone()

    @property
    def videos(self) -> Tensor:
        return blank(take(self.prompt.videos, self.tokens.ordinals, 1), self.tokens.valid, False)

    @property
    def sizes(self) -> Tensor:
        return self.tokens.sizes.clone()

    @cached_property
    def attention(self) -> Any:
        return self._declared("attention", self._rows)

    @cached_property
    def keys(self) -> Any:
        return self._declared("keys", lambda spec: self._keys(spec, self.tokens.positions, self.tokens.valid))

    @cached_property
    def values(self) -> Any:
        return self._declared("values", lambda spec: self._keys(spec, self.tokens.positions, self.tokens.valid))

    @cached_property
    def text_keys(self) -> Any:
        positions, valid = self.tokens.text_positions, self.tokens.text_valid
        return self._declared("text_keys", lambda spec: self._keys(spec, positions, valid))

    @cached_property
    def text_values(self) -> Any:
        positions, valid = self.tokens.text_positions, self.tokens.text_valid
        return self._declared("text_values", lambda spec: self._keys(spec, positions, valid))

    def _declared(self, name: str, make: Callable[[Any], Tensor | None]) -> Any:
        """One tensor for one declaration, a tuple for a tuple."""
        declared = table.request(self.place.stage.inputs, name)
        return tuple(map(make, declared)) if isinstance(declared, tuple) else make(declared)

    def _rows(self, spec: decoder_requests.Rows) -> Tensor | None:
        if decoder_requests.layer_of(spec.layer, self.place.site, self.shape.layers) is None:
            return None
        return self.readings.rows(*self._attended(spec), spec, self.tokens)

    def _attended(self, spec: decoder_requests.Spec) -> tuple[Attended, Run]:
        calls, key = self._calls, decoder_requests.layer_and_rope(spec)
        if key not in calls:
            calls[key] = self.readings.attended(spec, self.here, self.place, self.hidden_states)
        return calls[key]

    @cached_property
    def _calls(self) -> dict[Any, tuple[Attended, Run]]:
        """Calls of layers that were read for this stage: several inputs may read the same one."""
        return {}

    def _keys(self, spec: decoder_requests.Keys | decoder_requests.Values, positions: Tensor, valid: Tensor) -> Tensor:
        states, run = self._attended(spec)
        columns = self.readings.columns(run, positions)
        return blank(decoder_rows.keys(states, columns.to(states.key.device), spec), valid)

    @property
    def text_valid(self) -> Tensor:
        return self.tokens.text_valid.clone()

    @cached_property
    def text_after(self) -> Tensor:
        return self.tokens.state.text_after.gather(1, self.tokens.text_positions)

    @cached_property
    def text(self) -> Tensor:
        embeds = self.readings.embeds
        assert embeds is not None, "kept if Needs.embeds"
        return taken(self._attached(embeds), self.tokens.text_positions, self.tokens.text_valid)

    @cached_property
    def text_hidden(self) -> Tensor:
        return taken(self._main(self.hidden_states), self.tokens.text_slots, self.tokens.text_valid)

    @property
    def project(self) -> Callable[[Tensor], Tensor]:
        tower = self.parts.tower
        assert tower is not None, "checked when the pipeline was bound"

        def project(states: Tensor) -> Tensor:
            made = tower.project(states.reshape(-1, states.shape[-1]))
            return made.view(*states.shape[:-1], made.shape[-1])

        return project

    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        module: Callable[[Tensor], Tensor] = self.parts.final_norm
        return module

    @cached_property
    def forward(self) -> Forward:
        return Forward(self.readings, self.here, self.place, self.tokens, self.hidden_states)

    @property
    def seed(self) -> tuple[int, ...]:
        return self.prompt.seeds

    @property
    def extras(self) -> Tensor:
        return record.extras(self.prompt)

    @property
    def extras_valid(self) -> Tensor:
        crops = torch.tensor(record.crops(self.prompt), device=self.tokens.slots.device)
        return torch.arange(int(crops.max()), device=crops.device) < crops[:, None]

    @property
    def cls_crops(self) -> Tensor:
        return record.crop_numbers(self.prompt).to(self.tokens.slots.device)

    @property
    def index(self) -> Tensor:
        return self.tokens.ordinals.masked_fill(~self.tokens.valid, -1)

    @cached_property
    def positions(self) -> Tensor:
        axes = [take(axis, self.tokens.positions, 1) for axis in self.here.forward_pass.rotations.ids]
        return blank(torch.stack(axes, dim=-1), self.tokens.valid, -1)

    @cached_property
    def rotary(self) -> Tensor:
        turns = aside.turns(self.here)
        axes = [take(axis, self.tokens.positions, 1) for axis in turns]
        return blank(torch.stack(axes, dim=2), self.tokens.valid)

    @property
    def text_ids(self) -> Tensor:
        return self.prompt.ids.gather(1, self.tokens.text_positions).masked_fill(~self.tokens.text_valid, -1)

    @cached_property
    def question(self) -> tuple[str, ...]:
        rows = zip(self.text_ids.tolist(), self.tokens.text_counts, strict=True)
        return questions(self.tokens.state.processor, [ids[:count] for ids, count in rows])

    @cached_property
    def _of_tower(self) -> dict[str, Any]:
        """Inputs of the vision tower, once each."""
        return {}

    def get(self, name: str) -> Any:
        """The input of hooks with this name."""
        if name not in table.OF_TOWER:
            return getattr(self, name)
        if name not in self._of_tower:
            ordinals, valid = self.tokens.ordinals, self.tokens.valid
            self._of_tower[name] = record.encoder_input(
                self.prompt, self.parts.tower, self.place, name, ordinals, valid
            )
        return self._of_tower[name]

    def of_sample(self, name: str, b: int) -> Any:
        """Input `name` of sample b: unpadded, without the batch axis; `state` is a dict of the sample's own."""
        value = self.get(name)
        if name in table.OF_TOWER:
            crops = record.crops(self.prompt)[b]
            return record.row_of_declared(self.place.stage.inputs, name, value, b, self.counts[b], crops)
        lengths = {"V": self.counts[b], "T": self.tokens.text_counts[b]}
        if name.startswith("extras") or name == "cls_crops":
            lengths["E"] = record.crops(self.prompt)[b]
        if name not in table.OF_DECODER_LAYERS:
            return table.cut_for_sample(name, value, b, lengths)
        declared = table.requests(self.place.stage.inputs, name)
        parts = value if isinstance(value, tuple) else (value,)
        ones = tuple(self._one(name, part, spec, b, lengths) for part, spec in zip(parts, declared, strict=True))
        return ones if isinstance(value, tuple) else ones[0]

    def _one(self, name: str, value: Tensor | None, spec: Any, b: int, lengths: Mapping[str, int]) -> Tensor | None:
        one: Tensor | None = table.cut_for_sample(name, value, b, lengths)
        if one is None or not (isinstance(spec, decoder_requests.Rows) and spec.over == "none"):
            return one
        _, valid = self.readings.queries(spec, self._attended(spec)[1])
        return one[..., : int(valid[b].sum())]
