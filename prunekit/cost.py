"""Exact prefill FLOPs and KV bytes from token counts: of the decoder, and of the vision tower with its projector.

One multiply-add is two FLOPs. A decoder layer that n tokens enter costs `2 * params * n` for its matrix products and
`4 * n^2 * heads * head_dim` for the two products of attention, counted as the full square; the sum equals what
`torch.utils.flop_counter.FlopCounterMode` counts on the language model without its head. Where m of n tokens query
(the others are frozen), attention costs `4 * m * n * heads * head_dim`, and the output projection and the MLP are
counted for m. What the stages' own decisions cost is in these figures as far as they say it, as routers do (a method
`flops`); it is in every measured time.

The vision tower and the projector are figures of their own, in the same way: the patch embedding for each patch, blocks
with the square of each part that attends to itself (a crop, a video frame, a window; images that share one sequence
behind a mask are counted each for itself), the pooling head where it runs, and the modules that make visual tokens. A
budget and `prefill_flops` are of the decoder; `whole_flops_fraction` is of both. The language-model head is in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.strategy.decisions import LayerAction, LayerPlan, ModelShape, TowerParams

# What FLOPs and their fractions are of, for whoever reads a record: those of the decoder, and of the whole prefill.
FLOPS_OF = "prefill of the decoder's layers, with the decisions that strategies price; not tower, projector and head"
WHOLE_FLOPS_OF = "the same, and the vision tower with its projector, from pixels on; not the head"


@dataclass(frozen=True)
class Work:
    """What one decoder layer did for one sample at prefill.

    tokens: that entered. visual: of these, visual ones. mlp: that went through the MLP.
    """

    action: LayerAction
    tokens: int
    visual: int
    mlp: int


@dataclass(frozen=True)
class TowerWork:
    """What the vision tower and its projector did for one image or video, or for several together.

    patches: that became states. blocks: of each block the tokens that attended, the sum of the squares of the numbers
    that attended to each other, and the tokens that went through the MLP. projected: tokens that the projector mapped;
    merged: visual tokens that each of the mergers made of patches. pools, pooled: rows of the pooling head, and the
    tokens in them.
    """

    patches: int
    blocks: tuple[tuple[int, int, int], ...]
    projected: int = 0
    merged: tuple[int, ...] = ()
    pools: int = 0
    pooled: int = 0


@dataclass(frozen=True)
class Cost:
    """What the prefill of a prompt batch cost, and what it would have cost dense; one entry per sample.

    Prefill FLOPs are those of the decoder's layers: vision tower and projector have figures of their own.

    decision_flops: the part of `prefill_flops` that the stages' own decisions took, as far as they say.
    tower_flops, dense_tower_flops: of the vision tower and the projector; None where they are not known, as for a model
    without a family file, or features that were encoded outside of the block.
    """

    prefill_flops: tuple[int, ...]
    dense_prefill_flops: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    dense_kv_bytes: tuple[int, ...]
    decision_flops: tuple[int, ...] = ()
    tower_flops: tuple[int, ...] | None = None
    dense_tower_flops: tuple[int, ...] | None = None

    @property
    def flops_fraction(self) -> float:
        """Prefill FLOPs of the batch over those of the dense model."""
        return sum(self.prefill_flops) / sum(self.dense_prefill_flops)

    @property
    def whole_flops_fraction(self) -> float | None:
        """FLOPs of the whole prefill, from pixels to the last decoder layer, over those of the dense model.

        None where those of the tower are not known.
        """
        if self.tower_flops is None or self.dense_tower_flops is None:
            return None
        dense = sum(self.dense_prefill_flops) + sum(self.dense_tower_flops)
        return (sum(self.prefill_flops) + sum(self.tower_flops)) / dense

    @property
    def kv_fraction(self) -> float:
        """KV bytes of the batch over those of the dense model."""
        return sum(self.kv_bytes) / sum(self.dense_kv_bytes)


def layer_flops(
    shape: ModelShape,
    tokens: int,
    action: LayerAction = LayerAction.RUN,
    *,
    visual: int = 0,
    mlp: int | None = None,
) -> int:
    """FLOPs of one decoder layer that `tokens` tokens enter at prefill.

    visual: the visual ones among them, which matter where they are frozen. mlp: those that go through the MLP; None:
    all that it runs for.
    """
    moving = tokens - visual if action is LayerAction.FREEZE else tokens
    projections = shape.attention_params - shape.output_params
    fed = moving * action.feeds_mlp if mlp is None else mlp
    keys = 2 * projections * tokens * action.writes_kv
    attention = (2 * shape.output_params * moving + 4 * moving * tokens * shape.heads * shape.head_dim) * action.attends
    return keys + attention + 2 * shape.mlp_params * fed


def tower_flops(params: TowerParams, work: TowerWork) -> int:
    """FLOPs of a vision tower and its projector, from pixels to image features."""
    blocks = sum(
        2 * params.attention * tokens + 4 * params.width * pairs + 2 * params.mlp * fed
        for tokens, pairs, fed in work.blocks
    )
    square = params.width**2
    # One learned query a row; keys and values of every token.
    pool = 2 * (params.pool - 2 * square) * work.pools + (4 * square + 4 * params.width) * work.pooled
    merged = sum(2 * weights * tokens for weights, tokens in zip(params.mergers, work.merged, strict=True))
    return 2 * params.patch * work.patches + blocks + pool + 2 * params.projector * work.projected + merged


def prefill_flops(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan | None = None) -> int:
    """FLOPs of the language model's prefill of one sample, whose layer l is entered by `layer_tokens[l]` tokens."""
    plan = plan or LayerPlan()
    return sum(layer_flops(shape, tokens, plan[layer]) for layer, tokens in enumerate(layer_tokens))


def work_flops(shape: ModelShape, work: Sequence[Work]) -> int:
    """FLOPs of the language model's prefill of one sample, layer by layer."""
    return sum(layer_flops(shape, one.tokens, one.action, visual=one.visual, mlp=one.mlp) for one in work)


def kv_tokens(layer_tokens: Sequence[int], plan: LayerPlan) -> tuple[int, ...]:
    """KV entries that each layer holds for one sample after the prefill, when nothing is cropped."""
    held = (plan[layer].writes_kv and plan.decoding(layer).writes_kv for layer in range(len(layer_tokens)))
    return tuple(tokens if holds else 0 for tokens, holds in zip(layer_tokens, held, strict=True))


def cost_of(
    shape: ModelShape,
    work: Sequence[Sequence[Work]],
    kv_tokens: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    itemsize: int,
    decisions: Sequence[int] | None = None,
    towers: Sequence[Sequence[tuple[TowerWork, TowerWork]]] | None = None,
) -> Cost:
    """The cost of a batch: per sample, what each layer did and holds, against its `prompt_tokens` in all layers.

    itemsize: bytes of one number in the KV cache. decisions: FLOPs of the stages' decisions per sample; None: no stage
    says any. towers: per sample and image, what the vision tower did, and does without any cut; None: not known.
    """
    params = None if shape.tower is None else shape.tower.work
    sums: list[tuple[int, ...] | None] = [None, None]
    if params is not None and towers is not None:
        sums = [tuple(sum(tower_flops(params, one[of]) for one in row) for row in towers) for of in (0, 1)]
    decided = tuple(decisions or [0] * len(work))
    width = shape.kv_width * itemsize
    return Cost(
        prefill_flops=tuple(work_flops(shape, row) + own for row, own in zip(work, decided, strict=True)),
        dense_prefill_flops=tuple(prefill_flops(shape, [n] * shape.layers) for n in prompt_tokens),
        kv_bytes=tuple(width * sum(row) for row in kv_tokens),
        dense_kv_bytes=tuple(width * shape.layers * n for n in prompt_tokens),
        decision_flops=decided,
        tower_flops=sums[0],
        dense_tower_flops=sums[1],
    )
