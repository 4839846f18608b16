"""MiniCPM-SALA: three quarters of the layers are lightning attention, one quarter reads few blocks of all keys by softmax.

    lightning   q, k = rotary(rms_norm(W x)) per head, as many key heads as query heads
                S_t = e^(-s_h) S_{t-1} + k_t v_t^T,   y_t = W_o (norm(S_t^T q_t D^-1/2) * sigmoid(W_g x_t)),   s_h ALiBi's slopes
    sparse      grouped queries, no rotary embedding, y_t = W_o (attention * sigmoid(W_g x_t)) over the keys of `top` blocks: the first,
                those of the last `local` tokens, and those found through the means of overlapping windows   (parts.window_blocks)
                queries among the first `dense` tokens read all before them

Blocks are chosen for each query and key head and have no parameters, so dense and sparse reading are one layer. A decoder takes
`minicpm_sala_layers`; a trained model is converted by `saccade.train.convert`, which finds the layers that stay
(`saccade.train.layer_choice`).

Source: minicpm-sala, arXiv 2602.11761.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.cache.pooled_store import PooledStore
from saccade.core import Call, Info, Mixer, MixerShape, Selection, TokenMixer, format_spec, over_groups, register
from saccade.methods.linear.softmax import Softmax, SoftmaxMixer
from saccade.ops import attend, decode
from saccade.parts.linear.gates import HeadGate
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.recurrent import Recurrent
from saccade.parts.linear.slopes import alibi_slopes, lightning_slopes
from saccade.parts.window_blocks import choose_blocks

PUBLISHED = (0, 9, 16, 17, 22, 29, 30, 31)  # sparse ones of 32 layers


@register
@dataclass(frozen=True, kw_only=True)
class MinicpmSala(Mixer):
    """sparse: a sparse layer, else a lightning layer.

    Of lightning layers: expand: a key and value head for every query head, whatever the shape says. depth: slopes that fall with depth,
    as lightning-attention has them. norm: what was read is normalised over "all" heads together or over each "head".

    Of sparse layers, in tokens unless said otherwise: block: of keys. top: blocks a query reads. init: first blocks that are always read.
    local: last tokens whose blocks are. window, stride: of the means. dense: queries before this place read everything. rotary: turn
    queries and keys (a converted model may have it). qk_norm: RMS norm of queries and keys.

    theta: base of the rotary embedding. bias: in the projections of q, k and v.
    """

    sparse: bool = False
    expand: bool = True
    depth: bool = False
    norm: Literal["all", "head"] = "all"
    block: int = 64
    top: int = 64
    init: int = 1
    local: int = 2048
    window: int = 32
    stride: int = 16
    dense: int = 8192
    rotary: bool = False
    qk_norm: bool = False
    theta: float = 10000.0
    bias: bool = False

    info = Info(
        slug="minicpm-sala", phase="mixer", needs=frozenset({"training"}),
        tiny={"sparse": True, "block": 8, "top": 4, "local": 9, "window": 4, "stride": 2, "dense": 20},
        variants=(
            {}, {"expand": False, "depth": True, "norm": "head", "bias": True}, {"sparse": True},
            {
                "sparse": True, "block": 4, "top": 4, "init": 0, "local": 4, "window": 6, "stride": 4, "dense": 0, "rotary": True,
                "qk_norm": True,
            },
        ),
        opts_out={"constant": "sparse layers keep the keys and values of all tokens"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.norm not in ("all", "head"):
            raise ValueError(f"norm={self.norm!r} is not 'all' or 'head'")
        if min(self.block, self.top, self.local, self.window, self.stride) < 1 or min(self.init, self.dense) < 0:
            raise ValueError(
                f"block={self.block}, top={self.top}, local={self.local}, window={self.window}, stride={self.stride}, init={self.init}, "
                f"dense={self.dense}: give at least 1, and 0 for init and dense"
            )
        if self.block % self.stride or self.window < self.stride:
            raise ValueError(
                f"block={self.block}, window={self.window}, stride={self.stride}: let the stride divide the block, and no window be shorter"
            )
        always = self.init + (self.local + self.block - 2) // self.block + 1
        if self.top < always:
            raise ValueError(f"top={self.top} can't hold the {always} blocks that init={self.init} and local={self.local} need: raise it")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        return SparseMixer(shape, self) if self.sparse else LightningMixer(shape, self)

    def staying(self) -> MinicpmSala:
        """What stands in a layer that is not converted: the sparse layer, with the rotary embedding the model was trained with."""
        return replace(self, sparse=True, rotary=True)


class LightningMixer(Recurrent):
    """A lightning layer."""

    # in a conversion all of it learns, by the layer's output
    taught_whole = True

    def __init__(self, shape: MixerShape, method: MinicpmSala) -> None:
        if method.expand:
            shape = replace(shape, kv_heads=shape.heads)
        slopes = lightning_slopes(shape.heads, shape.layer, shape.layers) if method.depth else alibi_slopes(shape.heads)
        super().__init__(
            shape, gate=HeadGate(slopes), normaliser=OutputNorm(shape.heads, shape.head_dim, over=method.norm), rotary="before",
            theta=method.theta, scale=None, out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "sigmoid"),
        )  # fmt: skip
        if method.bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                own = getattr(self, name)
                setattr(self, name, nn.Linear(own.in_features, own.out_features))
        self.q_norm, self.k_norm = (nn.RMSNorm(shape.head_dim, eps=1e-6) for _ in range(2))

    def project(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        q, k, v, kept = super().project(x, past, call)
        return self.q_norm(q), self.k_norm(k), v, kept


class SparseMixer(SoftmaxMixer):
    """A sparse layer. It keeps all keys and values, and the window means of the keys."""

    batches_padding = False
    # in a conversion it begins as the layer it was, and has nothing to be taught
    taught = False

    def __init__(self, shape: MixerShape, method: MinicpmSala) -> None:
        super().__init__(shape, Softmax(rotary=method.rotary, theta=method.theta, qk_norm=method.qk_norm, gate=True, bias=method.bias))
        self.sala = method

    @torch.no_grad()
    def take_over(self) -> None:
        """After the projections of a trained layer were copied: every gate stands at a half, and the last projection makes up for it."""
        assert self.out_gate is not None
        self.out_gate.project.weight.zero_()  # pyright: ignore[reportCallIssue]
        self.o_proj.weight.mul_(2)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        start, n, m = int(call.start[0]), x.shape[1], self.sala
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        store, real = PooledStore(), None
        if past or call.keep:
            store = past.get("kv", store)
            k, v, real = store.append(k, v, None)
        if real is not None:
            # a row that was joined with longer ones; rows are run one by one then
            k, v = (t[:, :, real[0]] for t in (k, v))
        means = store.means(k.detach(), m.window, m.stride)
        cut = min(max(m.dense - start, 0), n)
        outs = []
        if cut:
            outs.append(_attended(q[:, :, :cut], k[:, :, : start + cut], v[:, :, : start + cut]))
        if cut < n:
            late = q[:, :, cut:]
            outs.append(_attended(late, k, v, self.selection(late, means, start + cut)))
        return self.finish(torch.cat(outs, dim=2), x), {"kv": store} if call.keep else {}

    def selection(self, q: Tensor, means: Tensor, first: int) -> Selection:
        """The blocks of the newest queries q `(B, H, n, D)`, which stand at places from `first` on."""
        m, n_k = self.sala, first + q.shape[2]
        blocks, counts = choose_blocks(
            q.detach(), means, first, window=m.window, stride=m.stride, block=m.block, top=m.top, init=m.init, local=m.local
        )
        starts = (blocks * m.block).clamp(max=n_k).to(torch.int32)
        return Selection(
            n_q=q.shape[2], n_k=n_k, block_q=1, block_k=m.block, starts=starts, start_counts=counts.to(torch.int32),
            tokens=starts[..., :0], token_counts=torch.zeros_like(counts, dtype=torch.int32), causal=True,
        )  # fmt: skip

    def naive(self, x: Tensor) -> Tensor:
        call = self.whole(x)
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        return self.finish(partial_softmax(q, k, v, self.mask(q, k)).out.to(x.dtype), x)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys each query of a whole sequence reads, `(B, H, N, N)` bool, window by window and block by block."""
        m, n = self.sala, q.shape[2]
        place = torch.arange(n, device=q.device)
        causal = place <= place[:, None]
        block = place // m.block
        ids = torch.arange(-(-n // m.block), device=q.device)
        begins = torch.arange(0, max(0, n - m.window + 1), m.stride, device=q.device)
        score = q.new_zeros(q.shape[0], k.shape[1], n, len(ids), dtype=torch.promote_types(q.dtype, torch.float32))
        if len(begins):
            wide = score.dtype
            inside = (place >= begins[:, None]) & (place < begins[:, None] + m.window)
            means = (inside.to(wide) / m.window) @ k.to(wide)
            logits = over_groups((q.to(wide) * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1)), means.mT)
            ended = begins + m.window <= place[:, None] + 1
            p = logits.masked_fill(~ended, float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
            meets = (begins[:, None] < (ids + 1) * m.block) & (begins[:, None] + m.window > ids * m.block)
            score = p.unsqueeze(-1).masked_fill(~meets, 0.0).amax(-2)
        local = (place[:, None] - m.local + 1).clamp(min=0) // m.block
        score = score.masked_fill((ids < m.init) | (ids >= local), float("inf")).masked_fill(ids > block[:, None], -1.0)
        rank = score.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        chosen = ((rank < m.top) & (score >= 0))[..., block] | (place[:, None] < m.dense)
        return (chosen & causal).repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _attended(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None = None) -> Tensor:
    if q.shape[2] == 1 and not (torch.is_grad_enabled() and q.requires_grad):
        return decode(q, k, v, selection).out
    return attend(q, k, v, selection, causal=True).out


def minicpm_sala_layers(count: int, *, sparse: Sequence[int] | None = None, **fields: Any) -> list[str]:
    """The specs of a model's layers: `SaccadeConfig(layers=minicpm_sala_layers(32))`.

    sparse: the sparse layers; default: those published for 32 layers, else a quarter, the first and the last among them. fields: of the
    layers, such as top and local. ValueError where a number is out of range.
    """
    if sparse is None:
        many = max(2, round(count / 4))
        sparse = PUBLISHED if count == 32 else [round(i * (count - 1) / (many - 1)) for i in range(many)]
    if count < 1 or any(not 0 <= index < count for index in sparse):
        raise ValueError(f"sparse layers {sorted(set(sparse))} are not all among {count} layers: count from 0")
    return [format_spec("minicpm-sala", {**fields, "sparse": True} if index in set(sparse) else fields) for index in range(count)]
