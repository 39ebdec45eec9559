"""One call of an encoding method: the tower runs on the tokens that its cuts leave, and what was asked for is noted.

Between blocks states keep their logical shape (R, T, W), so that whatever picks hidden states by number still fits; a
block gathers the tokens that are left, runs on them and puts them back. Between attention and MLP a block is run in two
halves: with an MLP that adds nothing, then, on what the cut left, with an attention that adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from prunekit.engine.asking import decide
from prunekit.engine.attention.tower_rows import Attended, pooled_row, read
from prunekit.engine.prompt.visual_inputs import Pictures
from prunekit.engine.tower.packed import as_row, cut_along
from prunekit.engine.tower.tokens import Left, Units
from prunekit.engine.tower.view import TowerView
from prunekit.errors import Unsupported
from prunekit.families.base import Modality
from prunekit.pipeline.stage import Cut
from prunekit.strategy.decisions import Selection
from prunekit.strategy.tower_requests import POOL, EncoderRows, EncoderSpec, Features

if TYPE_CHECKING:
    from prunekit.engine.tower.plan import TowerPlan


@dataclass(frozen=True)
class TowerDecision:
    """A cut's answer, kept on its device until somebody asks for a report.

    left, keep: bool (B, V) over all visual tokens of each picture, those that entered and that stayed; tokens without
    a patch are in neither. sizes: float (B, V) where the cut gave any.
    """

    cut: Cut
    left: Tensor
    keep: Tensor
    sizes: Tensor | None


class TowerRun:
    """The tower during one call of an encoding method. arguments: of that call, by name."""

    def __init__(self, plan: TowerPlan, modality: Modality, arguments: Mapping[str, Any]) -> None:
        self.plan, self.modality, self.arguments = plan, modality, arguments
        self.shape: tuple[int, int] | None = None
        self.left: Left | None = None
        self.decisions: list[TowerDecision] = []
        self.stage_states: dict[int, dict[Any, Any]] = {}
        # What was read of a block's attention, in one call or several, and the tokens that were left then.
        self.seen: dict[EncoderSpec, tuple[Left | None, list[Tensor]]] = {}
        self.states: dict[int, Tensor] = {}
        self.pool_states: Tensor | None = None
        self.block_tokens: dict[int, tuple[int, ...]] = {}
        self.only: Literal["attention", "mlp"] | None = None
        self._physical: tuple[Tensor, Tensor, Left] | None = None
        self._masks: dict[int, tuple[Any, Any]] = {}

    @cached_property
    def units(self) -> Units:
        """The visual tokens in tokens of the tower; known once the first block has been called."""
        if self.shape is None:
            raise Unsupported("the vision tower's blocks have not run, so there is nothing to read of it or to cut")
        rows, tokens = self.shape
        tower = self.plan.tower
        if tower.patch_groups is None:
            return Units.plain(rows, tokens, tower.leading).to(self.device)
        tables = tower.patch_groups(self.modality.name, self.arguments, rows, tokens - tower.leading)
        return Units.of(tables, tokens, tower.leading).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where decisions are kept."""
        pixels = self.arguments.get(self.modality.pixels)
        return pixels.device if isinstance(pixels, Tensor) else torch.device("cpu")

    @cached_property
    def present(self) -> Tensor:
        """Which visual tokens are left: bool (B, V). Rebound by every cut."""
        return self.units.there

    @cached_property
    def sizes(self) -> Tensor:
        """Sizes of the visual tokens, float (B, V). Rebound by cuts that give sizes."""
        return torch.ones(self.units.there.shape, device=self.device)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many visual tokens are left of each picture. Rebound by every cut."""
        return self.units.made

    @cached_property
    def pictures(self) -> Pictures:
        """The pictures that are being encoded."""
        return Pictures(self.modality, self.arguments, self.units.counts)

    @property
    def places(self) -> list[Tensor]:
        """As `Modality.coords`."""
        return self.pictures.places

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """One number for each picture, from its pixels alone."""
        sums = self.pictures.checksums
        if sums is None:
            raise Unsupported("the pixels of each picture cannot be told apart, so a stage in the tower has no `seed`")
        return tuple(number & (1 << 56) - 1 for number in sums)

    def run_block(self, number: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run block `number` on the tokens that are left, with its cuts."""
        hidden = args[0] if args else kwargs["hidden_states"]
        flat, original = hidden.ndim == 2, as_row(original, hidden)
        hidden = hidden[None] if flat else hidden
        self.begin(hidden)
        self.block_tokens[number] = self._lengths()
        mids = self.plan.cuts_at(number, "mid")
        if mids:
            hidden = self._local(original, hidden, args, kwargs, "attention")
            for cut in mids:
                hidden = self.cut(cut, hidden)
        output = self._local(original, hidden, args, kwargs, "mlp" if mids else None)
        self._keep_state(number, output)
        for cut in self.plan.cuts_at(number, "after"):
            output = self.cut(cut, output)
            self._keep_state(number, output)
        return output[0] if flat else output

    def _keep_state(self, number: int, output: Tensor) -> None:
        if number in self.plan.kept_states:
            self.states[number] = output.detach()

    def begin(self, hidden: Tensor) -> None:
        """Take the shape of the tower's batch from the states of its first block."""
        if self.shape is None:
            self.shape = (hidden.shape[0], hidden.shape[1])

    def settle(self) -> bool:
        """After the call: whether the tower's batch is known, be it from what was read alone."""
        if self.shape is None:
            seen = [torch.cat(found, 1) for _, found in self.seen.values()]
            seen += [] if self.pool_states is None else [self.pool_states]
            self.shape = (seen[0].shape[0], seen[0].shape[1]) if seen else None
        return self.shape is not None

    @property
    def whole(self) -> tuple[int, ...]:
        """Tokens of each row of the tower's batch before any cut; in a packed tower, of each picture."""
        if self.plan.tower.packed:
            return tuple(count * self.units.cells.shape[-1] for count in self.units.made)
        assert self.shape is not None
        return (self.shape[1],) * self.shape[0]

    def _lengths(self) -> tuple[int, ...]:
        """Tokens of each row that are left; in a packed tower, of each picture."""
        if self.plan.tower.packed:
            return tuple(count * self.units.cells.shape[-1] for count in self.counts)
        return self.whole if self.left is None else self.left.lengths

    def _local(
        self, original: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
        only: Literal["attention", "mlp"] | None,
    ) -> Tensor:  # fmt: skip
        """Logical states through a block, or one half of it, that runs on what is left."""
        left = self.left
        inner: Tensor = hidden
        if left is not None:
            known = self._physical
            inner = known[1] if known and known[0] is hidden and known[2] is left else left.gather(hidden)
            kwargs = cut_along(kwargs, left) if self.plan.tower.packed else kwargs
        self.only = only
        try:
            call: dict[str, Any] = {} if args else {"hidden_states": inner}
            inner = original(*((inner, *args[1:]) if args else ()), **{**kwargs, **call})
        finally:
            self.only = None
        if left is None:
            return inner
        output: Tensor = left.put(inner, hidden)
        self._physical = (output, inner, left)
        return output

    def mask(self, given: Tensor | None, hidden: Tensor) -> Tensor | None:
        """The mask of a block's attention on what is left, made once for each cut."""
        assert self.left is not None
        key = id(given)
        if key not in self._masks:
            self._masks[key] = self.left.mask(given, hidden, self.plan.additive), given
        found: Tensor | None = self._masks[key][0]
        return found

    def cut(self, cut: Cut, states: Tensor) -> Tensor:
        """Let a stage decide about logical `states` (R, T, W); returns them with what was merged."""
        units, wanted = self.units, None
        if cut.keep is not None:
            wanted = tuple(map(cut.keep.count, units.made, self.counts))
        view = TowerView(self, cut, states, self.present, self.counts, wanted)
        selection = decide(cut.stage, view)  # type: ignore[arg-type]
        if selection.crop:
            raise Unsupported(f"{cut.label}: crop=True is about the KV cache; there is none at '{cut.site}'")
        keep = torch.zeros_like(self.present).scatter_(1, view.ordinals, selection.keep & view.valid)
        if selection.sizes is not None and not self.plan.takes_masks:
            raise Unsupported(
                f"{cut.label}: sizes add to attention logits, and this vision tower takes no masks for them"
            )
        if selection.weights is not None:
            states = self._merge(states, view, selection)
        sizes = None if selection.sizes is None else self._resize(view, selection)
        self.decisions.append(TowerDecision(cut, self.present, keep, sizes))
        self._drop(keep)
        return states

    def _merge(self, states: Tensor, view: TowerView, selection: Selection) -> Tensor:
        """Weighted sums of visual tokens in the places of those that stay, patch by patch."""
        assert selection.weights is not None
        index = view.ordinals.to(states.device)
        patches = self.units.gather(states)
        shape = (*index.shape, *[1] * (patches.ndim - 2))
        inside = patches.gather(1, index.view(shape).expand(*index.shape, *patches.shape[2:]))
        inside = inside.masked_fill(~view.valid.to(states.device).view(shape), 0)
        weights = selection.weights[..., : index.shape[1]].to(states.device, states.dtype)
        merged = (weights @ inside.flatten(2)).view_as(inside)
        values = patches.scatter(1, index.view(shape).expand_as(merged), merged)
        chosen = torch.zeros_like(self.present).scatter_(1, view.ordinals, selection.keep & view.valid)
        return self.units.put(values, chosen, states)

    def _resize(self, view: TowerView, selection: Selection) -> Tensor:
        assert selection.sizes is not None
        before = self.sizes.to(torch.promote_types(selection.sizes.dtype, torch.float32))
        given = torch.where(selection.keep & view.valid, selection.sizes.to(before), before.gather(1, view.ordinals))
        self.sizes = before.scatter(1, view.ordinals, given)
        return self.sizes

    def _drop(self, keep: Tensor) -> None:
        """Rebind what is left; one read back from the device."""
        assert self.shape is not None
        rows, tokens = self.shape
        gone = self.units.cells[self.units.there & ~keep]
        there = torch.ones(rows * tokens, dtype=torch.bool, device=keep.device)
        there = there.index_fill(0, gone.flatten(), False).view(rows, tokens)
        numbers = torch.cat([there.sum(1), keep.sum(1)]).tolist()
        lengths, self.counts = numbers[:rows], tuple(numbers[rows:])
        self.present, self._masks, sizes = keep, {}, None
        if any(decision.sizes is not None for decision in self.decisions):
            cells = self.units.cells[keep]
            spread = self.sizes[keep][:, None].expand_as(cells)
            sizes = torch.ones(rows * tokens, dtype=self.sizes.dtype, device=keep.device)
            sizes = sizes.index_put((cells.flatten(),), spread.flatten()).view(rows, tokens)
        if sizes is not None or min(lengths) < tokens:
            self.left = Left.of(there, lengths, sizes)

    def take(self, block: int, seen: Attended) -> None:
        """Note what is asked of a block's attention."""
        for spec in self.plan.reads.get(block, ()):
            self.seen.setdefault(spec, (self.left, []))[1].append(read(cast("Any", spec), seen))

    def tokens(self, spec: EncoderSpec) -> Tensor:
        """What was noted for a resolved `spec` of all tokens of the tower, (R, T, ...)."""
        if isinstance(spec, Features):
            return self.states[spec.layer or 0]
        if isinstance(spec, EncoderRows) and spec.query == POOL:
            row = self._pooled()
            return row.mean(1) if spec.heads == "mean" else row.sum(1) if spec.heads == "sum" else row.transpose(1, 2)
        if spec not in self.seen:
            raise Unsupported(
                f"{spec} could not be read: the block's attention did not ask transformers' AttentionInterface for its "
                "kernel; use stages that need no attention of the vision tower"
            )
        left, parts = self.seen[spec]
        found = torch.cat(parts, dim=1)
        if left is None:
            return found
        assert self.shape is not None
        if left.valid is not None:
            found = found.masked_fill(~left.valid.to(found.device).view(*left.valid.shape, *[1] * (found.ndim - 2)), 0)
        return left.put(found, found.new_zeros(found.shape[0], self.shape[1], *found.shape[2:]))

    def _pooled(self) -> Tensor:
        if self.pool_states is None or self.plan.tower.pool is None:
            raise Unsupported("the pooling head of the vision tower did not run, so there is no row of its query")
        return pooled_row(self.plan.tower.pool, self.pool_states)

    def table(self, spec: EncoderSpec) -> Tensor:
        """What was noted for a resolved `spec`: of all visual tokens, (B, V, ...), or of CLS tokens, (B, E, ...)."""
        found = self.tokens(spec)
        if getattr(spec, "of", "patches") == "patches":
            return self.units.mean(found)
        rows = self.units.rows
        table = found.new_zeros(len(rows), max(map(len, rows)), *found.shape[2:])
        for picture, here in enumerate(rows):
            table[picture, : len(here)] = found[list(here), 0]
        return table
