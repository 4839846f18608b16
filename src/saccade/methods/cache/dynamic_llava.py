"""Dynamic-LLaVA: after an early layer, small predictors drop most image tokens and decide which tokens deeper layers store.

At layer l the hidden states X of a call's tokens are judged once, for all layers from l on:

    prompt, images    the top r_v n_img by keep score of the image predictor stay
    prompt, text      stays where keep > drop of the instruction predictor; the newest token always
    each new token    attends to what is stored and to itself; its key and value are stored where keep > drop of the output predictor

A dropped token is seen by no later query in these layers; layers before l keep everything. Predictors are trained with a Gumbel softmax
(`saccade.train.token_predictors`), a rate of 1 keeps all and asks none. Without images, all tokens of a prompt's call but the last `text`
are judged as images are.

What attention alone can't do: in the paper dropped tokens leave the hidden states too, so that a prompt costs less in every part of the
layers from l on; here they go on through them, reading what is kept and themselves, as they do in training. X is what goes into layer l's
attention, after its norm. Decoding without a cache is not served by the rule above: all tokens then count as a prompt.
Source: dynamic-llava, arXiv 2412.00876.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import CachePolicy, Decode, Info, LayerContext, Prefill, Selection, StoredKV, merge, register
from saccade.parts.own_key import own_key
from saccade.parts.ragged import slots_of
from saccade.parts.rows import pick_rows
from saccade.parts.token_predictor import TokenPredictor

# in the sequence's state: which tokens deeper layers keep `(B, tokens)`; which new ones are images `(B, m)`; up to which token a layer
# has dropped what goes
FLAGS, IMAGES, BASE = "dynamic-llava flags", "dynamic-llava images", "dynamic-llava base"


@register
@dataclass(frozen=True, kw_only=True)
class DynamicLlava(Prefill, Decode, CachePolicy):
    """layer: l, from which on tokens are dropped, at least 1. vision: r_v, share of the image tokens that stays.
    instruction, output: below 1 their predictors are asked; their values are what training aims at.
    text: without images, how many of the newest tokens of a prompt's call are text. heads: of the image predictor's blocks.
    """

    layer: int = 2
    vision: float = 0.2
    instruction: float = 0.7
    output: float = 0.5
    text: int = 32
    heads: int = 8

    info = Info(
        slug="dynamic-llava", phase="cache", also=frozenset({"prefill", "decode"}),
        needs=frozenset({"hidden", "calibration", "training"}), frees_memory=True, append_only=False, ragged=True,
        opened={"vision": 1.0, "instruction": 1.0, "output": 1.0}, tiny={"layer": 1, "vision": 0.3, "text": 8, "heads": 2},
        opts_out={
            "chunked": "images of a call are judged together and a share of them is kept, so a part of a prompt is judged as a whole one",
            "stepwise": "images of a call are judged together; tokens that come one by one are judged as generated text",
            "future": "the image predictor sees all images of a prompt, those after a token too",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("layer", "text", "heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"dynamic-llava({name}={value!r}) is not a whole number of at least 1")
        for name in ("vision", "instruction", "output"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"dynamic-llava({name}={value!r}) is not a rate above 0 and at most 1")

    # -- decisions ---------------------------------------------------------------------------------------------------------

    def _flags(self, ctx: LayerContext, q: Tensor) -> Tensor:
        """Which tokens up to ctx.seen deeper layers keep, bool `(B, tokens)`; the first layer from l on decides on the newest m."""
        if FLAGS not in ctx.shared:
            m = q.shape[2]
            if ctx.hidden is None:
                raise ValueError("dynamic-llava reads the inputs of a model's layers: use it with saccade.attach")
            end = ctx.hidden.shape[1] - (ctx.tokens - ctx.seen)
            hidden = ctx.hidden[:, end - m : end]
            known = ctx.sequence.get(FLAGS, torch.ones(q.shape[0], 0, dtype=torch.bool, device=q.device))[:, : ctx.seen - m]
            known = F.pad(known, (0, ctx.seen - m - known.shape[1]), value=True)
            new = self._judge_text(ctx, hidden, "output") if ctx.phase == "decode" else self._judge_prompt(ctx, hidden)
            ctx.shared[FLAGS] = ctx.sequence[FLAGS] = torch.cat([known, new], 1)
        return ctx.shared[FLAGS]

    def _judge_prompt(self, ctx: LayerContext, hidden: Tensor) -> Tensor:
        """Decisions on a prompt's tokens `(B, m, C)`, bool `(B, m)`."""
        batch, m = hidden.shape[:2]
        images = ctx.sequence.get(IMAGES)
        if images is None or images.shape[1] != m:
            images = (torch.arange(m, device=hidden.device) < m - self.text).expand(batch, m)
        keep = self._judge_text(ctx, hidden, "instruction") | images
        if self.vision < 1:
            predictor = self._predictor(ctx, "image", hidden.device)
            for row in range(batch):
                places = images[row].nonzero().flatten()
                if not places.numel():
                    continue
                scores = predictor(hidden[row : row + 1, places])[0, :, 0]
                count = math.ceil(round(self.vision * places.numel(), 9))
                keep[row, places[torch.sort(scores, descending=True, stable=True).indices[count:]]] = False
        keep[:, -1] = True
        return keep

    def _judge_text(self, ctx: LayerContext, hidden: Tensor, kind: str) -> Tensor:
        if getattr(self, kind) == 1:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        found = self._predictor(ctx, kind, hidden.device)(hidden)
        return found[..., 0] > found[..., 1]

    def _predictor(self, ctx: LayerContext, kind: str, device: torch.device) -> TokenPredictor:
        plan = ctx.plan
        if plan is None:
            raise ValueError("dynamic-llava has no plan: train its predictors (saccade.train.token_predictors) and pass plan=")
        return TokenPredictor.read(lambda name: plan.tensor(self.layer, name).to(device), kind, self.heads)

    # -- attention ---------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What is read beside each query's own key."""
        kept = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool, device=q.device) if ctx.layer < self.layer else self._kept(ctx, q, k)
        return Selection.from_token_mask(kept[:, None, None].expand(-1, -1, q.shape[2], -1), block_q=1, n_q=q.shape[2])

    def _kept(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        """Which entries `(B, n)` are read: of tokens since the last drop by their flags, all older ones."""
        base = min(ctx.sequence.get(f"{BASE} {ctx.layer}", 0), ctx.seen)
        flags = self._flags(ctx, q)[:, base : ctx.seen][:, -k.shape[2] :]
        return F.pad(flags, (k.shape[2] - flags.shape[1], 0), value=True)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = k.shape[2], q.shape[2]
        stored = [segment.attend(q, scale=ctx.scale, softcap=ctx.softcap) for segment in ctx.segments]
        ctx.count(sum(float(m * segment.length) for segment in ctx.segments))
        kept = None if ctx.layer < self.layer else self._kept(ctx, q, k)
        if kept is None or bool((kept if m > 1 else kept[:, :-1]).all()):
            return merge(*stored, ctx.partial(q, k, v, None)).out if stored else ctx.attend(q, k, v, None)
        slots, counts = slots_of(kept[:, None].expand(-1, k.shape[1], -1))
        past = torch.arange(slots.shape[-1], device=slots.device) >= counts.unsqueeze(-1)
        rows = torch.arange(n - m, n, device=q.device)
        read = ctx.partial(
            q, pick_rows(k, slots), pick_rows(v, slots), None, q_positions=rows[None, None], k_positions=slots.masked_fill(past, n)
        )
        return merge(*stored, read, own_key(ctx, q, k[:, :, n - m :], v[:, :, n - m :], ~kept[:, n - m :])).out

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        """Layers before l tell which of the new tokens are images."""
        if ctx.layer < self.layer:
            marks = kv.side.get("vision")
            ctx.sequence.pop(IMAGES, None)
            if marks is not None:
                ctx.sequence[IMAGES] = marks[:, 0, marks.shape[2] - q.shape[2] :].bool()

    def _pending(self, ctx: LayerContext) -> Tensor | None:
        """Flags `(B, t)` of the tokens since this layer last dropped some; None where all stay."""
        flags = None if ctx.layer < self.layer else ctx.sequence.get(FLAGS)
        if flags is None:
            return None
        base = min(ctx.sequence.get(f"{BASE} {ctx.layer}", 0), ctx.seen)
        flags = F.pad(flags[:, base : ctx.seen], (0, max(0, ctx.seen - max(base, flags.shape[1]))), value=True)
        return None if bool(flags.all()) else flags

    def due(self, ctx: LayerContext, length: int) -> bool:
        return self._pending(ctx) is not None

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        flags = self._pending(ctx)
        if ctx.layer >= self.layer:
            ctx.sequence[f"{BASE} {ctx.layer}"] = ctx.seen
        if flags is None or not kv.length:
            return
        # flags are of the newest entries, older ones were kept before; gaps stand at a head's end
        held = torch.full((*kv.side["positions"].shape[:2], 1), kv.length) if kv.valid is None else kv.valid.sum(-1, keepdim=True)
        place = torch.arange(kv.length, device=flags.device) - (held.to(flags.device) - flags.shape[1])
        own = flags[:, None].expand(*place.shape[:2], -1).gather(-1, place.clamp(0, flags.shape[1] - 1))
        stay = (place < 0) | own
        kv.keep(*slots_of(stay if kv.valid is None else stay & kv.valid))
