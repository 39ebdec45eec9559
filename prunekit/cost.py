"""Exact prefill FLOPs and KV bytes from token counts: of the decoder, and of the vision tower with its projector.

One multiply-add is two FLOPs. A decoder layer that n tokens enter costs `2 * params * n` for its matrix products and
`4 * n^2 * heads * head_dim` for the two products of attention, counted as the full square; the sum equals what
`torch.utils.flop_counter.FlopCounterMode` counts on the language model without its head. Where m of n tokens query
(the others are frozen), attention costs `4 * m * n * heads * head_dim`, and the output projection and the MLP are
counted for m. A layer that attends to another one's keys and values projects and holds none; one with a recurrent state
costs `2 * params * n` for the matrices and convolutions of its mixer, without the recurrence itself. What the stages'
own decisions cost is in these figures as far as they say it, as routers do (a method `flops`); it is in every measured
time.

The vision tower and the projector are figures of their own, in the same way: the patch embedding for each patch, blocks
with the square of each part that attends to itself (a crop, a video frame, a window; images that share one sequence
behind a mask are counted each for itself), the pooling head where it runs, and the modules that make visual tokens. A
budget and `prefill_flops` are of the decoder; `whole_flops_fraction` is of both. The language-model head is in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from prunekit.strategy.decisions import LayerAction, LayerPlan, LayerShape, ModelShape, TowerParams

# What FLOPs and their fractions are of, for whoever reads a record: those of the decoder, and of the whole prefill.
FLOPS_OF = "prefill of the decoder's layers, with the decisions that strategies price; not tower, projector and head"
WHOLE_FLOPS_OF = "the same, and the vision tower with its projector, from pixels on; not the head"


@dataclass(frozen=True)
class Work:
    """What one decoder layer did for one sample at prefill.

    tokens: that entered. visual: of these, visual ones. mlp: that went through the MLP. keys: that those which entered
    could attend to; None: to each other.
    """

    action: LayerAction
    tokens: int
    visual: int
    mlp: int
    keys: int | None = None


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
class Area:
    """Tokens of a vision tower that attend to each other in one block: a crop, a frame, a window.

    visual: visual tokens whose patches are among them. fixed: tokens that stay whatever leaves: leading ones such as
    CLS, and patches of no visual token. times: how many such areas there are.
    """

    visual: int
    fixed: int = 0
    times: int = 1


@dataclass(frozen=True)
class TowerInput:
    """What a vision tower gets of the images or videos of one prompt, before anything is cut.

    inputs: of each image or video the visual tokens that the decoder gets, and those of them that are made of no patch,
    such as newlines. group: patches of each of the others. blocks: of each block the areas within which tokens attend.
    rows: crops or frames that are rows of the tower's batch, 0 where it takes one sequence. tokens: of all rows
    together. mapped: of those of one row the ones that come to a projector that maps them one by one. apart: patches
    that leave before the tower are not embedded.
    """

    inputs: tuple[tuple[int, int], ...]
    group: int
    blocks: tuple[tuple[Area, ...], ...]
    rows: int
    tokens: int
    mapped: int = 0
    apart: bool = False

    @property
    def visual(self) -> int:
        """Visual tokens of the prompt."""
        return sum(visual for visual, _ in self.inputs)

    @property
    def blank(self) -> int:
        """Those of them that are made of no patch."""
        return sum(blank for _, blank in self.inputs)


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
    shape: ModelShape | LayerShape,
    tokens: int,
    action: LayerAction = LayerAction.RUN,
    *,
    visual: int = 0,
    mlp: int | None = None,
    keys: int | None = None,
) -> int:
    """FLOPs of decoder layer `layer`, which `tokens` tokens enter at prefill.

    shape: of the layer, or of a model whose layers are all alike. visual: the visual ones among the tokens, which
    matter where they are frozen. mlp: those that go through the MLP; None: all that it runs for. keys: as in `Work`.
    """
    layer = shape.of(0) if isinstance(shape, ModelShape) else shape
    moving = tokens - visual if action is LayerAction.FREEZE else tokens
    projections = layer.attention_params - layer.output_params
    fed = moving * action.feeds_mlp if mlp is None else mlp
    projected = moving * action.attends if layer.reads_kv else tokens * action.writes_kv
    products = 4 * moving * (tokens if keys is None else keys) * layer.heads * layer.head_dim
    attention = (2 * layer.output_params * moving + products) * action.attends
    runs = moving * (action.attends or action.feeds_mlp)
    others = 2 * (layer.other_params * runs + layer.early_params * max(projected - runs, 0))
    return 2 * projections * projected + attention + 2 * layer.mlp_params * fed + others


def decode_flops(shape: ModelShape, keys: Sequence[int], plan: LayerPlan | None = None) -> tuple[int, ...]:
    """FLOPs of each decoder layer for one decoded token that attends to `keys[l]` tokens in layer l, itself included.

    plan: None: all layers run.
    """
    plan = plan or LayerPlan()
    return tuple(
        layer_flops(shape.of(layer), 1, plan.decoding(layer), keys=count) for layer, count in enumerate(keys)
    )


def tower_flops(params: TowerParams, work: TowerWork) -> int:
    """FLOPs of a vision tower and its projector, from pixels to image features."""
    return vision_flops(params, work) + projector_flops(params, work)


def projector_flops(params: TowerParams, work: TowerWork) -> int:
    """FLOPs of the modules that make visual tokens of what a tower gives: its projector and mergers."""
    merged = sum(2 * weights * tokens for weights, tokens in zip(params.mergers, work.merged, strict=True))
    return 2 * params.projector * work.projected + merged


def vision_flops(params: TowerParams, work: TowerWork) -> int:
    """FLOPs of a vision tower without its projector and mergers."""
    blocks = sum(
        2 * params.attention * tokens + 4 * params.width * pairs + 2 * params.mlp * fed
        for tokens, pairs, fed in work.blocks
    )
    square = params.width**2
    # One learned query a row; keys and values of every token.
    pool = 2 * (params.pool - 2 * square) * work.pools + (4 * square + 4 * params.width) * work.pooled
    return 2 * params.patch * work.patches + blocks + pool


def prefill_flops(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan | None = None) -> int:
    """FLOPs of the language model's prefill of one sample, whose layer l is entered by `layer_tokens[l]` tokens."""
    plan = plan or LayerPlan()
    return sum(layer_flops(shape.of(layer), tokens, plan[layer]) for layer, tokens in enumerate(layer_tokens))


def dense_flops(shape: ModelShape, tokens: int, last: int = 0) -> int:
    """FLOPs of the prefill of a prompt of `tokens` tokens when nothing is pruned.

    last: how many tokens, the last ones, enter layers from `shape.last_only` on; 0: all.
    """
    few = shape.layers if shape.last_only is None or not last else shape.last_only
    return sum(
        layer_flops(shape.of(layer), tokens if layer < few else min(last, tokens), keys=tokens)
        for layer in range(shape.layers)
    )


def work_flops(shape: ModelShape, work: Sequence[Work]) -> int:
    """FLOPs of the language model's prefill of one sample, layer by layer."""
    return sum(
        layer_flops(shape.of(layer), one.tokens, one.action, visual=one.visual, mlp=one.mlp, keys=one.keys)
        for layer, one in enumerate(work)
    )


def kv_tokens(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan) -> tuple[int, ...]:
    """KV entries that each layer holds for one sample after the prefill, when nothing is cropped.

    A layer that attends to another one's, or has a recurrent state in their place, holds none.
    """
    layers = range(len(layer_tokens))
    own = [shape.kv_source(layer) == layer and layer not in shape.recurrent for layer in layers]
    held = (own[layer] and plan[layer].writes_kv and plan.decoding(layer).writes_kv for layer in layers)
    return tuple(tokens if holds else 0 for tokens, holds in zip(layer_tokens, held, strict=True))


def stock_kv_tokens(shape: ModelShape, tokens: int) -> tuple[int, ...]:
    """KV entries that each layer of the dense model holds after a prompt of `tokens` tokens: where it attends within a
    window, those that the next token still sees.
    """
    every = kv_tokens(shape, [tokens] * shape.layers, LayerPlan())
    return tuple(
        count if (window := shape.window_of(layer)) is None else min(count, window - 1)
        for layer, count in enumerate(every)
    )


def cost_of(
    shape: ModelShape,
    work: Sequence[Sequence[Work]],
    kv_tokens: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    itemsize: int,
    decisions: Sequence[int] | None = None,
    last: int = 0,
    towers: Sequence[Sequence[tuple[TowerWork, TowerWork]]] | None = None,
) -> Cost:
    """The cost of a batch: per sample, what each layer did and holds, against its `prompt_tokens` in all layers.

    itemsize: bytes of one number in the KV cache. decisions: FLOPs of the stages' decisions per sample; None: no stage
    says any. last: as for `dense_flops`. towers: per sample and image, what the vision tower did, and does without any
    cut; None: not known.
    """
    params = None if shape.tower is None else shape.tower.work
    sums: list[tuple[int, ...] | None] = [None, None]
    if params is not None and towers is not None:
        sums = [tuple(sum(tower_flops(params, one[of]) for one in row) for row in towers) for of in (0, 1)]
    decided = tuple(decisions or [0] * len(work))
    widths = [kv_bytes(shape, layer, itemsize) for layer in range(shape.layers)]
    return Cost(
        prefill_flops=tuple(work_flops(shape, row) + own for row, own in zip(work, decided, strict=True)),
        dense_prefill_flops=tuple(dense_flops(shape, n, last) for n in prompt_tokens),
        kv_bytes=tuple(sum(map(mul, widths, row)) for row in kv_tokens),
        dense_kv_bytes=tuple(sum(map(mul, widths, stock_kv_tokens(shape, n))) for n in prompt_tokens),
        decision_flops=decided,
        tower_flops=sums[0],
        dense_tower_flops=sums[1],
    )


def kv_bytes(shape: ModelShape, layer: int, itemsize: int) -> int:
    """Bytes that one token adds to the KV cache of a layer, in numbers of `itemsize` bytes."""
    return shape.of(layer).kv_width * itemsize * (shape.kv_source(layer) == layer)
