"""Cottention: cosine similarity in the place of softmax, with a learned power of the length in the place of its denominator.

    qh = q / |q|,   kh = k / |k|,   c_h = sigmoid(m_h),  m = 0.5 at first
    on="values":  S_t = S_{t-1} + kh_t (v_t / t^c)^T,   o_t = S_t^T qh_t          (the released code; t counts from 1)
    on="output":  S_t = S_{t-1} + kh_t v_t^T,           o_t = S_t^T qh_t / t^c    (the formula)

Weights lie in [-1, 1] and are not normalised; the state is D x Dv per head, in float32. With `bidirectional=True` t is the number of real
tokens for all.

Source: cottention, arXiv 2409.18747.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.counts import tokens_read
from saccade.parts.linear.normalise import LengthPower


@register
@dataclass(frozen=True, kw_only=True)
class Cottention(TwoWayMixer):
    """on: what is divided by the power of the length, "values" or "output"; both ways they are the same. rotary: turn q and k by their
    positions, which leaves their lengths alone."""

    on: Literal["values", "output"] = "values"
    rotary: bool = False

    info = Info(
        slug="cottention", phase="mixer", needs=frozenset({"training"}),
        variants=({"on": "output", "rotary": True}, {"bidirectional": True}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in ("values", "output"):
            raise ValueError(f"on={self.on!r} is not 'values' or 'output'")

    def build(self, shape: MixerShape) -> TokenMixer:
        # values are divided before they are written, with one power for all that share them
        power = (WholeLengthPower if self.bidirectional else LengthPower)(shape.kv_heads if self.on == "values" else shape.heads, self.on)
        return BothWays(
            shape, bidirectional=self.bidirectional, q_map="unit", k_map="unit", normaliser=power, rotary="before" if self.rotary else None
        )


class WholeLengthPower(LengthPower):
    """The same with the number of all real tokens in each place."""

    def _divided(self, x: Tensor, call: Call) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        n = tokens_read(call, x.shape[2], bidirectional=True).to(wide)
        power = torch.exp(-self.m.to(wide).sigmoid()[:, None] * n.log()[:, None])
        return (x.to(wide) * power.unsqueeze(-1)).to(x.dtype)
