"""DeltaLLM: older keys are read as thresholded differences between neighbours, recent ones exactly; one softmax over both.

    khat_j = sum_{t <= j} Delta_t,  Delta_t[c] = 0 where channel c moved by at most theta since it was last sent (`parts/deltas.py`)
    logit_ij = scale * q_i.k_j            for i - j < window
    logit_ij = scale * s_ij               for older keys, with  s_ij = s_i,j-1 + sum_{c: Delta_j[c] != 0} q_i[c] Delta_j[c]  = q_i.khat_j

Values are untouched; there is one stream of deltas for each key/value head. What is saved are multiplications, on hardware that
skips zeros: matrix units of CPUs and GPUs multiply them too, so here the method is slower than dense attention. The density it
reports is the share of multiplications that remain: non-zero deltas of older keys, all channels of recent ones. Single tokens are
decoded densely from the exact keys, which the cache keeps.

Source: deltallm, arXiv 2507.19608. The paper gives neither theta nor the window; the rule "compare with the value last sent" is the
delta network's, which bounds the error of every key element by theta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.parts.deltas import delta_code, delta_scores
from saccade.parts.sizes import check_size, resolve

PAIRS = {"cpu": 1 << 21}  # scores held at a time
PAIRS_ELSEWHERE = 1 << 26


@register
@dataclass(frozen=True, kw_only=True)
class DeltaLLM(Prefill):
    """theta: largest change of a key element that is not sent, in the units of the keys; 0 sends every change.
        Keys of the pocket model have standard deviations of 1.7 to 2.9: 1.0 leaves 0.4 of its multiplications.
    window: most recent keys that each query reads exactly, itself included; tokens, or a share of the prompt in (0, 1].
    restart: a key is sent in full every so many tokens.
    """

    theta: float = 1.0
    window: int | float = 128
    restart: int = 256

    info = Info(
        slug="deltallm", phase="prefill", opened={"theta": 0.0}, tiny={"theta": 0.3, "window": 8, "restart": 32},
        opts_out={
            "chunked": "up to 16 tokens on a filled cache count as decoding, which reads the exact keys",
            "stepwise": "single tokens are decoded densely from the exact keys, only a prompt that comes at once is read through deltas",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or not 0 <= self.theta < float("inf"):
            raise ValueError(f"deltallm(theta={self.theta!r}) is not a change of at least 0")
        check_size("deltallm", "window", self.window)
        if isinstance(self.restart, bool) or not isinstance(self.restart, int) or self.restart < 1:
            raise ValueError(f"deltallm(restart={self.restart!r}) is not a whole number of at least 1")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """Every key: the sparsity is in the operands, not in the pairs."""
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_k = k.shape[2]
        window = resolve(self.window, n_k)
        if self.theta == 0 or window >= n_k or n_k == 0:
            return ctx.attend(q, k, v, None)
        # keys in the window of every query are never read through deltas
        deltas = delta_code(k[:, :, : n_k - window], self.theta, self.restart)
        ctx.count(self._multiplications(deltas, q.shape[2], n_k, window))
        return self._read(ctx, q, k, v, deltas, window)

    def _read(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, deltas: Tensor, window: int) -> Tensor:
        """Attention of runs of query rows, each with one softmax over deltas and exact keys."""
        n_q, n_k, dtype = q.shape[2], k.shape[2], deltas.dtype
        group = q.shape[1] // k.shape[1]
        exact_k, exact_v = k.to(dtype), v.to(dtype)
        queries = (q.to(dtype) * ctx.scale).unflatten(1, (-1, group))
        rows = max(1, PAIRS.get(q.device.type, PAIRS_ELSEWHERE) // max(1, q.shape[0] * q.shape[1] * n_k))
        outs = []
        for begin in range(0, n_q, rows):
            first, end = n_k - n_q + begin, n_k - n_q + min(begin + rows, n_q)
            # the queries of a group are rows over their key/value head: keys are not repeated
            part = queries[:, :, :, begin : begin + rows].flatten(2, 3)
            coded, recent = max(0, end - window), max(0, first - window + 1)
            exact = (part @ exact_k[:, :, recent:end].mT).unflatten(2, (group, -1))
            older = delta_scores(part, deltas[:, :, :coded], self.restart).unflatten(2, (group, -1))
            positions = torch.arange(first, end, device=q.device).unsqueeze(-1)
            keys = torch.arange(end, device=q.device)
            if recent < coded:
                old = keys[recent:coded] <= positions - window
                exact[..., : coded - recent] = torch.where(old, older[..., recent:], exact[..., : coded - recent])
            logits = torch.cat([older[..., :recent], exact], dim=-1)
            if ctx.softcap is not None:
                logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
            logits[..., first:].masked_fill_(keys[first:] > positions, -torch.inf)
            weights = torch.softmax(logits, dim=-1).flatten(2, 3)
            outs.append((weights @ exact_v[:, :, :end]).unflatten(2, (group, -1)))
        return torch.cat(outs, dim=3).flatten(1, 2).to(q.dtype)

    @staticmethod
    def _multiplications(deltas: Tensor, n_q: int, n_k: int, window: int) -> float:
        """Products of query and key elements, over the head dim: comparable with score pairs; the mean over batch and heads."""
        sent = (deltas != 0).double().mean((0, 1, 3)).cumsum(0)
        positions = torch.arange(n_k - n_q, n_k, device=deltas.device)
        older = positions - window
        through_deltas = torch.where(older >= 0, sent[older.clamp(min=0)], 0.0)
        return float((through_deltas + (positions + 1).clamp(max=window)).sum())
