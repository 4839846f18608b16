"""Latte: attention through a few latents, p(s | t) = sum_l p(l | t) p(s | l), both factors normalised by softmax.

    p(l | t) = softmax over a head's latents of W_q x_t
    p(s | l, t) = exp(K_sl) / sum_{r<=t} exp(K_rl),   K = W_k x
    o_t = sum_l p(l | t) sum_{s<=t} p(s | l, t) v_s

Causal, it is a scan with a gate per latent: keys exp(K_t - z_t) and log gates z_{t-1} - z_t, z the running log-sum-exp of K, which no
size of K overflows. The state is one vector of the values' width for each latent. With `bidirectional=True` the second softmax is over all
tokens: efficient attention. Latents have no positions to turn.

Source: latte, arXiv 2402.17512.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from saccade.core import Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import TwoWayMixer
from saccade.parts.linear.dropout import FeatureDropout
from saccade.parts.linear.features import Chain, Pointwise, feature_map
from saccade.parts.linear.two_softmaxes import two_softmaxes


@register
@dataclass(frozen=True, kw_only=True)
class Latte(TwoWayMixer):
    """latents: of all heads together, the paper takes 128 to 512. dropout: on p(l | t), in training. scaled: multiply the logits of both
    softmaxes by head_dim^-1/2, as the paper's variant without a running maximum does."""

    latents: int = 128
    dropout: float = 0.0
    scaled: bool = False

    info = Info(
        slug="latte", phase="mixer", needs=frozenset({"training"}), tiny={"latents": 24},
        variants=({"latents": 8, "scaled": True}, {"latents": 24, "bidirectional": True}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"latents={self.latents}, dropout={self.dropout}: give at least 1 latent and a probability from 0 to below 1")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.latents % shape.heads:
            raise ValueError(f"{self.latents} latents can't be split among {shape.heads} heads: make latents a multiple of heads")
        scale = Pointwise(partial(torch.mul, other=shape.head_dim**-0.5 if self.scaled else 1.0))
        return two_softmaxes(
            shape, bidirectional=self.bidirectional, key_dim=self.latents // shape.heads, k_map=scale,
            q_map=Chain(scale, feature_map("softmax"), FeatureDropout(self.dropout)),
        )  # fmt: skip
