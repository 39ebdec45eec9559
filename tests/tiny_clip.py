"""Writes a random CLIP model whose vision tower has the shape of `tiny_llava`'s: what its tower might be taken from."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

SEGMENT = 12  # tokens that its text tower takes, start and end among them


def write(folder: Path, width: int = 24) -> Path:
    """The folder, with config, weights and a tokenizer of single letters. width: of the vision tower."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*sorted({*letters, *(f"{one}</w>" for one in letters)}), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    begin, end = len(pieces) - 2, len(pieces) - 1
    text = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=SEGMENT, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    generator = torch.Generator().manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=10))
    for _, weight in sorted(model.named_parameters()):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) / max(weight.shape[-1:], default=1) ** 0.5)
    model.save_pretrained(folder)
    return folder
