"""Tiny random LLaVA models and prompts for tests: no download, no tokenizer, milliseconds a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
)

PAD, BOS, IMAGE, VOCABULARY = 0, 1, 3, 120
IMAGE_SIZE, PATCH = 56, 14
PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2


def tiny_llava(
    attention: str = "sdpa",
    *,
    layers: int = 6,
    blocks: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tower: Literal["clip", "pixtral"] = "clip",
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: CLIP tower with CLS, 16 visual tokens an image, grouped queries, own `lm_head`.

    layers, blocks: of the decoder and of the tower, whose features are taken behind the last block but one.
    tower: `pixtral` has no CLS and takes images of any size, whose sizes come with them (`tiny_inputs(sizes=True)`).
    attention: `sdpa` or `eager`. Equal arguments give equal weights, and another `attention` gives the same weights.
    The weights are large enough that attention is peaked and every layer matters; with the usual small ones a model
    would hardly notice a wrong mask or position. It has no end-of-text token, so `generate` runs to its limit.
    """
    make: Any = LlavaConfig  # its keyword arguments are not all declared
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=BOS,
        eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 2,
        "image_size": IMAGE_SIZE, "patch_size": PATCH,
    }  # fmt: skip
    vision = PixtralVisionConfig(**sizes) if tower == "pixtral" else CLIPVisionConfig(**sizes, projection_dim=24)
    config = make(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=PER_IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="full" if tower == "pixtral" else "default",
        tie_word_embeddings=False, attn_implementation=attention,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    _randomise(model, seed)
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    ready: LlavaForConditionalGeneration = model.eval().requires_grad_(False).to(dtype)
    return ready


def tiny_inputs(
    images: Sequence[int] = (1,),
    text: Sequence[int] | int = 9,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sizes: bool = False,
) -> dict[str, Tensor]:
    """A left-padded prompt batch with `images[b]` images and `text[b]` text tokens in row b.

    Returns `input_ids` and `attention_mask`, int64 (B, S), and `pixel_values`, float (sum of images, 3, 56, 56),
    which is left out when no row has an image. Text stands before, between and after the images. Row b depends on
    `seed`, b, `images[b]` and `text[b]` alone; `row_of` cuts it out. sizes: also `image_sizes`, int64 (images, 2).
    """
    lengths = [text] * len(images) if isinstance(text, int) else list(text)
    prompts, pixels = [], []
    for row, (count, length) in enumerate(zip(images, lengths, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        words = torch.randint(IMAGE + 1, VOCABULARY, (length,), generator=generator)
        pieces = [torch.tensor([BOS])]
        for number, part in enumerate(words.tensor_split(count + 1)):
            pieces += [torch.full((PER_IMAGE,), IMAGE)] * (number > 0) + [part]
        prompts.append(torch.cat(pieces))
        pixels += [torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype) for _ in range(count)]
    longest = max(map(len, prompts))
    batch = {
        "input_ids": torch.stack([torch.cat([torch.full((longest - len(p),), PAD), p]) for p in prompts]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts]),
    }
    if not pixels:
        return batch
    told = {"image_sizes": torch.full((len(pixels), 2), IMAGE_SIZE)} if sizes else {}
    return batch | {"pixel_values": torch.stack(pixels)} | told


class TinyWords:
    """The tokenizer of tiny prompts, for strategies that ask for `question`: token 40 is the word `w40`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The words of these token ids, with blanks between them."""
        return " ".join(f"w{one}" for one in ids if one > IMAGE or not skip_special_tokens)


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` of a batch of `tiny_inputs` as a batch of its own, without padding."""
    present = batch["attention_mask"][row].bool()
    single = {"input_ids": batch["input_ids"][row : row + 1, present]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    images = [int((ids == IMAGE).sum()) // PER_IMAGE for ids in batch["input_ids"]]
    first = sum(images[:row])
    shown = [name for name in ("pixel_values", "image_sizes") if name in batch and images[row]]
    return single | {name: batch[name][first : first + images[row]] for name in shown}


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            elif weight.ndim > 1 and "embed" not in name:
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_((1.0 if "embed" in name else 0.1) * noise)
