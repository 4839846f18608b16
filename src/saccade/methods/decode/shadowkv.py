"""ShadowKV: keys stay on the device as low-rank factors, values move to the host, and a step fetches only the chunks its query matches.

When a prompt has ended, the keys of all heads side by side, before the rotary embedding, are factorised together, X = A B with rank r.
Chunks of c tokens get a landmark, the mean of their turned keys. The chunks that a landmark stands for worst, by

    min over the chunk's keys of cos(landmark, key),

are kept exactly on the device (the lowest `outliers` of each key head), and so are the newest chunks and all that follows. A step reads

    s_ghm = softmax_m(scale q_gh.landmark_gm),   the budget / c chunks with the highest max_h s_ghm for each key head g,

rebuilds the chosen keys from A and B, turns them to their places, fetches their values (those of the step before are still there), and
attends to them, the exact chunks and the rest in one softmax. Each later turn's prompt is factorised on its own and has a budget of its
own. Many tokens at a time read everything, keys rebuilt. Without a rotary embedding that can be turned back, keys are factorised as
they are. Source: shadowkv, arXiv 2410.21465.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache.offloaded import OffloadedStore, RecentUnits
from saccade.cache.shadow import ShadowContent, ShadowSegment
from saccade.core import Budget, CachePolicy, Decode, Info, LayerContext, Mass, Selection, StoredKV, Threshold, merge, register
from saccade.parts.dots import dots
from saccade.parts.heads import reduce_heads
from saccade.parts.joint_rank import joint_factors
from saccade.parts.pick import pick_best
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows


@register
@dataclass(frozen=True, kw_only=True)
class ShadowKV(Decode, CachePolicy):
    """rank: r of the joint factors, over all key heads (160 of 1024 channels in the paper). chunk: tokens c of a chunk.
    budget: tokens fetched per step and key head (int, a multiple of c), or their share (float) of a prompt's factorised tokens.
    outliers: chunks of a key head that are kept exactly. local: the last whole chunks of a prompt, kept exactly with what follows them.
    """

    rank: int = 160
    chunk: int = 8
    budget: float | int = 2048
    outliers: int = 48
    local: int = 4

    info = Info(
        slug="shadowkv", phase="decode", also=frozenset({"cache"}), frees_memory=True, append_only=False, encodes=True,
        opened={"rank": 1 << 30, "budget": 1.0}, tiny={"rank": 6, "chunk": 4, "budget": 0.25, "outliers": 2, "local": 2},
        opts_out={"stepwise": "acts when a prompt has ended, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("chunk", 1), ("outliers", 0), ("local", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"shadowkv({name}={value!r}) is not a whole number of at least {least}")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("shadowkv fetches a fixed number of chunks: its budget is a ratio or a number of tokens")
        if isinstance(self.budget, int) and self.budget % self.chunk:
            raise ValueError(f"shadowkv(budget={self.budget}) is no multiple of its chunk of {self.chunk} tokens")

    # -- when a prompt has ended -------------------------------------------------------------------------------------------

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        chunks = max(0, kv.length // self.chunk - self.local)
        outliers = min(self.outliers, chunks)
        if chunks == outliers:
            return
        n, begin = chunks * self.chunk, ctx.seen - kv.length
        keys, values = kv.keys[:, :, :n], kv.values[:, :, :n]
        rotary = ctx.rotary if ctx.rotary is not None and ctx.rotary.inv_freq.numel() else None
        before = keys if rotary is None else turn(keys, -torch.arange(begin, begin + n, device=keys.device), rotary)
        factors, basis = joint_factors(before, self.rank)
        exact = torch.promote_types(keys.dtype, torch.float32)
        by_chunk = keys.to(exact).unflatten(2, (chunks, self.chunk))
        landmarks = by_chunk.mean(3)
        worst = F.cosine_similarity(by_chunk, landmarks.unsqueeze(3), dim=-1).amin(-1)
        kept = pick_best(-worst, outliers) if outliers else torch.zeros_like(worst[..., :0], dtype=torch.int64)
        others = pick_best(torch.ones_like(worst).scatter(-1, kept, 0.0), chunks - outliers)
        tokens = (kept.unsqueeze(-1) * self.chunk + torch.arange(self.chunk, device=kept.device)).flatten(2)
        kv.seal(ShadowSegment(ShadowContent(
            factors=factors, basis=basis, values=OffloadedStore.of(values), landmarks=pick_rows(landmarks, others).to(keys.dtype),
            chunks=others, exact_chunks=kept, exact_keys=pick_rows(keys, tokens), exact_values=pick_rows(values, tokens),
            positions=kv.side["positions"][:, :1, :n].clone(), chunk=self.chunk, begin=begin, rotary=rotary,
        )), n)  # fmt: skip

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """Of what stands on the device in full, everything; `landmarks` says what is read of a sealed prompt."""
        return Selection.full(q.shape[2], k.shape[2], block_q=1, block_k=k.shape[2], device=q.device)

    def landmarks(self, ctx: LayerContext, q: Tensor, segment: ShadowSegment) -> Tensor:
        """Which landmarks of a sealed prompt match q `(B, Hq, 1, D)` best, `(B, Hk, m)` int64 ascending."""
        content = segment.content
        shares = (dots(q.squeeze(2), content.landmarks) * ctx.scale).softmax(-1)
        count = max(1, Budget.of(self.budget).tokens(segment.length) // self.chunk)
        return pick_best(reduce_heads(shares, content.landmarks.shape[1], "group_max"), count)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for number, segment in enumerate(ctx.segments):
            if not isinstance(segment, ShadowSegment):
                ctx.count(segment.length)
                parts.append(segment.attend(q, scale=ctx.scale, softcap=ctx.softcap))
                continue
            picked = self.landmarks(ctx, q, segment)
            recent = ctx.state.setdefault(f"recent {number}", RecentUnits(picked.shape[-1]))
            ctx.count((picked.shape[-1] + segment.content.exact_chunks.shape[-1]) * self.chunk)
            parts.append(segment.attend_chosen(q, picked, recent, scale=ctx.scale, softcap=ctx.softcap))
        if not parts:
            return ctx.attend(q, k, v, None)
        return merge(*parts, ctx.partial(q, k, v, None)).out if k.shape[2] else merge(*parts).out
