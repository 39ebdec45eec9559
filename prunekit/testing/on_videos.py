"""A strategy that looks at videos, on a tiny model that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunekit import families
from prunekit.errors import SpecError, Unsupported
from prunekit.testing.check import Broken
from prunekit.testing.subject import Subject
from prunekit.testing.tiny_families import row_of, tiny_batch, tiny_model

# The first that a strategy fits: images and videos of any size, then one whose tower has CLS tokens.
FAMILIES = ("qwen2_5_vl", "llava_onevision", "llava_next_video")


@dataclass
class Clips:
    """As `StrategyContract`, where the first visual input of each row is a video; `alone`: the others are as well."""

    use: str
    options: Mapping[str, Any]
    keep: Mapping[str, Any] | None
    at_most: bool
    may_keep_more: bool
    words: Any
    made: Any = None
    alone: bool = False

    def model(self) -> Any:
        return self.made

    def inputs(self, **rows: Any) -> dict[str, Tensor]:
        other = "video" if self.alone else "image"
        kinds = [["video"][:count] + [other] * (count - 1) for count in rows["images"]]
        return tiny_batch(self.made, kinds, text=rows["text"])

    def row(self, inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        return row_of(inputs, row)  # type: ignore[arg-type]

    def processor(self) -> Any:
        return self.words


def on_videos(subject: Subject) -> Subject:
    """The same strategy on the first family that takes videos and has what it asks for. Raises Broken without one."""
    one = subject.setting
    clips = Clips(one.use, one.options, one.keep, one.at_most, one.may_keep_more, one.processor())
    reasons = []
    for family in FAMILIES:
        clips.made = tiny_model(family, layers=subject.shape.layers)
        try:
            bound = subject.build().bind(families.shape_of(clips.made))
        except (SpecError, Unsupported) as error:
            reasons.append(f"{family}: {error}")
            continue
        clips.alone = any(cut.site.in_tower for cut in bound.cuts)  # the reference cuts towers of one kind only
        return Subject(clips)
    raise Broken("it looks at videos, but runs on none of the tiny models that take them\n" + "\n".join(reasons))
