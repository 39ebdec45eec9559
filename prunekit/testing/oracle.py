"""The masked reference: what a pruned run must equal, computed the slow and obvious way.

It takes the decisions of a run (its `RunReport`) and replays them on the stock model: the complete, unpruned sequence,
no cache, everything recomputed at every step. Nothing is ever made shorter:

- a token dropped at a site stays in the sequence, but its key column is masked in every layer from there on;
- a merged token's state is written into the slot of its anchor before that layer, the others are masked;
- a skipped layer runs and its output is thrown away for its input; of a skipped attention or MLP the output is zeros;
- positions are the original ones, counted without padding.

It shares no code with `prunekit.engine`, which does none of these things.

Shape letters: B batch, S padded prompt plus decoded tokens, V visual tokens, H hidden, A heads, N layers, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from prunekit.decisions import LayerAction
from prunekit.sites import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from prunekit.report import RunReport, StageEvent

# The merge of one event: for each sample, float (kept, entered), how the tokens that entered are summed into the kept.
Merge = Sequence[Tensor]


class MaskedReference:
    """Replays the decisions in `report` on `model` with the prompt batch `inputs`.

    model: stock, in eval mode, with no pipeline applied, attention implementation sdpa or eager; the caller chooses
        the dtype. A model in float64 under `prunekit.testing.precision.Float64Throughout` gives errors below 1e-12.
    inputs: `input_ids` and `attention_mask` int64 (B, P), left-padded, and `pixel_values` if there are images.
    merges: event number (in `report.events`) to the merge of that event; events that are not named merge nothing.
    Raises ValueError when the report contradicts itself or the inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        report: RunReport,
        merges: Mapping[int, Merge] | None = None,
    ) -> None:
        self.model, self.inputs, self.report = model, inputs, report
        self.stock = cast(Any, model)  # untyped, as the methods of transformers are
        self.merges = dict(merges or {})
        self.decoder: Any = self.stock.get_decoder()
        self.layers: Sequence[Any] = self.decoder.layers
        self.visual = [row.nonzero()[:, 0] for row in inputs["input_ids"] == model.config.image_token_id]
        self._check()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the last position at each of T steps, (B, T, vocabulary).

        tokens: int64 (B, T), what the pruned run decoded. Step t sees the prompt and the first t of them, so the last
        of them is never read.
        """
        steps = [self.forward(tokens[:, :step]).last_hidden_state[:, -1] for step in range(tokens.shape[1])]
        head = self.stock.get_output_embeddings()
        return torch.stack([head(state) for state in steps], dim=1)

    @torch.no_grad()
    def attention(self, layer: int) -> Tensor:
        """The full attention map of one decoder layer over the prompt, (B, A, S, S); the model must be eager."""
        maps: Tensor = self.forward(self.inputs["input_ids"][:, :0], output_attentions=True).attentions[layer]
        return maps

    @torch.no_grad()
    def states(self, layer: int) -> Tensor:
        """The states that enter one decoder layer over the prompt, (B, S, H), merged ones in their anchors' slots."""
        seen: list[Tensor] = []

        def look(state: Tensor, arguments: dict[str, Any]) -> Tensor:
            seen.append(state)
            return state

        with _before(self.layers[layer], look, last=True):
            self.forward(self.inputs["input_ids"][:, :0])
        return seen[0]

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """The stock decoder over the whole sequence, prompt and `tokens`, with the hooks of the reference on it."""
        mask = self.inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with ExitStack() as stack:
            alive = mask.bool()
            self._install(stack, lambda: alive)
            return self.decoder(
                inputs_embeds=self._embeddings(tokens), attention_mask=mask, position_ids=positions, use_cache=False,
                **options,
            )  # fmt: skip

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the model itself is the reference: every uncached forward replays the decisions.

        For `model.generate(..., use_cache=False)`; each forward must hold the whole sequence, prompt included.
        """
        with ExitStack() as stack:
            alive = self.inputs["attention_mask"].bool()

            def begin(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                nonlocal alive
                alive = named["attention_mask"].bool().clone()

            handle = self.decoder.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
            self._install(stack, lambda: alive)
            yield

    def before_layer(self, layer: int, state: Tensor, alive: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Replay what happens before a layer: returns the new state and edits `arguments` of the layer's call.

        state: float (B, S, H). alive: bool (B, S), edited in place as tokens are dropped.
        """
        for number, event in enumerate(self.report.events):
            if max(Site.parse(event.site).depth, 0) == layer:
                state = self._drop(number, event, state, alive)
        arguments["attention_mask"] = self._mask(alive, state.dtype)
        return state

    def _embeddings(self, tokens: Tensor) -> Tensor:
        """Prompt with the image features in their slots, then the decoded tokens: (B, S, H)."""
        table: Any = self.model.get_input_embeddings()
        prompt: Tensor = table(self.inputs["input_ids"])
        if "pixel_values" in self.inputs:
            features = self.stock.get_image_features(pixel_values=self.inputs["pixel_values"], return_dict=True)
            flat = torch.cat([image.reshape(-1, prompt.shape[-1]) for image in features.pooler_output])
            start = 0
            for row, slots in enumerate(self.visual):
                prompt[row, slots] = flat[start : start + len(slots)].to(prompt.dtype)
                start += len(slots)
        return torch.cat([prompt, table(tokens)], dim=1)

    def _install(self, stack: ExitStack, alive: Callable[[], Tensor]) -> None:
        for number, layer in enumerate(self.layers):
            action = self.report.actions.get(number, LayerAction.RUN)
            stack.enter_context(_before(layer, self._replay(number, alive)))
            if action is LayerAction.SKIP:
                stack.enter_context(_after(layer, lambda given, _: given))
            elif action is LayerAction.SKIP_ATTENTION:
                stack.enter_context(_after(layer.self_attn, lambda _, result: (torch.zeros_like(result[0]), result[1])))
            elif action is LayerAction.SKIP_MLP:
                stack.enter_context(_after(layer.mlp, lambda _, result: torch.zeros_like(result)))

    def _replay(self, layer: int, alive: Callable[[], Tensor]) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        return lambda state, arguments: self.before_layer(layer, state, alive(), arguments)

    def _drop(self, number: int, event: StageEvent, state: Tensor, alive: Tensor) -> Tensor:
        state = state.clone()
        for row, slots in enumerate(self.visual):
            entered = slots[alive[row, slots]]
            kept = slots[list(event.kept[row])]
            if number in self.merges and len(kept):
                state[row, kept] = self.merges[number][row].to(state.dtype) @ state[row, entered]
            alive[row, slots] = False
            alive[row, kept] = True
        return state

    def _mask(self, alive: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 1, S, S) for the model's attention: bool for sdpa, additive for eager.

        Every token sees itself, also padding and dropped ones: no row of the softmax may be empty, and what they
        compute is read by nobody.
        """
        size = alive.shape[1]
        square = torch.ones(size, size, dtype=torch.bool, device=alive.device)
        seen = square.tril() & alive[:, None, None, :] | square.diag().diag()
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _check(self) -> None:
        counts = tuple(map(len, self.visual))
        if self.report.samples != len(counts) or self.report.visual_tokens != counts:
            raise ValueError(f"the report has visual tokens {self.report.visual_tokens}, the inputs have {counts}")
        everything = tuple(tuple(range(count)) for count in counts)
        decided = [everything, *(event.kept for event in self.report.events)]
        for event, (before, after) in zip(self.report.events, pairwise(decided), strict=True):
            if event.entered != tuple(map(len, before)):
                raise ValueError(f"{event.stage} at {event.site}: {event.entered} entered, {before} had been kept")
            for old, new in zip(before, after, strict=True):
                if not set(new) <= set(old) or list(new) != sorted(set(new)):
                    raise ValueError(f"{event.stage} at {event.site}: kept {new} of {old}")
        if self.report.kept_tokens != tuple(map(len, decided[-1])):
            raise ValueError(f"the report keeps {self.report.kept_tokens}, its last event {decided[-1]}")


@contextmanager
def _before(module: nn.Module, edit: Callable[[Tensor, dict[str, Any]], Tensor], last: bool = False) -> Iterator[None]:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = edit(given[0], named)
        return (state, *given[1:]), named

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=not last)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, edit: Callable[[Tensor, Any], Any]) -> Iterator[None]:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> Any:
        return edit(given[0] if given else named["hidden_states"], result)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
