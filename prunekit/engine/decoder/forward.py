"""The input `forward`: decoder layers, or modules of a strategy's own, run on the current tokens and thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunekit.engine.decoder import scratch
from prunekit.engine.decoder.readings import Run, taken
from prunekit.errors import PluginError, Unsupported
from prunekit.strategy.decoder_requests import Rows

if TYPE_CHECKING:
    from prunekit.engine.decoder.view import View


@dataclass(frozen=True)
class Forwarded:
    """What came of a scratch forward.

    hidden: float (B, V, H), visual tokens. text: float (B, T, H), text tokens. last: float (B, H), the last prompt
    token. attention: what `rows` asked for of the last layer, as the input `attention`; None without `rows`.
    """

    hidden: Tensor
    text: Tensor
    last: Tensor
    attention: Tensor | None


@dataclass(frozen=True, repr=False)
class Forward:
    """Runs layers on the side: nothing is written to the KV cache, and the prefill goes on from where it was."""

    view: View

    def __call__(
        self, layers: Sequence[int | nn.Module], hidden: Tensor | None = None, rows: Rows | None = None
    ) -> Forwarded:
        """Run `layers`, one after the other, on the tokens that reach the site.

        layers: numbers of decoder layers, or modules that are called as a decoder layer is. hidden: float (B, V, H), to
        take the place of the visual tokens' states; None leaves them. rows: attention rows of the last of `layers` to
        take; their `layer` means nothing here, and `rope` must be True. Runs without gradients, unless the strategy is
        trainable. Raises PluginError for arguments that make no sense, Unsupported where the family's decoder does more
        between its layers than call them.
        """
        if not layers or (rows is not None and not rows.rope):
            raise PluginError(f"{self.view.place.label}: forward needs layers, and rows with rope=True")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.view.place.stage.trainable):
            return self._run(layers, self._start(hidden), rows)

    def _run(self, layers: Sequence[int | nn.Module], states: Tensor, rows: Rows | None) -> Forwarded:
        view, session = self.view, self.view.session
        parts, here, noted, run = session.parts, view.here, None, None
        for at, layer in enumerate(layers):
            number = layer if isinstance(layer, int) else here.number
            if not 0 <= number < len(parts.layers):
                raise PluginError(f"{view.place.label}: forward asks for layer {number} of {len(parts.layers)}")
            if at < len(layers) - 1 and isinstance(layer, int) and number < parts.logical_until:
                raise Unsupported(f"forward cannot go on after layer {number}: this model adds features of pictures")
            module = parts.layers[number] if isinstance(layer, int) else layer
            run = Run(session.inputs.place(here, number), number, states, session.counts, session.lengths)
            attention = parts.attention if rows is not None and at == len(layers) - 1 else None
            states, noted = scratch.run(run.place, module, states, attention)
        attention_rows = None
        if rows is not None and noted is not None and run is not None:
            attention_rows = view.rows_of(noted, run, rows)
        return self._result(states, attention_rows)

    def _start(self, hidden: Tensor | None) -> Tensor:
        view = self.view
        states = view.hidden_states if view.place.stage.trainable else view.hidden_states.detach()
        if hidden is None:
            return states
        if hidden.shape != view.hidden.shape:
            raise PluginError(
                f"{view.place.label}: forward got hidden {tuple(hidden.shape)}, not {tuple(view.hidden.shape)}"
            )
        slots = view.slots.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        given = torch.where(view.valid.to(states.device)[..., None], hidden.to(states), states.gather(1, slots))
        return states.scatter(1, slots, given)

    def _result(self, states: Tensor, attention: Tensor | None) -> Forwarded:
        view = self.view
        hidden = taken(states, view.slots, view.valid)
        text = taken(states, view.text_slots, view.text_valid)
        slots = view.slot_of.gather(1, view.prompt.last[:, None])[:, 0].to(states.device)
        last = states[torch.arange(len(slots), device=states.device), slots]
        return Forwarded(hidden, text, last, attention)
