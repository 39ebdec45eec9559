"""Asking a model one thing: the options that say what, and what becomes of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli.arguments import positive

if TYPE_CHECKING:
    from PIL.Image import Image

    from prunekit.video_files import Clip


@dataclass(frozen=True)
class Prompt:
    """Images, RGB, and videos behind them, and the question about them."""

    images: tuple[Image, ...]
    text: str
    videos: tuple[Clip, ...] = ()

    def shown_to(self, processor: Any) -> Prompt:
        """The same for a model that takes no videos, which gets their frames as images. Raises InputError for files
        that cannot be decoded.
        """
        from prunekit.video_files import takes_videos

        if not self.videos or takes_videos(processor):
            return self
        return Prompt((*self.images, *(frame for clip in self.videos for frame in clip.images())), self.text)


def add_prompt(command: argparse.ArgumentParser) -> None:
    """Options that say what is asked."""
    command.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="may be repeated")
    command.add_argument(
        "--video", action="append", default=[], type=Path, metavar="FILE",
        help="a video, behind the images; may be repeated; needs prunekit[video]",
    )  # fmt: skip
    command.add_argument(
        "--frames", type=positive, default=8, metavar="N",
        help="frames to show of each video, evenly spread; default: 8, or all where there are fewer",
    )  # fmt: skip
    command.add_argument("--prompt", metavar="TEXT", help="the question")
    command.add_argument(
        "--data", metavar="D", help="images and question of a registered source, or of a .jsonl file with images"
    )
    command.add_argument(
        "--number", type=int, default=0, metavar="N", help="which of the prompts of --data, from 0; default: 0"
    )


def prompt_of(namespace: argparse.Namespace) -> Prompt:
    """What the options say: --prompt, --image and --video go before what --data has.

    Raises InputError where nothing is asked, and for images, videos and numbers that do not exist.
    """
    from prunekit.errors import InputError
    from prunekit.image_files import read_image
    from prunekit.video_files import Clip, Sampling, check_installed

    clips = tuple(Clip(path, Sampling(namespace.frames)) for path in namespace.video)
    if clips:
        check_installed()
    for clip in clips:
        if not clip.path.is_file():
            raise InputError(f"no such video: '{clip.path}'")
    images, text = [read_image(path) for path in namespace.image], namespace.prompt
    if namespace.data is not None:
        from prunekit.training import data

        source = data.source(namespace.data)
        if not 0 <= namespace.number < len(source):
            raise InputError(f"--number {namespace.number}: '{namespace.data}' has prompts 0 to {len(source) - 1}")
        sample = source[namespace.number]
        images = images or ([] if clips else list(sample.images))
        text = sample.prompt if text is None else text
    if text is None:
        raise InputError("nothing is asked (ask something with --prompt, or take a prompt of --data)")
    if not text.strip():
        raise InputError("the prompt is empty (ask something with --prompt)")
    if not is_text(text):
        raise InputError("the prompt is not UTF-8 (convert it, for instance with iconv -t UTF-8)")
    return Prompt(tuple(images), text, clips)


def is_text(argument: str) -> bool:
    """Whether an argument of the command line was valid UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in argument)


def prepare(processor: Any, prompt: str, images: Sequence[Image], videos: Sequence[Clip] = ()) -> Any:
    """Model inputs for one question about `images`, in the words of the model's chat template.

    videos: behind the images, of a model that takes some. Raises InputError when the model brings no chat template, or
    the prompt holds the model's image placeholder.
    """
    from prunekit.errors import InputError
    from prunekit.video_files import as_videos

    if not getattr(processor, "chat_template", None):
        raise InputError("the model brings no chat template, so its prompt format is not known")
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in prompt:
        raise InputError(f"the prompt holds '{placeholder}', which stands for an image (leave it out; use --image)")
    shown = [*({"type": "image"} for _ in images), *({"type": "video"} for _ in videos)]
    content = [*shown, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # A chat template that already wrote the first token must not get a second one.
    special = not (begin and text.startswith(begin))
    return processor(
        text=[text], images=list(images) or None, **as_videos(videos), return_tensors="pt", add_special_tokens=special
    )


def on_model(model: Any, inputs: Any) -> dict[str, Any]:
    """Model inputs where the model is, pixels in its dtype; other floats, such as seconds, count positions."""
    return {
        name: value.to(model.device, model.dtype if name.startswith("pixel") and value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> tuple[str, float]:
    """The greedy answer, and how many seconds it took."""
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip(), time.perf_counter() - start
