"""How much a head looks back at earlier copies of what it reads now, on tokens that repeat with a known period.

The tokens are `lead` first ones and then `period` random ones, `repeats` times over. For a query i that has earlier copies,

    echo_i = sum_m P(i, i - m period),    induction_i = sum_m P(i, i - m period + 1),    m = 1, 2, ...

the attention to the copies of its own token, and to what came right after them. Source: razorattention, arXiv 2407.15891, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def repeated_ids(batch: Tensor, period: int, repeats: int, special: frozenset[int]) -> Tensor:
    """Token ids `(B, lead + period * repeats)`: one `period` of ids drawn from those in `batch (B, N)`, special ones left out, repeated.

    The first token of the batch leads where it is special, as it does in every sequence of such a model. The batch alone decides what is
    drawn. ValueError when the batch has special tokens only.
    """
    pool = torch.tensor(sorted(set(batch.flatten().tolist()) - special), dtype=batch.dtype)
    if not len(pool):
        raise ValueError("the batch holds special tokens only: give text")
    places = torch.arange(1, batch.numel() + 1)
    generator = torch.Generator().manual_seed(int((batch.flatten().cpu().long() * places).sum()) % (1 << 31))
    drawn = pool[torch.randint(len(pool), (batch.shape[0], period), generator=generator)].repeat(1, repeats)
    lead = batch[:, :1].cpu() if int(batch[0, 0]) in special else drawn[:, :0]
    return torch.cat([lead, drawn], 1)


def echo_scores(
    q: Tensor, k: Tensor, lse: Tensor, *, period: int, lead: int, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Echo and induction score of each query head, in [0, 1]: float32 (float64 for float64) `(B, Hq)` each.

    q `(B, Hq, N, D)`, k `(B, Hk, N, D)`, lse `(B, Hq, N)` of dense causal attention. The mean is over the queries that have an earlier
    copy.
    """
    n, kv_heads = q.shape[2], k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped, keys, lse = q.to(exact).unflatten(1, (kv_heads, -1)), k.to(exact).unsqueeze(2), lse.to(exact).unflatten(1, (kv_heads, -1))
    found = [torch.zeros(q.shape[:2], dtype=exact, device=q.device) for _ in range(2)]
    for back in range(period, n - lead, period):
        rows = slice(lead + back, n)
        for score, after in zip(found, (0, 1), strict=True):
            logits = (grouped[..., rows, :] * keys[..., lead + after : n - back + after, :]).sum(-1) * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            score += (logits - lse[..., rows]).exp().sum(-1).flatten(1)
    queries = max(1, n - lead - period)
    return found[0] / queries, found[1] / queries


def places_of(scores: list[Tensor]) -> list[Tensor]:
    """Where each head stands among all heads of the model, best first, as a share in [0, 1): float64, shaped as the scores of a layer
    `(H,)`. Ties go to the lower layer, then the lower head. Of all heads the share s are those below s, rounded up to whole heads."""
    together = torch.cat(scores)
    order = torch.sort(together, descending=True, stable=True).indices
    places = torch.empty(len(together), dtype=torch.float64, device=together.device)
    places[order] = torch.arange(len(together), dtype=torch.float64, device=together.device) / len(together)
    return list(places.split([len(x) for x in scores]))
