"""Normalisers: what stands in the place of softmax's denominator.

A normaliser may change the values before they are written (`before`), tell the scan to divide by the sum of the scores (`total`), and
change what was read (`after`).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call


class Normaliser(nn.Module):
    """The identity: nothing is normalised."""

    total: Literal["sum"] | None = None

    def before(self, v: Tensor, call: Call) -> Tensor:
        """Values `(B, H, N, Dv)` as they are written."""
        return v

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        """What was read, `(B, H, N, Dv')`, as `(B, H, N, Dv)`. level: of a gate that stabilises itself, else None."""
        return out


class RowSum(Normaliser):
    """Every row of weights sums to 1: divided by `phi(q) . sum_j phi(k_j)`."""

    total = "sum"


class OutputNorm(Normaliser):
    """RMS norm of what was read. over: "head" (each head alone, one weight per channel of a head) or "all" (the heads together).

    weight: whether the norm has learned weights; without them it is the simple RMS norm (SRMSNorm).
    """

    def __init__(self, heads: int, value_dim: int, over: Literal["head", "all"] = "head", weight: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        if over not in ("head", "all"):
            raise ValueError(f"an output norm over {over!r} is not known: use 'head' or 'all'")
        self.over, self.eps = over, eps
        shape = (value_dim,) if over == "head" else (heads, 1, value_dim)
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        if self.over == "head":
            fits = self.weight is not None and self.weight.dtype == out.dtype
            normed = F.rms_norm(out, out.shape[-1:], self.weight if fits else None, self.eps)
            # weights of more digits than the activations keep them
            return normed if fits or self.weight is None else normed * self.weight
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        mean = wide.square().mean((1, 3), keepdim=True)
        normed = (wide * (mean + self.eps).rsqrt()).to(out.dtype)
        return normed if self.weight is None else normed * self.weight


class LengthPower(Normaliser):
    """Divided by n^c, n the number of tokens, c = sigmoid(m) learned per head, m = 0.5 at first (cottention).

    on: "values" divides the value of the n-th token as it is written (the reference code), "output" what the n-th query reads (the
    formula).
    """

    def __init__(self, heads: int, on: Literal["values", "output"] = "values") -> None:
        super().__init__()
        if on not in ("values", "output"):
            raise ValueError(f"a length power on {on!r} is not known: use 'values' or 'output'")
        self.on = on
        self.m = nn.Parameter(torch.full((heads,), 0.5))

    def _divided(self, x: Tensor, call: Call) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        n = call.start[:, None] + torch.arange(1, x.shape[2] + 1, device=x.device)
        power = torch.exp(-self.m.to(wide).sigmoid()[:, None] * n.to(wide).log()[:, None])
        return (x.to(wide) * power.unsqueeze(-1)).to(x.dtype)

    def before(self, v: Tensor, call: Call) -> Tensor:
        return self._divided(v, call) if self.on == "values" else v

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        return self._divided(out, call) if self.on == "output" else out


class MaxStabilised(Normaliser):
    """Divided by `max(|q . n|, exp(-m))`: the sum of the scores with its sign dropped, and a floor of 1 in the units before the gate's
    running maximum m was taken off (mLSTM, blalm). Needs `StabilisedGate`."""

    def before(self, v: Tensor, call: Call) -> Tensor:
        return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        if level is None:
            raise ValueError("a max-stabilised normaliser needs a gate with a running maximum: use StabilisedGate")
        wide = torch.promote_types(out.dtype, torch.float32)
        read, total = out[..., :-1].to(wide), out[..., -1:].to(wide)
        return (read / torch.maximum(total.abs(), (-level).exp().unsqueeze(-1))).to(out.dtype)


class Together(Normaliser):
    """Several, one after another; at most one of them may divide by the sum."""

    def __init__(self, *parts: Normaliser) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.total = "sum" if any(part.total for part in parts) else None

    def before(self, v: Tensor, call: Call) -> Tensor:
        for part in self.parts:
            v = cast(Normaliser, part).before(v, call)
        return v

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        for part in self.parts:
            out = cast(Normaliser, part).after(out, call, level)
        return out
