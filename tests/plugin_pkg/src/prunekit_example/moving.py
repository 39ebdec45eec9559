"""Baseline: tokens of a video that differ most from the same place in the frame before; of images, the longest."""

from torch import Tensor

from prunekit import Sites, hookimpl, strategy


@strategy(group="video", per_sample=True, sites=Sites(decoder=False))
class Moving:
    """A token without one before it counts as new."""

    @hookimpl
    def score_tokens(self, hidden: Tensor, coords: Tensor, frames: Tensor, videos: Tensor) -> Tensor:
        """Float (V,)."""
        states = hidden.float()
        scores = states.norm(dim=-1)
        places = list(zip(coords[:, :3].tolist(), frames.tolist(), strict=True))
        numbers = {(*place, frame): number for number, (place, frame) in enumerate(places)}
        for number, (place, frame) in enumerate(places):
            before = numbers.get((*place, frame - 1))
            if bool(videos[number]) and before is not None:
                scores[number] = (states[number] - states[before]).norm()
        return scores
