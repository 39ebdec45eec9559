"""What the benchmarks run on: a random LLaVA, its prompts, and the pipelines that are compared.

Image features are given, so that the vision tower does not run: what is measured is the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import prunekit

IMAGE, VOCABULARY = 3, 2048


@dataclass(frozen=True)
class Size:
    """A model and its prompt; `side` squared visual tokens and `text` text tokens."""

    layers: int = 16
    hidden: int = 1024
    mlp: int = 2752
    heads: int = 16
    side: int = 24
    text: int = 64


FULL = Size()
BATCH = Size(layers=8, hidden=512, mlp=1376, heads=8)
TINY = Size(layers=8, hidden=64, mlp=128, heads=4, side=6, text=8)

FASTV = {"use": "fastv", "at": 2, "keep": 0.25}
SKIP = {"use": "skip_layers", "layers": [3, 4, 5, 6]}
PRUNES_NOTHING = {
    "no stage acts": [{"use": "dense"}],
    "a stage keeps all": [{"use": "stride", "at": "encoder", "keep": 1.0}],
}
PRUNES = {
    "FastV, before layer 2, keep 25 %": [FASTV],
    "stride, at the encoder, keep 25 %": [{"use": "stride", "at": "encoder", "keep": 0.25}],
    "skip 4 layers": [SKIP],
    "stride 50 %, FastV 25 %, skip 4": [{"use": "stride", "at": "encoder", "keep": 0.5}, FASTV, SKIP],
}
# PAR at the counts of its paper on LLaVA-1.5-7B: T = 128 of 576 visual tokens, L = 24 of 32 layers.
T_SHARE, L_SHARE = 128 / 576, 24 / 32
PIPELINES: dict[str, list[Any] | None] = {"dense": None, **PRUNES_NOTHING, **PRUNES}


def par_of(size: Size) -> dict[str, list[Any]]:
    """PAR, with an untrained router as wide beside the model as the default one is beside a 7B model; and its parts."""

    def stage(**budget: float) -> list[Any]:
        where = {"at": 2} if "keep" in budget else {}
        return [{"use": "par", **where, "weights": None, "seed": 0, "width": size.hidden // 8, **budget}]

    tokens, layers = round(T_SHARE * size.side**2), round(L_SHARE * size.layers)
    return {
        f"PAR, T={tokens} of {size.side**2}, L={layers} of {size.layers}": stage(keep=T_SHARE, keep_layers=L_SHARE),
        "its tokens alone": stage(keep=T_SHARE),
        "its layers alone": stage(keep_layers=L_SHARE),
        "its router alone, all kept": stage(keep=1.0, keep_layers=1.0),
    }


def model_of(size: Size, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A random LLaVA with a token of a vision tower, in float32; the same weights for every `attention`."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=2,
        image_size=2 * size.side,
    )  # fmt: skip
    make: Any = LlavaConfig
    config = make(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=size.side**2,
        vision_feature_layer=-1, vision_feature_select_strategy="default", attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def inputs_of(size: Size, texts: Sequence[int] = ()) -> dict[str, Any]:
    """A left-padded prompt batch, one image a row: eight text tokens, the image, the rest of the text.

    texts: text tokens of each row; without them, one row with `size.text`.
    """
    texts = list(texts) or [size.text]
    generator = torch.Generator().manual_seed(0)
    visual, longest = size.side**2, max(texts)
    rows, masks = [], []
    for count in texts:
        words = torch.randint(IMAGE + 1, VOCABULARY, (count,), generator=generator)
        row = torch.cat([words[:8], torch.full((visual,), IMAGE), words[8:]])
        rows.append(torch.cat([row.new_zeros(longest - count), row]))
        masks.append(torch.arange(longest + visual) >= longest - count)
    features = [torch.randn(visual, size.hidden, generator=generator) for _ in texts]
    return {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))},
        "logits_to_keep": 1,
    }


@contextmanager
def applied(model: LlavaForConditionalGeneration, stages: list[Any] | None) -> Iterator[Any]:
    """The pipeline of `stages` on the model; `stages` None is the bare model, which yields None."""
    if stages is None:
        yield None
        return
    with prunekit.apply(model, {"name": "bench", "stages": stages}) as run:
        yield run


@contextmanager
def prefill(model: LlavaForConditionalGeneration, stages: list[Any] | None, inputs: dict[str, Any]) -> Iterator[Any]:
    """A case of `timing.interleaved`: the prefill of `inputs` up to the logits of the last token."""
    with applied(model, stages):
        yield lambda: model(**inputs)


@torch.inference_mode()
def report_of(model: LlavaForConditionalGeneration, stages: list[Any] | None, inputs: dict[str, Any]) -> Any:
    """The report of one prefill; None for the bare model."""
    with applied(model, stages) as run:
        model(**inputs)
        return None if run is None else run.report
