"""Tiny models that take videos, with transformers' own processors, and small clips written by PyAV.

Video processors of transformers need torchvision. Where it is not installed, a stand-in makes the tensors that the real
one makes of frames of the tower's size; the words around them are the real processors' either way.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from prunekit_evals.run.answering import Loaded, left_padded

from prunekit.testing.tiny_families import tiny_model
from prunekit.verify.tiny_models import BEGIN, BOS, END, FIRST_WORD, IMAGE, PAD, VIDEO, VOCABULARY

SIDE, PATCH = 56, 14
SPECIAL = {PAD: "<pad>", BOS: "<s>", IMAGE: "<image>", VIDEO: "<video>", BEGIN: "<begin>", END: "<end>", 7: "<unk>"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}FENCED<PART>FENCE_END{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")


def clip(path, frames=12, rate=4, codec="mpeg4", size=(48, 64), seed=0):
    """Write a video of so many frames of noise that move slowly from one picture to another."""
    generator = np.random.default_rng(seed)
    first, last = (generator.integers(0, 256, (6, 8, 3)) for _ in range(2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            mixed = first + (last - first) * number / max(frames - 1, 1)
            frame = np.repeat(np.repeat(mixed.astype(np.uint8), size[0] // 6, 0), size[1] // 8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@dataclass
class Videos:
    """In place of a video processor: every frame at the tower's size."""

    patches: bool
    side: int = SIDE
    merge_size: int = 2
    temporal_patch_size: int = 2
    model_input_names: tuple[str, ...] = ("pixel_values_videos",)

    def __call__(self, videos: Any, **kwargs: Any) -> dict[str, Any]:
        from transformers.video_utils import VideoMetadata

        assert kwargs["do_sample_frames"] is False
        pixels = [torch.stack([self.frame(frame) for frame in video]) for video in videos]
        told = {"video_metadata": [VideoMetadata(**one) for one in kwargs["video_metadata"]]}
        if not self.patches:
            return {"pixel_values_videos": torch.stack(pixels)} | told
        grids = torch.tensor([[(len(video) + 1) // 2, self.side // PATCH, self.side // PATCH] for video in pixels])
        return {"pixel_values_videos": torch.cat([self.rows(one) for one in pixels]), "video_grid_thw": grids} | told

    def frame(self, pixels: Any) -> torch.Tensor:
        small = Image.fromarray(np.asarray(pixels)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1

    def rows(self, video: torch.Tensor) -> torch.Tensor:
        """As Qwen's processor: pairs of frames, in patches, those that are merged beside one another."""
        if len(video) % 2:
            video = torch.cat([video, video[-1:]])
        cells, merge = self.side // PATCH // self.merge_size, self.merge_size
        split = video.reshape(-1, 2, 3, cells, merge, PATCH, cells, merge, PATCH)
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)


def tokenizer():
    """One token a printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {SPECIAL.get(number, f"<{number}>"): number for number in range(FIRST_WORD)}
    words |= {chr(32 + number): FIRST_WORD + number for number in range(95)}
    words |= {f"<{number}>": number for number in range(FIRST_WORD + 95, VOCABULARY)}
    made: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>", "video_token": "<video>", "vision_start_token": "<begin>",
            "vision_end_token": "<end>", "start_image_token": "<begin>", "end_image_token": "<end>",
            "context_image_token": "<image>",
        },
    )  # fmt: skip


def _images(family):
    import transformers as kit

    size = {"height": SIDE, "width": SIDE}
    if family.startswith("qwen"):
        area = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
        return kit.Qwen2VLImageProcessorPil(size=area, patch_size=PATCH, merge_size=2)
    if family == "llava_onevision":
        return kit.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]])
    return kit.GotOcr2ImageProcessorPil(size={"height": 84, "width": 84}, crop_to_patches=False)


def processor(family):
    """The family's own processor, whatever makes its videos."""
    import transformers as kit

    names = {
        "qwen3_5": "Qwen3VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor",
        "llava_onevision": "LlavaOnevisionProcessor", "internvl": "InternVLProcessor",
    }  # fmt: skip
    more = {"llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}}
    more["internvl"] = {"image_seq_length": 9}
    base = getattr(kit, names[family])
    kind = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda *_: None, "__init__": base.__init__})
    fence = ("<begin>", "<end>") if family == "qwen2_5_vl" else ("", "")
    part = "{{ '<video>' if part['type'] == 'video' else '<image>' }}"
    template = TEMPLATE.replace("<PART>", part).replace("FENCED", fence[0]).replace("FENCE_END", fence[1])
    videos = Videos(family.startswith("qwen"), 84 if family == "internvl" else SIDE)
    return kind(
        image_processor=_images(family), tokenizer=tokenizer(), video_processor=videos,
        chat_template=template, **more.get(family, {}),
    )  # fmt: skip


@cache
def video_model(family):
    """A tiny random model in float64."""
    return Loaded(family, f"tiny-{family}", tiny_model(family, layers=4), left_padded(processor(family)))
