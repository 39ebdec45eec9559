"""FEATHER (https://arxiv.org/abs/2412.13180, ICCV 2025): FastV without its preference for the bottom of the image.

score_i = mean over heads of softmax over the visual keys of (q K^T / sqrt(d))_i, of the last prompt token in layer K -
1, before rotation. The first cut keeps the best floor(ratio N) and the grid [::stride, ::stride] of each image; those
behind it the best floor(ratio^2 n) of the n tokens that are left.

Rule: markendo/FEATHER@c2a09b2. Whether the paper's second fraction is of N, where the code takes n, is not known.
Deviations: layers scale with the depth (8 and 16 of 32); images need not be square, and the grid is that of the
original image, crop or frame, whatever left before. With `keep` exactly that many stay: the grid, and the best of the
others.
"""

from torch import Tensor

from prunekit import ModelShape, Rows, Site, Sites, hookimpl, strategy
from prunekit.ops import ranks, top_k_mask


@strategy(
    paper="2412.13180",
    code="markendo/FEATHER@c2a09b2",
    sites=Sites(encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous", rope=False, domain="visual")},
    keep="optional",
    schedule=lambda self, layers: {Site(max(layers // 4, 1)): None, Site(max(layers // 2, 1)): None},
    per_sample=True,
)
class Feather:
    """Keep what the last prompt token attends to most regardless of position, at first with a uniform grid.

    ratio: of the tokens that the first cut keeps by attention. stride: of the grid.
    """

    ratio: float = 0.3
    stride: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError("ratio: is above 0, and at most 1")
        if self.stride < 1:
            raise ValueError("stride: is at least 1")

    @hookimpl
    def select_tokens(self, attention: Tensor, coords: Tensor, cut: int, count: int | None) -> Tensor:
        """Bool (V,) from scores (V,) and coords (V, 5)."""
        row, column = coords[:, 1], coords[:, 2]
        grid = (row % self.stride == 0) & (column % self.stride == 0) & (row >= 0) & (cut == 0)
        if count is not None:
            return top_k_mask(len(attention) * grid - ranks(attention), count)
        ratio = self.ratio if cut == 0 else self.ratio**2
        return grid | top_k_mask(attention, max(int(len(attention) * ratio), 1))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Queries and keys without rotation, and one row."""
        return shape.look_flops(text + visual) + shape.row_flops(1, text + visual)
