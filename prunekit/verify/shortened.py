"""The reference for cuts at the decoder input of a decoder that is not known inside: lists that really are shorter.

Every row of a batch is run by itself, without padding and without a cache: the decoder gets the embeddings of the
prompt tokens that remain, merged ones in their anchors' places, and behind them those of the decoded tokens, all at the
positions that they have in the complete sequence. It shares no code with `prunekit.engine`.

Shape letters: B batch, P padded prompt, S prompt plus decoded tokens, H hidden, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from prunekit.families.generic import decoder_of
from prunekit.verify.oracle import Merge
from prunekit.verify.reported import Move, TokenTables, moves_of, tables_of
from prunekit.verify.stock import visual_mask
from prunekit.verify.tower import tower_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.records import RunReport


class ShortenedReference:
    """Replays the decisions in `report`, all of them made before the decoder, on `model` with the batch `inputs`.

    model, inputs, merges: as for `prunekit.verify.oracle.MaskedReference`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        report: RunReport,
        merges: Mapping[int, Merge] | None = None,
    ) -> None:
        self.stock = cast("Any", model)
        self.model, self.inputs, self.report, self.merges = model, inputs, report, merges or {}
        self.visual = [row.nonzero()[:, 0] for row in visual_mask(model, inputs["input_ids"])]
        self.present = inputs["attention_mask"].bool()
        layers = range(len(report.layer_tokens[0]))
        self.tables: TokenTables = tables_of(inputs["input_ids"], self.present, self.visual, report, layers)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the last position at each of T steps, (B, T, vocabulary); as `MaskedReference.logits`."""
        decoded = tokens[:, :-1]
        inputs = dict(self.inputs)
        for name, value in self.inputs.items():
            if name == "input_ids":
                inputs[name] = torch.cat([value, decoded.masked_fill(visual_mask(self.model, decoded), 0)], 1)
            elif name == "attention_mask":
                inputs[name] = torch.cat([value, value.new_ones(decoded.shape)], 1)
            elif name.endswith("token_type_ids"):
                inputs[name] = torch.cat([value, value.new_zeros(decoded.shape)], 1)  # text
        decoder, length = decoder_of(self.model), self.present.shape[1]
        inside = {n: merge.weights for n, merge in self.merges.items() if "vision" in self.report.events[n].site}
        original = decoder.forward
        decoder.forward = self._row_by_row(original, decoded)
        try:
            with tower_cuts(self.model, self.inputs, self.report, self.visual, inside):
                logits: Tensor = self.stock(**inputs, use_cache=False).logits
        finally:
            del decoder.forward
        return logits[:, length - 1 :]

    def _row_by_row(self, original: Callable[..., Any], decoded: Tensor) -> Callable[..., Any]:
        """The decoder's forward on one list for each row; states of tokens that are on none are zeros."""
        length = self.present.shape[1]

        def forward(**arguments: Any) -> Any:
            words = self.stock.get_input_embeddings()(decoded)
            embeds = torch.cat([arguments["inputs_embeds"][:, :length], words], 1)
            if arguments.get("position_ids") is None:  # as `generate` counts them
                counted = torch.cat([self.present, self.present.new_ones(decoded.shape)], 1).cumsum(1) - 1
                arguments["position_ids"] = counted.clamp_min(0)
            states, output = torch.zeros_like(embeds), None
            for row in range(len(embeds)):
                there = torch.cat([self.tables.entering[0][row], self.present.new_ones(decoded.shape[1])]).nonzero()[
                    :, 0
                ]
                own = {name: _of_row(value, embeds.shape, row, there, self) for name, value in arguments.items()}
                own |= {"inputs_embeds": self._merged(embeds[row], row)[None, there], "use_cache": False}
                output = original(**own)
                states[row, there] = output.last_hidden_state[0]
            assert output is not None
            output.last_hidden_state = states
            return output

        return forward

    def _merged(self, states: Tensor, row: int) -> Tensor:
        """States of one row, (S, H), with what was merged in front of the decoder."""
        states = states.clone()
        for move in self._moves:
            merge = self.merges.get(move.number)
            entered, kept = move.entered[row], move.kept[row]
            if merge is not None and "vision" not in self.report.events[move.number].site and len(kept):
                parts = states[entered]
                if merge.extras is not None:
                    parts = torch.cat([parts, merge.extras[row].to(parts.dtype)])
                states[kept] = merge.weights[row].to(states.dtype) @ parts
        return states

    @property
    def _moves(self) -> Sequence[Move]:
        return [move for _, move in moves_of(self.report, self.visual)]


def _of_row(value: Any, whole: Sequence[int], row: int, there: Tensor, reference: ShortenedReference) -> Any:
    """What one row's list needs of an argument of the decoder. whole: (B, S, H) of the batch."""
    rows, length = whole[:2]
    if isinstance(value, dict):
        return {name: _of_row(one, whole, row, there, reference) for name, one in value.items()}
    if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
        return type(value)(_of_row(one, whole, row, there, reference) for one in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4 and value.shape[-2:] == (length, length):  # a mask
        return value[min(row, len(value) - 1)][None][:, :, there][..., there]
    if value.ndim == 3 and value.shape[-1] == length:  # positions on several axes
        return value[:, min(row, value.shape[1] - 1)][:, None, there]
    if value.ndim >= 2 and value.shape[0] in (1, rows) and value.shape[1] == length:
        return value[min(row, len(value) - 1)][None, there]
    counts = [len(slots) for slots in reference.visual]
    if value.shape[:1] == (sum(counts),):  # an entry for each visual token
        mine = torch.split(value, counts)[row]
        return mine[torch.isin(reference.visual[row], there)]
    return value
