"""TokenSelect: single tokens chosen by a soft vote of the heads, and chosen again only when the query has changed.

The first `sinks` and the last `local` tokens are always read. Of those between, for the mean query q_h of a chunk of C queries (a prompt)
or of one (decoding),

    score_j = sum_h softmax_j(scale * q_h.k_j)         one score a token, every head's say being the same

and the best `budget` tokens are read by all heads. If the cosine between this query and the one of the last choice is at least theta, the
last choice is read again. Without the vote, one head with large logits would outshout the others.

For prompts longer than the model was trained on, `reindex` numbers the tokens that are read consecutively, so that no distance is longer
than their number, and puts the query at distance `local` from every key while choosing, so that content alone decides.

Source: tokenselect, arXiv 2411.02886, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Decode, Info, LayerContext, Prefill, Selection, register
from saccade.parts.choice_cache import ChoiceCache
from saccade.parts.heads import reduce_heads
from saccade.parts.lists import KeyLists, run_tiles
from saccade.parts.pick import pick_best, read_tokens
from saccade.parts.planner import step_logits
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows

BLOCK = 64  # keys per tile of the local window of a chunk
ROWS = 4096  # keys turned at a time: bounds the float32 copy of a long prompt


@register
@dataclass(frozen=True, kw_only=True)
class TokenSelect(Prefill, Decode):
    """`attach(model, prefill="tokenselect", decode="tokenselect")`, or one of the two.

    sinks, local: first and last tokens that are always read (n_init, n_local). A chunk's own tokens come on top of its local ones.
    budget: tokens k that are chosen between them. Where sinks + budget + local reach as far as the tokens go, all are read.
    chunk: queries of a prompt that share a choice, C, counted from the first one given; a choice takes part in from all of them.
    theta: the cosine from which the last choice is read again; above 1 every query chooses, at -1 only the first one.
    pool: odd width of a maximum over neighbouring positions before the choice; 1 leaves the scores as they are.
    reindex: number the tokens that are read consecutively; needs a rotary embedding and a cache that drops nothing.
    """

    sinks: int = 128
    local: int = 512
    budget: int = 2048
    chunk: int = 512
    theta: float = 0.9
    pool: int = 1
    reindex: bool = False

    info = Info(
        slug="tokenselect", phase="decode", reads_encoded=True, opened={"budget": 1 << 30},
        tiny={"sinks": 2, "local": 8, "budget": 12, "chunk": 16},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("local", 1), ("budget", 1), ("chunk", 1), ("pool", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"tokenselect got {name}={value!r}: expected a whole number of at least {least}")
        if self.pool % 2 == 0:
            raise ValueError(f"tokenselect got pool={self.pool}: expected an odd width, which has a middle")
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or self.theta != self.theta:
            raise ValueError(f"tokenselect got theta={self.theta!r}: expected a cosine, or a number above 1 to choose at every query")
        if not isinstance(self.reindex, bool):
            raise ValueError(f"tokenselect got reindex={self.reindex!r}: expected True or False")

    # -- choosing ----------------------------------------------------------------------------------------------------------

    @property
    def fixed(self) -> int:
        """Tokens that a query reads when it can't read all."""
        return self.sinks + self.budget + self.local

    def chosen(self, ctx: LayerContext, q: Tensor, k: Tensor, first: int) -> Tensor:
        """The tokens that q `(B, Hq, m, D)` at positions from `first` on have chosen before their local ones: `(B, budget)` ascending."""
        # the newest query is itself the last of its local tokens, a chunk comes after them
        end = first + q.shape[2] - self.local if ctx.phase == "decode" else first - self.local
        mean = q.mean(2, keepdim=True, dtype=torch.promote_types(q.dtype, torch.float32))
        choices: ChoiceCache = ctx.state.setdefault("choices", ChoiceCache())

        def search() -> Tensor:
            middle = k[:, :, self.sinks : end]
            # scores without values are half of a pair's work
            ctx.count(middle.shape[2] / 2)
            if ctx.entries is not None:
                # encoded keys are read from the first on
                logits = step_logits(ctx, mean, k)[..., self.sinks : end]
            else:
                logits = self._by_content(ctx, mean, middle, first) if self.reindex else step_logits(ctx, mean, middle)
            votes = reduce_heads(logits, ctx.layout.kv_heads, "vote")
            if self.pool > 1:
                votes = torch.nn.functional.max_pool1d(votes, self.pool, stride=1, padding=self.pool // 2)
            return self.sinks + pick_best(votes.squeeze(1), self.budget)

        return choices.get(mean.flatten(1), first + q.shape[2], self.theta, search).long()

    def _by_content(self, ctx: LayerContext, mean: Tensor, middle: Tensor, first: int) -> Tensor:
        """Logits with the query at distance `local` from every key, `(B, Hq, n)`."""
        assert ctx.rotary is not None
        q = turn(mean, self.local - first, ctx.rotary)
        pieces = []
        for begin in range(0, middle.shape[2], ROWS):
            keys = middle[:, :, begin : begin + ROWS]
            slots = self.sinks + begin + torch.arange(keys.shape[2], device=keys.device)
            pieces.append(step_logits(ctx, q, turn(keys.to(q.dtype), -slots, ctx.rotary)))
        return torch.cat(pieces, dim=-1)

    def _check_reindex(self, ctx: LayerContext, n: int) -> None:
        if ctx.rotary is None:
            raise ValueError("tokenselect(reindex=True) moves keys to other positions, which needs a model with a fixed rotary embedding")
        if ctx.entries is not None:
            raise ValueError("tokenselect(reindex=True) moves keys to other positions, which encoded ones can't be: leave reindex off")
        if ctx.seen != n:
            raise ValueError(
                f"tokenselect(reindex=True) needs every token in the cache, which holds {n} of {ctx.seen}: leave the cache policy out"
            )

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if "choices" in ctx.state:
            ctx.state["choices"].truncate(n)
        return n

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        if ctx.phase != "decode":
            return self._prompt(ctx, q, k)
        n = k.shape[2]
        if self.fixed >= n:
            return Selection.full(1, n, block_q=1, device=q.device)
        places = torch.arange(n, device=q.device).expand(q.shape[0], n)
        ids = [places[:, : self.sinks], self.chosen(ctx, q, k, n - 1), places[:, n - self.local :]]
        return read_tokens(torch.cat(ids, dim=1).unsqueeze(1), n)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_q, n = q.shape[2], k.shape[2]
        if self.reindex:
            self._check_reindex(ctx, n)
        if self.fixed >= n or (n_q == 1 and ctx.phase != "decode"):
            return ctx.attend(q, k, v, None)
        if ctx.phase == "decode":
            if not self.reindex:
                return Decode.attend(self, ctx, q, k, v)
            return self._moved(ctx, q, k, v, n - 1, n - self.local)
        if not self.reindex:
            return ctx.attend(q, k, v, self._prompt(ctx, q, k))
        outs = []
        for rows, first in self._chunks(ctx, n_q, n):
            part, end = q[:, :, rows], first + rows.stop - rows.start
            if self.fixed >= first:
                outs.append(ctx.attend(part, k[:, :, :end], v[:, :, :end], None))
            else:
                outs.append(self._moved(ctx, part, k[:, :, :end], v[:, :, :end], first, first - self.local))
        return torch.cat(outs, dim=2)

    def _moved(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, first: int, begin: int) -> Tensor:
        """Attention of the last queries over the keys from `begin` on, and sinks and chosen ones moved to stand right before them."""
        assert ctx.rotary is not None
        sinks = torch.arange(self.sinks, device=q.device).expand(q.shape[0], -1)
        far = torch.cat([sinks, self.chosen(ctx, q, k, first)], dim=1)
        places = begin - far.shape[1] + torch.arange(far.shape[1], device=q.device)
        rows = far.unsqueeze(1).expand(-1, k.shape[1], -1)
        keys = turn(pick_rows(k, rows), (places - far).unsqueeze(1), ctx.rotary)
        keys, values = torch.cat([keys, k[:, :, begin:]], dim=2), torch.cat([pick_rows(v, rows), v[:, :, begin:]], dim=2)
        return ctx.attend(q, keys, values, None)

    # -- a prompt ----------------------------------------------------------------------------------------------------------

    def _chunks(self, ctx: LayerContext, n_q: int, n_k: int) -> Iterator[tuple[slice, int]]:
        """Rows of each chunk, and the position of its first one; choices of tokens that were taken back are forgotten."""
        if "choices" in ctx.state:
            ctx.state["choices"].truncate(n_k - n_q)
        for begin in range(0, n_q, self.chunk):
            yield slice(begin, min(begin + self.chunk, n_q)), n_k - n_q + begin

    def _prompt(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Selection:
        """Chunk by chunk: sinks and chosen tokens singly, the local ones and the chunk itself as tiles."""
        batch, n_q, n_k = q.shape[0], q.shape[2], k.shape[2]
        begins, ends, tokens = [], [], []
        sinks = torch.arange(self.sinks, device=q.device).expand(batch, -1)
        for rows, first in self._chunks(ctx, n_q, n_k):
            whole = self.fixed >= first
            begins.append(0 if whole else first - self.local)
            ends.append(first + rows.stop - rows.start)
            listed = torch.full((batch, self.sinks + self.budget), n_k, device=q.device)
            tokens.append(listed if whole else torch.cat([sinks, self.chosen(ctx, q[:, :, rows], k, first)], dim=1))
        local = run_tiles(torch.tensor(begins, device=q.device), torch.tensor(ends, device=q.device), BLOCK, n_k)
        lists = KeyLists(local.expand(batch, 1, -1, -1), torch.stack(tokens, dim=1).unsqueeze(1).to(torch.int32))
        return lists.selection(n_q=n_q, n_k=n_k, block=BLOCK, block_q=self.chunk)
