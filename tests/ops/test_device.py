"""No primitive reads numbers back from the device: on `meta` tensors, which have none, that raises."""

from __future__ import annotations

import pytest
import torch

from prunekit import ops

V, G = 12, 3
ROW = {"size": (2, V), "device": "meta"}
SCORES, VALID, NUMBERS = torch.empty(**ROW), torch.empty(**ROW, dtype=torch.bool), torch.empty(**ROW, dtype=torch.int64)
MATRIX, FEATURES = torch.empty(2, V, V, device="meta"), torch.empty(2, V, 4, device="meta")
COORDS = torch.empty(V, 5, device="meta", dtype=torch.int64)
WEIGHTS, SIZES = torch.empty(2, G, device="meta"), torch.empty(2, G, device="meta", dtype=torch.int64)

CALLS = {
    "bipartite_matching": lambda: ops.bipartite_matching(MATRIX, [3, 2], valid=VALID, protected=VALID),
    "borda": lambda: ops.borda([SCORES, SCORES], [0.5, 0.5], VALID),
    "cosine": lambda: ops.cosine(FEATURES),
    "coverage": lambda: ops.coverage(MATRIX, [3, 2], VALID, SCORES, VALID),
    "density_peaks": lambda: ops.density_peaks(MATRIX, [3, 2], 4, VALID),
    "dpp": lambda: ops.dpp(MATRIX, [3, 2], SCORES, VALID),
    "group_means": lambda: ops.group_means(FEATURES[0], NUMBERS[0], G),
    "group_sizes": lambda: ops.group_sizes(NUMBERS, G, VALID),
    "group_top_k": lambda: ops.group_top_k(SCORES, NUMBERS, SIZES, VALID),
    "index_mask": lambda: ops.index_mask(NUMBERS, V),
    "max_min": lambda: ops.max_min(MATRIX, [3, 2], VALID, SCORES),
    "max_sum": lambda: ops.max_sum(MATRIX, SCORES, [3, 2], VALID),
    "middles": lambda: ops.middles(NUMBERS[0]),
    "min_max": lambda: ops.min_max(SCORES, VALID),
    "mmr": lambda: ops.mmr(SCORES, MATRIX, [3, 2], 0.5, VALID, at_once=2),
    "nearest_kept": lambda: ops.nearest_kept(MATRIX, VALID, VALID),
    "outliers": lambda: ops.outliers(SCORES, VALID),
    "precise": lambda: ops.precise(SCORES),
    "quotas": lambda: ops.quotas(WEIGHTS, [3, 2], SIZES, 1),
    "ranks": lambda: ops.ranks(SCORES, VALID),
    "recycle": lambda: ops.recycle(SCORES[0], FEATURES[0], 3, 5, 2),
    "same_place": lambda: ops.same_place(COORDS, NUMBERS[0], 2),
    "segments": lambda: ops.segments(SCORES[0], 0.9, 8),
    "slot_weights": lambda: ops.slot_weights(NUMBERS[0], V),
    "top_k_mask": lambda: ops.top_k_mask(SCORES, NUMBERS[:, 0], VALID),
}
# Plain numbers, functions of coords that read the sizes or the number of the images, and rounds until nothing is open.
ON_THE_HOST = {"clip_shares", "crop_quotas", "density_cutoff", "even_grid", "grid_cells", "group_members", "tile_of"}


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - ON_THE_HOST))
def test_nothing_waits_for_the_device(name: str) -> None:
    assert CALLS[name]().device.type == "meta"


def test_reading_a_number_raises() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.grid_cells(torch.empty(V, 5, device="meta", dtype=torch.int64), 4)
