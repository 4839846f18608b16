"""Two numbers that say what a head is for: how much it looks at the first tokens, and how much it looks things up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SINKS = 4
NGRAM = 8
MOST_REPEATS = 4096


def repeats(ids: Sequence[int], ngram: int = NGRAM) -> tuple[Tensor, Tensor]:
    """Where an n-gram comes for the second time, and what followed it the first time: (queries, keys), int64 `(P,)` each, ascending.

    A query is the last token of the second occurrence, its key the token right after the first; occurrences that overlap don't count,
    nor do third and later ones. At most MOST_REPEATS pairs, evenly spread.
    """
    first: dict[tuple[int, ...], int] = {}
    done: set[tuple[int, ...]] = set()
    pairs = []
    for end in range(ngram, len(ids) + 1):
        gram = tuple(ids[end - ngram : end])
        after = first.setdefault(gram, end)
        if after <= end - ngram and gram not in done:
            done.add(gram)
            # a key inside the second occurrence would be a neighbour, not a memory
            if after < end - ngram:
                pairs.append((end - 1, after))
    if len(pairs) > MOST_REPEATS:
        pairs = [pairs[i * len(pairs) // MOST_REPEATS] for i in range(MOST_REPEATS)]
    found = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def sink_scores(q: Tensor, k: Tensor, lse: Tensor, *, scale: float, softcap: float | None = None, sinks: int = SINKS) -> Tensor:
    """Mean attention mass on the first `sinks` tokens: `(Hq,)` in [0, 1].

    q `(1, Hq, N, D)`, k `(1, Hk, N, D)`, lse `(Hq, N)` of dense attention. The mean is over the queries after those tokens, which see
    other keys too (0 where there are none).
    """
    rows = q[0, :, sinks:].to(lse.dtype).unflatten(0, (k.shape[1], -1))
    logits = _capped((rows @ k[0, :, :sinks].to(lse.dtype).unsqueeze(1).mT).flatten(0, 1) * scale, softcap)
    mass = (logits - lse[:, sinks:, None]).exp().sum(-1)
    return mass.mean(-1) if mass.shape[1] else mass.sum(-1)


def retrieval_scores(
    q: Tensor, k: Tensor, lse: Tensor, pairs: tuple[Tensor, Tensor], *, scale: float, softcap: float | None = None
) -> Tensor | None:
    """Mean attention mass from the second occurrence of an n-gram to the token after the first: `(Hq,)` in [0, 1]; None without repeats.

    pairs: (queries, keys) from `repeats`. This is the induction score by which razorattention (arXiv 2407.15891, section 3) finds its
    retrieval heads, taken on the n-grams that a text repeats by itself instead of on repeated random tokens, and for second occurrences
    only, where just one earlier place can be meant.
    """
    rows, keys = (x.to(q.device) for x in pairs)
    if not rows.numel():
        return None
    own = q[0, :, rows].to(lse.dtype).unflatten(0, (k.shape[1], -1))
    logits = _capped((own * k[0, :, keys].to(lse.dtype).unsqueeze(1)).sum(-1).flatten(0, 1) * scale, softcap)
    return (logits - lse[:, rows]).exp().mean(-1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
