"""What hooks may ask for, computed when asked: the visual tokens of a prompt batch as they stand at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.engine.decoder.forward import Forward
from prunekit.engine.decoder.readings import Run, taken
from prunekit.engine.prompt.prompt import Prompt
from prunekit.engine.tokens.layout import Layout, blank, leftmost
from prunekit.engine.tower import record
from prunekit.errors import Unsupported
from prunekit.pipeline.stage import Cut
from prunekit.strategy import decoder_requests
from prunekit.strategy import inputs as table

if TYPE_CHECKING:
    from prunekit.engine.decoder.session import Session
    from prunekit.engine.decoder.step import Step

# Inputs that belong to the whole batch, those with one entry per sample, and those with one per text token.
SHARED = frozenset({"cut", "norm"})
SINGLE = frozenset({"count", "seed"})
TEXT = frozenset({"text", "text_hidden", "text_keys", "text_after", "text_valid"})


@dataclass(frozen=True, repr=False)
class Here:
    """Where in a forward pass a cut is made: before, inside or after decoder layer `number`.

    kwargs: the arguments of that layer's call, logical.
    """

    step: Step
    number: int
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class View:
    """The visual tokens that reach one stage. Its properties named in the hook specifications are the inputs of hooks.

    layout: of the tokens that reach it. hidden_states: float (B, K, H), physical, as they enter the site.
    visual: bool (B, K), slots of visual tokens. count: how many to leave, None if the stage takes no `keep`.
    """

    session: Session
    here: Here
    place: Cut
    layout: Layout
    hidden_states: Tensor
    visual: Tensor
    count: tuple[int, ...] | None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens of each row."""
        return self.session.counts

    @property
    def prompt(self) -> Prompt:
        return self.session.prompt

    @property
    def state(self) -> dict[Any, Any]:
        return self.session.states.setdefault(self.place.stage.index, {})

    @property
    def cut(self) -> int:
        return self.place.number

    @cached_property
    def slots(self) -> Tensor:
        """Physical slots of the visual tokens, int64 (B, V); columns past a row's `counts` are padding."""
        return leftmost(self.visual, max(self.counts))

    @cached_property
    def positions(self) -> Tensor:
        """Their logical positions, int64 (B, V)."""
        return self.layout.index.gather(1, self.slots)

    @cached_property
    def ordinals(self) -> Tensor:
        """Their numbers among the row's original visual tokens, int64 (B, V), meaningless on padding."""
        return self.prompt.ordinals.gather(1, self.positions).clamp_min(0)

    @cached_property
    def valid(self) -> Tensor:
        columns = torch.arange(self.slots.shape[1], device=self.slots.device)
        return columns < torch.tensor(self.counts, device=self.slots.device)[:, None]

    @cached_property
    def hidden(self) -> Tensor:
        return taken(self._attached(self.hidden_states), self.slots, self.valid)

    @cached_property
    def previous_hidden(self) -> Tensor:
        number = decoder_requests.layer_before(self.place.site, self.session.bound.shape.layers)
        assert number is not None, "checked by Needs.of"
        run = self.session.inputs.runs[number]
        columns = self.session.inputs.columns(run, self.positions)
        return taken(self._attached(run.hidden), columns, self.valid)

    def _attached(self, states: Tensor) -> Tensor:
        return states if self.place.stage.trainable else states.detach()

    @cached_property
    def places(self) -> Tensor:
        """As `Prompt.places`, of the tokens that reach the site: int64 (B, V, 6)."""
        index = self.ordinals[..., None].expand(-1, -1, 6)
        return self.prompt.places.gather(1, index).masked_fill(~self.valid[..., None], -1)

    @property
    def coords(self) -> Tensor:
        return self.places[..., [0, 2, 3, 4, 5]]

    @property
    def frames(self) -> Tensor:
        return self.places[..., 1]

    @cached_property
    def sizes(self) -> Tensor:
        if self.layout.sizes is None:
            return torch.ones_like(self.valid, dtype=torch.float32)
        return self.layout.sizes.gather(1, self.slots).masked_fill(~self.valid, 1.0)

    @cached_property
    def attention(self) -> Any:
        return self._declared("attention", self._rows)

    @cached_property
    def keys(self) -> Any:
        return self._declared("keys", lambda spec: self._keys(spec, self.positions, self.valid))

    @cached_property
    def values(self) -> Any:
        return self._declared("values", lambda spec: self._keys(spec, self.positions, self.valid))

    @cached_property
    def text_keys(self) -> Any:
        return self._declared("text_keys", lambda spec: self._keys(spec, self.text_positions, self.text_valid))

    def _declared(self, name: str, make: Callable[[Any], Tensor]) -> Any:
        """One tensor for one declaration, a tuple for a tuple."""
        declared = table.request(self.place.stage.inputs, name)
        return tuple(map(make, declared)) if isinstance(declared, tuple) else make(declared)

    def _rows(self, spec: decoder_requests.Rows) -> Tensor:
        return self.rows_of(*self._attended(spec), spec)

    def _attended(self, spec: decoder_requests.Spec) -> tuple[Attended, Run]:
        known, key = self._looked, decoder_requests.layer_and_rope(spec)
        if key not in known:
            known[key] = self.session.inputs.attended(spec, self.here, self.place, self.hidden_states)
        return known[key]

    @cached_property
    def _looked(self) -> dict[Any, tuple[Attended, Run]]:
        """Layers that were looked at for this stage: several inputs may read the same one."""
        return {}

    def rows_of(self, states: Attended, run: Run, spec: decoder_requests.Rows) -> Tensor:
        """The rows that `spec` describes of one call of a layer, as the input `attention`."""
        noted, device = self.session.inputs, states.query.device
        slots, valid = noted.queries(spec, run)
        columns = noted.columns(run, self.positions)
        found = decoder_rows.attention(
            states, slots.to(device), valid.to(device), noted.visual(run).to(device), columns.to(device), spec
        )
        return blank(found, self.valid)

    def _keys(self, spec: decoder_requests.Keys | decoder_requests.Values, positions: Tensor, valid: Tensor) -> Tensor:
        states, run = self._attended(spec)
        columns = self.session.inputs.columns(run, positions)
        return blank(decoder_rows.keys(states, columns.to(states.key.device), spec), valid)

    @cached_property
    def text_counts(self) -> tuple[int, ...]:
        """Text tokens of each row; at least one column is made of them."""
        pairs = zip(self.session.prompt.lengths, self.prompt.visual_counts, strict=True)
        return tuple(length - count for length, count in pairs)

    @cached_property
    def text_positions(self) -> Tensor:
        """Logical positions of the text tokens, int64 (B, T)."""
        return leftmost(self.session.inputs.text, max(self.text_counts))

    @cached_property
    def text_valid(self) -> Tensor:
        return self.session.inputs.text.gather(1, self.text_positions)

    @cached_property
    def text_after(self) -> Tensor:
        return self.session.inputs.after.gather(1, self.text_positions)

    @cached_property
    def text(self) -> Tensor:
        embeds = self.session.inputs.embeds
        assert embeds is not None, "kept if Needs.embeds"
        return taken(self._attached(embeds), self.text_positions, self.text_valid)

    @cached_property
    def text_hidden(self) -> Tensor:
        return taken(self._attached(self.hidden_states), self.text_slots, self.text_valid)

    @cached_property
    def text_slots(self) -> Tensor:
        """Physical slots of the text tokens, int64 (B, T)."""
        return self.slot_of.gather(1, self.text_positions)

    @cached_property
    def slot_of(self) -> Tensor:
        """For each logical position the slot that holds it now, int64 (B, S)."""
        index = self.layout.index
        slots = torch.zeros(index.shape[0], self.layout.length, dtype=torch.int64, device=index.device)
        return slots.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))

    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        found: Callable[[Tensor], Tensor] = self.session.parts.final_norm
        return found

    @cached_property
    def forward(self) -> Forward:
        return Forward(self)

    @property
    def seed(self) -> tuple[int, ...]:
        return self.prompt.seeds

    @cached_property
    def extras(self) -> Tensor:
        return record.extras(self.prompt)

    @cached_property
    def _of_tower(self) -> dict[str, Any]:
        """Inputs of the vision tower, once each."""
        return {}

    def get(self, name: str) -> Any:
        """The input of hooks with this name."""
        if name not in table.OF_TOWER:
            return getattr(self, name)
        if name not in self._of_tower:
            tower = self.session.parts.tower
            self._of_tower[name] = record.encoder_input(self.prompt, tower, self.place, name, self.ordinals, self.valid)
        return self._of_tower[name]

    def of_sample(self, name: str, b: int) -> Any:
        """Input `name` of sample b: unpadded, without the batch axis; `state` is a dict of the sample's own."""
        value = self.get(name)
        if name == "state":
            return value.setdefault(b, {})
        if name == "forward":
            raise Unsupported(
                f"{self.place.label}: `forward` runs the whole batch, and a strategy with per_sample=True sees one "
                "sample; leave out per_sample, or forward"
            )
        if value is None or name in SHARED:
            return value
        if name in SINGLE:
            return value[b]
        if name == "extras":
            return value[b, : record.crops(self.prompt)[b]]
        if name in table.OF_TOWER:
            crops = record.crops(self.prompt)[b]
            return record.row_of_declared(self.place.stage.inputs, name, value, b, self.counts[b], crops)
        if name in table.OF_DECODER_LAYERS:
            declared = table.requests(self.place.stage.inputs, name)
            parts = value if isinstance(value, tuple) else (value,)
            found = tuple(self._one(name, part, spec, b) for part, spec in zip(parts, declared, strict=True))
            return found if isinstance(value, tuple) else found[0]
        return value[b, : self._length(name, b)]

    def _length(self, name: str, b: int) -> int:
        return self.text_counts[b] if name in TEXT else self.counts[b]

    def _one(self, name: str, value: Tensor, spec: Any, b: int) -> Tensor:
        one = value[b, : self._length(name, b)]
        if not (isinstance(spec, decoder_requests.Rows) and spec.over == "none"):
            return one
        _, valid = self.session.inputs.queries(spec, self._attended(spec)[1])
        return one[..., : int(valid[b].sum())]
