"""Selections drawn at random, for timing: which tiles are read doesn't matter to a kernel, how many does."""

from __future__ import annotations

import torch

from saccade.core import Selection


def random_tiles(n: int, heads: int, tile: int, density: float, device: str, seed: int = 0) -> Selection:
    """Causal tiles drawn at random per head, the diagonal always among them, so that `density` of the visible pairs is read."""
    generator = torch.Generator(device).manual_seed(seed)
    tiles = -(-n // tile)
    rank = torch.rand(1, heads, tiles, tiles, generator=generator, device=device)
    visible = torch.ones(tiles, tiles, dtype=torch.bool, device=device).tril()
    rank = rank.masked_fill(~visible, 2.0).masked_fill(torch.eye(tiles, dtype=torch.bool, device=device), -1.0)
    order = rank.argsort(-1).argsort(-1)
    # a diagonal tile holds half its pairs: tiles of a row, in pairs, are what the row sees less half a tile
    pairs = torch.arange(tiles, device=device) + 0.5
    wanted = (density * pairs).cumsum(0)
    # the diagonal counts for half a tile of its row
    sums = (wanted + 0.5 * torch.arange(1, tiles + 1, device=device)).round()
    counts = sums.diff(prepend=torch.zeros(1, device=device)).clamp(min=1)
    mask = (order < counts[:, None]) & visible
    return Selection.from_block_mask(mask, block_q=tile, block_k=tile, n_q=n, n_k=n)


def random_pages(n: int, heads: int, block_q: int, page: int, density: float, device: str, seed: int = 0) -> Selection:
    """Each page of `page` keys is read by a tile of `block_q` queries with probability `density`, the first page by all; page 1: single
    keys."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.rand(1, heads, -(-n // block_q), -(-n // page), generator=generator, device=device) < density
    mask[..., 0] = True
    if page == 1:
        return Selection.from_token_mask(mask, block_q=block_q, n_q=n)
    return Selection.from_block_mask(mask, block_q=block_q, block_k=page, n_q=n, n_k=n)


def cache_pages(n: int, selected: int, batch: int, heads: int, page: int, device: str, seed: int = 0) -> Selection:
    """For one query over n keys: `selected` of them, in whole pages drawn at random, for each batch row and head."""
    if n % page or selected % page:
        raise ValueError(f"{n} keys and {selected} selected ones must be multiples of the page of {page}")
    generator = torch.Generator(device).manual_seed(seed)
    picked = torch.rand(batch, heads, n // page, generator=generator, device=device).topk(selected // page, sorted=False).indices
    if page == 1:
        return Selection.from_positions(picked.unsqueeze(2), n_q=1, n_k=n)
    return Selection.from_parts(n_q=1, n_k=n, block_q=1, block_k=page, starts=picked.unsqueeze(2) * page)
