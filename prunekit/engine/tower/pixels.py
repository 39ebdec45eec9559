"""Images and videos made smaller before the vision tower sees them.

A smaller image has fewer visual tokens than the prompt has places for it. Its tokens stand in the places of those of
the complete image in whose middle they lie; the others leave like tokens that a stage has dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunekit.engine.tower.record import Decision, TowerRecord
from prunekit.families.images import Images
from prunekit.pipeline.cut import Cut


@dataclass(frozen=True)
class Resized:
    """Images as the tower gets them.

    cut: the stage that said so. given, arguments: of the encoding method, with the complete and the smaller images.
    sizes: height and width in pixels of each image. anchors: bool (V,) for each, the visual tokens of the complete
    image in whose places those of the smaller one stand; None where the tower takes one size, and all are made.
    """

    cut: Cut
    given: Mapping[str, Any]
    arguments: Mapping[str, Any]
    sizes: tuple[tuple[int, int], ...]
    anchors: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls, cut: Cut, holder: Images, modality: str, arguments: Mapping[str, Any], scales: Sequence[float]
    ) -> Resized:
        """The images in `arguments`, each made smaller by its factor of both sides."""
        images = holder.unpack(modality, arguments)
        sizes = [smaller(size_of(one), scale, holder.cell) for one, scale in zip(images, scales, strict=True)]
        small = [resized(one, size) for one, size in zip(images, sizes, strict=True)]
        if holder.cell is None:
            small = [resized(one, size_of(image)) for one, image in zip(small, images, strict=True)]
            return cls(cut, arguments, holder.pack(modality, arguments, small), tuple(sizes), None)
        places = [anchors(image, one, holder.cell) for image, one in zip(images, small, strict=True)]
        return cls(cut, arguments, holder.pack(modality, arguments, small), tuple(sizes), tuple(places))

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens of each complete image."""
        assert self.anchors is not None
        return tuple(map(len, self.anchors))

    def expand(self, features: Any) -> Any:
        """Features of the smaller images, (tokens, H) each or all behind one another, in the places of complete ones.

        Zeros elsewhere.
        """
        if self.anchors is None:
            return features
        if isinstance(features, Tensor):
            parts = torch.split(features, [int(places.sum()) for places in self.anchors])
            return torch.cat(self.expand(parts))
        return tuple(_spread(one, places) for one, places in zip(features, self.anchors, strict=True))

    def widen(self, output: Any) -> None:
        """Let the output of an encoding method have as many features as the complete images have visual tokens."""
        if self.anchors is None:
            return
        output.pooler_output = self.expand(output.pooler_output)
        if (stacks := getattr(output, "deepstack_features", None)) is not None:
            output.deepstack_features = [self.expand(features) for features in stacks]

    def record(self, record: TowerRecord, counts: Sequence[int]) -> TowerRecord:
        """A record of the smaller images as one of the complete ones, with this decision as the first.

        counts: visual tokens of each complete image.
        """
        places = self.anchors or tuple(torch.ones(count, dtype=torch.bool) for count in counts)
        made = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in places], batch_first=True)
        keep = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
        own = Decision(self.cut, made, keep, None, None, self.sizes)
        if self.anchors is None:
            made = made if record.made is None else record.made
            return replace(record, decisions=(own, *record.decisions), made=made)
        inputs = {
            spec: values if getattr(spec, "of", "patches") == "cls" else list(self.expand(values))
            for spec, values in record.inputs.items()
        }
        kept = list(places) if record.kept is None else list(self.expand(record.kept))
        later = tuple(self._widened(decision) for decision in record.decisions)
        return replace(record, inputs=inputs, kept=kept, decisions=(own, *later), made=made)

    def _widened(self, decision: Decision) -> Decision:
        def spread(table: Tensor | None) -> Any:
            if table is None:
                return None
            rows = self.expand(
                [row[: int(places.sum())] for row, places in zip(table, self.anchors or (), strict=True)]
            )
            return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

        entered, keep, sizes = map(spread, (decision.entered, decision.keep, decision.sizes))
        detail = decision.detail and decision.detail.among([one.nonzero()[:, 0] for one in self.anchors or ()])
        return replace(decision, entered=entered, keep=keep, sizes=sizes, detail=detail)


def size_of(image: Tensor) -> tuple[int, int]:
    """Height and width."""
    return image.shape[-2], image.shape[-1]


def smaller(size: tuple[int, int], scale: float, cell: int | None) -> tuple[int, int]:
    """Height and width in pixels of an image made smaller: whole cells, rounded half up, at least one."""
    unit = cell or 1
    height, width = (max(int(side // unit * scale + 0.5), 1) * unit for side in size)
    return height, width


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Float (..., H, W) at another size: bilinear, over all pixels that fall into one."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    flat = image.reshape(-1, 1, *image.shape[-2:])
    exact = flat.to(torch.promote_types(flat.dtype, torch.float32))
    small = functional.interpolate(exact, size, mode="bilinear", antialias=True)
    return small.to(image.dtype).view(*image.shape[:-2], *size)


def anchors(image: Tensor, small: Tensor, cell: int) -> Tensor:
    """The visual tokens of an image in whose middle those of a smaller one lie, bool (V,); float (..., H, W) both."""
    on_axis = []
    for axis in (-2, -1):
        many, few = image.shape[axis] // cell, small.shape[axis] // cell
        middles = ((2 * torch.arange(few) + 1) * many) // (2 * few)
        on_axis.append(torch.zeros(many, dtype=torch.bool).index_fill(0, middles, True))
    return (on_axis[0][:, None] & on_axis[1]).flatten().repeat(len(image))


def _spread(values: Tensor, places: Tensor) -> Tensor:
    wide = values.new_zeros(len(places), *values.shape[1:])
    return wide.index_put((places.to(values.device),), values)
