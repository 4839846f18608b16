"""Double Sparsity: a few channels of the keys, fixed for each head, find the tokens that deserve exact attention.

Offline, the importance of channel c of a key head is the mean over tokens and its query heads of |q_c k_c| (own token, after RoPE);
the most important D / f channels C are kept beside the keys, contiguously and in 4 bits: the label cache. A step ranks tokens by

    a_t = sum_{c in C} q_c k_tc

and reads the best ones, first and newest tokens among them, with all channels.

The paper's offloading variant fetches tokens of layer l + 1 while layer l runs, by a query guessed from layer l's input; attention
methods do not see layer inputs, so it is left out. First and newest tokens are not forced in the paper.
Source: double-sparsity, arXiv 2408.07092.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Budget, Calibrated, Decode, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import Reduce, packed_products
from saccade.ops.quant import quantise_rows
from saccade.parts.columns import cut, extend
from saccade.parts.dots import dots
from saccade.parts.ends import force_ends
from saccade.parts.heads import check_reduction
from saccade.parts.pick import pick_best, read_tokens
from saccade.parts.placed import placed


@register
@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(Decode, Calibrated):
    """channels: channels of a label, as a share of the head dim D (float, 1 / f) or a number (int).
    budget: tokens read per step and query head (int), or their share (float) of the entries the layer holds.
    bits: of a label's numbers, 1 to 8, with one smallest value and step per token and key head (two numbers in the keys' dtype); None
        keeps the keys' dtype. The index is bits / 16 / f of a half-precision key cache, and those two numbers.
    by: what tells a channel's importance: "product" |q_c k_c|, "query" |q_c| or "key" |k_c|.
    sinks, recent: first and newest tokens, read always; they come out of the budget. dense_layers: the first layers, which read
        everything.
    reduce: "none" lets every query head choose its tokens; "group_max" and "group_sum" choose once for the query heads that share a key
        head, by the highest or the summed a_t, so that a token is loaded once (inferred: the paper has no grouped heads).
    """

    channels: float | int = 0.0625
    budget: float | int = 0.0625
    bits: int | None = 4
    by: Literal["product", "query", "key"] = "product"
    sinks: int = 4
    recent: int = 16
    dense_layers: int = 2
    reduce: Reduce = "none"

    info = Info(
        slug="double-sparsity", phase="decode", reads_encoded=True, recordable=True, needs=frozenset({"calibration"}),
        opened={"budget": 1.0},
        tiny={"channels": 0.5, "budget": 0.25, "sinks": 1, "recent": 4, "dense_layers": 0},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole = isinstance(self.channels, int) and not isinstance(self.channels, bool)
        if not (whole and self.channels >= 1) and not (isinstance(self.channels, float) and 0 < self.channels <= 1):
            raise ValueError(f"double-sparsity(channels={self.channels!r}) is neither a share of the head dim in (0, 1] nor a number")
        if self.bits is not None and (isinstance(self.bits, bool) or self.bits not in range(1, 9)):
            raise ValueError(f"double-sparsity(bits={self.bits!r}) is neither None nor a number of bits from 1 to 8")
        if self.by not in ("product", "query", "key"):
            raise ValueError(f"double-sparsity(by={self.by!r}) is not one of 'product', 'query', 'key'")
        for name in ("sinks", "recent", "dense_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"double-sparsity({name}={value!r}) is not a whole number from 0 on")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("double-sparsity reads a fixed number of tokens: its budget is a ratio or a number of tokens")
        check_reduction("double-sparsity", self.reduce)

    def layer_policy(self, layer: int, layers: int) -> LayerPolicy:
        return "dense" if layer < self.dense_layers else "select"

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """"importance" `(Hk, D)` float64, summed over batch, tokens and the query heads of a key head; "tokens" `(1,)`."""
        strength = ctx.layout.to_groups(q).abs().double().sum(2) if self.by != "key" else torch.ones_like(k, dtype=torch.float64)
        if self.by != "query":
            strength = strength * k.abs().double()
        tokens = torch.tensor([float(q.shape[0] * q.shape[2])], dtype=torch.float64, device=q.device)
        return {"importance": strength.sum((0, 2)), "tokens": tokens}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """"channels" `(Hk, D)` int64: by falling importance, ties to the lower; "importance" `(Hk, D)`: their mean a token."""
        importance = sums["importance"] / sums["tokens"]
        found = torch.sort(importance, dim=-1, descending=True, stable=True)
        return {"channels": found.indices, "importance": found.values.float()}

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def chosen(self, ctx: LayerContext, like: Tensor) -> Tensor:
        """The channels of a label, int64 `(Hk, d)`."""
        channels = ctx.found("channels")
        d = round(self.channels * channels.shape[-1]) if isinstance(self.channels, float) else self.channels
        return placed(channels, like.device, columns=max(1, d))

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        channels = self.chosen(ctx, k)
        if self.bits is None:
            return extend(ctx.state, labels=k.gather(-1, channels.unsqueeze(1).expand(k.shape[0], -1, k.shape[2], -1)))
        labels, ranges = quantise_rows(k, self.bits, columns=channels)
        return extend(ctx.state, labels=labels, ranges=ranges)

    def rewind(self, ctx: LayerContext, n: int) -> int:
        return cut(ctx.state, n, "labels", "ranges")

    def label_logits(self, ctx: LayerContext, q: Tensor) -> Tensor:
        """The products of q `(B, Hq, D)` with all labels, without the scale: `(B, Hq, n)` float32 (float64 for float64).

        With a reduction there is one row for each key head.
        """
        channels = self.chosen(ctx, q)
        groups = ctx.layout.to_groups(q)
        q = groups.gather(-1, channels.unsqueeze(1).expand(*groups.shape[:3], -1)).flatten(1, 2)
        labels = ctx.state["labels"].view
        if self.bits is None:
            return dots(q, labels, self.reduce)
        # labels are never restored
        return packed_products(q, labels, ctx.state["ranges"].view, self.bits, channels.shape[-1], reduce=self.reduce)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n = k.shape[2]
        count = Budget.of(self.budget).tokens(n)
        scores = force_ends(self.label_logits(ctx, q.squeeze(2)), count, sinks=self.sinks, recent=self.recent)
        return read_tokens(pick_best(scores, count), n)
