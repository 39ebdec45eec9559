"""A tiny random LLaVA as a folder on disk, with tokenizer, image processor and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT{% endfor %}"
)


def save(folder: Path, layers: int = 10) -> Path:
    """Write the checkpoint; float32, 16 visual tokens an image, words that it does not know become `<unk>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.utils import logging

    from prunekit.testing.tiny import IMAGE_SIZE, PATCH, VOCABULARY, tiny_llava

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT"]
    words += [f"w{number}" for number in range(len(words), VOCABULARY)]
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    processor = LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, chat_template=CHAT,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    logging.disable_progress_bar()
    tiny_llava(layers=layers, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(path: Path, seed: int = 0) -> Path:
    """Write a small noisy picture."""
    import random

    from PIL import Image

    Image.frombytes("RGB", (20, 14), random.Random(seed).randbytes(3 * 20 * 14)).save(path)
    return path
