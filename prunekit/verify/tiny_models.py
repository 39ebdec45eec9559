"""Tiny random models of any LVLM class that a config names, and the vocabulary that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD, BOS, NEWLINE, IMAGE, VIDEO, BEGIN, END = range(7)
FIRST_WORD, VOCABULARY = 10, 120
# What configs call the number of heads.
HEADS = ("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads")
# A sliding window that is shorter than any prompt with an image.
WINDOW = 12


def tiny_from_config(
    config: Any,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    cls: type[PreTrainedModel] | None = None,
) -> Any:
    """A model with random weights that are large enough for peaked attention, so that a wrong mask or position shows.

    attention: `sdpa` or `eager`. cls: of the model; None: the one that transformers has for such a config. Equal
    arguments give equal weights; another `attention` gives the same ones, another dtype the same up to its rounding.
    The model has no end-of-text token, so `generate` runs to its limit, and never generates the id of a visual token,
    as its head gives those the logit 0.
    """
    import transformers

    auto: Any = transformers.AutoModelForImageTextToText
    make: Any = auto.from_config if cls is None else cls._from_config
    tower = getattr(config, "vision_config", None)
    convolves = tower is not None and not any(hasattr(tower, name) for name in HEADS)
    # Convolutions have no attention to choose, and the usual kernel of experts takes no float64.
    chosen = {"": attention, **dict.fromkeys(config.sub_configs, attention)} | {"vision_config": "eager"}
    model = make(config, attn_implementation=chosen if convolves else attention, experts_implementation="eager")
    _randomise(model, seed)
    heads = [one.get_output_embeddings() for one in model.modules() if hasattr(one, "get_output_embeddings")]
    with torch.no_grad():  # of the model itself, or of the language model inside of it
        next(head for head in heads if head is not None).weight[:FIRST_WORD] = 0
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model.eval().requires_grad_(False).to(dtype)


def _randomise(model: nn.Module, seed: int) -> None:
    """Norms around 1, those of queries and keys larger; matrices that enlarge by 1.5 whatever they multiply."""
    generator = torch.Generator().manual_seed(seed)
    tables = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if ("norm" in name and name.endswith("weight")) or "lambda" in name:
                weight.copy_((1.7 if "q_norm" in name or "k_norm" in name else 1.0) + 0.1 * noise)
            elif name in tables or name.endswith(("token", "embedding", "embeddings", "newline")):
                weight.copy_(noise)
            elif weight.ndim > 1:
                inputs = weight.shape[1] if "experts" in name and weight.ndim == 3 else weight[0].numel()
                weight.copy_(1.5 * noise / inputs**0.5)
            else:
                weight.copy_(0.1 * noise)
