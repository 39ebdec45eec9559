"""The three models of the GPU benchmark at their real sizes, with random weights made on the device.

LLaVA-1.5-7B (https://arxiv.org/abs/2310.03744): Vicuna-7B, 576 visual tokens. LLaVA-NeXT (LLaVA-1.6, Mistral-7B): five
crops, 2880. Qwen2.5-VL-7B (https://arxiv.org/abs/2502.13923): an image of 1036 x 1036 pixels, 1369. The vision towers
are shrunk, because they do not run: features are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE, VOCABULARY = 3, 32064


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder, and of the prompts that it is given."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    visual: int
    text: int = 64


Make = Callable[[Decoder], Any]


@dataclass(frozen=True)
class Model:
    """A model: its name, its decoder, how its config is made from that, and a toy decoder for tests."""

    name: str
    decoder: Decoder
    config: Make
    toy: Decoder


def _text(d: Decoder, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": d.hidden, "intermediate_size": d.mlp, "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads, "num_key_value_heads": d.kv_heads, "max_position_embeddings": 8192,
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _clip() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "patch_size": 2, "image_size": 48,
    }  # fmt: skip


def _llava(d: Decoder) -> Any:
    return transformers.LlavaConfig(
        text_config=_text(d, model_type="llama"), vision_config=_clip(), image_token_id=IMAGE,
        image_seq_length=d.visual, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip


def _llava_next(d: Decoder) -> Any:
    return transformers.LlavaNextConfig(
        text_config=_text(d, model_type="mistral", sliding_window=None), vision_config=_clip(), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip


def _qwen(d: Decoder) -> Any:
    head = d.hidden // d.heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16]}
    tower = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": d.hidden,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [0],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(d, rope_parameters=rope), vision_config=tower, image_token_id=IMAGE, video_token_id=4,
        vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip


MODELS = (
    Model("LLaVA-1.5-7B", Decoder(32, 4096, 11008, 32, 32, 576), _llava, Decoder(8, 64, 96, 4, 4, 36, 8)),
    Model("LLaVA-NeXT-7B", Decoder(32, 4096, 14336, 32, 8, 2880), _llava_next, Decoder(8, 64, 96, 4, 2, 60, 8)),
    Model("Qwen2.5-VL-7B", Decoder(28, 3584, 18944, 28, 4, 1369), _qwen, Decoder(8, 64, 96, 4, 2, 36, 8)),
)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights on `device`, made there: nothing of its size is ever held by the host."""
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02)
    for module in model.modules():  # the frequencies of rotary positions are buffers, and no parameters
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            with device:
                fresh = type(module)(module.config)
            for name, value in fresh.named_buffers():
                setattr(module, name, value)
    return model


def inputs_of(model: Any, decoder: Decoder, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """`batch` rows: eight text tokens, one image, the rest of the text; its features are given."""
    device = model.device
    words = torch.randint(10, VOCABULARY, (batch, decoder.text), device=device)
    images = words.new_full((batch, decoder.visual), IMAGE)
    ids = torch.cat([words[:, :8], images, words[:, 8:]], dim=1)
    features = tuple(torch.randn(decoder.visual, decoder.hidden, device=device, dtype=dtype) for _ in range(batch))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
        "logits_to_keep": 1,
    }
    if hasattr(model.config, "vision_start_token_id"):
        inputs |= _places(ids, decoder.visual)
    return inputs


def _places(ids: Tensor, visual: int) -> dict[str, Tensor]:
    """What M-RoPE is computed from: the grid of patches before each 2 x 2 of them is merged, and the kind of token."""
    side = 2 * round(visual**0.5)
    grid = torch.tensor([[1, side, side]], device=ids.device).expand(len(ids), 3)
    return {"image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
