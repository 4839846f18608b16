"""estimate: what a query tile should read, found for much less than reading it.

    pooled_scores, block_statistics, pool_blocks        one vector per block of tokens (minference, spargeattn)
    minmax_pages, extend_pages, page_bounds             an upper bound from the channel-wise range of a page (quest)
    tile_maxima                                         the largest logit of each tile, in full precision, 8 or 4 bits (sale)
    row_sums                                            column and diagonal sums of a few exact rows (minference, sampleattention)
    pooled_probabilities                                softmax probabilities per tile, exact (calibration, inspection, proxyattn)
    row_products, packed_products, best_ids             one query's scores over many stored rows, and the best of them (decoding)
    slash_lists                                         what query tiles read of chosen columns and diagonals (minference)
    descend_tree                                        about the best of them, a score for ranges of keys instead of each (hip)
    choose_top_k, choose_top_p, choose_threshold        tile scores to a Selection, without a host synchronisation

Shapes: q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`, Hk dividing Hq, keys never repeated; tile scores `(B, H, Tq, Tk)` with
`Tq = ceil(Nq / block_q)` and `Tk = ceil(Nk / block_k)`. Causal masks are aligned at the end. No function ever holds an Nq x Nk map.
impl: "reference" (plain torch, the oracle), "triton", or "auto": Triton on CUDA tensors that it supports, on a CPU what is made for one
where there is such, else the reference. `last_estimate()` says which. Nothing here has a gradient.
"""

from __future__ import annotations

from saccade.ops.estimate.best import best_ids, row_products
from saccade.ops.estimate.choose import choose_threshold, choose_tiles, choose_top_k, choose_top_p
from saccade.ops.estimate.common import IMPLEMENTATIONS, Impl, TileGrid, last_estimate
from saccade.ops.estimate.descend import descend_tree
from saccade.ops.estimate.groups import Reduce
from saccade.ops.estimate.packed import packed_products
from saccade.ops.estimate.pages import extend_pages, minmax_pages, page_bounds
from saccade.ops.estimate.pooled import BlockStatistics, block_statistics, pool_blocks, pooled_scores, self_similarity
from saccade.ops.estimate.rows import RowSums, row_sums
from saccade.ops.estimate.slash_lists import SlashLists, slash_lists
from saccade.ops.estimate.tiles import mean_probability, pooled_probabilities, tile_maxima

__all__ = [
    "IMPLEMENTATIONS", "BlockStatistics", "Impl", "Reduce", "RowSums", "SlashLists", "TileGrid", "best_ids", "block_statistics",
    "choose_threshold", "choose_tiles", "choose_top_k", "choose_top_p", "descend_tree", "extend_pages", "last_estimate",
    "mean_probability", "minmax_pages", "packed_products", "page_bounds", "pool_blocks", "pooled_probabilities", "pooled_scores",
    "row_products", "row_sums", "self_similarity", "slash_lists", "tile_maxima",
]  # fmt: skip
