"""Folding entries of a cache into others: which survivor each goes to, with what weight, and what becomes of it.

Everything is written per slot. A route `into`, int64 `(B, H, n)`, says where each of n entries goes: a survivor to itself, a folded
entry to its survivor, a dropped one to n, the zero class. With weights w `(B, H, n)` a survivor becomes

    x_c = sum_{j: into_j = c} w_j x_j        (itself among the j)

Sources: d2o 2406.13035, look-m 2406.18139, kvmerger 2407.08454, ems 2412.08521.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import LayerContext, StoredKV
from saccade.parts.ragged import slots_of
from saccade.parts.rows import pick_rows

COUNT = "count"  # the side array of how many tokens an entry stands for; 0 for an entry that no merge has met, which is 1
LOG_WEIGHT = "log_weight"  # the side array, in float32 or float64, of what full attention adds to an entry's logit, after a softcap
PAIRS = 1 << 22  # similarities that are held at a time


def check_mergeable(slug: str, ctx: LayerContext, kv: StoredKV) -> None:
    """ValueError where the model stores one latent for all heads, which heads can't merge each in its own way."""
    if kv.heads != kv.keys.shape[1]:
        raise ValueError(f"layer {ctx.layer} caches one latent for all heads, where {slug} can't merge: use a policy that only drops")


# -- routes ----------------------------------------------------------------------------------------------------------------


def to_nearest(stay: Tensor, leaving: Tensor, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each leaving entry goes to the staying one of its head whose key has the largest cosine with its own.

    stay, leaving: bool `(B, H, n)`, disjoint; an entry that is neither goes to the zero class. keys, values `(B, H, n, D)`: with values
    the similarity is cos(k, k') cos(v, v'), and minus its size unless both are positive. Returns the route and the similarity of each
    entry to where it goes, float32 (float64 for float64 keys) `(B, H, n)`: 1 for survivors, 0 in the zero class. Ties go to the lower
    slot.
    """
    n = stay.shape[-1]
    own = torch.arange(n, device=stay.device).expand_as(stay)
    into = torch.where(stay, own, n)
    exact = torch.promote_types(keys.dtype, torch.float32)
    similarity = stay.to(exact)
    targets, held = slots_of(stay)
    sources, gone = slots_of(leaving)
    if not sources.shape[-1] or not targets.shape[-1]:
        return into, similarity
    sides = [[_unit(pick_rows(x, slots)) for slots in (sources, targets)] for x in ((keys,) if values is None else (keys, values))]
    missing = (torch.arange(targets.shape[-1], device=stay.device) >= held.unsqueeze(-1)).unsqueeze(2)
    step = max(1, PAIRS // (targets.numel()))
    best, where = [], []
    for begin in range(0, sources.shape[-1], step):
        cosines = [a[:, :, begin : begin + step] @ b.mT for a, b in sides]
        found = cosines[0] if values is None else _both_positive(*cosines)
        top = found.masked_fill(missing, -torch.inf).max(-1)
        best.append(top.values)
        where.append(top.indices)
    goes, cosine = torch.gather(targets, -1, torch.cat(where, -1)), torch.cat(best, -1)
    real = torch.arange(sources.shape[-1], device=stay.device) < gone.unsqueeze(-1)
    # what fills up short lists keeps what it had
    into = into.scatter(-1, sources, torch.where(real, goes, into.gather(-1, sources)))
    similarity = similarity.scatter(-1, sources, torch.where(real, cosine, similarity.gather(-1, sources)))
    return into, similarity


def drop(into: Tensor, which: Tensor) -> Tensor:
    """The route with the entries `which`, bool `(B, H, n)`, sent to the zero class."""
    return into.masked_fill(which, into.shape[-1])


# -- weights ---------------------------------------------------------------------------------------------------------------


def average(into: Tensor, similarity: Tensor) -> Tensor:
    """Every member of a class of s entries, the survivor among them, weighs 1 / s."""
    return 1 / class_sums(torch.ones_like(similarity), into)


def pivotal(into: Tensor, similarity: Tensor) -> Tensor:
    """Members are averaged with the survivor before they are folded: 1 / (2 s) for them, the rest for the survivor."""
    size = class_sums(torch.ones_like(similarity), into)
    return torch.where(_survivors(into), (1 + size) / 2, 0.5) / size


def cosine(into: Tensor, similarity: Tensor) -> Tensor:
    """Members weigh as much as they are alike, u / s: the weights sum to less than 1, so that merged entries shrink."""
    return similarity / class_sums(torch.ones_like(similarity), into)


def exponential(into: Tensor, similarity: Tensor) -> Tensor:
    """Softmax of the similarities in a class, in which the survivor has similarity 1."""
    return normalised(similarity.exp(), into)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": average, "pivotal": pivotal, "cosine": cosine, "exponential": exponential,
}  # fmt: skip


def gaussian(into: Tensor, keys: Tensor, sigma: float) -> Tensor:
    """g / (sum of g over the class), g = exp(-|k_p - k|^2 / (2 sigma^2)) for a key k and its survivor's k_p."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    pivot = pick_rows(keys, into.clamp(max=into.shape[-1] - 1))
    return normalised(torch.exp(-(keys - pivot).square().sum(-1) / (2 * sigma**2)), into)


def normalised(weights: Tensor, into: Tensor) -> Tensor:
    """Weights of at least 0 divided by their sum over each class; members of a class whose weights are all 0 weigh the same."""
    total = class_sums(weights, into)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(weights.dtype).tiny), average(into, weights))


# -- folding ---------------------------------------------------------------------------------------------------------------


def class_sums(x: Tensor, into: Tensor) -> Tensor:
    """For each entry the sum of x `(B, H, n)` over all entries of its class, itself among them."""
    sums = x.new_zeros(*x.shape[:2], x.shape[2] + 1).scatter_add_(-1, into, x)
    return sums.gather(-1, into)


def fold(x: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """x `(B, H, n, D)` with every survivor replaced by the weighted sum of its class, computed in float32 or better; in the other slots
    0.

    A survivor to whom nobody goes, with weight 1, stays as it is.
    """
    weighted = x.to(weights.dtype) * weights.unsqueeze(-1)
    sums = weighted.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3])
    return sums.scatter_add_(2, into.unsqueeze(-1).expand_as(x), weighted)[:, :, :-1].to(x.dtype)


def fold_directions(x: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """The same for directions and norms apart: the weighted mean of unit vectors, made as long as the weighted mean of the norms."""
    exact = x.to(weights.dtype)
    norms = exact.norm(dim=-1, keepdim=True)
    merged = _unit(fold(_unit(exact), into, weights)) * fold(norms, into, weights)
    alone = class_sums(torch.ones_like(weights), into) == 1
    return torch.where(alone.unsqueeze(-1), x, merged.to(x.dtype))


def merge_entries(kv: StoredKV, into: Tensor, keys: Tensor, values: Tensor, *, weigh: bool = False) -> None:
    """Store folded keys and values, count the tokens that each survivor now stands for, and keep the survivors.

    weigh: a survivor enters the softmax as many times as it has tokens, its logit + log(count).
    """
    known = kv.side.get(COUNT)
    counts = torch.ones_like(into, dtype=torch.int32) if known is None else known.clamp(min=1)
    kv.rewrite(keys=keys, values=values)
    kv.side[COUNT] = counts = class_sums(counts, into)
    if weigh:
        kv.side[LOG_WEIGHT] = counts.to(torch.promote_types(keys.dtype, torch.float32)).log()
    kv.keep(*slots_of(_survivors(into)))


def _survivors(into: Tensor) -> Tensor:
    return into == torch.arange(into.shape[-1], device=into.device)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _both_positive(a: Tensor, b: Tensor) -> Tensor:
    product = a * b
    return torch.where((a > 0) & (b > 0), product, -product.abs())
