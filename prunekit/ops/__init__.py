"""Pure tensor primitives that strategies share; each has a naive twin of the same name in `tests/ops/naive.py`.

Conventions, stated here once:

- Shapes are those of a batch, (B, V) for scores and masks, (B, V, V) for matrices; the leading axis may be missing
  throughout, for strategies that decide one sample at a time. B batch, V visual tokens (at least 1), R targets, G
  groups.
- `valid`: bool (B, V), False at the padding of ragged rows, which is never chosen and changes no result; None: no
  padding.
- `count`: one number, or one for each row. A row with fewer valid entries keeps all of them.
- On ties the lower index comes first. NaN counts as the lowest score, so that an overflow elsewhere may change which
  tokens are chosen but never how many.
- `owner`: int64 (B, V), the index along V of the kept token that each token joins. A kept token owns itself; -1 for
  padding and for tokens that go nowhere.
- Decisions carry no gradient. Nothing waits for the device, except where a docstring says so.
"""

from prunekit.ops.borda import borda
from prunekit.ops.coverage import coverage
from prunekit.ops.crops import clip_shares, crop_quotas
from prunekit.ops.density import density_peaks, recycle
from prunekit.ops.dpp import dpp
from prunekit.ops.extras import slot_weights
from prunekit.ops.greedy import index_mask
from prunekit.ops.grid import even_grid, grid_cells, middles, tile_of
from prunekit.ops.groups import group_means, group_members, group_sizes, group_top_k, quotas
from prunekit.ops.matching import bipartite_matching
from prunekit.ops.maxmin import max_min
from prunekit.ops.maxsum import max_sum
from prunekit.ops.mmr import mmr
from prunekit.ops.nearest import nearest_kept
from prunekit.ops.outliers import outliers
from prunekit.ops.scale import cosine, min_max, precise
from prunekit.ops.separate import density_cutoff
from prunekit.ops.topk import ranks, top_k_mask
from prunekit.ops.video import same_place, segments

__all__ = [
    "bipartite_matching",
    "borda",
    "clip_shares",
    "cosine",
    "coverage",
    "crop_quotas",
    "density_cutoff",
    "density_peaks",
    "dpp",
    "even_grid",
    "grid_cells",
    "group_means",
    "group_members",
    "group_sizes",
    "group_top_k",
    "index_mask",
    "max_min",
    "max_sum",
    "middles",
    "min_max",
    "mmr",
    "nearest_kept",
    "outliers",
    "precise",
    "quotas",
    "ranks",
    "recycle",
    "same_place",
    "segments",
    "slot_weights",
    "tile_of",
    "top_k_mask",
]
