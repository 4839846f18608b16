"""The estimates in plain torch: any device, float64 for float64 inputs, float32 otherwise. The oracle of the kernels.

Work goes query tile by query tile, or in runs of rows, so no n_q x n_k map is held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core import over_groups
from saccade.ops.estimate.common import TileGrid, exact

ROWS = 64  # query rows whose probabilities are held at a time


def runs(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """`(..., N, D)` as runs `(..., T, block, D)` in the exact dtype; what is missing from the last run holds `fill`."""
    n = x.shape[-2]
    return pad(x.to(exact(x)), (0, 0, 0, -n % block), value=fill).unflatten(-2, (-1, block))


def sizes(n: int, block: int, device: torch.device) -> Tensor:
    """Tokens in each run of `block`, int64 `(T,)`."""
    return (n - torch.arange(0, n, block, device=device)).clamp(max=block)


def pool(x: Tensor, block: int, how: str) -> Tensor:
    """`(B, H, T, D)`; means are exact dtype, maxima and minima have the dtype of x."""
    if how == "mean":
        return runs(x, block).sum(-2) / sizes(x.shape[-2], block, x.device).unsqueeze(-1)
    if how == "max":
        return runs(x, block, -torch.inf).amax(-2).to(x.dtype)
    return runs(x, block, torch.inf).amin(-2).to(x.dtype)


def statistics(x: Tensor, block: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(means `(B, H, T, D)`, mean cosine over all pairs of a run, a row with itself included, `(B, H, T)`)."""
    moved = x.to(exact(x)) if shift is None else x.to(exact(x)) - shift.to(exact(x)).unsqueeze(2)
    length = moved.norm(dim=-1, keepdim=True)
    units = torch.where(length > 0, moved / torch.where(length > 0, length, 1.0), 0.0)
    # the mean entry of U U^T is the squared length of the mean row of U
    return pool(moved, block, "mean"), pool(units, block, "mean").square().sum(-1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q.k for q `(B, Hq, Nq, D)` and k `(B, Hk, Nk, D)`: `(B, Hq, Nq, Nk)`, keys not repeated."""
    return over_groups(q.to(exact(q)).unflatten(1, (k.shape[1], -1)), k.to(exact(k)).mT).flatten(1, 2)


def page_bounds(q: Tensor, low: Tensor, high: Tensor, grid: TileGrid | None) -> Tensor:
    """`(B, Hq, Nq, P)`, or with a grid the maximum over each query tile, `(B, Hq, Tq, P)`."""
    bounds = products(q.clamp(min=0), high) + products(q.clamp(max=0), low)
    if grid is None:
        return bounds
    tiles = pad(bounds, (0, 0, 0, -q.shape[2] % grid.block_q), value=-torch.inf).unflatten(2, (grid.rows, -1)).amax(3)
    return tiles.masked_fill(~grid.visible(q.device), -torch.inf)


def extend_pages(low: Tensor, high: Tensor, keys: Tensor, seen: int, page: int) -> None:
    """Widen the bounds in place by keys `(B, H, m, D)`, the first of which is token number `seen`."""
    done = 0
    while done < keys.shape[2]:
        at = seen + done
        take = min(page - at % page, keys.shape[2] - done)
        new, index = keys[:, :, done : done + take], at // page
        fresh = at % page == 0
        low[:, :, index] = new.amin(2) if fresh else torch.minimum(low[:, :, index], new.amin(2))
        high[:, :, index] = new.amax(2) if fresh else torch.maximum(high[:, :, index], new.amax(2))
        done += take


def logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    raw = products(q, k) * scale
    return softcap * torch.tanh(raw / softcap) if softcap else raw


def quantised(x: Tensor, mean: Tensor | None, bits: int, group: int) -> Tensor:
    """x less its mean, rounded to `step * {-most ... most}`, `most = 2^(bits-1) - 1`, `step = max |x| / most` over `group` tokens."""
    wide = x.to(exact(x)) if mean is None else x.to(exact(x)) - mean.unsqueeze(2)
    most = (1 << (bits - 1)) - 1
    tiles = runs(wide, group)
    step = tiles.abs().amax((-1, -2), keepdim=True) / most
    steps = (tiles / torch.where(step > 0, step, 1.0) + 0.5).floor().clamp(-most, most)
    return (steps * step).flatten(-3, -2)[..., : x.shape[-2], :]


def estimated(q: Tensor, k: Tensor, bits: int | None, group: int, smooth: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What to multiply and what to add: q.k is about `a.b + c_j + q_i.kbar`; returns (a, b, extra).

    With smoothing a and b are the rounded q - qbar and k - kbar, and extra `(B, Hq, Nk)` is `qbar.(k_j - kbar)`.
    """
    if bits is None:
        return q, k, None
    if not smooth:
        return quantised(q, None, bits, group), quantised(k, None, bits, group), None
    q_mean, k_mean = (x.mean(2, dtype=exact(x)) for x in (q, k))
    centred = k.to(exact(k)) - k_mean.unsqueeze(2)
    extra = products(q_mean.unsqueeze(2), centred).squeeze(2)
    return quantised(q, q_mean, bits, group), quantised(k, k_mean, bits, group), extra


def tile_reduce(
    q: Tensor, k: Tensor, grid: TileGrid, *, offset: int, scale: float, softcap: float, relative_to: Tensor | None, total: bool,
    bits: int | None = None, group: int = 1, smooth: bool = True,
) -> Tensor:  # fmt: skip
    """Over each tile: the maximum of `z_ij = logit_ij - relative_to_i`, or with `total` the sum of `exp(z_ij)`; `(B, Hq, Tq, Tk)`.

    offset: position of query 0 among the keys. Tiles without a visible pair hold -inf, or 0.
    """
    a, b, extra = estimated(q, k, bits, group, smooth)
    keys = torch.arange(grid.n_k, device=q.device)
    found = []
    for begin in range(0, grid.n_q, grid.block_q):
        rows = slice(begin, min(begin + grid.block_q, grid.n_q))
        raw = products(a[:, :, rows], b)
        if extra is not None:
            k_mean = k.mean(2, dtype=exact(k)).unsqueeze(2)
            raw = raw + extra.unsqueeze(2) + products(q[:, :, rows], k_mean)
        z = raw * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        if relative_to is not None:
            z = z - relative_to[:, :, rows].to(z.dtype).unsqueeze(-1)
        if grid.causal:
            z = z.masked_fill(keys > torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(-1) + offset, -torch.inf)
        z = pad(z, (0, -grid.n_k % grid.block_k), value=-torch.inf).unflatten(-1, (grid.columns, grid.block_k))
        found.append(z.exp().sum((2, 4)) if total else z.amax((2, 4)))
    return torch.stack(found, dim=2)


def row_lse(q: Tensor, k: Tensor, limits: Tensor, scale: float, softcap: float) -> Tensor:
    """log-sum-exp of each row's logits over its first `limits (m,)` keys: `(B, Hq, m)`, -inf where it sees none."""
    keys = torch.arange(k.shape[2], device=q.device)
    found = []
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, begin + ROWS)
        z = logits(q[:, :, rows], k, scale, softcap)
        found.append(z.masked_fill(keys >= limits[rows].unsqueeze(-1), -torch.inf).logsumexp(-1))
    return torch.cat(found, dim=2)


def row_sums(
    q: Tensor, k: Tensor, limits: Tensor, first: int | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(column sums `(B, Hq, Nk)`, diagonal sums `(B, Hq, Nk)` or None, lse `(B, Hq, m)`) of the softmax rows.

    limits `(m,)`: how many keys each row sees. first: position of row 0 when the rows are consecutive and diagonals are wanted.
    """
    n = k.shape[2]
    # on a CPU nothing is lost by looking: what no row sees need not be multiplied
    seen = n if limits.is_cuda or not limits.numel() else max(0, min(n, int(limits.max())))
    keys = torch.arange(seen, device=q.device)
    columns = torch.zeros(*q.shape[:2], n, dtype=exact(q), device=q.device)
    diagonals = None if first is None else torch.zeros_like(columns)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact(q), device=q.device)
    for begin in range(0, q.shape[2], ROWS):
        rows = slice(begin, begin + ROWS)
        z = logits(q[:, :, rows], k[:, :, :seen], scale, softcap)
        z = z.masked_fill(keys >= limits[rows].unsqueeze(-1), -torch.inf)
        lse[:, :, rows] = z.logsumexp(-1)
        p = (z - lse[:, :, rows].masked_fill(lse[:, :, rows].isneginf(), 0.0).unsqueeze(-1)).exp()
        columns[..., :seen] += p.sum(2)
        if diagonals is None or first is None:
            continue
        for i in range(p.shape[2]):
            # offset o of the row at position p is key p - o
            own = first + begin + i
            reach = min(own, seen - 1)
            if reach >= 0:
                diagonals[..., own - reach : own + 1] += p[:, :, i, : reach + 1].flip(-1)
    return columns, diagonals, lse


def counts_of_mass(weights: Tensor, share: Tensor, taken: Tensor) -> Tensor:
    """How many of the highest `weights (..., n)` (float64, -1 for what can't be chosen) reach `share` of the total with `taken`.

    share, taken: `(...)` float64. The entry that crosses is counted. taken: weight of what is chosen already.
    """
    ordered = weights.sort(dim=-1, descending=True).values.clamp(min=0)
    sums = ordered.cumsum(-1)
    target = share * (sums[..., -1] + taken) - taken
    needed = (sums < target.unsqueeze(-1)).sum(-1) + 1
    return torch.where(target > 0, needed, 0)


def ranks(scores: Tensor) -> Tensor:
    """0 for the highest score of each row of `(..., n)`, 1 for the next, and so on; of equal scores the first comes first."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def best(scores: Tensor, count: Tensor) -> Tensor:
    """bool: the `count (...)` highest of `scores (..., n)`, entries of -inf never; ties go to the lower index."""
    return (ranks(scores) < count.unsqueeze(-1)) & (scores > -torch.inf)


def listed(keep: Tensor, block: int, width: int, n_k: int) -> tuple[Tensor, Tensor]:
    """(starts `(..., width)`, counts `(...)`) int32 of the True tiles, which are at most `width` a row; past the end n_k."""
    counts = keep.sum(-1, dtype=torch.int32)
    # a stable sort on "absent" moves the chosen tiles to the front in ascending order
    ids = torch.sort((~keep).to(torch.uint8), dim=-1, stable=True).indices[..., :width]
    past = torch.arange(width, device=keep.device) >= counts.unsqueeze(-1)
    return (ids * block).masked_fill(past, n_k).to(torch.int32), counts


def choose(
    scores: Tensor, rule: str, limit: Tensor, grid: TileGrid, *, sinks: int, local: int, forced: Tensor | None, inside: bool, width: int
) -> tuple[Tensor, Tensor]:
    """(starts `(B, H, Tq, width)`, counts `(B, H, Tq)`) int32. rule: "count", "mass" or "threshold", with its `limit (B, H, Tq)`."""
    visible = grid.visible(scores.device)
    certain = (grid.forced(sinks, local, scores.device) & visible).expand(scores.shape)
    asked = scores.isnan() & visible
    if forced is not None:
        asked = asked | (forced & visible)
    must = certain | asked
    alive = visible & (scores > -torch.inf) | must
    ranked = scores.masked_fill(~alive, -torch.inf)
    rest = ranked.masked_fill(must, -torch.inf) if inside else ranked.masked_fill(scores.isnan(), -torch.inf)
    inside_count = must.sum(-1) if inside else torch.zeros_like(must.sum(-1))
    available = (rest > -torch.inf).sum(-1)
    if rule == "threshold":
        count = (rest > limit.unsqueeze(-1)).sum(-1)
    elif rule == "count":
        count = (limit - inside_count).clamp(min=0)
    else:
        weights = torch.where(rest > -torch.inf, scores.double().clamp(min=0), -1.0)
        taken = torch.where(must & ~scores.isnan(), scores.double().clamp(min=0), 0.0).sum(-1) if inside else torch.zeros_like(limit)
        count = counts_of_mass(weights, limit, taken)
        count = torch.where(limit >= 1, available, torch.maximum(count, 1 - inside_count))
    keep = best(rest, count) | must
    if width < grid.columns:
        # what is certain stays first, then what was asked for, then the best
        index = torch.arange(grid.columns, device=scores.device).expand_as(keep)
        place = torch.where(must, index, ranks(ranked)).double()
        place = place - (certain.double() + must.double()) * (grid.columns + 1)
        keep = best((-place).masked_fill(~keep, -torch.inf), keep.sum(-1).clamp(max=width))
    return listed(keep, grid.block_k, width, grid.n_k)
