"""Sparse state expansion: a gated recurrence whose state has many partitions, of which every token writes to and reads a few.

    shared:  q1 = silu(W_q x),  k1 = softmax(W_k x)        sparse:  q2, k2 of W_q x + B_q A_q x, W_k x + B_k A_k x        v = silu(W_v x)
    e = softmax(W_e x) over N partitions,   T = the K largest;      log g = logsigmoid(low rank(x)) / 16, one gate for each half
    S^i = diag(g2) S^i + k2 (e_i v)^T   for i in T,   all others untouched;    S^0 = diag(g1) S^0 + k1 v^T
    y = W_o (silu(W_z x) * norm(q1 S^0 + sum_{i in T} e_i q2 S^i))

Partitions share all parameters. host="gdn": one gate per token and head, the delta rule, q and k of length 1. rows: keep only the largest
entries of k; the other rows of the state are neither written nor forgotten. Trainers add `SSEMixer.balance(x)` to the loss, so that all
partitions are used. The paper's hybrid has one softmax layer for five such: `["sse"] * 5 + ["softmax"]`.

Source: sse, arXiv 2507.16577.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.ops.scan import scan
from saccade.parts.linear import Recurrent, quadratic
from saccade.parts.linear.features import feature_map
from saccade.parts.linear.gates import Gate, SigmoidGate, SoftplusGate, heads_first
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.partitions import chosen, gathered, masked
from saccade.parts.linear.strength import WriteStrength

SHORT = 256  # tokens from which sorting them by partition is worth it


@register
@dataclass(frozen=True, kw_only=True)
class SSE(Mixer):
    """partitions: N, besides the one all tokens share. top: K, partitions of a token. host: "gla" or "gdn". key_dim: rows of a head's
    state (default: head_dim). rows: of the state that a token's key touches, None for all; only for "gla". rank: of the low-rank terms of q
    and k. form: "masked", "gathered" or "auto", by the length."""

    partitions: int = 4
    top: int = 1
    host: Literal["gla", "gdn"] = "gla"
    key_dim: int | None = None
    rows: int | None = None
    rank: int = 64
    form: Literal["auto", "masked", "gathered"] = "auto"

    info = Info(
        slug="sse", phase="mixer", needs=frozenset({"training"}), tiny={"rank": 4},
        variants=(
            {"rank": 4, "form": "gathered", "top": 2, "rows": 3}, {"rank": 4, "host": "gdn", "top": 2},
            {"rank": 4, "host": "gdn", "form": "gathered", "key_dim": 6},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.partitions:
            raise ValueError(f"top={self.top}, partitions={self.partitions}: give at least 1 partition, and top from 1 to as many")
        if self.host not in ("gla", "gdn") or self.form not in ("auto", "masked", "gathered"):
            raise ValueError(f"host={self.host!r}, form={self.form!r}: use 'gla' or 'gdn', and 'auto', 'masked' or 'gathered'")
        if self.rank < 1 or any(x is not None and x < 1 for x in (self.key_dim, self.rows)):
            raise ValueError(f"rank={self.rank}, key_dim={self.key_dim}, rows={self.rows}: give at least 1, or None for the last two")
        if self.rows is not None and self.host != "gla":
            raise ValueError("rows of the state are chosen by a key that is a softmax: use host='gla', or rows=None")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.rows is not None and self.rows > (self.key_dim or shape.head_dim):
            raise ValueError(f"rows={self.rows} of a state that has {self.key_dim or shape.head_dim}: give at most as many")
        return SSEMixer(shape, self)


class SSEMixer(Recurrent):
    """The layer: the shared partition is a recurrence as usual, the sparse ones run beside it."""

    def __init__(self, shape: MixerShape, method: SSE) -> None:
        delta = method.host == "gdn"
        key_dim = method.key_dim or shape.head_dim
        super().__init__(
            shape, key_dim=key_dim, scale=None if delta else 1.0, normaliser=OutputNorm(shape.heads, shape.head_dim),
            q_map="unit" if delta else "silu", k_map="unit" if delta else "softmax",
            out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "silu"),
        )  # fmt: skip
        self.method, self.v_map = method, feature_map("silu")

        def low_rank(width: int) -> nn.Sequential:
            made = nn.Sequential(nn.Linear(shape.dim, method.rank, bias=False), nn.Linear(method.rank, width, bias=False))
            nn.init.zeros_(made[1].weight)  # pyright: ignore[reportArgumentType]
            return made

        def gate() -> Gate:
            return SoftplusGate(shape.dim, shape.heads) if delta else SigmoidGate(shape.dim, shape.heads, key_dim)

        self.q_low, self.k_low = low_rank(shape.heads * key_dim), low_rank(shape.kv_heads * key_dim)
        self.gates = nn.ModuleList([gate(), gate()])
        self.strengths = nn.ModuleList([WriteStrength(shape.dim, shape.heads) for _ in range(2)]) if delta else None
        self.router = nn.Linear(shape.dim, method.partitions, bias=False)

    def shares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """e `(B, N, P)` in float32 at least, and the partitions of each token `(B, N, K)`."""
        share = self.router(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        return share, chosen(share, self.method.top)

    def balance(self, x: Tensor, weight: float = 0.01) -> Tensor:
        """`weight N / K sum_n mean(e_n) mean(n is taken)` over tokens x `(B, N, dim)`: smallest where all are used alike."""
        share, picked = self.shares(x)
        taken = torch.zeros_like(share).scatter(-1, picked, 1.0)
        return weight * self.method.partitions / self.method.top * (share.mean((0, 1)) * taken.mean((0, 1))).sum()

    def half(self, x: Tensor, index: int, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, log decays and write strengths of the shared (0) or the sparse (1) partitions."""
        q, k = self.q_proj(x), self.k_proj(x)
        if index:
            q, k = q + self.q_low(x), k + self.k_low(x)
        q, k = self.q_map(heads_first(q, self.heads)), self._keys(heads_first(k, self.kv_heads))
        decay = self.gates[index](x, k, None, call).log_decay
        if self.method.rows is not None:
            decay = decay * (k > 0).repeat_interleave(self.heads // self.kv_heads, dim=1)
        beta = None if self.strengths is None else call.masked(self.strengths[index](x))
        return q, call.masked(k), call.masked(decay), beta

    def _keys(self, logits: Tensor) -> Tensor:
        if self.method.rows is None:
            return self.k_map(logits)
        best = logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.method.rows]
        return self.k_map(logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).scatter(-1, best, False), float("-inf")))

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        v = call.masked(self.v_map(heads_first(self.v_proj(x), self.kv_heads)))
        options: dict[str, Any] = {"scale": self.scale, "impl": self.impl}
        q, k, decay, beta = self.half(x, 0, call)
        out, state = scan(q, k, v, log_decay=decay, beta=beta, initial_state=past.get("s"), **options)
        q, k, decay, beta = self.half(x, 1, call)
        share, picked = self.shares(x)
        if call.real is not None:
            picked = picked.masked_fill(~call.real.unsqueeze(-1), 0)  # padding orders nothing by what stands in it
        form = self.method.form
        run = gathered if form == "gathered" or (form == "auto" and x.shape[1] >= SHORT) else masked
        sparse, states = run(q, k, v, share, picked, past.get("parts"), log_decay=decay, beta=beta, **options)
        y = self.finish(self.normaliser.after(out + sparse, call, None), x)
        return y, {"s": state, "parts": states} if call.keep else {}

    def naive(self, x: Tensor) -> Tensor:
        call = self.whole(x)
        v = self.v_map(heads_first(self.v_proj(x), self.kv_heads))

        def recur(*given: Tensor, initial_state: None, **options: Any) -> tuple[Tensor, None]:
            return quadratic(*given, **options), None

        q, k, decay, beta = self.half(x, 0, call)
        out = quadratic(q, k, v, log_decay=decay, beta=beta, scale=self.scale)
        q, k, decay, beta = self.half(x, 1, call)
        out = out + masked(q, k, v, *self.shares(x), None, recur=recur, log_decay=decay, beta=beta, scale=self.scale)[0]
        return self.finish(self.normaliser.after(out, call, None), x)
