"""One attention layer, fed again with the queries, keys and values of a dense run, under the methods of a contender.

What runs here is what an attached model runs (the same LayerRunner on the same KVLayer), so pictures and errors show
the method itself; the inputs are dense attention's, so errors of lower layers are not carried into higher ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.attach.layers import LayerCall, LayerRunner
from saccade.cache import KVLayer, PackedSegment, Rectangle
from saccade.core import LayerContext, Selection
from saccade.evaluate.contenders import Contender
from saccade.ops import last_run


class LayerReplay:
    """q `(1, Hq, N, D)`, k `(1, Hk, N, D)`, v `(1, Hk, N, Dv)` of layer `ctx.layer`, fed piece by piece.

    shared: one dict for each piece, the same for all layers of one contender: methods may reuse another layer's
    selection.
    """

    def __init__(
        self,
        ctx: LayerContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        contender: Contender,
        shared: dict[int, dict[Any, Any]],
    ) -> None:
        self.ctx, self.q, self.k, self.v, self.shared = ctx, q, k, v, shared
        methods: dict[str, Any] = contender.methods
        self.runner = LayerRunner(
            layer=ctx.layer, layers=ctx.layers, prefill=methods.get("prefill"), decode=methods.get("decode"),
            policy=methods.get("cache"), plans={plan.slug: plan for plan in contender.plans}, when="prompt",
            impl="auto", seed=ctx.seed, rotary=ctx.rotary,
        )  # fmt: skip
        self.layer = KVLayer()

    def feed(self, begin: int, end: int) -> Tensor:
        """The layer's output `(1, Hq, end - begin, Dv)` for tokens begin ... end - 1, which come next."""
        k, v = self.layer.update(self.k[:, :, begin:end], self.v[:, :, begin:end])
        call = LayerCall(
            q=self.q[:, :, begin:end], k=k, v=v, scale=self.ctx.scale, softcap=self.ctx.softcap, real=None,
            shared=self.shared.setdefault(begin, {}),
        )  # fmt: skip
        return self.runner.run(call, self.layer)

    def close(self) -> None:
        """The prompt ends here: the cache policy acts."""
        self.runner.end_prompt(self.layer)

    def keep_rest(self) -> None:
        """What was fed since `close` is no second prompt."""
        self.layer.pending = 0

    def ran(self, n_q: int) -> Selection | None:
        """The selection by which the last `feed`, of n_q tokens, was computed; None for dense attention."""
        found = last_run().selection
        return found if found is not None and found.n_q == n_q else None

    def chosen(self, n: int) -> Selection | None:
        """What the prefill method selects for the first n tokens, which were fed; None where it read everything.

        Not what ran last: a method may attend in several passes, or over keys in another order.
        """
        method = self.runner.prefill
        pairs = self.runner.stats.prefill
        if method is None or pairs.computed >= pairs.visible:
            return None
        plans = self.runner.plans
        # layers may hand selections on; -1 is no piece's place in `shared`
        shared = self.shared.setdefault(-1, {})
        ctx = replace(self.ctx, plan=plans.get(method.info.slug), plans=plans, state={}, shared=shared)
        return method.select(ctx, *(x[:, :, :n] for x in (self.q, self.k, self.v)))

    def held(self, n: int) -> Tensor:
        """Which of the first n tokens the cache still has an entry of: `(Hk, n)` bool."""
        return self._mark(n, None)

    def read(self, n: int) -> Tensor:
        """Which of the first n tokens the last `feed`, of one token, read: `(H, n)` bool with H = Hk or Hq."""
        return self._mark(n, self.ran(1))

    def _mark(self, n: int, selection: Selection | None) -> Tensor:
        heads = self.k.shape[1]
        parts = self._rectangles()
        # a selection is over all slots, sealed ones first; a method that made the sealed parts itself selects among others
        slots = sum(part.keys.shape[2] for part in parts)
        chosen = None if selection is None or selection.n_k != slots else selection.coverage()[0, :, 0]
        if chosen is not None and chosen.shape[0] not in (1, heads):
            heads = chosen.shape[0]
        marked = torch.zeros(heads, n + 1, dtype=torch.bool, device=self.k.device)
        end = 0
        for part in parts:
            begin, end = end, end + part.keys.shape[2]
            positions = part.side["positions"][0].long()
            here = torch.ones_like(positions, dtype=torch.bool) if part.valid is None else part.valid[0]
            positions = positions.repeat_interleave(heads // positions.shape[0], 0)
            here = here.repeat_interleave(heads // here.shape[0], 0)
            if chosen is not None:
                here = here & chosen[:, begin:end]
            # slots that hold nothing go to the spare column
            marked.scatter_(1, torch.where(here & (positions < n), positions, n), True)
        return marked[:, :n]

    def _rectangles(self) -> list[Rectangle]:
        tail = self.layer.tail
        assert tail is not None
        parts = [s.read_row(0) if isinstance(s, PackedSegment) else s.read(0, s.length) for s in self.layer.segments]
        return [*parts, Rectangle(tail.keys, tail.values, tail.side)]


def probabilities(q: Tensor, k: Tensor, first: int, scale: float, softcap: float | None) -> Tensor:
    """Dense attention probabilities, float32 `(Hq, m, n)`: q `(1, Hq, m, D)` at positions first ... over k `(1, Hk,
    n, D)`."""
    group = q.shape[1] // k.shape[1]
    logits = (q[0].float().unflatten(0, (-1, group)) @ k[0].float().unsqueeze(1).mT).flatten(0, 1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(first, first + q.shape[2], device=q.device)
    hidden = torch.arange(k.shape[2], device=q.device) > rows[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)
