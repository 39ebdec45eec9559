"""The masked reference: what a pruned run must equal, computed the slow and obvious way.

It takes the decisions of a run (its `RunReport`) and replays them on the stock model: the complete, unpruned sequence
of prompt and decoded tokens in one forward, no cache, nothing ever made shorter:

- who sees whom, and every position, are those of the stock model's own `generate` (`prunekit.verify.stock`), so
  nothing about a family is written down here;
- a token dropped at a site stays in the sequence, but its key column is masked in every layer from there on; one that
  leaves the KV cache later or only there (a crop, `prefill_end`) is masked for the decoded tokens alone;
- a merged token's state is written into the slot of its anchor, the others are masked, in decoder and tower alike;
- a token's size is the logarithm added to its column of the mask;
- a skipped layer runs and its output is thrown away for its input, for the prompt, the decoded tokens or both; of a
  skipped attention or MLP the output is zeros; a frozen token's output is its input;
- decoded tokens do not see prompt tokens in a layer that wrote no KV for them;
- positions stay, or are counted again per row and layer and handed to the stock rotary module;
- what stands in the place of attention and holds a state (linear attention, a convolution) runs on lists that really
  are shorter, row by row: the tokens that enter it, and behind them those decoded tokens that it runs for.
- a layer that attends to keys and values of an earlier one gets a mask of its own, which hides what has left since;
  its positions are those of that earlier layer.

It shares no code with `prunekit.engine`, which does none of these things.

Shape letters: B batch, P padded prompt, S prompt plus decoded tokens, V visual tokens, H hidden, N layers, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prunekit.families.generic import decoder_of
from prunekit.strategy.sites import Site
from prunekit.verify.muting import without
from prunekit.verify.reported import ATTENDS, MLPS, RUNS, Move, TokenTables, closed, tables_of
from prunekit.verify.stock import (
    StockRun,
    arguments_of,
    as_square,
    kv_sources,
    parts_of,
    recurrent_layers,
    stock_run_of,
    visual_mask,
)
from prunekit.verify.tower import tower_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.records import RunReport


@dataclass(frozen=True)
class Merge:
    """How the tokens that entered one event were summed into the kept ones.

    weights: for each sample, float (kept, entered + E); of an event inside the vision tower, for each image, float
        (entered, entered), as `prunekit.verify.tower.tower_cuts` takes them.
    extras: for each sample, float (E, H), the declared extras that the last E columns stand for; None when there are
        none.
    """

    weights: Sequence[Tensor]
    extras: Sequence[Tensor] | None = None


class MaskedReference:
    """Replays the decisions in `report` on `model` with the prompt batch `inputs`.

    model: stock, in eval mode, with no pipeline applied; the caller chooses the dtype and, of sdpa and eager, the
        attention (a flash-style kernel is replaced by sdpa). In float64 under
        `prunekit.verify.precision.Float64Throughout` errors are below 1e-12.
    inputs: what `generate` takes: `input_ids` and `attention_mask` int64 (B, P), pixels and what belongs to them.
    merges: event number (in `report.events`) to the merge of that event, or just its weights; events that are not named
        merge nothing.
    stock_run: of these inputs, at least as long as what is asked for; None makes one when needed.
    Raises ValueError when the report contradicts itself or the inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        report: RunReport,
        merges: Mapping[int, Merge | Sequence[Tensor]] | None = None,
        stock_run: StockRun | None = None,
    ) -> None:
        self.model, self.inputs, self.report, self.stock_run = model, inputs, report, stock_run
        self.stock = cast("Any", model)  # untyped, as the methods of transformers are
        every = {n: merge if isinstance(merge, Merge) else Merge(merge) for n, merge in (merges or {}).items()}
        inside = {n for n in every if Site.parse(report.events[n].site).in_tower}
        self.merges = {n: merge for n, merge in every.items() if n not in inside}
        self.tower_merges = {n: every[n].weights for n in inside}
        self.decoder = decoder_of(model)
        self.layers: Sequence[Any] = self.decoder.layers
        self.visual = [row.nonzero()[:, 0] for row in visual_mask(model, inputs["input_ids"])]
        self.present = inputs["attention_mask"].bool()
        self.sources, self.recurrent = kv_sources(self.layers), recurrent_layers(model)
        self.tables: TokenTables = tables_of(
            inputs["input_ids"], self.present, self.visual, report, self.sources, self.recurrent
        )
        self.muted: set[str] = set()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the last position at each of T steps, (B, T, vocabulary).

        tokens: int64 (B, T), what the pruned run decoded. Step t sees the prompt and the first t of them, so the last
        of them is never read.
        """
        logits: Tensor = self.forward(tokens[:, :-1]).logits
        return logits[:, self.inputs["input_ids"].shape[1] - 1 :]

    @torch.no_grad()
    def attention(self, layer: int) -> Tensor:
        """The full attention map of one decoder layer over the prompt, (B, A, P, P); the model must be eager."""
        maps: Sequence[Tensor] = self.forward(self.inputs["input_ids"][:, :0], output_attentions=True).attentions
        return maps[layer - sum(other < layer for other in self.recurrent)]  # layers without a map are left out

    @torch.no_grad()
    def states(self, layer: int) -> Tensor:
        """The states that enter one decoder layer over the prompt, (B, P, H), merged ones in their anchors' slots."""
        seen: list[Tensor] = []

        def look(state: Tensor, _: dict[str, Any]) -> Tensor:
            seen.append(state)
            return state

        with _before(self.layers[layer], look, last=True):
            self.forward(self.inputs["input_ids"][:, :0])
        return seen[-1]  # a stock run may have come first

    @torch.no_grad()
    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """The stock model's output for the whole sequence, prompt and `tokens`, with the reference's hooks on it."""
        inputs = dict(self.inputs)
        for key, value in self.inputs.items():
            if key == "input_ids":
                # To `generate` a decoded id of a visual token is a word; here it would be a place to fill.
                words = tokens.masked_fill(visual_mask(self.model, tokens), 0)
                inputs[key] = torch.cat([value, words], 1)
            elif key == "attention_mask":
                inputs[key] = torch.cat([value, value.new_ones(tokens.shape)], 1)
            elif key.endswith("token_type_ids"):
                inputs[key] = torch.cat([value, value.new_zeros(tokens.shape)], 1)  # text
        with self.installed(tokens.shape[1] + 1), self._embedded(tokens):
            return self.stock(**inputs, use_cache=False, **options)

    @contextmanager
    def installed(self, steps: int = 32) -> Iterator[None]:
        """While open, the model itself is the reference: every uncached forward replays the decisions.

        For `model.generate(..., use_cache=False)` of up to `steps` tokens; each forward must hold the whole sequence,
        prompt included.
        """
        if self.stock_run is None or self.stock_run.length < self.inputs["input_ids"].shape[1] + steps - 1:
            self.stock_run = stock_run_of(self.model, self.inputs, steps)
        with ExitStack() as stack, as_square(self.model):
            stack.enter_context(tower_cuts(self.model, self.inputs, self.report, self.visual, self.tower_merges))
            for number, layer in enumerate(self.layers):
                stack.enter_context(_before(layer, self._entering(number)))
                stack.enter_context(_after(layer, self._leaving(number, layer)))
                attention, mlp = parts_of(layer)
                if number in self.recurrent:
                    stack.enter_context(_after(attention, self._shortened(number, attention)))
                stack.enter_context(_after(attention, self._part(number, "attention")))
                stack.enter_context(_after(mlp, self._part(number, "mlp")))
            yield

    @contextmanager
    def _embedded(self, tokens: Tensor) -> Iterator[None]:
        """While open, the decoder gets the embeddings of `tokens` behind the prompt, whatever their ids, and the
        position ids that the stock `generate` gives it.
        """
        length = self.present.shape[1]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            words = self.stock.get_input_embeddings()(tokens)
            embeds = kwargs["inputs_embeds"] = torch.cat([kwargs["inputs_embeds"][:, :length], words], 1)
            if self.stock_run is not None and self.stock_run.position_ids is not None:
                kwargs["position_ids"] = self.stock_run.position_ids[..., : embeds.shape[1]]

        handle = self.decoder.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def mask(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Who sees whom in a layer, bool (B, S, S), and what is added to the logits of each key, float64 (B, S)."""
        assert self.stock_run is not None
        length, tables = self.present.shape[1], self.tables
        seen = self.stock_run.mask(layer)[:, :tokens, :tokens].clone()
        seen[:, :length, :length] &= tables.entering[layer][:, None]
        seen[:, length:, :length] &= tables.lasting[layer][:, None]
        bias = torch.zeros(len(seen), tokens, dtype=torch.float64, device=seen.device)
        bias[:, :length] = tables.sizes[layer].log()
        return seen, bias

    def positions(self, layer: int, tokens: int) -> Tensor | None:
        """Positions in a layer, int64 (axes, B, S); None where the model rotates nothing."""
        assert self.stock_run is not None
        positions = self.stock_run.positions(layer)
        if positions is not None and self.report.positions == "renumber":
            positions = closed(positions, self.tables.entering[self.sources[layer]], self.present)
        return None if positions is None else positions[..., :tokens]

    def _entering(self, layer: int) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        def edit(state: Tensor, arguments: dict[str, Any]) -> Tensor:
            tokens = state.shape[-2]
            recurrent = layer in self.recurrent
            arguments["attention_mask"] = None if recurrent else _additive(*self.mask(layer, tokens), state.dtype)
            positions = self.positions(layer, tokens)
            if positions is not None and self.stock_run is not None:
                arguments["position_embeddings"] = self.stock_run.rotate(layer, positions)
                if len(positions) == 1 and arguments.get("position_ids") is not None:
                    arguments["position_ids"] = positions[0]
            return self._moved(self.tables.before[layer], state)

        return edit

    def _leaving(self, layer: int, module: Any) -> Callable[[Tensor, dict[str, Any], Any], Any]:
        """The layer's output, the input where a token passes unchanged, with what moves inside and right behind it."""

        def edit(state: Tensor, arguments: dict[str, Any], result: Any) -> Any:
            runs = self.tables.switch(layer, RUNS, state.shape[-2], frozen=True)[..., None]
            if any(move.number in self.merges for move in self.tables.mid[layer]):
                result = self._in_two(layer, module, state, arguments)
            return self._moved(self.tables.after[layer], torch.where(runs, result, state))

        return edit

    def _in_two(self, layer: int, module: Any, state: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The layer once without its MLP, then the merge, then the layer once without its attention."""
        with without(self.muted, "mlp"):
            between = module.forward(state, **arguments)
        between = self._moved(self.tables.mid[layer], between)
        with without(self.muted, "attention"):
            return cast("Tensor", module.forward(between, **arguments))

    def _part(self, layer: int, part: str) -> Callable[[Any, dict[str, Any], Any], Any]:
        """What attention or MLP gives, and zeros where it is skipped."""
        table = ATTENDS if part == "attention" else MLPS

        def edit(_: Any, arguments: dict[str, Any], result: Any) -> Any:
            first = result[0] if isinstance(result, tuple) else result
            states = first.view(len(self.present), -1, first.shape[-1])  # some experts give them in a row
            adds = self.tables.switch(layer, table, states.shape[1])[..., None]
            if part in self.muted:
                adds = torch.zeros_like(adds)
            first = torch.where(adds, states, torch.zeros_like(states)).view(first.shape)
            return (first, *result[1:]) if isinstance(result, tuple) else first

        return edit

    def _shortened(self, layer: int, module: Any) -> Callable[[Any, dict[str, Any], Any], Any]:
        """What `module`, which holds a state, gives for the list of each row; zeros for tokens that are not on it."""

        def edit(state: Any, arguments: dict[str, Any], result: Tensor) -> Tensor:
            states: Tensor = arguments["hidden_states"] if state is None else state
            others = {name: value for name, value in arguments.items() if name != "hidden_states"}
            output = torch.zeros_like(result)
            for row in range(len(states)):
                there = self.tables.listed(layer, row, states.shape[1])
                if len(there):
                    output[row, there] = module.forward(states[row : row + 1, there], **others)[0]
            return output

        return edit

    def _moved(self, moves: Sequence[Move], state: Tensor) -> Tensor:
        state = state.clone()
        for move in moves:
            merge = self.merges.get(move.number)
            for row, (entered, kept) in enumerate(zip(move.entered, move.kept, strict=True)):
                if merge is not None and len(kept):
                    parts = state[..., row, entered, :]
                    if merge.extras is not None:
                        parts = torch.cat([parts, merge.extras[row].to(parts.dtype)])
                    state[..., row, kept, :] = merge.weights[row].to(state.dtype) @ parts
        return state


def _additive(seen: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, S), as both sdpa and eager attention take it.

    Every token sees itself, also padding and dropped ones: no row of the softmax may be empty, and what they compute is
    read by nobody.
    """
    seen = seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    columns = bias.to(dtype)[:, None, :].expand(seen.shape)
    return columns.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@contextmanager
def _before(module: nn.Module, edit: Callable[[Tensor, dict[str, Any]], Tensor], last: bool = False) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = arguments_of(module, args, kwargs)
        return (edit(args[0], kwargs),), kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=not last)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, edit: Callable[[Any, dict[str, Any], Any], Any]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return edit(args[0] if args else None, kwargs, result)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
