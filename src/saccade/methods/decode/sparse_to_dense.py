"""Sparse-to-Dense: single steps read the images that the text looked at, and what they write is only a draft.

When the prompt has ended, each layer chooses once, for every key head, from its image tokens X_v and text tokens X_t

    s(x) = 1 / m_t  sum over t in X_t of A(t, x),   x in X_v,   A summed over the query heads of a group
    draft cache = the K image tokens with the highest s, and all text

and every step reads that and what was generated since. This alone is lossy. `saccade.speculate` makes it lossless: gamma tokens are
drafted in this way, one dense pass over them says how far they are right, and its keys and values replace those of the draft. Nothing is
dropped, so memory is not reduced. A later prompt on the same cache (a call of more than 16 tokens) chooses anew, with its text added.

Which tokens are images comes from the model's placeholder ids or from `handle.mark_vision`. Without images the prompt's last `text`
tokens take the part of the text, and all before them that of the images. Where the prompt was read before the method was there, the
first query that is decoded stands in for the text.

Source: sparse-to-dense, arXiv 2505.19155. The sum over heads within a group is inferred there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache.state import Scope
from saccade.core import Budget, CachePolicy, Decode, Info, LayerContext, Mass, Selection, StoredKV, Threshold, register
from saccade.parts.ends import read_with_tail
from saccade.parts.lists import hits
from saccade.parts.recent_queries import GUESSES, recall, remember
from saccade.parts.text_mass import text_mass


@register
@dataclass(frozen=True, kw_only=True)
class SparseToDense(Decode, CachePolicy):
    """budget: entries K + m_t of the draft cache, per key head, out of the prompt: their number (int) or share (float). Text is always
        read, so K is what the text leaves of it, down to 0.
    text: without images, how many of the prompt's last tokens count as text.

    A layer's state lies with the sequence: the last "queries" `(B, Hq, m, D)` of the prompt, the "mass" s of its entries `(B, Hk, n)` and
    which of them are "vision" `(B, n)` where there are images, and the "draft": entries read, ascending, `(B, Hk, M)` int32.
    """

    budget: float | int = 1024
    text: int = 32

    info = Info(
        slug="sparse-to-dense", phase="decode", also=frozenset({"cache"}), needs=frozenset({"queries", "weights"}),
        opened={"budget": 1.0}, tiny={"budget": 0.25, "text": 8},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("sparse-to-dense keeps a draft cache of fixed size: its budget is a ratio or a number of tokens")
        if isinstance(self.text, bool) or not isinstance(self.text, int) or self.text < 1:
            raise ValueError(f"sparse-to-dense got text={self.text!r}: expected a whole number of at least 1")

    # -- the prompt --------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        """A prompt leaves its text's attention behind; what is decoded leaves nothing."""
        own = self._own(ctx)
        if own.get("decoded") == ctx.seen:
            return
        own.pop("draft", None)
        marks = kv.side.get("vision")
        if marks is None:
            remember(own, q, ctx.seen, self.text + GUESSES)
            return
        vision, n = marks[:, 0].bool(), kv.length
        waiting = recall(own, ctx.seen - q.shape[2])
        queries = q if waiting is None else torch.cat([waiting, q], dim=2)
        m = queries.shape[2]
        held = min(GUESSES, m)  # these may be guesses that are taken back: their say waits
        before: Tensor = own.get("mass", kv.keys.new_zeros(*kv.keys.shape[:2], 0))
        before = before[..., : n - q.shape[2]]
        found = text_mass(
            queries[:, :, : m - held], kv.keys, ~vision[:, n - m : n - held], scale=ctx.scale, softcap=ctx.softcap, behind=held
        )
        own["mass"], own["vision"] = found + F.pad(before, (0, n - before.shape[-1])), vision
        remember(own, queries[:, :, m - held :], ctx.seen, held)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        """Nothing is dropped."""

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def rewind(self, ctx: LayerContext, n: int) -> int:
        own = self._own(ctx)
        own.pop("decoded", None)
        if n < own.get("prompt", 0):
            own.pop("draft", None)
        return n

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        own, n = self._own(ctx), k.shape[2]
        own["decoded"] = ctx.seen
        if "draft" not in own:
            own["prompt"] = n - 1
            own["draft"] = self._draft(ctx, own, q, k)
        ids, end = own["draft"], own["prompt"]
        return read_with_tail(ids.masked_fill(ids >= end, n), end, n)

    def _draft(self, ctx: LayerContext, own: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
        """The prompt's entries that every step reads, `(B, Hk, M)` int32, ascending; the prompt is all entries but q's own."""
        n, options = k.shape[2] - 1, {"scale": ctx.scale, "softcap": ctx.softcap}
        queries, keys = recall(own, ctx.seen - 1), k[:, :, :n]
        if "vision" in own:
            vision, mass = own["vision"][:, :n], own["mass"][..., :n]
            if queries is not None:
                mass = mass + text_mass(queries, keys, ~vision[:, n - queries.shape[2] :], **options)
        else:
            vision = (torch.arange(n, device=k.device) < n - self.text).expand(k.shape[0], n)
            queries, keys = (q, k) if queries is None else (queries[:, :, -self.text :], keys)
            every = torch.ones(q.shape[0], queries.shape[2], dtype=torch.bool, device=q.device)
            mass = text_mass(queries, keys, every, **options)[..., :n]
        room = Budget.of(self.budget).tokens(n) - (~vision).sum(-1)
        scores = mass.masked_fill(~vision.unsqueeze(1), -torch.inf)
        ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        first = torch.arange(n, device=k.device) < room[:, None, None]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked, first.expand_as(ranked))
        return hits(chosen | ~vision.unsqueeze(1))

    def _own(self, ctx: LayerContext) -> dict[str, Any]:
        """This layer's state, which decoding and caching share."""
        return ctx.sequence.setdefault(f"sparse-to-dense {ctx.layer}", Scope())
