"""A vision tower and its projector on the tokens that cuts leave, put in place for the length of a `with` block.

Between blocks states keep their logical shape (R, T, W), so that whatever picks hidden states by number still fits; a
block takes the tokens that remain, runs on them and puts them back. Between attention and MLP a block is run in two
halves: with an MLP that adds nothing, then, on what the cut left, with an attention that adds nothing. A projector that
maps single tokens gets those that visual tokens still need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit.engine.asking import decide
from prunekit.engine.attention import tap
from prunekit.engine.overrides import Overrides
from prunekit.engine.tokens.layout import Layout, take
from prunekit.engine.tokens.masks import bidirectional_mask
from prunekit.engine.tokens.merges import merged
from prunekit.engine.tower.encoding import Encoding
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.packed import as_row, cut_along
from prunekit.engine.tower.record import Decision
from prunekit.engine.tower.view import TowerView
from prunekit.engine.tracing import as_it_is
from prunekit.errors import Unsupported
from prunekit.families.base import Modality
from prunekit.pipeline.stage import Cut
from prunekit.strategy.decisions import Selection

Part = Literal["attention", "mlp"]
# Not a field of the tower: threads may encode at once under one block, each in a context of its own.
_RUN: ContextVar[TowerRun | None] = ContextVar("prunekit_tower", default=None)


def override(overrides: Overrides, needs: TowerNeeds) -> None:
    """Override the blocks of the tower that need it, and the projector behind cuts."""
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
    if needs.cuts and tower.projector is not None:
        overrides.replace(tower.projector, "forward", _projector_forward)


@contextmanager
def encoding(needs: TowerNeeds, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[Encoding]:
    """Around a call of an encoding method with these arguments. Raises Unsupported for calls that do not fit."""
    needs.check_call(arguments)
    if needs.cuts and torch.is_grad_enabled() and any(map(_replays, needs.tower.layers)):
        raise Unsupported(
            "gradient checkpointing would run blocks of the vision tower again, without their cuts; switch it off "
            "for the tower, which pruning makes cheaper, or cut at 'encoder'"
        )
    state = Encoding(needs, modality, arguments)
    blocks = {number: getattr(needs.tower.layers[number], needs.tower.attention) for number in needs.reads}
    token = _RUN.set(TowerRun(state))
    try:
        with tap.tapped({block: partial(state.take, number) for number, block in blocks.items()}):
            yield state
    finally:
        _RUN.reset(token)


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

    def run_block(self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run block `number` on the tokens that remain, with its cuts."""
        encoding = self.encoding
        hidden = args[0] if args else kwargs["hidden_states"]
        flat, original = hidden.ndim == 2, as_row(original, hidden)
        hidden = hidden[None] if flat else hidden
        encoding.shape = encoding.shape or (hidden.shape[0], hidden.shape[1])
        encoding.block_tokens[number] = encoding.lengths
        mids = self.needs.cuts_at(number, "mid")
        if mids:
            hidden = self._local(original, hidden, args, kwargs, "attention")
            for cut in mids:
                hidden = self._cut(cut, hidden)
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
        assert self.encoding.shape is not None, "a cut has decided"
        rows, tokens = self.encoding.shape
        if features.ndim != 3 or len(features) != rows or features.shape[1] not in (tokens, tokens - 1):
            return original(features)
        flat = features.flatten(0, 1)
        index = self.encoding.to_project(tokens - features.shape[1]).to(flat.device)
        if len(index) == len(flat):
            return original(features)
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
        selection = decide(cut.stage, view)
        if selection.crop:
            raise Unsupported(f"{cut.label}: crop=True is about the KV cache; there is none at '{cut.site}'")
        if selection.extras is not None:
            raise Unsupported(f"{cut.label}: extras are states of the decoder's width; there are none at '{cut.site}'")
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
        encoding.decisions.append(Decision(cut, encoding.present, keep, asked, sizes))
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

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None or (run.part != "mlp" and run.encoding.layout is None):
            return original(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        hidden = arguments[names[0]]
        if run.part == "mlp":
            return (torch.zeros_like(hidden), None) if hidden.ndim == 3 else torch.zeros_like(hidden)
        if run.needs.takes_masks:
            arguments["attention_mask"] = run.mask(arguments.get("attention_mask"), hidden)
        return original(**arguments)

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
        if run is None or not run.encoding.decisions:
            return original(features, *args, **kwargs)
        return run.run_projector(lambda tokens: original(tokens, *args, **kwargs), features)

    return forward
