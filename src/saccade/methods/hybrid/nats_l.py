"""NAtS-L: a router decides for every chunk of tokens whether its keys are kept exactly or summed up in a delta-rule state; both are read.

    q, k, v = silu(conv(W x)),   beta_t = sigmoid(w_b x_t),   log g_t = -exp(A) softplus(w_a x_t + b)
    type of a chunk, per head group:  argmax of W_r mean(x in the chunk): attention or delta rule, straight through (hard - soft' + soft)
    attention:   softmax over the keys of earlier attention chunks and the own chunk so far; RMS norm on q and k, no positions
    delta rule:  S_t = g_t S_{t-1} + beta_t k_t (v_t - g_t S_{t-1}^T k_t)^T inside a chunk, q and k of length 1, read by S_t^T q_t D^-1/2
                 at a chunk's end  S = (prod g) S_start + u (S_end - (prod g) S_start),   u = 1 if its type is the delta rule, else 0
    y = W_o (silu(W_g x) * (w_1 norm_1(attention) + w_2 norm_2(delta rule))),   (w_1, w_2) = softmax(W_w q) per attention head

Both operators read the chunk that is not complete yet; when it is, the loser's share is dropped: the state goes back to the chunk's start,
decayed, or the keys are not kept. So the keys kept are those of attention chunks and of the open chunk, as many as the router chooses, per
row and group. The attention has `split` heads for every head of the delta rule, which share its channels. The paper makes the last chunk
of a training sequence one of both types, so that its kernels write the states out; no query reads that type, so nothing is done for it.

Source: nats-l, arXiv 2602.03681.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.cache.kept_keys import KeptKeys
from saccade.core import Call, Info, Mixer, MixerShape, Partial, TokenMixer, format_spec, register
from saccade.ops import attend
from saccade.ops.scan import scan
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.gates import SoftplusGate, heads_first
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.strength import WriteStrength

Inner = Literal["all", "attention", "delta"]
Weights = Literal["q", "x", "none"]
Sample = Literal["argmax", "gumbel"]


@register
@dataclass(frozen=True, kw_only=True)
class NatsL(Mixer):
    """chunk: tokens of a chunk. expand: channels of a value over those of a key. conv: width of the short convolution in tokens. split:
    attention heads for each head of the delta rule, a divisor of head_dim. groups: of heads with a type of their own, a divisor of the key
    heads (default: one for each key head). inner: what reads the own chunk: "all" or one of the two alone. decay: the state decays in
    attention chunks too. weights: of the operators' outputs, made from "q", from "x", or "none" (a plain sum). norm: each output has its
    own norm; False: one norm over their sum. sample: "argmax", or "gumbel": in training with Gumbel noise on the logits. soft: the router
    hears in training what each chunk would do for the operator that did not get it; attention then computes all its pairs."""

    chunk: int = 64
    expand: int = 2
    conv: int = 4
    split: int = 3
    groups: int | None = None
    inner: Inner = "all"
    decay: bool = True
    weights: Weights = "q"
    norm: bool = True
    sample: Sample = "argmax"
    soft: bool = False

    info = Info(
        slug="nats-l", phase="mixer", needs=frozenset({"training"}), tiny={"chunk": 8, "split": 2},
        variants=(
            {"chunk": 16, "split": 1, "groups": 1, "expand": 1, "decay": False, "weights": "x"},
            {"chunk": 5, "split": 2, "inner": "attention", "weights": "none", "conv": 1},
            {"chunk": 8, "split": 4, "inner": "delta", "norm": False},
        ),
        opts_out={
            "constant": "the keys and values of all chunks of attention type are kept",
            "gradcheck": "the type of a chunk is an argmax whose gradient is that of the softmax",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.chunk, self.expand, self.conv, self.split) < 1 or (self.groups is not None and self.groups < 1):
            raise ValueError(
                f"chunk={self.chunk}, expand={self.expand}, conv={self.conv}, split={self.split}, groups={self.groups}: "
                "give at least 1 of each"
            )
        for name, kinds in (("inner", Inner), ("weights", Weights), ("sample", Sample)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(kinds))}")

    def build(self, shape: MixerShape) -> TokenMixer:
        if shape.head_dim % self.split:
            raise ValueError(f"heads of {shape.head_dim} channels can't be split into {self.split} attention heads: change one of the two")
        if shape.kv_heads % (self.groups or 1):
            raise ValueError(f"{shape.kv_heads} key heads can't make up {self.groups} groups: give a divisor of the key heads")
        return NatsLMixer(shape, self)


class Pieces(NamedTuple):
    """What both operators take. Delta rule: q `(B, H, N, D)`, k `(B, Hk, N, D)` of length 1, v `(B, Hk, N, Dv)`, log_decay and beta
    `(B, H, N)`. Attention, in split heads: q_a `(B, sH, N, D/s)`, k_a `(B, sHk, N, D/s)`, v_a `(B, sHk, N, Dv/s)`. raw_q `(B, N, HD)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    q_a: Tensor
    k_a: Tensor
    v_a: Tensor
    raw_q: Tensor


class NatsLMixer(TokenMixer):
    """The layer. A chunk's type `(…, groups, 2)` is 1 at [..., 0] for attention and at [..., 1] for the delta rule."""

    def __init__(self, shape: MixerShape, method: NatsL) -> None:
        super().__init__(shape)
        self.method, self.heads, self.kv_heads = method, shape.heads, shape.kv_heads
        self.groups = method.groups or shape.kv_heads
        dim, d = shape.dim, shape.head_dim
        self.value_dim = method.expand * d
        self.widths = [self.heads * d, self.kv_heads * d, self.kv_heads * self.value_dim]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=False) for width in self.widths)
        self.conv = ShortConv(sum(self.widths), method.conv)
        self.strength, self.gate = WriteStrength(dim, self.heads), SoftplusGate(dim, self.heads)
        self.q_norm, self.k_norm = (nn.RMSNorm(d // method.split, eps=1e-6) for _ in range(2))
        self.router = nn.Linear(dim, 2 * self.groups, bias=False)
        split_heads, width = method.split * self.heads, self.heads * self.value_dim
        if method.weights != "none":
            self.weigh = nn.Linear(self.widths[0] if method.weights == "q" else dim, 2 * split_heads, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(self.value_dim // method.split, eps=1e-6) for _ in range(2 if method.norm else 1))
        self.out_gate, self.o_proj = OutputGate(dim, width, "silu"), nn.Linear(width, dim, bias=False)

    # -- what the forms share ----------------------------------------------------------------------------------------------

    def pieces(self, x: Tensor, tail: Tensor | None) -> tuple[Pieces, Tensor]:
        """What the operators take, and the new tail of the convolution."""
        (q, k, v), after = self.conv.each((self.q_proj(x), self.k_proj(x), self.v_proj(x)), tail)
        s, log_decay = self.method.split, self.gate(x, k, None, self.whole(x)).log_decay
        assert log_decay is not None
        q_1, k_1 = (F.normalize(heads_first(one, h), dim=-1, eps=1e-6) for one, h in ((q, self.heads), (k, self.kv_heads)))
        return Pieces(
            q=q_1, k=k_1, v=heads_first(v, self.kv_heads), log_decay=log_decay, beta=self.strength(x),
            q_a=self.q_norm(heads_first(q, s * self.heads)), k_a=self.k_norm(heads_first(k, s * self.kv_heads)),
            v_a=heads_first(v, s * self.kv_heads), raw_q=q,
        ), after  # fmt: skip

    def types(self, means: Tensor) -> Tensor:
        """The types `(B, chunks, groups, 2)` of chunks with these means `(B, chunks, dim)`: hard, with the gradient of the softmax."""
        logits = F.linear(means, self.router.weight.to(means.dtype)).unflatten(-1, (self.groups, 2))
        if self.training and self.method.sample == "gumbel":
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = logits.softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        # else only the operator that got the chunk passes a gradient on
        return hard + (1.0 if self.method.soft else hard) * (soft - soft.detach())

    def finish(self, attended: Tensor, read: Tensor, x: Tensor, raw_q: Tensor) -> Tensor:
        """y `(B, N, dim)` of attention's output `(B, sH, N, Dv/s)` and of what the state gave `(B, H, N, Dv)`."""
        heads = self.method.split * self.heads
        outs = [one.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)) for one in (attended, read)]
        if self.method.norm:
            outs = [_normed(norm, one) for norm, one in zip(self.norms, outs, strict=True)]
        shares: Sequence[Tensor | float] = (1.0, 1.0)
        if self.method.weights != "none":
            made = self.weigh(raw_q if self.method.weights == "q" else x).unflatten(-1, (heads, 2))
            shares = made.softmax(-1).unsqueeze(-2).unbind(-1)
        y = outs[0] * shares[0] + outs[1] * shares[1]
        y = y if self.method.norm else _normed(self.norms[0], y)
        return self.o_proj(self.out_gate(y.flatten(2).to(x.dtype), x))

    def of_heads(self, x: Tensor, heads: int) -> Tensor:
        """`(…, groups)` as `(…, heads)`."""
        return x.repeat_interleave(heads // self.groups, dim=-1)

    # -- many tokens, or one -----------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        c, n = self.method.chunk, x.shape[1]
        filled = int(call.start[0]) % c
        p, tail = self.pieces(x, past.get("conv"))
        held = past or self._nothing(x, p)
        wide = held["pool"].dtype
        # the open chunk and what is new, cut into chunks
        total = filled + n
        closed = total // c
        sums = F.pad(x.to(wide), (0, 0, filled, -total % c)).unflatten(1, (-1, c)).sum(2)
        # the pool is empty unless a chunk is open
        sums = torch.cat([sums[:, :1] + held["pool"].unsqueeze(1), sums[:, 1:]], 1)
        types = self.types(sums[:, :closed] / c)
        read, states = self._delta(p, held, types, filled)
        attended, kept, open_keys = self._attention(p, held, types, filled)
        y = self.finish(attended, read, x, p.raw_q)
        if not call.keep:
            return y, {}
        pool = sums[:, closed].clone() if total % c else torch.zeros_like(held["pool"])
        return y, {"conv": tail, "pool": pool, "kept": kept, **states, **open_keys}

    def _nothing(self, x: Tensor, p: Pieces) -> dict[str, Any]:
        """What is kept before the first token."""
        b, c, wide = x.shape[0], self.method.chunk, torch.promote_types(x.dtype, torch.float32)
        state = x.new_zeros(b, self.heads, self.shape.head_dim, self.value_dim, dtype=wide)
        return {
            "pool": x.new_zeros(b, x.shape[2], dtype=wide), "begin": state, "now": state, "decay": state.new_zeros(b, self.heads),
            "kept": KeptKeys.none(p.k_a, p.v_a),
            **{name: like.new_zeros(b, c, like.shape[1], like.shape[3]) for name, like in (("k", p.k_a), ("v", p.v_a))},
        }  # fmt: skip

    def _delta(self, p: Pieces, held: Mapping[str, Any], types: Tensor, filled: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the queries read from the state, `(B, H, N, Dv)`, and the state at the open chunk's start, now, and the decay between."""
        c, n = self.method.chunk, p.q.shape[2]
        wide = held["now"].dtype
        shares = self.of_heads(types[..., 1], self.heads).to(wide)  # (B, closed, H)
        begin, now, decay = held["begin"], held["now"], held["decay"]
        rows = [one.to(wide) for one in (p.q, p.k, p.v, p.log_decay, p.beta)]
        outs: list[Tensor] = []
        done = closed = 0
        if filled:
            done = min(n, c - filled)
            out, now, decay = self._open([one[:, :, :done] for one in rows], begin, now, decay)
            outs.append(out)
            if filled + done == c:
                begin, closed = self._closed(begin, now, decay, shares[:, 0]), 1
        whole = (n - done) // c
        if whole:
            out, begin, now, decay = self._chunks([one[:, :, done : done + whole * c] for one in rows], begin, shares[:, closed:])
            outs.append(out)
            done += whole * c
        if (filled + done) % c == 0:
            now, decay = begin, torch.zeros_like(decay)
        if done < n:
            out, now, decay = self._open([one[:, :, done:] for one in rows], begin, now, decay)
            outs.append(out)
        return torch.cat(outs, 2), {"begin": begin, "now": now, "decay": decay}

    def _open(self, rows: list[Tensor], begin: Tensor, now: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens within one chunk: (what they read, the state after them, the decay since the chunk's start)."""
        q, k, v, g, beta = rows
        out, after = scan(q, k, v, log_decay=g, beta=beta, initial_state=now)
        assert isinstance(after, Tensor)
        total = decay.unsqueeze(-1) + g.cumsum(-1)
        if self.method.inner == "attention":
            out = (q * total.exp().unsqueeze(-1) * q.shape[-1] ** -0.5) @ begin
        return out, after, total[..., -1].clone()

    def _closed(self, begin: Tensor, end: Tensor, decay: Tensor, share: Tensor) -> Tensor:
        """The state after a chunk: share `(B, H)` of what was written in it, over what was there before."""
        base = begin * decay.exp()[..., None, None]
        chosen = share[..., None, None]
        if not self.method.decay:
            # an attention chunk leaves the state as it was
            return begin + chosen * (end - begin)
        return base + chosen * (end - base)

    def _chunks(self, rows: list[Tensor], begin: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole chunks. The recurrence is linear in the state, so all chunks run at once from 0 and from the identity: the state after a
        chunk is `B + A S` and a query reads `o + O S`, S the state before it. Only S goes from chunk to chunk."""
        c = self.method.chunk
        chunks = rows[0].shape[2] // c
        q, k, v, g, beta = (one.unflatten(2, (chunks, c)).transpose(1, 2).flatten(0, 1) for one in rows)
        b, h, d, dv = begin.shape
        decay = g.sum(-1).unflatten(0, (b, chunks))
        eye = torch.eye(d, dtype=v.dtype, device=v.device).expand(b * chunks, h, d, d)
        start = torch.cat([eye.new_zeros(b * chunks, h, d, dv), eye], -1)
        out, after = scan(q, k, F.pad(v, (0, d)), log_decay=g, beta=beta, initial_state=start)
        assert isinstance(after, Tensor)
        written, turned = after.unflatten(0, (b, chunks)).split([dv, d], -1)
        own, through = out.unflatten(0, (b, chunks)).split([dv, d], -1)
        if self.method.inner == "attention":
            own = torch.zeros_like(own)
            through = (q * g.cumsum(-1).exp().unsqueeze(-1) * d**-0.5).unflatten(0, (b, chunks))
        before, end = [], begin
        for i in range(chunks):
            before.append(begin)
            end = written[:, i] + turned[:, i] @ begin
            begin = self._closed(begin, end, decay[:, i], shares[:, i])
        out = own + through @ torch.stack(before, 1)
        return out.transpose(1, 2).flatten(2, 3), begin, end, decay[:, -1].clone()

    def _attention(
        self, p: Pieces, held: Mapping[str, Any], types: Tensor, filled: int
    ) -> tuple[Tensor, KeptKeys, dict[str, Tensor]]:
        """Attention's output `(B, sH, N, Dv/s)`, the keys kept of complete chunks, and those of the open one."""
        c, n = self.method.chunk, p.q_a.shape[2]
        spare = -(filled + n) % c
        closed = types.shape[1]
        keys, values = (
            F.pad(torch.cat([held[name][:, :filled].transpose(1, 2).to(new.dtype), new], 2), (0, 0, 0, spare))
            for name, new in (("k", p.k_a), ("v", p.v_a))
        )
        kept: KeptKeys = held["kept"]
        dense = self.method.soft and torch.is_grad_enabled() and types.requires_grad and not (filled or kept.keys.shape[0])
        seen = kept.counts.unsqueeze(-1)  # (B, sHk, chunks), of which the first is the open one
        if closed:
            marks = self.of_heads(types[..., 0], keys.shape[1]).transpose(1, 2)  # (B, sHk, closed)
            chosen, weight = marks.detach() > 0.5, {}
            if torch.is_grad_enabled() and types.requires_grad:
                weight["log_weight"] = (marks - marks.detach()).repeat_interleave(c, 2)
            kept = kept.add(keys[:, :, : closed * c], values[:, :, : closed * c], chosen.repeat_interleave(c, 2), **weight)
            seen = torch.cat([seen, seen + c * chosen.cumsum(-1)], -1)
        if dense:
            out = self._naive_attention(p, types).to(p.q_a.dtype)
        else:
            # a single token does not see the chunk that closes with it
            store = kept if n > 1 else held["kept"]
            out = self._read(p.q_a, keys, values, store, seen[..., : -(-(filled + n) // c)], filled)
        first = closed * c
        opened = {
            name: F.pad(x[:, :, first : filled + n].transpose(1, 2), (0, 0, 0, 0, 0, c - (filled + n - first)))
            for name, x in (("k", keys), ("v", values))
        }
        return out, kept, opened

    def _read(self, q: Tensor, keys: Tensor, values: Tensor, kept: KeptKeys, seen: Tensor, filled: int) -> Tensor:
        """`(B, sH, N, Dv/s)`: q over its own chunk and the first `seen (B, sHk, chunks)` kept keys, all in one softmax."""
        c, n = self.method.chunk, q.shape[2]
        own = None if self.method.inner == "delta" else self._own(q, keys, values, filled)
        if n == 1:
            return kept.attend(q, state=own).out
        q = F.pad(q, (0, 0, filled, 0))
        if own is not None:
            assert own.lse is not None
            own = Partial(F.pad(own.out, (0, 0, filled, 0)), F.pad(own.lse, (filled, 0)))
        return kept.attend(q, seen=seen, tile=c, state=own).out[:, :, filled:]

    def _own(self, q: Tensor, keys: Tensor, values: Tensor, filled: int) -> Partial:
        """Attention of q `(B, sH, N, D/s)` over the tokens of its chunk so far; keys and values: whole chunks, the new ones among them."""
        c, b, n = self.method.chunk, q.shape[0], q.shape[2]
        if n == 1:
            place = filled + 1
            return attend(q, keys[:, :, :place], values[:, :, :place], causal=False, return_lse=True)
        q = F.pad(q, (0, 0, filled, keys.shape[2] - filled - n))
        rows, k, v = (one.unflatten(2, (-1, c)).transpose(1, 2).flatten(0, 1) for one in (q, keys, values))
        part = attend(rows, k, v, causal=True, return_lse=True)
        assert part.lse is not None
        out, lse = (one.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, filled : filled + n] for one in (part.out, part.lse))
        return Partial(out, lse)

    # -- the definition ----------------------------------------------------------------------------------------------------

    def naive(self, x: Tensor) -> Tensor:
        c, n = self.method.chunk, x.shape[1]
        p, _ = self.pieces(x, None)
        wide = torch.promote_types(x.dtype, torch.float32)
        whole = n // c
        types = self.types(x[:, : whole * c].to(wide).unflatten(1, (whole, c)).mean(2))
        return self.finish(self._naive_attention(p, types).to(x.dtype), self._naive_delta(p, types), x, p.raw_q)

    def _naive_attention(self, p: Pieces, types: Tensor) -> Tensor:
        c, n, wide = self.method.chunk, p.q_a.shape[2], types.dtype
        q, k, v = (one.to(wide).repeat_interleave(p.q_a.shape[1] // one.shape[1], 1) for one in (p.q_a, p.k_a, p.v_a))
        i = torch.arange(n, device=q.device)
        own = (i[:, None] // c == i // c) & (i <= i[:, None])
        before = i // c < i[:, None] // c
        # the last chunk, if it is not complete, has no type and is read by nobody after it
        marks = F.pad(self.of_heads(types[..., 0], q.shape[1]).transpose(1, 2).repeat_interleave(c, 2), (0, n % c))
        own = own if self.method.inner != "delta" else torch.zeros_like(own)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~(before | own), float("-inf"))
        top = logits.detach().amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (logits - top).exp() * (before * marks.unsqueeze(2) + own)
        total = weights.sum(-1, keepdim=True)
        return weights @ v / total.masked_fill(total == 0, 1.0)

    def _naive_delta(self, p: Pieces, types: Tensor) -> Tensor:
        """Token by token."""
        c, (b, h, n, d), wide = self.method.chunk, p.q.shape, types.dtype
        q, k, v = (one.to(wide).repeat_interleave(h // one.shape[1], 1).unsqueeze(-2) for one in (p.q, p.k, p.v))
        g, beta = p.log_decay.to(wide).exp(), p.beta.to(wide)
        shares = self.of_heads(types[..., 1], h)
        begin = state = q.new_zeros(b, h, d, v.shape[-1])
        decay = q.new_ones(b, h)
        outs = []
        for t in range(n):
            state = state * g[:, :, t, None, None]
            decay = decay * g[:, :, t]
            state = state + beta[:, :, t, None, None] * k[:, :, t].mT * (v[:, :, t] - k[:, :, t] @ state)
            seen = begin * decay[..., None, None] if self.method.inner == "attention" else state
            outs.append(q[:, :, t] @ seen * d**-0.5)
            if (t + 1) % c == 0:
                base = begin * decay[..., None, None] if self.method.decay else begin
                begin = state = base + shares[:, t // c, :, None, None] * (state - base)
                decay = torch.ones_like(decay)
        return torch.cat(outs, 2)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    weight = cast(nn.RMSNorm, norm).weight
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)


def nats_layers(count: int, *, every: int = 1, pure: str = "kimi-linear(gate='token')", **fields: Any) -> list[str]:
    """The specs of a model's layers: every `every`-th is NAtS-L, the others are `pure`, a gated delta rule.

    1: all layers; 4: the paper's hybrid of 3 in 4. fields: of the layers, such as chunk. ValueError where a number is out of range.
    """
    if count < 1 or every < 1:
        raise ValueError(f"{count} layers, every {every}-th: give at least 1 of each")
    spec = format_spec("nats-l", fields)
    return [spec if (index + 1) % every == 0 else pure for index in range(count)]
