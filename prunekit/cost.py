"""Exact prefill FLOPs and KV bytes from token counts.

One multiply-add is two FLOPs. A decoder layer that n tokens enter costs `2 * params * n` for its matrix products and
`4 * n^2 * heads * head_dim` for the two products of attention, counted as the full square; the sum equals what
`torch.utils.flop_counter.FlopCounterMode` counts on the language model without its head. Where m of n tokens query
(the others are frozen), attention costs `4 * m * n * heads * head_dim`, and the output projection and the MLP are
counted for m. A layer with a recurrent state costs `2 * params * n` for the matrices and convolutions of its mixer; the
recurrence itself is not counted. What the stages' own decisions cost is in these figures as far as they say it, as
routers do (a method `flops`); it is in every measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.strategy.decisions import LayerAction, LayerPlan, ModelShape

# What FLOPs and their fractions are of, for whoever reads a record.
FLOPS_OF = "prefill of the decoder's layers, with the decisions that strategies price; not tower, projector and head"


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
    shape: ModelShape,
    layer: int,
    tokens: int,
    action: LayerAction = LayerAction.RUN,
    *,
    visual: int = 0,
    mlp: int | None = None,
) -> int:
    """FLOPs of decoder layer `layer`, which `tokens` tokens enter at prefill.

    visual: the visual ones among them, which matter where they are frozen. mlp: those that go through the MLP; None:
    all that it runs for.
    """
    moving = tokens - visual if action is LayerAction.FREEZE else tokens
    projections = shape.attention_params - shape.output_params
    fed = moving * action.feeds_mlp if mlp is None else mlp
    if layer in shape.recurrent:
        return 2 * shape.mixer_params * tokens * action.attends + 2 * shape.mlp_params * fed
    keys = 2 * projections * tokens * action.writes_kv
    attention = (2 * shape.output_params * moving + 4 * moving * tokens * shape.heads * shape.head_dim) * action.attends
    return keys + attention + 2 * shape.mlp_params * fed


def prefill_flops(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan | None = None) -> int:
    """FLOPs of the language model's prefill of one sample, whose layer l is entered by `layer_tokens[l]` tokens."""
    plan = plan or LayerPlan()
    return sum(layer_flops(shape, layer, tokens, plan[layer]) for layer, tokens in enumerate(layer_tokens))


def work_flops(shape: ModelShape, work: Sequence[Work]) -> int:
    """FLOPs of the language model's prefill of one sample, layer by layer."""
    return sum(
        layer_flops(shape, layer, one.tokens, one.action, visual=one.visual, mlp=one.mlp)
        for layer, one in enumerate(work)
    )


def kv_tokens(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan) -> tuple[int, ...]:
    """KV entries that each layer holds for one sample after the prefill, when nothing is cropped."""
    writes = (plan[layer].writes_kv and plan.decoding(layer).writes_kv for layer in range(len(layer_tokens)))
    held = (writing and layer not in shape.recurrent for layer, writing in enumerate(writes))
    return tuple(tokens if holds else 0 for tokens, holds in zip(layer_tokens, held, strict=True))


def cost_of(
    shape: ModelShape,
    work: Sequence[Sequence[Work]],
    kv_tokens: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    itemsize: int,
    decisions: Sequence[int] | None = None,
) -> Cost:
    """The cost of a batch: per sample, what each layer did and holds, against its `prompt_tokens` in all layers.

    itemsize: bytes of one number in the KV cache. decisions: FLOPs of the stages' decisions per sample; None: no stage
    says any.
    """
    decided = tuple(decisions or [0] * len(work))
    width = shape.kv_width * itemsize
    return Cost(
        prefill_flops=tuple(work_flops(shape, row) + own for row, own in zip(work, decided, strict=True)),
        dense_prefill_flops=tuple(prefill_flops(shape, [n] * shape.layers) for n in prompt_tokens),
        kv_bytes=tuple(width * sum(row) for row in kv_tokens),
        dense_kv_bytes=tuple(width * (shape.layers - len(shape.recurrent)) * n for n in prompt_tokens),
        decision_flops=decided,
    )
