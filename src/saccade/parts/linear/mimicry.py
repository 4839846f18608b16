"""Teaching feature maps to imitate softmax: the weights they give, and how far those are from softmax's."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.linear.both_ways import fold, unfold


def linear_weights(phi_q: Tensor, phi_k: Tensor, *, causal: bool = True) -> Tensor:
    """The N x N weights of linear attention, rows summing to 1: `(B, H, N, N)` of phi_q `(B, H, N, F)`, phi_k `(B, Hk, N, F)`."""
    scores = unfold(fold(phi_q, phi_k.shape[1]) @ phi_k.mT, phi_q.shape[2])
    scores = scores.tril() if causal else scores
    return scores / scores.sum(-1, keepdim=True)


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """The N x N weights of softmax attention `(B, H, N, N)`; scale: default `D ** -0.5`."""
    logits = unfold(fold(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.shape[1]) @ k.mT, q.shape[2])
    if causal:
        logits = logits.masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return logits.softmax(-1)


def mimicry_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Cross entropy `-sum_j p_ij log a_ij`, the mean over rows, batch and heads (hedgehog): teacher p and student a `(B, H, N, N)`.

    Its smallest value is the mean entropy of the teacher's rows.
    """
    # a weight that both give as 0 adds nothing
    return -(teacher * student.clamp(min=torch.finfo(student.dtype).tiny).log()).sum(-1).mean()
