"""Logits from the high bits first: the low bits are fetched only for rows whose softmax is flat.

    code_x = round(x / s),  s = max |x| / (2^(msb + lsb - 1) - 1)             for each query and each key, msb + lsb bits
    high_x = (floor(code_x / 2^lsb) + 1/2) 2^lsb s                            what the msb high bits stand for: the middle of their range
    logits = high_q.high_k,     and  code_q.code_k s_q s_k  where  max softmax(logits) < threshold

Errors of the logits cancel in a peaked softmax and show in a flat one. Source: spatten, arXiv 2012.09852, section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def split_bits(x: Tensor, msb: int, lsb: int) -> tuple[Tensor, Tensor]:
    """What the high bits alone and all bits stand for, of x `(..., D)`, quantised by last axis, in the dtype of x."""
    most = 2 ** (msb + lsb - 1) - 1
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / most
    codes = (x / step).round()
    high = (torch.floor(codes / 2**lsb) + 0.5) * 2**lsb if lsb else codes
    return high * step, codes * step


def progressive_logits(
    q: Tensor, k: Tensor, msb: int, lsb: int, threshold: float, finish: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Finished logits `(h, N, n)` of q `(h, N, D)` over k `(n, D)`, and which rows needed all bits, bool `(h, N)`.

    finish: scales, caps and masks the products `(h, N, n)`.
    """
    (q_high, q_all), (k_high, k_all) = split_bits(q, msb, lsb), split_bits(k, msb, lsb)
    logits = finish(q_high @ k_high.mT)
    flat = logits.softmax(-1).amax(-1) < threshold
    if bool(flat.any()):
        full = finish(q_all @ k_all.mT)
        logits = torch.where(flat.unsqueeze(-1), full, logits)
    return logits, flat
