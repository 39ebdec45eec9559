"""A complete tiny model on disk, so that a plugin's tests can run the command line without a download."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

CHAT = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT{% endfor %}"
)


def save_tiny_model(folder: str | PathLike[str], layers: int = 10) -> Path:
    """Write a random LLaVA with tokenizer, image processor and chat template; returns the folder.

    It is for `prunekit run --model FOLDER` and all other commands, and for `prunekit.loading.load`. Weights are those
    of `tiny_llava` in float32, 16 visual tokens an image; words that it does not know become `<unk>`. What it answers
    means nothing. layers: of the decoder.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch import float32
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.utils import logging

    from prunekit.testing.tiny import IMAGE_SIZE, PATCH, VOCABULARY, tiny_llava

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT"]
    words += [f"w{number}" for number in range(len(words), VOCABULARY)]
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    read: Any = PreTrainedTokenizerFast
    fast = read(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    make: Any = CLIPImageProcessorPil
    images = make(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    join: Any = LlavaProcessor
    processor = join(
        image_processor=images, tokenizer=fast, patch_size=PATCH, chat_template=CHAT,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        tiny_llava(layers=layers, dtype=float32).save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        if shown:
            bars.enable_progress_bar()
    return Path(folder)
