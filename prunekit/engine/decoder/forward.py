"""The input `forward`: decoder layers, or modules of a strategy's own, run on the current tokens and thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.engine.decoder import aside
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.readings import Readings, taken
from prunekit.engine.decoder.site_tokens import SiteTokens
from prunekit.errors import PluginError, Unsupported
from prunekit.pipeline.cut import Cut
from prunekit.strategy.decoder_requests import Rows


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
    """Runs layers on the side: nothing is written to the KV cache, and the prefill goes on from where it was.

    hidden_states: float (B, K, H), physical, those that reach the site.
    """

    readings: Readings
    here: Here
    cut: Cut
    tokens: SiteTokens
    hidden_states: Tensor

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
            raise PluginError(f"{self.cut.label}: forward needs layers, and rows with rope=True")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut.stage.trainable):
            return self._run(layers, self._start(layers, hidden), rows)

    def _run(self, layers: Sequence[int | nn.Module], states: Tensor, rows: Rows | None) -> Forwarded:
        parts, here, attended, run = self.readings.state.parts, self.here, None, None
        for at, layer in enumerate(layers):
            number = layer if isinstance(layer, int) else here.number
            if not 0 <= number < len(parts.layers):
                raise PluginError(f"{self.cut.label}: forward asks for layer {number} of {len(parts.layers)}")
            if at < len(layers) - 1 and isinstance(layer, int) and number < parts.logical_until:
                raise Unsupported(f"forward cannot go on after layer {number}: this model adds features of images")
            self._check_arguments(number)
            module = parts.layers[number] if isinstance(layer, int) else layer
            run = self.readings.run_aside(here, number, states)
            attention = parts.attention if rows is not None and at == len(layers) - 1 else None
            states, attended = aside.run(run.aside, module, states, attention)
        attention_rows = None
        if rows is not None and attended is not None and run is not None:
            attention_rows = self.readings.rows(attended, run, rows, self.tokens)
        return self._result(states, attention_rows)

    def _check_arguments(self, number: int) -> None:
        """Raise Unsupported for a layer that is called with what is not known here, or with several streams."""
        parts = self.readings.state.parts
        if parts.stream is not None or (parts.own_inputs and number != self.here.number):
            raise Unsupported(
                f"forward cannot run layer {number} here: this model gives each layer inputs of its own, or several "
                "streams of hidden states; read `attention`, `keys` or `values`"
            )

    def _start(self, layers: Sequence[int | nn.Module], hidden: Tensor | None) -> Tensor:
        tokens, states = self.tokens, self.hidden_states
        if not self.cut.stage.trainable:
            # The model's own layers write to nothing that they are given; a strategy's module may.
            states = states.detach() if isinstance(layers[0], int) else states.detach().clone()
        if hidden is None:
            return states
        shape = (*tokens.slots.shape, states.shape[-1])
        if tuple(hidden.shape) != shape:
            raise PluginError(f"{self.cut.label}: forward got hidden {tuple(hidden.shape)}, not {shape}")
        slots = tokens.slots.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        visual = torch.where(tokens.valid.to(states.device)[..., None], hidden.to(states), states.gather(1, slots))
        return states.scatter(1, slots, visual)

    def _result(self, states: Tensor, attention: Tensor | None) -> Forwarded:
        tokens = self.tokens
        hidden = taken(states, tokens.slots, tokens.valid)
        text = taken(states, tokens.text_slots, tokens.text_valid)
        slots = tokens.slot_of.gather(1, tokens.state.prompt.last[:, None])[:, 0].to(states.device)
        last = states[torch.arange(len(slots), device=states.device), slots]
        return Forwarded(hidden, text, last, attention)
