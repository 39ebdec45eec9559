"""A vision tower and its projector on the tokens that cuts leave, put in place for the length of a `with` block.

Between blocks states keep their logical shape (R, T, W), so that whatever picks hidden states by number still fits; a
block takes the tokens that remain, runs on them and puts them back. Between attention and MLP a block is run in two
halves: with an MLP that adds nothing, then, on what the cut left, with an attention that adds nothing. A projector that
maps single tokens gets those that visual tokens still need; in a packed tower so do the modules that make visual tokens
of patches and, where patches leave before the tower, the one that makes states of pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit.engine.asking import decide, factors
from prunekit.engine.attention import tap
from prunekit.engine.details import Detail
from prunekit.engine.overrides import Overrides
from prunekit.engine.tokens.layout import Layout, take
from prunekit.engine.tokens.masks import bidirectional_mask
from prunekit.engine.tokens.merges import merged
from prunekit.engine.tower.encoding import Encoding
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.packed import as_row, cut_along
from prunekit.engine.tower.pixels import Resized
from prunekit.engine.tower.record import Decision, TowerRecord
from prunekit.engine.tower.view import ImageView, TowerView
from prunekit.engine.tracing import as_it_is
from prunekit.errors import Unsupported
from prunekit.families.base import Modality
from prunekit.pipeline.cut import Cut
from prunekit.strategy.decisions import Selection

Part = Literal["attention", "mlp"]
# Not a field of the tower: threads may encode at once under one block, each in a context of its own.
_RUN: ContextVar[TowerRun | None] = ContextVar("prunekit_tower", default=None)


def override(overrides: Overrides, needs: TowerNeeds) -> None:
    """Override the blocks of the tower that need it, and what stands before and behind them.

    A projector that maps single tokens is watched in any case: how many it gets is part of the cost.
    """
    tower = needs.tower
    first = min((cut.site.layer or 0 for cut in needs.cuts), default=len(tower.layers))
    if needs.reads:
        tap.method()
    for number, block in enumerate(tower.layers):
        if number >= first or number in needs.states:
            overrides.replace(block, "forward", partial(_block_forward, number))
        if number >= first:
            overrides.replace(getattr(block, tower.attention), "forward", _attention_forward)
        elif number in needs.reads:
            overrides.replace(getattr(block, tower.attention), "forward", as_it_is)
        if needs.cuts_at(number, "mid"):
            overrides.replace(getattr(block, tower.mlp), "forward", _mlp_forward)
    if needs.pools and tower.pool is not None:
        overrides.replace(tower.pool, "forward", _pool_forward)
    if tower.projector is not None:
        overrides.replace(tower.projector, "forward", _projector_forward)
    if needs.cuts and tower.packed:
        for number, merger in enumerate(tower.mergers):
            overrides.replace(merger, "forward", partial(_merger_forward, number))
    if needs.cuts_at(None, "before") and tower.embedding is not None:
        overrides.replace(tower.embedding, "forward", _embedding_forward)


def running() -> bool:
    """Whether an encoding method is being called, which may call another one."""
    return _RUN.get() is not None


def encode(
    needs: TowerNeeds, modality: Modality, arguments: Mapping[str, Any], original: Callable[[Mapping[str, Any]], Any]
) -> tuple[Any, TowerRecord | None]:
    """Call an encoding method with these arguments: its output, and what was recorded of the tower.

    Raises Unsupported for calls that do not fit.
    """
    if needs.asks:
        needs.check_call(arguments)
    if needs.cuts and torch.is_grad_enabled() and any(map(_replays, needs.tower.layers)):
        raise Unsupported(
            "gradient checkpointing would run blocks of the vision tower again, without their cuts; switch it off "
            "for the tower, which pruning makes cheaper, or cut at 'encoder'"
        )
    state = Encoding(needs, modality, arguments)
    if needs.resizing is not None:
        state = _resized_images(state, needs.resizing)
    run = TowerRun(state)
    run.cut_pixels()
    blocks = {number: getattr(needs.tower.layers[number], needs.tower.attention) for number in needs.reads}
    token = _RUN.set(run)
    try:
        with tap.tapped({block: partial(state.take, number) for number, block in blocks.items()}):
            output = original(state.arguments)
    finally:
        _RUN.reset(token)
    features = getattr(output, "pooler_output", None)
    if features is None:
        return output, None
    state.learn(output)
    record = state.record(modality.features(state.arguments, features))
    if state.resized is not None:
        state.resized.widen(output)
    return output, record


def _resized_images(state: Encoding, cut: Cut) -> Encoding:
    """An encoding of the images as small as a stage says."""
    holder = state.needs.tower.images
    assert holder is not None, "checked when the pipeline was bound"
    scales = factors(cut.stage, ImageView(state).get, len(state.images))
    resized = Resized.of(cut, holder, state.modality.name, state.arguments, scales)
    return Encoding(state.needs, state.modality, resized.arguments, resized=resized)


def _replays(block: nn.Module) -> bool:
    """Whether a backward pass runs the block a second time."""
    return block.training and bool(getattr(block, "gradient_checkpointing", False))


class TowerRun:
    """Runs the blocks of a tower on the tokens that remain, with their cuts, and the projector on what these leave."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding, self.needs = encoding, encoding.needs
        # The half of a block that runs, where a cut stands between its attention and its MLP.
        self.part: Part | None = None
        self._physical: tuple[Tensor, Tensor, Layout] | None = None
        # By the identity of a block's own mask, which is kept beside the result; and of which layout they are.
        self._masks: dict[int, tuple[Any, Any]] = {}
        self._masked: Layout | None = None

    def cut_pixels(self) -> None:
        """Let stages decide which patches come into the tower at all."""
        encoding, holder = self.encoding, self.needs.tower.images
        cuts = self.needs.cuts_at(None, "before")
        if not cuts or holder is None:
            return
        encoding.shape = (1, sum(encoding.cells) * holder.merge**2)
        for cut in cuts:
            self._cut(cut, torch.empty(*encoding.shape, 0, device=encoding.device))

    def run_embedding(self, original: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """States of patches, float (T, W), with zeros for those that have left; (T, values) are pixels patch by patch.

        A convolution over complete images runs in full.
        """
        encoding = self.encoding
        if pixels.ndim != 2 or not encoding.decisions:
            return original(pixels)
        encoding.embedded = encoding.present
        index = encoding.embedding.to(pixels.device)
        inner = original(pixels[index])
        return inner.new_zeros(len(pixels), *inner.shape[1:]).index_copy(0, index, inner)

    def run_merger(self, number: int, original: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """What merger `number` makes of the visual tokens that remain, float (V, ...), with zeros for the others.

        states: as `Tower.mergers` says, with or without a first axis of length 1.
        """
        encoding = self.encoding
        if len(states) == 1 and states.ndim == 3:
            return self.run_merger(number, lambda one: original(one[None])[0], states[0])[None]
        index, total = encoding.merging.to(states.device), sum(encoding.patches.made)
        each, rest = divmod(len(states), total)
        if rest or not each or len(index) == total:
            return original(states)
        encoding.merged[number] = encoding.present
        inner = original(states.view(total, each, *states.shape[1:])[index].flatten(0, 1))
        return inner.new_zeros(total, *inner.shape[1:]).index_copy(0, index, inner)

    def run_block(self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run block `number` on the tokens that remain, with its cuts."""
        encoding = self.encoding
        hidden = args[0] if args else kwargs["hidden_states"]
        flat, original = hidden.ndim == 2, as_row(original, hidden)
        hidden = hidden[None] if flat else hidden
        encoding.shape = encoding.shape or (hidden.shape[0], hidden.shape[1])
        encoding.block_tokens[number] = encoding.lengths
        if self.needs.cuts:
            encoding.attending[number] = encoding.present
        mids = self.needs.cuts_at(number, "mid")
        if mids:
            hidden = self._local(original, hidden, args, kwargs, "attention")
            for cut in mids:
                hidden = self._cut(cut, hidden)
        if self.needs.cuts:
            encoding.passing[number] = encoding.present
        output = self._local(original, hidden, args, kwargs, "mlp" if mids else None)
        self._keep_state(number, output)
        for cut in self.needs.cuts_at(number, "after"):
            output = self._cut(cut, output)
            self._keep_state(number, output)
        return output[0] if flat else output

    def run_projector(self, original: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        """The projector's output, float (R, T or T - 1, H), with zeros for tokens that no visual token needs any more.

        features: float (R, T, W), or (R, T - 1, W) without the first token of each row; others, such as pooled frames,
        are not the tower's tokens and are projected in full.
        """
        self.encoding.projected = features.shape[-2]
        if not self.encoding.decisions:
            return original(features)
        assert self.encoding.shape is not None, "a cut has decided"
        rows, tokens = self.encoding.shape
        if features.ndim != 3 or len(features) != rows or features.shape[1] not in (tokens, tokens - 1):
            return original(features)
        flat = features.flatten(0, 1)
        index = self.encoding.to_project(tokens - features.shape[1]).to(flat.device)
        if len(index) == len(flat):
            return original(features)
        self.encoding.fewer = True
        inner = original(flat[index][None])[0]
        output = inner.new_zeros(len(flat), inner.shape[-1]).index_copy(0, index, inner)
        return output.view(rows, -1, output.shape[-1])

    def _keep_state(self, number: int, output: Tensor) -> None:
        if number in self.needs.states:
            self.encoding.states[number] = output.detach()

    def _local(
        self, original: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], part: Part | None
    ) -> Tensor:
        """Logical states through a block, or one half of it, that runs on the tokens that remain."""
        layout = self.encoding.layout
        inner: Tensor = hidden
        if layout is not None:
            last = self._physical
            inner = last[1] if last and last[0] is hidden and last[2] is layout else layout.gather(hidden)
            kwargs = cut_along(kwargs, layout) if self.needs.tower.packed else kwargs
        self.part = part
        try:
            call: dict[str, Any] = {} if args else {"hidden_states": inner}
            inner = original(*((inner, *args[1:]) if args else ()), **{**kwargs, **call})
        finally:
            self.part = None
        if layout is None:
            return inner
        output = layout.put(inner, hidden)
        self._physical = (output, inner, layout)
        return output

    def mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """The mask of a block's attention on the tokens that remain, made once for each cut."""
        layout = self.encoding.layout
        assert layout is not None
        if layout is not self._masked:
            self._masks, self._masked = {}, layout
        if id(mask) not in self._masks:
            self._masks[id(mask)] = bidirectional_mask(mask, layout, hidden, self.needs.mask_kind), mask
        local: Tensor | None = self._masks[id(mask)][0]
        return local

    def _cut(self, cut: Cut, states: Tensor) -> Tensor:
        """Let a stage decide about logical `states` (R, T, W); returns them with what was merged."""
        encoding, asked = self.encoding, None
        if cut.keep is not None:
            asked = tuple(map(cut.keep.count, encoding.patches.made, encoding.counts))
        view = TowerView(encoding, cut, states, encoding.present, encoding.counts, asked)
        answer = decide(cut.stage, view, self.needs.traced)
        selection = answer.selection
        if selection.crop:
            raise Unsupported(f"{cut.label}: crop=True is about the KV cache; there is none at '{cut.site}'")
        if selection.extras is not None:
            raise Unsupported(f"{cut.label}: extras are states of the decoder's width; there are none at '{cut.site}'")
        if selection.weights is not None and cut.site.place == "pixels":
            raise Unsupported(f"{cut.label} merges, and pixels are no states that could be merged; cut at 'vision.0'")
        if selection.sizes is not None and not self.needs.takes_masks:
            raise Unsupported(
                f"{cut.label}: sizes add to attention logits, and this vision tower takes no masks for them"
            )
        keep = torch.zeros_like(encoding.present).scatter_(1, view.ordinals, selection.keep)
        if selection.weights is not None:
            patches = encoding.patches
            every = patches.take(states)
            values = merged(selection.weights, view.pick(every), view.sizes)
            index = view.ordinals.to(values.device).view(*view.ordinals.shape, *[1] * (values.ndim - 2))
            states = patches.put(every.scatter(1, index.expand_as(values), values), keep, states)
        sizes = None if selection.sizes is None else _resized(encoding, view, selection)
        told = Detail(view.ordinals, view.counts, selection, answer.scores) if self.needs.traced else None
        encoding.decisions.append(Decision(cut, encoding.present, keep, asked, sizes, None, answer.unsound, told))
        encoding.drop(keep)
        return states


def _resized(encoding: Encoding, view: TowerView, selection: Selection) -> Tensor:
    assert selection.sizes is not None
    before = encoding.sizes.to(torch.promote_types(selection.sizes.dtype, torch.float32))
    sizes = torch.where(selection.keep, selection.sizes.to(before), take(before, view.ordinals, 1))
    encoding.sizes = before.scatter(1, view.ordinals, sizes)
    return encoding.sizes


def _block_forward(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        return original(*args, **kwargs) if run is None else run.run_block(number, original, args, kwargs)

    return forward


def _attention_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)
    pair = True  # whether it gives its weights, too, as it did when the block ran without its MLP

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal pair
        run = _RUN.get()
        if run is None:
            return original(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        hidden = arguments[names[0]]
        if run.part == "mlp":
            return (torch.zeros_like(hidden), None) if pair else torch.zeros_like(hidden)
        if run.encoding.layout is not None and run.needs.takes_masks:
            arguments["attention_mask"] = run.mask(arguments.get("attention_mask"), hidden)
        result = original(**arguments)
        pair = isinstance(result, tuple)
        return result

    return forward


def _mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None and run.part == "attention":
            return torch.zeros_like(hidden)
        return original(hidden, *args, **kwargs)

    return forward


def _pool_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is not None:
            run.encoding.pool_states = hidden.detach()
        return original(hidden, *args, **kwargs)

    return forward


def _projector_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(features: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None:
            return original(features, *args, **kwargs)
        return run.run_projector(lambda tokens: original(tokens, *args, **kwargs), features)

    return forward


def _merger_forward(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None or not run.encoding.decisions:
            return original(states, *args, **kwargs)
        return run.run_merger(number, lambda tokens: original(tokens, *args, **kwargs), states)

    return forward


def _embedding_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None:
            return original(pixels, *args, **kwargs)
        return run.run_embedding(lambda patches: original(patches, *args, **kwargs), pixels)

    return forward
