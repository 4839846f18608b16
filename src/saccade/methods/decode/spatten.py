"""SpAtten: what has received little attention is left out of all later layers, tokens and heads alike, and stays out.

    token importance  s_j += sum over heads and query rows of P_hij        over layers and, in decoding, over steps
    head importance   s_h += sum |output of head h|

After each layer the next may read a share of all tokens, prod (1 - r_l), and of all heads: those with the highest s among the survivors.
What goes is left out of every deeper layer for good, as query, key and value; layers before it go on reading it. The first layers are
spared (15% of them for tokens, 30% for heads), after them r_l runs linearly from a start to an end ratio. In decoding the same shares
are of all tokens so far, and a pruned token never comes back. Within a head the smallest probabilities of a row fetch no value (local value
pruning: not passed on, not renormalised). Logits may come from the high bits of q and k alone (`parts/progressive.py`).

The density counts a logit as half a pair, by the share of its bits that was fetched, and a value row as the other half.

What attention alone can't do: a pruned token's query is skipped, its output here is 0, but it still goes through the model's other parts.
Nor is memory freed: early layers still read what late ones do not. Importances are of tokens, so no other policy may drop entries.
Source: spatten, arXiv 2012.09852. The schedule's shares, the recompute threshold, the protected ends (as in a port to language models) and
that early layers keep what late ones prune are inferred. Guessed tokens that are verified in one call are weighed layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import CachePolicy, Decode, Info, LayerContext, Prefill, Selection, StoredKV, register
from saccade.parts.cascade import Cascade, count_of, surviving_share
from saccade.parts.mass_sums import PAIRS
from saccade.parts.progressive import progressive_logits

CASCADE, FETCHES = "spatten cascade", "spatten fetches"  # in ctx.sequence


@register
@dataclass(frozen=True, kw_only=True)
class SpAtten(Prefill, Decode, CachePolicy):
    """token_ratios: share of the surviving tokens that goes before a layer, at the first layer that prunes and at the last; in [0, 1).
    head_ratios: the same for query heads. value_ratio: share of a row's values that is not fetched, in [0, 1).
    spared, spared_heads: share of the layers, from the first on, that keep all tokens, and all heads.
    sinks, recent: the first and the newest tokens (at least 1), which go last.
    bits: (MSB, LSB) of progressive quantisation such as (8, 4), None: logits as they are. threshold: rows whose highest probability is
        lower fetch the low bits as well (0: none does, above 1: all do). Row counts lie in the sequence's state under "spatten fetches",
        int64 `(B, 2)`: rows, and rows that fetched.
    """

    token_ratios: tuple[float, float] = (0.05, 0.25)
    head_ratios: tuple[float, float] = (0.0, 0.02)
    value_ratio: float = 0.0
    spared: float = 0.15
    spared_heads: float = 0.3
    sinks: int = 4
    recent: int = 128
    bits: tuple[int, int] | None = None
    threshold: float = 0.1

    info = Info(
        slug="spatten", phase="prefill", also=frozenset({"decode", "cache"}), needs=frozenset({"queries", "weights"}),
        opened={"token_ratios": (0.0, 0.0), "head_ratios": (0.0, 0.0), "value_ratio": 0.0},
        tiny={
            "token_ratios": (0.5, 0.5), "head_ratios": (0.2, 0.2), "value_ratio": 0.1, "spared": 0.0, "spared_heads": 0.0, "sinks": 2,
            "recent": 4,
        },
        opts_out={
            "chunked": "importance sums over the queries of a call, and what a chunk has pruned does not come back for the next",
            "stepwise": "importance sums over the queries of a call: a prompt at once knows more of it than its first tokens",
            "future": "a token's importance sums over all queries of the prompt, those after it too",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("token_ratios", "head_ratios"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(_is_share(x) for x in pair):
                raise ValueError(f"spatten({name}={pair!r}): expected two ratios in [0, 1), at the first pruning layer and at the last")
            object.__setattr__(self, name, tuple(pair))
        if not _is_share(self.value_ratio):
            raise ValueError(f"spatten(value_ratio={self.value_ratio!r}) is not a ratio in [0, 1)")
        for name in ("spared", "spared_heads"):
            if not (_is_share(getattr(self, name)) or getattr(self, name) == 1):
                raise ValueError(f"spatten({name}={getattr(self, name)!r}) is not a share of the layers in [0, 1]")
        for name, least in (("sinks", 0), ("recent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"spatten({name}={value!r}) is not a whole number of at least {least}")
        if self.bits is not None:
            pair = self.bits
            if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[0] < 2 or pair[1] < 0 or sum(pair) > 16:
                raise ValueError(f"spatten(bits={pair!r}): expected (MSB, LSB) with at least 2 high bits and at most 16 in all, or None")
            object.__setattr__(self, "bits", tuple(pair))
        if not isinstance(self.threshold, int | float) or self.threshold < 0:
            raise ValueError(f"spatten(threshold={self.threshold!r}) is not a probability from 0 on")

    @property
    def prunes(self) -> bool:
        """Whether tokens or heads go at all."""
        return any(self.token_ratios) or any(self.head_ratios)

    # -- hooks -------------------------------------------------------------------------------------------------------------

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        """No entry is dropped: a token that late layers no longer read is still read by the first ones."""

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if CASCADE in ctx.sequence:
            ctx.sequence[CASCADE].rewind(n)
        return n

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """The tokens and heads that this layer still has; local value pruning is no part of it."""
        m, n = q.shape[2], k.shape[2]
        tokens, heads = self._alive(ctx, q, k)
        mask = tokens[:, None, None] & heads[:, :, None, None]
        return Selection.from_token_mask((mask & tokens[:, None, n - m :, None]).expand(-1, q.shape[1], -1, -1), block_q=1, n_q=m)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (self.prunes or self.value_ratio or self.bits):
            return ctx.attend(q, k, v, None)
        tokens, heads = self._alive(ctx, q, k)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32), device=q.device)
        mass, work = torch.zeros(tokens.shape, dtype=out.dtype, device=q.device), 0.0
        fetches = torch.zeros(q.shape[0], 2, dtype=torch.int64)
        for row in range(q.shape[0]):
            work += self._attend_row(ctx, q[row], k[row], v[row], tokens[row], heads[row], out[row], mass[row], fetches[row])
        if self.bits:
            ctx.sequence[FETCHES] = ctx.sequence.get(FETCHES, 0) + fetches
        ctx.count(work / (q.shape[0] * q.shape[1]))
        if self.prunes:
            self._weigh(ctx, mass, out)
        return out.to(q.dtype)

    # -- one layer ---------------------------------------------------------------------------------------------------------

    def _cascade(self, ctx: LayerContext, q: Tensor, n: int) -> Cascade:
        # without a cache nothing lasts but what the layers of one pass share
        found = ctx.sequence.get(CASCADE, ctx.shared.get(CASCADE))
        if found is None:
            found = Cascade(q.shape[0], q.shape[1], ctx.layer, torch.promote_types(q.dtype, torch.float32), q.device)
        ctx.sequence[CASCADE] = ctx.shared[CASCADE] = found
        found.arrive(ctx.layer, n, q.shape[2])
        return found

    def _alive(self, ctx: LayerContext, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens `(B, n)` and heads `(B, Hq)` this layer reads, bool."""
        n = k.shape[2]
        if not self.prunes:
            every = torch.ones(q.shape[0], max(n, q.shape[1]), dtype=torch.bool, device=q.device)
            return every[:, :n], every[:, : q.shape[1]]
        found = self._cascade(ctx, q, n)
        return found.last[:, :n] >= ctx.layer, found.head_last >= ctx.layer

    def _weigh(self, ctx: LayerContext, mass: Tensor, out: Tensor) -> None:
        """Add this layer's importances, and prune what the next layer is not to read."""
        cascade, n, heads = ctx.sequence[CASCADE], mass.shape[1], out.shape[1]
        cascade.mass[:, :n] += mass
        cascade.head_mass = cascade.head_mass + out.abs().sum((2, 3))
        if ctx.layer + 1 < ctx.layers:
            tokens = surviving_share(ctx.layer + 1, ctx.layers, self.token_ratios, self.spared)
            kept = surviving_share(ctx.layer + 1, ctx.layers, self.head_ratios, self.spared_heads)
            cascade.prune(ctx.layer, n, count_of(tokens, n), count_of(kept, heads), sinks=self.sinks, recent=self.recent)

    def _attend_row(
        self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, heads: Tensor, out: Tensor, mass: Tensor,
        fetches: Tensor,
    ) -> float:  # fmt: skip
        """One row of the batch: fills `out (Hq, m, Dv)`, adds to `mass (n,)` and `fetches (2,)`; returns the work, in pairs of all heads.

        A key head's tokens are gathered once for the query heads that share it. A GPU wants one kernel that also writes column sums.
        """
        m, n, group, exact = q.shape[1], k.shape[1], q.shape[0] // k.shape[0], out.dtype
        ids = tokens.nonzero().flatten()
        rows = tokens[n - m :].nonzero().flatten()
        work = 0.0
        for head in range(k.shape[0]):
            own = heads[head * group : (head + 1) * group].nonzero().flatten() + head * group
            if not own.numel():
                continue
            keys, values = k[head, ids].to(exact), v[head, ids].to(exact)
            step = max(1, PAIRS // max(1, own.numel() * ids.numel()))
            for part in rows.split(step):
                seen = int(torch.searchsorted(ids, part[-1] + n - m, right=True)) if part.numel() else 0
                hidden = ids[:seen] > (part + n - m).unsqueeze(1)
                weights, bits = self._weights(ctx, q[own][:, part].to(exact), keys[:seen], hidden, fetches)
                mass[ids[:seen]] += weights.sum((0, 1))
                visible = (~hidden).sum(1)
                weights, fetched = self._local(weights, visible)
                index = own.unsqueeze(1), part.unsqueeze(0)
                out[index] = weights @ values[:seen]
                work += 0.5 * (float((visible * bits).sum()) + float(fetched.sum()) * own.numel())
        return work

    def _weights(self, ctx: LayerContext, q: Tensor, keys: Tensor, hidden: Tensor, fetches: Tensor) -> tuple[Tensor, Tensor | float]:
        """Probabilities `(h, r, c)` of q `(h, r, D)`, and the share of the bits that each row fetched, `(h, r)`; without quantisation their
        sum over the heads, h."""

        def finish(products: Tensor) -> Tensor:
            logits = products * ctx.scale
            logits = logits if ctx.softcap is None else ctx.softcap * torch.tanh(logits / ctx.softcap)
            return logits.masked_fill(hidden, -torch.inf)

        if self.bits is None:
            return finish(q @ keys.mT).softmax(-1), float(q.shape[0])
        logits, flat = progressive_logits(q, keys, *self.bits, self.threshold, finish)
        fetches += torch.tensor([flat.numel(), int(flat.sum())])
        high = self.bits[0] / sum(self.bits)
        return logits.softmax(-1), high + (1 - high) * flat

    def _local(self, weights: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(h, r, c)` without each row's smallest, and how many values a row `(r,)` fetches."""
        if not self.value_ratio:
            return weights, visible
        fetched = ((1 - self.value_ratio) * visible).round(decimals=6).ceil().long()
        ranked = torch.sort(weights, dim=-1, descending=True, stable=True)
        first = torch.arange(weights.shape[-1], device=weights.device) < fetched.unsqueeze(1)
        return torch.zeros_like(weights).scatter(-1, ranked.indices, ranked.values * first), fetched


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
