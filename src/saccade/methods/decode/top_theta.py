"""Top-Theta: thresholds found offline take the place of the search for the best k, and what they drop is repaired.

For row length n every head has a threshold, the mean plus c standard deviations of the k-th highest score seen in calibration:

    theta[head, n] = mean + c * std,      keep = {j : a_j > theta},      rows with n <= k are dense
    before softmax:  w_j = e_j / (sum_keep e + s R),  e_j = exp(a_j - max a),  R an estimate of sum_dropped e   (denominator repair)
    after softmax:   w_j = softmax(a)_j
    out = sum_keep w_j v_j + (1 - sum_keep w_j) * mean(v_0 ... v_row)                                            (value repair)

All logits are computed; what is saved is the search and the value rows, of which a key head loads those that any of its query heads
keeps. The density therefore counts a logit as half a pair and a value row as the other half.

Thresholds are calibrated on dense inputs, every layer at once: the paper's variant that gives later layers the outputs of an exact top-k
is left out. Works on prompts (prefill="top-theta") as well as on single tokens.
Source: top-theta, arXiv 2502.08363.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Calibrated, Decode, Info, LayerContext, Prefill, Selection, register
from saccade.parts.columns import cut, extend
from saccade.parts.compensated import Kept, above, kept_before, nearest_entry
from saccade.parts.lists import hits
from saccade.parts.placed import placed
from saccade.parts.shares import centroid_logits

ROWS = 64  # rows of a prompt whose logits are held at a time
BLOCK = 64  # tokens whose values are summed for good


@register
@dataclass(frozen=True, kw_only=True)
class TopTheta(Decode, Prefill, Calibrated):
    """k: entries that a row should keep. first_k: the same in the first `first_layers` layers. c: standard deviations on the threshold.
    every: one row length in so many is calibrated (10: a tenth of the rows). A row uses the nearest calibrated length.
    scores: threshold the logits ("pre") or the probabilities ("post"). cap: whether rows with more than k survivors keep the last k.
    sdc: denominator repair of "pre": "exact" R; "exp": number dropped times exp(theta - max); "offline": mean exact R of calibration;
        None. sdc_scale: the factor s. vmc: value repair; without "post" or denominator repair there is nothing for it to repair.
    """

    k: int = 64
    first_k: int = 512
    first_layers: int = 2
    c: float = 0.1
    every: int = 10
    scores: Literal["pre", "post"] = "pre"
    sdc: Literal["exact", "exp", "offline"] | None = "exact"
    sdc_scale: float = 1.0
    vmc: bool = True
    cap: bool = False

    info = Info(
        slug="top-theta", phase="decode", needs=frozenset({"calibration"}), opened={"k": 1 << 30, "first_layers": 0},
        tiny={"k": 12, "first_layers": 0},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("first_k", 1), ("first_layers", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"top-theta({name}={value!r}) is not a whole number of at least {least}")
        for name, least in (("c", -math.inf), ("sdc_scale", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= least):
                raise ValueError(f"top-theta({name}={value!r}) is not a finite number{' from 0 on' if least == 0 else ''}")
        if self.scores not in ("pre", "post"):
            raise ValueError(f"top-theta(scores={self.scores!r}) is neither 'pre' nor 'post'")
        if self.sdc not in (None, "exact", "exp", "offline"):
            raise ValueError(f"top-theta(sdc={self.sdc!r}) is not one of None, 'exact', 'exp', 'offline'")
        for name in ("vmc", "cap"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"top-theta({name}={getattr(self, name)!r}) is neither True nor False")

    def kept_in(self, layer: int) -> int:
        """k of a layer."""
        return self.first_k if layer < self.first_layers else self.k

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, float64, by calibrated length every, 2 every, ... (G of them): "rows" `(G,)`; "sum" and "squares" `(Hq, G)`
        of the k-th highest score; "residual" `(Hq, G)`: sum of exp(logit - maximum) below it. Lengths up to k have 0 everywhere."""
        best, (batch, heads, n, _) = self.kept_in(ctx.layer), q.shape
        lengths = torch.arange(self.every, n + 1, self.every, device=q.device)
        found = torch.zeros(3, heads, lengths.shape[0], dtype=torch.float64, device=q.device)
        rows = torch.where(lengths > best, float(batch), 0.0).double()
        chosen = (lengths > best).nonzero().flatten()
        for begin in range(0, chosen.shape[0], ROWS):
            places = chosen[begin : begin + ROWS]
            logits = self._logits(ctx, q[:, :, lengths[places] - 1], k, lengths[places])
            score = logits.topk(best, dim=-1).values[..., -1]
            highest = logits.amax(-1)
            dropped = (logits - highest.unsqueeze(-1)).exp().masked_fill(logits >= score.unsqueeze(-1), 0.0).sum(-1)
            if self.scores == "post":
                score = (score - logits.logsumexp(-1)).exp()
            found[:, :, places] = torch.stack([score.double(), score.double().square(), dropped.double()]).sum(1)
        return {"rows": rows, "sum": found[0], "squares": found[1], "residual": found[2]}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sums:
            return found
        longest = max(sums["rows"].shape[0], found["rows"].shape[0])
        padded = ({name: F.pad(x, (0, longest - x.shape[-1])) for name, x in part.items()} for part in (sums, found))
        return super().combine(*padded)

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """"lengths" `(G,)` int64, those above k; "theta" and "residual" `(Hq, G)` float32."""
        there = sums["rows"] > 0
        rows = sums["rows"][there]
        mean, squares, residual = (sums[name][:, there] / rows for name in ("sum", "squares", "residual"))
        theta = mean + self.c * (squares - mean.square()).clamp(min=0).sqrt()
        return {"lengths": (there.nonzero().flatten() + 1) * self.every, "theta": theta.float(), "residual": residual.float()}

    # -- online ------------------------------------------------------------------------------------------------------------

    def _logits(self, ctx: LayerContext, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        """Logits `(B, Hq, N, n)` of N rows in float32 (float64), -inf from each row's length on."""
        logits = centroid_logits(q.to(torch.promote_types(q.dtype, torch.float32)), k, ctx.scale)
        if ctx.softcap is not None:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        return logits.masked_fill(torch.arange(k.shape[2], device=k.device) >= lengths.unsqueeze(-1), -torch.inf)

    def _keep(self, ctx: LayerContext, logits: Tensor, lengths: Tensor) -> Kept:
        """What rows of these lengths `(N,)` keep of their logits `(B, Hq, N, n)`, and with which weights."""
        best, known = self.kept_in(ctx.layer), placed(ctx.found("lengths"), logits.device)
        short = (lengths <= best).unsqueeze(-1)
        if not known.numel():
            if not bool(short.all()):
                raise ValueError(f"this top-theta plan saw no sequence longer than k={best}: calibrate on longer ones")
            known = known.new_zeros(1)
        places = nearest_entry(known, lengths)
        plan = (placed(ctx.found(name), logits.device, logits.dtype) for name in ("theta", "residual"))
        theta, residual = (F.pad(x, (0, 1))[:, places].unsqueeze(-1) for x in plan)
        cap = best if self.cap else None
        if self.scores == "post":
            weights = logits.softmax(-1)
            mask = above(weights.masked_fill(logits == -torch.inf, -torch.inf), theta, short, cap)
            return Kept(mask, weights * mask)
        mask = above(logits, theta, short, cap)
        return kept_before(logits, mask, residual if self.sdc == "offline" else self.sdc, theta, self.sdc_scale)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What each row keeps, without its weights: for pictures of short prompts, as many bytes as there are logits."""
        n = k.shape[2]
        lengths = torch.arange(n - q.shape[2] + 1, n + 1, device=q.device)
        return Selection.from_token_mask(self._keep(ctx, self._logits(ctx, q, k, lengths), lengths).mask, block_q=1, n_q=q.shape[2])

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        m, n = q.shape[2], k.shape[2]
        if n <= self.kept_in(ctx.layer):
            return ctx.attend(q, k, v, None)
        if m == 1:
            return self._one(ctx, q, k, v)
        exact, first, outs = torch.promote_types(v.dtype, torch.float32), n - m + 1, []
        sums = v.double().cumsum(2)[:, :, n - m :] if self.vmc else None
        for begin in range(0, m, ROWS):
            end = min(begin + ROWS, m)
            lengths = torch.arange(first + begin, first + end, device=q.device)
            seen = n - m + end
            kept = self._keep(ctx, self._logits(ctx, q[:, :, begin:end], k[:, :, :seen], lengths), lengths)
            grouped = ctx.layout.to_groups(kept.weights.to(exact)).flatten(2, 3)
            out = (grouped @ v[:, :, :seen].to(exact)).unflatten(2, (-1, end - begin))
            if sums is not None:
                mean = sums[:, :, begin:end] / lengths.unsqueeze(-1)
                out = _with_mean(out, ctx.layout.to_groups(kept.weights), mean.unsqueeze(2))
            ctx.count(0.5 * (float(lengths.sum()) + float(kept.mask.sum(dtype=torch.float64)) / (q.shape[0] * q.shape[1])))
            outs.append(out.flatten(1, 2))
        return torch.cat(outs, dim=2).to(q.dtype)

    def _one(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query: the value rows that a group keeps are loaded once, no others."""
        n, lengths = k.shape[2], torch.tensor([k.shape[2]], device=q.device)
        kept = self._keep(ctx, self._logits(ctx, q, k, lengths), lengths)
        if ctx.phase == "decode":
            tokens = hits(kept.mask)
            counts = kept.mask.sum(-1, dtype=torch.int32)
            none = torch.zeros_like(counts)
            ctx.publish(Selection(
                n_q=1, n_k=n, block_q=1, block_k=1, starts=tokens[..., :0], start_counts=none, tokens=tokens, token_counts=counts
            ))  # fmt: skip
        weights = ctx.layout.to_groups(kept.weights.squeeze(2))
        union = ctx.layout.to_groups(kept.mask.squeeze(2)).any(2)
        ids = hits(union)
        ctx.count(0.5 * (n + float(union.sum(-1).double().mean())))
        there, ids = (ids < n).unsqueeze(2), ids.clamp(max=n - 1).long()
        rows = v.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])).to(weights.dtype)
        out = weights.gather(-1, ids.unsqueeze(2).expand(-1, -1, weights.shape[2], -1)).masked_fill(~there, 0.0) @ rows
        if self.vmc:
            out = _with_mean(out, weights, self._value_mean(ctx, v).unsqueeze(2))
        return out.flatten(1, 2).unsqueeze(2).to(q.dtype)

    def _value_mean(self, ctx: LayerContext, v: Tensor) -> Tensor:
        """Mean of all values `(B, Hk, Dv)` float64: sums over whole blocks are kept, only what came after them is read."""
        sums = ctx.state.get("value_sums")
        done, whole = 0 if sums is None else sums.n, v.shape[2] // BLOCK
        if whole > done:
            new = v[:, :, done * BLOCK : whole * BLOCK].double().unflatten(2, (-1, BLOCK)).sum(3).cumsum(2)
            extend(ctx.state, value_sums=new if sums is None else new + sums.view[:, :, -1:])
        rest = v[:, :, whole * BLOCK :].double().sum(2)
        return (rest + ctx.state["value_sums"].view[:, :, whole - 1] if whole else rest) / v.shape[2]

    def rewind(self, ctx: LayerContext, n: int) -> int:
        cut(ctx.state, n // BLOCK, "value_sums")
        return n


def _with_mean(out: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """out `(..., Dv)` plus what the weights `(..., n)` lack of 1, times the mean value."""
    return out + ((1 - weights.double().sum(-1, keepdim=True)) * mean).to(out.dtype)
