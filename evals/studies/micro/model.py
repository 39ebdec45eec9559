"""The model: an ordinary LLaVA of transformers, small; and the word vectors that vision is aligned to."""

from __future__ import annotations

import torch
from prunekit_evals.micro.compose import IMAGE_SIZE, PATCH_SIZE, TOKENS
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, NOUNS, SIDES, SIGNS
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VISION_WIDTH = 128
WIDTH = 160
LAYERS = 8
SEEING = 3  # decoder layers after which a patch must have been recognised; the tower alone is too shallow for it
NAMES: tuple[str, ...] = (*NOUNS, *SIGNS)
WORDS: tuple[str, ...] = (*NAMES, *COLOR_NAMES, *SIDES, *HEIGHTS)


def config(vocabulary: int, image_token: int, bos: int, eos: int, pad: int, layers: int = LAYERS) -> LlavaConfig:
    """The architecture: CLIP tower 3 x 128 (feature layer -2), projector 128-160-160, Llama 8 x 160.

    The tower's features are those of its second layer: it sees edges and colors, and the decoder must see the rest.
    """
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=4 * VISION_WIDTH, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=448, num_hidden_layers=layers,
        num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_token_id=image_token,
        image_seq_length=TOKENS, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def word_vectors(seed: int = 0) -> Tensor:
    """One orthonormal vector for each of `WORDS`; float32 `[66, 160]`.

    They start as the language model's embedding rows of these words and are what the first stage teaches the
    visual states to name, so that the decoder's later layers can read the image from their first step.
    """
    noise = torch.randn(WIDTH, len(WORDS), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q.T.contiguous()


def fresh(cfg: LlavaConfig, seed: int, attention: str) -> LlavaForConditionalGeneration:
    """A newly initialised model in float32; output projections shrunk with depth, as GPT-2 does."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(cfg, attn_implementation=attention)
    depth = (2 * LAYERS) ** -0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "language_model" in name and p.ndim == 2:
                torch.nn.init.normal_(p, std=WIDTH**-0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    p.mul_(depth)
            elif "multi_modal_projector" in name and p.ndim == 2:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model
