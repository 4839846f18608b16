"""Decoding in which few layers read everything and say what the layers after them read.

A planner layer needs its logits twice, for its output and for its choice, so it computes them once:

    l_hj = cap(scale * q_h.k_j)        out_h = softmax_j(l_hj) v        selection = choose(l)

and publishes the selection, which the layers up to the next planner read instead of scoring anything themselves.

Sources: tidaldecode, arXiv 2410.05076; less-is-more, arXiv 2508.07101; delta-layer-aware, arXiv 2510.09883; hylra, arXiv 2602.00777.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from saccade.core import Decode, LayerContext, Selection
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import Reduce
from saccade.parts.dots import dots, weighted_values
from saccade.parts.heads import reduce_heads

_DENSE, _PLANS = -1, -2  # in a calibration plan, beside the numbers of layers


def step_logits(ctx: LayerContext, q: Tensor, k: Tensor, reduce: Reduce = "none") -> Tensor:
    """Logits of q `(B, Hq, 1, D)` over k `(B, Hk, n, D)`, scaled and capped: `(B, Hq, n)` float32 (float64 for float64).

    reduce: "group_max" or "group_sum" over the query heads of a group, `(B, Hk, n)`; the others are then never written, where neither a
    cap nor encoded entries stand in between. Where entries lie encoded, k tells their number only, and keys are decoded a piece at a time.
    """
    if ctx.entries is None and ctx.softcap is None and ctx.scale > 0:
        return dots(q.squeeze(2), k, reduce) * ctx.scale
    products = dots(q.squeeze(2), k) if ctx.entries is None else ctx.entries.dots(q.squeeze(2))
    logits = products * ctx.scale
    logits = logits if ctx.softcap is None else ctx.softcap * torch.tanh(logits / ctx.softcap)
    return reduce_heads(logits, ctx.layout.kv_heads, reduce)


def role_of(layer: int, layers: int, full: Collection[int]) -> LayerPolicy:
    """What a layer does when those in `full` read everything: the last one before each gap plans, the layers in the gap follow it.

    Layers before the first of `full` read everything too: nobody has planned for them.
    """
    if layer in full:
        return "dense" if layer + 1 in full or layer + 1 >= layers else "select"
    before = [number for number in full if number < layer]
    return max(before) if before else "dense"


def check_place(slug: str, name: str, place: object) -> None:
    """ValueError unless `place` is a layer's number (int >= 0) or a share of the depth (float in [0, 1))."""
    whole = isinstance(place, int) and not isinstance(place, bool) and place >= 0
    if not whole and not (isinstance(place, float) and 0 <= place < 1):
        raise ValueError(f"{slug} got {name}={place!r}: expected a layer's number from 0 on, or a share of the depth in [0, 1)")


def layer_at(place: int | float, layers: int) -> int:
    """The number of the layer at a checked place; a share is rounded, and stays within the depth."""
    return min(round(place * layers), layers - 1) if isinstance(place, float) else place


def planned_roles(roles: Mapping[int, LayerPolicy]) -> dict[int, dict[str, Tensor]]:
    """Roles by layer as the tensors of a calibration plan, which `found_role` reads."""
    codes = {"dense": _DENSE, "select": _PLANS}
    return {layer: {"role": torch.tensor(codes[role] if isinstance(role, str) else role)} for layer, role in roles.items()}


def found_role(ctx: LayerContext) -> LayerPolicy:
    """This layer's role in its calibration plan; ValueError without a plan."""
    code = int(ctx.found("role"))
    return "dense" if code == _DENSE else "select" if code == _PLANS else code


class Planner(Decode):
    """What the methods of this kind have in common: they differ in who plans (`role`) and in what is chosen (`choose`).

    A layer that follows reads what was planned last in this step. Where its planner does not exist, because the model has another kind of
    attention there, the first follower plans in its place.
    """

    @abstractmethod
    def choose(self, ctx: LayerContext, logits: Tensor) -> Selection:
        """What the following layers read, from a planner's logits `(B, Hq, n)` or its `scores`; both may be overwritten."""

    def scores(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        """What is chosen by where the planner's output needs no logits: the logits, or fewer numbers that `choose` takes in their place."""
        return step_logits(ctx, q, k)

    @abstractmethod
    def reads_all(self, n: int) -> bool:
        """Whether a cache of n entries is read whole, so that nothing is chosen."""

    @abstractmethod
    def role(self, ctx: LayerContext) -> LayerPolicy:
        """"dense", "select" for a planner, or the number of the planner that this layer follows."""

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What this layer chooses when it plans."""
        n = k.shape[2]
        if self.reads_all(n):
            return Selection.full(1, n, block_q=1, device=q.device)
        return self.choose(ctx, self.scores(ctx, q, k))

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        role, n = self.role(ctx), k.shape[2]
        if role == "dense":
            return ctx.attend(q, k, v, None)
        if role != "select" and "planner" in ctx.shared:
            return ctx.attend(q, k, v, ctx.published(ctx.shared["planner"]))
        ctx.shared["planner"] = ctx.layer
        if self.reads_all(n):
            ctx.publish(Selection.full(1, n, block_q=1, device=q.device))
            return ctx.attend(q, k, v, None)
        if ctx.recorded or (q.is_cuda and ctx.entries is None):
            # the decode kernel reads the keys a second time, which costs less than weights written out and read again
            out = ctx.attend(q, k, v, None)
            ctx.publish(self.choose(ctx, self.scores(ctx, q, k)))
            return out
        ctx.count(n)
        logits = step_logits(ctx, q, k)
        weights = logits.softmax(-1)
        out = weighted_values(weights, v) if ctx.entries is None else ctx.entries.weighted_values(weights)
        ctx.publish(self.choose(ctx, logits))
        return out.unsqueeze(2).to(q.dtype)
