"""Attention-Gate: a small attention module before each layer reads its input and decides, token by token and head by head, what is kept.

    p = gate(X), (n, H) in (0, 1);   flag_ih = p_ih > tau        (`parts/token_gate.py`)

A token without a flag is seen by itself and by no later query of its head, and its key and value are gone when the prompt has ended. All
generated tokens are kept. Gates are trained with the model frozen (`saccade.train.attention_gates`), hard flags forward and p backward.

Source: attention-gate, arXiv 2410.12876, section 3. Chosen here: the gate is causal, since one that sees the whole prompt would tell of
later tokens; one flag serves the query heads of a group; the newest token of a prompt stays. Tokens of one call are a prompt, or a turn,
unless they come alone or, up to 16 of them, on a prompt that has ended (guesses to be verified). A turn is judged among its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import CachePolicy, Decode, Info, LayerContext, Partial, Prefill, Selection, StoredKV, merge, register
from saccade.parts.ragged import slots_of
from saccade.parts.rows import pick_rows
from saccade.parts.token_gate import TokenGate

FLAGS, KEYS, VALUES, PLACES, BASE, CLOSED = "flags", "keys", "values", "places", "base", "closed"  # in the sequence's state, by layer


@register
@dataclass(frozen=True, kw_only=True)
class AttentionGate(Prefill, Decode, CachePolicy):
    """threshold: tau; a token whose p is above it is kept, so 0 keeps all. Needs a plan with gates:
    `saccade.train.attention_gates.train_attention_gates`."""

    threshold: float = 0.5

    info = Info(
        slug="attention-gate", phase="cache", also=frozenset({"prefill", "decode"}),
        needs=frozenset({"hidden", "calibration", "training"}), frees_memory=True, append_only=False, ragged=True,
        opened={"threshold": 0.0},
        opts_out={"stepwise": "tokens that come alone are generated ones, which are all kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 <= self.threshold < 1:
            raise ValueError(f"attention-gate(threshold={self.threshold!r}) is not a probability below 1: give a number from 0")

    # -- flags -------------------------------------------------------------------------------------------------------------

    def flags(self, ctx: LayerContext) -> Tensor:
        """Which of the newest tokens are kept, bool `(B, Hk, L)`: those since the last prompt ended, up to the one at ctx.seen."""
        state, base = ctx.sequence, ctx.sequence.get(f"{BASE} {ctx.layer}", 0)
        hidden = ctx.hidden
        if hidden is None:
            raise ValueError("attention-gate reads the inputs of a model's layers: use it with saccade.attach")
        known: Tensor | None = state.get(f"{FLAGS} {ctx.layer}")
        if known is None:
            known = torch.ones(hidden.shape[0], ctx.layout.kv_heads, 0, dtype=torch.bool, device=hidden.device)
        m = hidden.shape[1]
        if ctx.phase == "prefill" or ctx.seen == ctx.tokens - m + 1:  # the first time in this call
            old = ctx.tokens - m
            known = known[..., : old - base]
            # tokens in between came alone
            known = F.pad(known, (0, old - base - known.shape[-1]), value=True)
            alone = m == 1 or (ctx.phase == "decode" and state.get(f"{CLOSED} {ctx.layer}", False))
            new = known.new_ones(*known.shape[:2], m) if alone else self._judge(ctx, hidden, old)
            known = state[f"{FLAGS} {ctx.layer}"] = torch.cat([known, new], -1)
        return known[..., : ctx.seen - base]

    def _judge(self, ctx: LayerContext, hidden: Tensor, old: int) -> Tensor:
        """Flags of the tokens of this call, bool `(B, Hk, m)`, by what the gate has read so far and them."""
        state, gate = ctx.sequence, TokenGate.read(ctx.found)
        q, k, v = gate.features(hidden)
        places = torch.arange(old, old + hidden.shape[1], device=k.device).expand(len(k), -1)
        before = state.get(f"{PLACES} {ctx.layer}")
        if before is not None:
            # what was taken back is read no more
            stay = int((before[0] < old).sum())
            k = torch.cat([state[f"{KEYS} {ctx.layer}"][:, :, :stay], k], 2)
            v = torch.cat([state[f"{VALUES} {ctx.layer}"][:, :, :stay], v], 2)
            places = torch.cat([before[:, :stay], places], 1)
        state[f"{KEYS} {ctx.layer}"], state[f"{VALUES} {ctx.layer}"], state[f"{PLACES} {ctx.layer}"] = k, v, places
        state[f"{CLOSED} {ctx.layer}"] = False
        return gate.logits(q, k, v).sigmoid() > self.threshold

    # -- attention ---------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What is read beside each query's own key."""
        return Selection.from_token_mask(self._kept(ctx, k).unsqueeze(2).expand(-1, -1, q.shape[2], -1), block_q=1, n_q=q.shape[2])

    def _kept(self, ctx: LayerContext, k: Tensor) -> Tensor:
        flags = self.flags(ctx)[..., -k.shape[2] :]
        return F.pad(flags, (k.shape[2] - flags.shape[-1], 0), value=True)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept, n, m = self._kept(ctx, k), k.shape[2], q.shape[2]
        stored = [segment.attend(q, scale=ctx.scale, softcap=ctx.softcap) for segment in ctx.segments]
        ctx.count(sum(float(m * segment.length) for segment in ctx.segments))
        if bool(kept.all()):
            return merge(*stored, ctx.partial(q, k, v, None)).out if stored else ctx.attend(q, k, v, None)
        slots, counts = slots_of(kept)
        past = torch.arange(slots.shape[-1], device=slots.device) >= counts.unsqueeze(-1)
        rows = torch.arange(n - m, n, device=q.device)
        read = ctx.partial(
            q, pick_rows(k, slots), pick_rows(v, slots), None, q_positions=rows[None, None], k_positions=slots.masked_fill(past, n)
        )
        return merge(*stored, read, self._own(ctx, q, k[:, :, n - m :], v[:, :, n - m :], kept[..., n - m :])).out

    def _own(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Partial:
        """Each query over its own key, where that has no flag."""
        exact, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
        logits = (q.to(exact).unflatten(1, (k.shape[1], group)) * k.to(exact).unsqueeze(2)).sum(-1) * ctx.scale
        if ctx.softcap is not None:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        lse = logits.masked_fill(kept.unsqueeze(2), -torch.inf).flatten(1, 2)
        ctx.count(float((~kept).sum(-1).double().mean()))
        return Partial(v.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2), lse)

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if kv.heads != ctx.layout.kv_heads:
            raise ValueError(f"layer {ctx.layer} caches one latent for all heads, whose heads can't keep different tokens")
        state, layer = ctx.sequence, ctx.layer
        flags: Tensor | None = state.get(f"{FLAGS} {layer}")
        base = state.get(f"{BASE} {layer}", 0)
        for name in (FLAGS, KEYS, VALUES, PLACES):
            state.pop(f"{name} {layer}", None)
        state[f"{BASE} {layer}"], state[f"{CLOSED} {layer}"] = ctx.seen, True
        if flags is None or not kv.length:
            return
        flags = F.pad(flags[..., : ctx.seen - base], (0, max(0, ctx.seen - base - flags.shape[-1])), value=True)
        flags[..., -1] = True
        # flags are of the newest entries of each head, older ones were kept before
        held = kv.length if kv.valid is None else kv.valid.sum(-1, keepdim=True)
        of = torch.arange(kv.length, device=flags.device) - (held - flags.shape[-1])
        stay = (of < 0) | flags.gather(-1, torch.as_tensor(of).expand(*flags.shape[:2], -1).clamp(0, flags.shape[-1] - 1))
        stay = stay if kv.valid is None else stay & kv.valid
        if not bool((stay if kv.valid is None else stay | ~kv.valid).all()):
            kv.keep(*slots_of(stay))
