"""Pure tensor primitives that strategies share; each has a naive twin in the tests."""

from prunekit.ops.grid import even_grid, grid_cells, middles
from prunekit.ops.maxmin import max_min
from prunekit.ops.topk import top_k_mask

__all__ = ["even_grid", "grid_cells", "max_min", "middles", "top_k_mask"]
