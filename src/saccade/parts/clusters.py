"""k-means of many sets at once: seeded, weighted, with k-means++ and chunked distances.

Each set (a head's keys) is clustered on its own and draws from the same random numbers, so that its clusters do not depend on
which other sets are clustered beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22  # scores of points against centroids held at a time


class Clusters(NamedTuple):
    """centroids `(..., c, D)` float32 (float64 for float64 points). labels `(..., n)` int64: each point's centroid.

    weights `(..., c)`, dtype of the centroids: the number of points of each cluster, or the sum of their weights; 0 where points
    coincide and there are fewer of them than clusters.
    """

    centroids: Tensor
    labels: Tensor
    weights: Tensor


def kmeans(
    points: Tensor, count: int, *, generator: torch.Generator, weights: Tensor | None = None, iterations: int = 300
) -> Clusters:
    """Cluster points `(..., n, D)` into `count` clusters (at most n), each set on its own.

    k-means++ draws the first centroids with probability weight * squared distance to the nearest one so far. Then points go to the
    nearest centroid (ties to the lower) and centroids to the mean of their points, until nothing moves or `iterations` are done. A
    cluster without points is moved to the point that is farthest from its centroid, several to the next ones.

    weights: `(..., n)`, from 0 on (default 1). generator: on the CPU. ValueError for no points or a count below 1.
    """
    if points.ndim < 2 or points.shape[-2] == 0 or count < 1:
        raise ValueError(f"k-means of points {tuple(points.shape)} in {count} clusters: give at least one point and one cluster")
    lead = points.shape[:-2]
    exact = torch.promote_types(points.dtype, torch.float32)
    x = points.to(exact).reshape(-1, *points.shape[-2:])
    w = torch.ones_like(x[..., 0]) if weights is None else weights.to(exact).expand(points.shape[:-1]).reshape(x.shape[:2])
    centroids = spread_seeds(x, min(count, x.shape[1]), generator, w)
    labels = nearest(x, centroids)
    for _ in range(iterations):
        centroids = _filled(x, labels, *cluster_means(x, labels, centroids.shape[1], w))
        moved = nearest(x, centroids)
        if torch.equal(moved, labels):
            break
        labels = moved
    centroids, sums = cluster_means(x, labels, centroids.shape[1], w, empty=centroids)
    return Clusters(*(part.reshape(*lead, *part.shape[1:]) for part in (centroids, labels, sums)))


def spread_seeds(points: Tensor, count: int, generator: torch.Generator, weights: Tensor) -> Tensor:
    """k-means++: `count` of the points `(R, n, D)`, far from each other, as first centroids `(R, count, D)`; weights `(R, n)`."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    squares = (points * points).sum(-1)
    seeds = points.new_empty(points.shape[0], count, points.shape[2])
    odds = weights
    nearest_so_far = torch.full_like(weights, torch.inf)
    for i, draw in enumerate(draws):
        # inverse of the cumulated odds, in float64: a long sum of small float32 numbers stalls
        total = odds.to(torch.float64).cumsum(-1)
        place = torch.searchsorted(total, total[:, -1:] * draw, right=True).clamp(max=points.shape[1] - 1)
        seed = points.gather(1, place.unsqueeze(-1).expand(-1, -1, points.shape[2]))
        seeds[:, i : i + 1] = seed
        away = squares - 2 * (points @ seed.mT).squeeze(-1) + (seed * seed).sum(-1)
        nearest_so_far = torch.minimum(nearest_so_far, away.clamp_(min=0).scatter_(1, place, 0.0))
        odds = weights * nearest_so_far
    return seeds


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point by Euclidean distance, ties to the lower: `(R, n, D)`, `(R, c, D)` to `(R, n)` int64."""
    half = (centroids * centroids).sum(-1).unsqueeze(1) / 2
    rows = max(1, CHUNK // max(1, points.shape[0] * centroids.shape[1]))
    # argmin of |x - c|^2 is the argmax of x.c - |c|^2 / 2
    return torch.cat([torch.baddbmm(-half, piece, centroids.mT).argmax(-1) for piece in points.split(rows, dim=1)], dim=1)


def cluster_means(
    points: Tensor, labels: Tensor, count: int, weights: Tensor | None = None, empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted means `(R, count, D)` of the points of each label, and the sums of their weights `(R, count)`.

    points `(R, n, D)`, labels `(R, n)` int64, weights `(R, n)` (default 1). A label without weight has mean 0, or that of `empty`.
    """
    rows, _, dim = points.shape
    each = torch.ones_like(points[..., 0]) if weights is None else weights
    where = (labels + torch.arange(rows, device=labels.device).unsqueeze(1) * count).flatten()
    sums = points.new_zeros(rows * count).index_add_(0, where, each.flatten())
    means = points.new_zeros(rows * count, dim).index_add_(0, where, (points * each.unsqueeze(-1)).flatten(0, 1))
    means = (means / sums.clamp(min=torch.finfo(points.dtype).tiny).unsqueeze(-1)).view(rows, count, dim)
    sums = sums.view(rows, count)
    return means if empty is None else torch.where((sums > 0).unsqueeze(-1), means, empty), sums


def _filled(points: Tensor, labels: Tensor, means: Tensor, sums: Tensor) -> Tensor:
    """The means, with those of empty clusters replaced by the points farthest from their own."""
    empty = sums == 0
    if not bool(empty.any()):
        return means
    index = labels.unsqueeze(-1).expand(points.shape)
    away = (points - means.gather(1, index)).square().sum(-1)
    farthest = torch.sort(away, dim=-1, descending=True, stable=True).indices[:, : means.shape[1]]
    rank = (empty.cumsum(-1) - 1).clamp(min=0)
    chosen = points.gather(1, farthest.gather(1, rank).unsqueeze(-1).expand(means.shape))
    return torch.where(empty.unsqueeze(-1), chosen, means)
