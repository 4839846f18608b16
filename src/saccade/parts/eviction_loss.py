"""How far a score is from the best possible order of eviction (l2-norm, 2406.11430, section 4)."""

from __future__ import annotations

from torch import Tensor


def eviction_loss(scores: Tensor, mass: Tensor) -> Tensor:
    """Attention loss per row and head, `(B, H)`: sum over m of Y_m, where Y_m is the attention mass of the m entries
    with the lowest score minus the mass of the m entries that hold the least. 0 when the score orders entries as their
    mass does.

    scores `(B, H, n)`: entries with low scores are evicted first (ties: the higher slot first); mass `(B, H, n)`:
    attention received.
    """
    if scores.shape != mass.shape:
        raise ValueError(f"scores {tuple(scores.shape)}, mass {tuple(mass.shape)}: give one of each per entry")
    # evicted last to first: the same order in which keep_best drops them
    order = scores.sort(dim=-1, descending=True, stable=True).indices.flip(-1)
    lost = mass.gather(-1, order).cumsum(-1)
    least = mass.sort(dim=-1).values.cumsum(-1)
    return (lost - least).sum(-1)
