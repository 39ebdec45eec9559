"""Exact prefill FLOPs and KV bytes from token counts.

One multiply-add is two FLOPs. A decoder layer that n tokens enter costs `2 * params * n` for its matrix products and
`4 * n^2 * heads * head_dim` for the two products of attention, counted as the full square; the sum equals what
`torch.utils.flop_counter.FlopCounterMode` counts on the language model without its head. Where m of n tokens query
(the others are frozen), attention costs `4 * m * n * heads * head_dim`, and the output projection and the MLP are
counted for m. A layer that attends to another one's keys and values projects and holds none; one with a recurrent state
costs `2 * params * n` for the matrices and convolutions of its mixer, without the recurrence itself. What the stages'
own decisions cost is in these figures as far as they say it, as routers do (a method `flops`); it is in every measured
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from prunekit.strategy.decisions import LayerAction, LayerPlan, LayerShape, ModelShape

# What FLOPs and their fractions are of, for whoever reads a record.
FLOPS_OF = "prefill of the decoder's layers, with the decisions that strategies price; not tower, projector and head"


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
class Cost:
    """What the prefill of a prompt batch cost, and what it would have cost dense; one entry per sample.

    FLOPs are those of the decoder's layers: vision tower, projector and language-model head are not in them.

    decision_flops: the part of `prefill_flops` that the stages' own decisions took, as far as they say.
    """

    prefill_flops: tuple[int, ...]
    dense_prefill_flops: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    dense_kv_bytes: tuple[int, ...]
    decision_flops: tuple[int, ...] = ()

    @property
    def flops_fraction(self) -> float:
        """Prefill FLOPs of the batch over those of the dense model."""
        return sum(self.prefill_flops) / sum(self.dense_prefill_flops)

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


def cost_of(
    shape: ModelShape,
    work: Sequence[Sequence[Work]],
    kv_tokens: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    itemsize: int,
    decisions: Sequence[int] | None = None,
    last: int = 0,
) -> Cost:
    """The cost of a batch: per sample, what each layer did and holds, against its `prompt_tokens` in all layers.

    itemsize: bytes of one number in the KV cache. decisions: FLOPs of the stages' decisions per sample; None: no stage
    says any. last: as for `dense_flops`.
    """
    decided = tuple(decisions or [0] * len(work))
    widths = [kv_bytes(shape, layer, itemsize) for layer in range(shape.layers)]
    return Cost(
        prefill_flops=tuple(work_flops(shape, row) + own for row, own in zip(work, decided, strict=True)),
        dense_prefill_flops=tuple(dense_flops(shape, n, last) for n in prompt_tokens),
        kv_bytes=tuple(sum(map(mul, widths, row)) for row in kv_tokens),
        dense_kv_bytes=tuple(sum(widths) * n for n in prompt_tokens),
        decision_flops=decided,
    )


def kv_bytes(shape: ModelShape, layer: int, itemsize: int) -> int:
    """Bytes that one token adds to the KV cache of a layer, in numbers of `itemsize` bytes."""
    return shape.of(layer).kv_width * itemsize * (shape.kv_source(layer) == layer)
