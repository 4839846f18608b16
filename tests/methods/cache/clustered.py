"""Keys in clusters, as natural text has them: what is evicted has kin among what stays."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered(
    n: int, clusters: int, *, dim: int = 16, spread: float = 0.3, queries: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt q `(1, 4, n, D)`, k, v `(1, 2, n, D)` and later queries `(1, 4, queries, D)`, float64.

    Keys and values lie around `clusters` centres of each head; queries look at centres, each at one of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    centres, contents = noise(1, 2, clusters, dim), noise(1, 2, clusters, dim)
    own = torch.randint(clusters, (n,), generator=generator)
    k = centres[:, :, own] + spread * noise(1, 2, n, dim)
    v = contents[:, :, own] + spread * noise(1, 2, n, dim)
    asked = torch.randint(clusters, (n + queries,), generator=generator)
    q = 1.5 * centres.repeat_interleave(2, 1)[:, :, asked] + noise(1, 4, n + queries, dim)
    return q[:, :, :n], k, v, q[:, :, n:]


def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q `(B, Hq, m, D)` over all of k and v."""
    group = q.shape[1] // k.shape[1]
    weights = (q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v.repeat_interleave(group, 1)


def relative(out: Tensor, dense: Tensor) -> float:
    """Mean over rows of the relative error."""
    return float(((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())
