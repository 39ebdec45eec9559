"""TokenCarve (https://arxiv.org/abs/2503.10501): attended, informative tokens stay; similar ones merge into them.

Attention of the last prompt token in layer K - 1, head mean, and the information sum_j |U S|_ij, of the singular value
decomposition X = U S V^T of the visual states, rank the tokens; N, N - 1, ..., 1 points a ranking, weighted, are added
up. Of the 1.5 T best, the better half takes in the T / 2 of the others that are most similar to one of it, by the mean.

Rule: ShawnTan86/TokenCarve@a57bd59; as there X is the layer's output (the paper speaks of its attention's), and the KV
of earlier layers is cropped to the tokens that stay. Deviations: equal points go by the lower index, not by a sort
routine; positions stay, the authors close them up (`positions: renumber`); there may be more visual tokens than
channels.
"""

import torch
from torch import Tensor

from prunekit import ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import bipartite_matching, borda, cosine, precise, ranks


@strategy(
    paper="2503.10501",
    code="ShawnTan86/TokenCarve@a57bd59",
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous")},
    per_sample=True,
    crops=True,
)
class TokenCarve:
    """Keep tokens that rank high by attention and information together, with similar ones merged into them.

    attention_weight: of the ranking by attention; that by information has the rest of 1. spare: how many tokens are
    merged into kept ones, as a fraction of those.
    """

    attention_weight: float = 0.5
    spare: float = 0.5

    def __post_init__(self) -> None:
        for name in ("attention_weight", "spare"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: is from 0 to 1")

    @hookimpl
    def select_tokens(self, attention: Tensor, hidden: Tensor, count: int) -> Selection:
        """Bool (V,) and owners, from attention (V,) and states (V, H)."""
        states = precise(hidden)
        left, values, _ = torch.linalg.svd(states, full_matrices=False)
        information = (left * values).abs().sum(-1)
        rank = ranks(borda([attention, information], [self.attention_weight, 1 - self.attention_weight]))
        ranked = min(count + int(self.spare * count), len(states))
        owner = bipartite_matching(cosine(states), ranked - count, sources=rank >= ranked // 2, valid=rank < ranked)
        keep = owner == torch.arange(len(states), device=owner.device)
        return Selection(keep, Owners(owner), crop=True)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row, the cosines, and the decomposition: bidiagonalisation and the left vectors, 8 m n^2 and 8 n^3."""
        short, long = sorted((visual, shape.hidden))
        decomposition = 8 * long * short**2 + 8 * short**3
        return shape.row_flops(1, text + visual) + 2 * visual**2 * shape.hidden + decomposition
