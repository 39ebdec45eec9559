"""The state of one call of an encoding method: which tokens of the tower remain, and what was recorded of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attention.attended import Attended
from prunekit.engine.attention.tower_rows import heads_together, pooled_row, read
from prunekit.engine.prompt.visual_inputs import VisualInputs
from prunekit.engine.tokens.layout import Layout, leftmost
from prunekit.engine.tower.effort import Effort
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.patches import Patches, layout_of
from prunekit.engine.tower.pixels import Resized
from prunekit.engine.tower.record import Decision, TowerRecord
from prunekit.errors import Unsupported
from prunekit.families.base import Modality
from prunekit.strategy.tower_requests import POOL, EncoderRows, EncoderSpec, Features


@dataclass
class Encoding:
    """The tower during one call of an encoding method. arguments: of that call, by name.

    shape: rows and tokens of the tower's batch, known once a block has been called. layout: of the tokens that remain;
    None: all. attended: what was read of a block's attention, in one call or several, and the layout then. states: the
    output of blocks, (R, T, W), by number. attending, passing: for each block that cuts made smaller, the visual tokens
    that remained in its attention and in its MLP; embedded: before all blocks; merged: at each of the mergers.
    projected: tokens of each row that came to the projector; fewer: not all of them were mapped. resized: the smaller
    images that the tower gets, whose arguments `arguments` then are.
    """

    needs: TowerNeeds
    modality: Modality
    arguments: Mapping[str, Any]
    shape: tuple[int, int] | None = None
    layout: Layout | None = None
    decisions: list[Decision] = field(default_factory=list)
    stage_states: dict[int, dict[Any, Any]] = field(default_factory=dict)
    attended: dict[EncoderSpec, tuple[Layout | None, list[Tensor]]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    pool_states: Tensor | None = None
    block_tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    attending: dict[int, Tensor] = field(default_factory=dict)
    passing: dict[int, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None
    merged: dict[int, Tensor] = field(default_factory=dict)
    projected: int = 0
    fewer: bool = False
    resized: Resized | None = None

    @cached_property
    def patches(self) -> Patches:
        """The visual tokens in tokens of the tower; known once the first block has been called."""
        if self.shape is None:
            raise Unsupported("the vision tower's blocks have not run, so there is nothing to read of it or to cut")
        return Patches.by(self.needs.tower, self.modality.name, self.arguments, *self.shape).to(self.device)

    @cached_property
    def images(self) -> list[Tensor]:
        """The images or videos as `Images.unpack` gives them."""
        holder = self.needs.tower.images
        assert holder is not None, "checked when the pipeline was bound"
        return holder.unpack(self.modality.name, self.arguments)

    @property
    def cells(self) -> tuple[int, ...]:
        """Visual tokens of each image or video of any size, from its pixels alone; of one size, 1."""
        holder = self.needs.tower.images
        if holder is None or holder.cell is None:
            return (1,) * len(self.images)
        return tuple(len(one) * (one.shape[-2] // holder.cell) * (one.shape[-1] // holder.cell) for one in self.images)

    @property
    def device(self) -> torch.device:
        """Where decisions are kept."""
        pixels = self.arguments.get(self.modality.pixels)
        return pixels.device if isinstance(pixels, Tensor) else torch.device("cpu")

    @cached_property
    def present(self) -> Tensor:
        """Which visual tokens remain: bool (B, V). Rebound by every cut."""
        return self.patches.present

    @cached_property
    def sizes(self) -> Tensor:
        """Sizes of the visual tokens, float (B, V). Rebound by cuts that give sizes."""
        return torch.ones(self.patches.present.shape, device=self.device)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many visual tokens remain of each image or video. Rebound by every cut."""
        return self.patches.made

    @cached_property
    def visual(self) -> VisualInputs:
        """The images or videos that are being encoded."""
        counts = self.cells if self.shape is None else self.patches.counts
        return VisualInputs(self.modality, self.arguments, counts)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """One number for each image or video, from its pixels alone."""
        sums = self.visual.checksums
        if sums is None:
            raise Unsupported("the pixels of each image cannot be told apart, so a stage in the tower has no `seed`")
        return tuple(number & (1 << 56) - 1 for number in sums)

    @property
    def whole(self) -> tuple[int, ...]:
        """Tokens of each row of the tower's batch before any cut; in a packed tower, of each image or video."""
        assert self.shape is not None
        return self._packed(self.patches.made) if self.needs.tower.packed else (self.shape[1],) * self.shape[0]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Those that remain. Rebound by every cut."""
        return self.whole

    def _packed(self, counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(count * self.patches.index.shape[-1] for count in counts)

    def drop(self, keep: Tensor) -> None:
        """Only the visual tokens in bool (B, V) remain; one read back from the device."""
        assert self.shape is not None
        rows, tokens = self.shape
        index = self.patches.index
        present = self.patches.tokens(keep, rows, tokens)
        numbers = torch.cat([present.sum(1), keep.sum(1)]).tolist()
        lengths, self.counts, self.present = numbers[:rows], tuple(numbers[rows:]), keep
        self.lengths = self._packed(self.counts) if self.needs.tower.packed else tuple(lengths)
        sizes = None
        if any(decision.sizes is not None for decision in self.decisions):
            spread = self.sizes[keep][:, None].expand_as(index[keep])
            sizes = torch.ones(rows * tokens, dtype=self.sizes.dtype, device=keep.device)
            sizes = sizes.index_put((index[keep].flatten(),), spread.flatten()).view(rows, tokens)
        if sizes is not None or min(lengths) < tokens:
            self.layout = layout_of(present, lengths, sizes)

    def to_project(self, skipped: int) -> Tensor:
        """Tokens that visual tokens still need of the projector, int64 (K,): leading ones, which may be visual tokens
        themselves, and patches of visual tokens that remain. K is on the host without another read-back.

        skipped: the projector's input is without so many first tokens of each row; the result counts without them.
        """
        assert self.shape is not None
        rows, tokens = self.shape
        index, leading = self.patches.index, self.needs.tower.leading
        uses = self.present[..., None].expand_as(index).flatten().to(torch.int32)
        needed = uses.new_zeros(rows * tokens).index_add_(0, index.flatten(), uses).view(rows, tokens) > 0
        needed[:, :leading] = True
        count = sum(self.counts) * index.shape[-1] + rows * max(leading - skipped, 0)
        return leftmost(needed[:, skipped:].reshape(1, -1), count)[0]

    @property
    def merging(self) -> Tensor:
        """Of the visual tokens, in the order of their patches in a packed tower, those that remain: int64 (K,)."""
        patches = self.patches
        order = patches.index[..., 0][patches.present].argsort()
        return leftmost(self.present[patches.present][order][None], sum(self.counts))[0]

    @property
    def embedding(self) -> Tensor:
        """Patches in the order of the pixels, those of a visual token together, that remain: int64 (K,)."""
        each = self.patches.index.shape[-1]
        kept = leftmost(self.present[self.patches.present][None], sum(self.counts))[0]
        return (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()

    def take(self, block: int, attended: Attended) -> None:
        """Record what is asked of a block's attention, whose queries see keys before and behind them."""
        attended = replace(attended, causal=False)
        for spec in self.needs.reads[block]:
            assert not isinstance(spec, Features)
            self.attended.setdefault(spec, (self.layout, []))[1].append(read(spec, attended))

    def tokens(self, spec: EncoderSpec) -> Tensor:
        """What was recorded for a resolved `spec` of all tokens of the tower, (R, T, ...)."""
        if isinstance(spec, Features):
            assert isinstance(spec.layer, int), "resolved"
            return self.states[spec.layer]
        if isinstance(spec, EncoderRows) and spec.query == POOL:
            if self.pool_states is None or self.needs.tower.pool is None:
                raise Unsupported("the pooling head of the vision tower did not run, so there is no row of its query")
            return heads_together(pooled_row(self.needs.tower.pool, self.pool_states), spec.heads)
        if spec not in self.attended:
            raise Unsupported(
                f"{spec} could not be read: the block's attention did not ask transformers' AttentionInterface for its "
                "kernel; use stages that need no attention of the vision tower"
            )
        layout, parts = self.attended[spec]
        states = torch.cat(parts, dim=1)
        if layout is None:
            return states
        return layout.put(states, states.new_zeros(states.shape[0], layout.length, *states.shape[2:]))

    def table(self, spec: EncoderSpec) -> Tensor:
        """What was recorded for a resolved `spec`: of all visual tokens, (B, V, ...), or of CLS tokens, (B, E, ...)."""
        states = self.tokens(spec)
        return self.patches.first_of(states) if getattr(spec, "of", "patches") == "cls" else self.patches.mean(states)

    @torch.no_grad()
    def record(self, features: Sequence[Tensor]) -> TowerRecord:
        """What goes along with the images or videos, after the call.

        features: as `Modality.features` gives them. Raises Unsupported when visual tokens are not those that the
        family's file says.
        """
        needs, counts = self.needs, tuple(map(len, features))
        if not needs.blocks:
            record = TowerRecord({spec: [one.detach() for one in features] for spec in needs.carried})
            return self._completed(record, counts)
        patches = self.patches
        if patches.counts != counts:
            raise Unsupported(
                f"the encoder made {counts} visual tokens, the family's file expects {patches.counts} of this tower; "
                "use stages that neither cut nor read the vision tower"
            )
        extras = kept = None
        if needs.extras and needs.tower.projector is not None:
            feature = self.states[needs.tower.feature_block][:, 0]
            extras = [needs.tower.project(feature[list(rows)]) for rows in patches.rows]
        if needs.cuts:
            kept = [row[:count] for row, count in zip(self.present | ~patches.present, counts, strict=True)]
        # A packed tower's one row holds all; it is counted input by input.
        rows = tuple((number,) for number in range(len(counts))) if needs.tower.packed else patches.rows
        blocks = range(len(needs.tower.layers) if needs.cuts else 0)
        entered = tuple(self.block_tokens.get(number, self.whole) for number in blocks)
        inputs = {spec: self._of_each(spec, features, counts) for spec in needs.carried}
        record = TowerRecord(inputs, extras, kept, tuple(self.decisions), patches.present, rows, entered)
        return self._completed(record, counts)

    def _completed(self, record: TowerRecord, counts: tuple[int, ...]) -> TowerRecord:
        """The record of complete images, with what was done for them. counts: visual tokens of those that were seen."""
        resized, needs = self.resized, self.needs
        complete = counts if resized is None or resized.anchors is None else resized.counts
        if needs.tower.embedding is not None:
            dense = Effort(needs.tower, self.modality, self.given, complete, self.shape, projected=self.projected)
            effort = replace(
                dense, arguments=self.arguments, counts=counts, attending=self.attending, passing=self.passing,
                embedded=self.embedded, merged=self.merged, remaining=self.present if needs.cuts else None,
                fewer=self.fewer,
            )  # fmt: skip
            record = replace(record, effort=effort, dense=dense)
        return record if resized is None else resized.record(record, complete)

    @property
    def given(self) -> Mapping[str, Any]:
        """The arguments with the complete images."""
        return self.arguments if self.resized is None else self.resized.given

    def learn(self, output: Any) -> None:
        """The tower's batch, where no block was overridden: from what was read of its attention, else from what an
        encoding method returned, which some towers have joined to visual tokens already.
        """
        if self.shape is not None:
            return
        states = [torch.cat(parts, 1) for _, parts in self.attended.values()]
        states += [] if self.pool_states is None else [self.pool_states]
        last = getattr(output, "last_hidden_state", None)
        if states:
            self.shape = states[0].shape[0], states[0].shape[1]
        elif self.needs.tower.embedding is not None and isinstance(last, Tensor) and last.ndim == 3:
            self.shape = last.shape[0], last.shape[1]

    def _of_each(self, spec: EncoderSpec, features: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        if isinstance(spec, Features) and spec.projected:
            return [one.detach() for one in features]
        cls = getattr(spec, "of", "patches") == "cls"
        lengths = map(len, self.patches.rows) if cls else counts
        return [row[:length] for row, length in zip(self.table(spec), lengths, strict=True)]
