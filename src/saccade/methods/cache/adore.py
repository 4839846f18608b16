"""ADORE: a small recurrent network, the controller, says which past tokens the next one will look at; the cache holds a fixed number of
them, and dropped tokens that matter again run through the model once more, beside the new token.

    z_t = GRU(x_t, z_{t-1}),    sigma_j = sigmoid(MLP([z_j, z_t]))        on input embeddings x; one list for all layers and heads

    rebuild   of the tokens that were dropped, the `rebuild` with the highest sigma_j run again, at their own positions
    attend    each sees what the cache holds up to its own place, and those beside it; the new token sees all
    release   of all of them the `size` with the highest sigma_j stay, the newest `recent` among them

A rebuilt key or value equals the first one in layer 0, and in deeper layers where all tokens before it are there. The controller is
trained on the frozen model's attention (`saccade.train.token_controller`); the paper tunes the model, too, to bear with what is missing.
Ids and z of all tokens are kept: a few hundred bytes a token for a model of any size.

Source: adore, arXiv 2407.02328. Inferred there or chosen here: the rebuilt tokens are read in any case, also where they do not stay; the
prompt is released at its end; a call of several tokens asks once what comes back, by its last token, or by its first where it has up to
16 of them (guesses to be verified). A token that images stand for can't be rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Plan, Rebuilding, StoredKV, register
from saccade.parts.keep import keep_best
from saccade.parts.pick import pick_best
from saccade.parts.token_controller import TokenController

STATES, SIGMA = "adore states", "adore sigma"  # in the sequence's state: z (B, n, d), and the logits of sigma at the newest token (B, n)
GUESSES = 16  # tokens of a call that may be guesses


@register
@dataclass(frozen=True, kw_only=True)
class Adore(Rebuilding):
    """size: tokens that the cache holds, m. rebuild: dropped tokens that run again at each step, R; 0 drops for good.
    recent: newest tokens that stay whatever their sigma, out of the size. Needs a plan with a controller:
    `saccade.train.token_controller.train_token_controller`.
    """

    size: int = 192
    rebuild: int = 8
    recent: int = 32

    info = Info(
        slug="adore", phase="cache", needs=frozenset({"calibration", "training"}), frees_memory=True, append_only=False,
        opened={"size": 1 << 30}, tiny={"size": 16, "rebuild": 1, "recent": 4},
        opts_out={"stepwise": "a prompt at once attends before tokens are released; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("rebuild", 0), ("recent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"adore({name}={value!r}) is not a whole number of at least {least}")

    def recall(self, sequence: dict[str, Any], plan: Plan | None, x: Tensor, held: Tensor) -> Tensor:
        controller, (m, n) = self._controller(plan, x.device), (x.shape[1], held.shape[1])
        known: Tensor | None = sequence.get(STATES)
        known = None if known is None or not n else known[:, :n]
        new = controller.read(x, None if known is None else known[:, -1])
        states = sequence[STATES] = new if known is None else torch.cat([known, new], 1)
        sequence.pop(SIGMA, None)
        count = min(self.rebuild, int((~held[0]).sum()))
        if not count:
            return torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
        at = n if m <= GUESSES else n + m - 1
        importance = controller.importance(states[:, :n], states[:, at : at + 1]).squeeze(1)
        return pick_best(importance.masked_fill(held, -torch.inf), count)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > self.size

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if kv.length <= self.size:
            return
        places, positions = ctx.sequence[self.PLACES].contiguous(), kv.side["positions"].flatten(1).contiguous()
        index = torch.searchsorted(places, positions)
        newest = int(index[0, -1])
        sigma: Tensor | None = ctx.sequence.get(SIGMA)
        if sigma is None or sigma.shape[1] != newest + 1:
            states = ctx.sequence[STATES][:, : newest + 1]
            sigma = self._controller(ctx.plan, states.device).importance(states, states[:, -1:]).squeeze(1)
            ctx.sequence[SIGMA] = sigma
        keep_best(kv, sigma.gather(1, index).view_as(kv.side["positions"]), self.size, recent=self.recent)

    def _controller(self, plan: Plan | None, device: torch.device) -> TokenController:
        if plan is None:
            raise ValueError("adore has no plan: train its controller (saccade.train.token_controller) and pass plan=")
        return TokenController.of(lambda name: plan.tensor(0, name).to(device))
