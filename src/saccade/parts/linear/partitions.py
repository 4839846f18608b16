"""A state in several partitions, of which every token writes to and reads from a few (sse).

    for i among the partitions of token t:   S^i_t = update(S^i_{t-1}; k_t, e_ti v_t),     o_t = sum_i e_ti (S^i_t)^T q_t
    all others stay as they are, to the bit

Two forms. masked: every partition runs over all tokens, with what it does not take set to no write and no decay. gathered: tokens are
sorted by partition and run as packed sequences, so that the work does not grow with the number of partitions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.scan import scan


def chosen(share: Tensor, top: int) -> Tensor:
    """`(B, N, top)` int64: the partitions with the largest shares `(B, N, P)`, the first ones where equal, in ascending order."""
    return share.sort(dim=-1, descending=True, stable=True).indices[..., :top].sort(dim=-1).values


def masked(
    q: Tensor, k: Tensor, v: Tensor, share: Tensor, picked: Tensor, held: Tensor | None, *, recur: Any = scan, log_decay: Tensor | None,
    beta: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out `(B, H, N, Dv)`, states `(B, P, H, D, Dv)`) of q `(B, H, N, D)`, k, v `(B, Hk, N, .)`, share e `(B, N, P)`, picked `(B, N, K)`.

    log_decay `(B, H, N)` or `(B, H, N, D)`, beta `(B, H, N)` or None; recur and options: the scan, or what stands in for it.
    """
    parts = share.shape[-1]
    taken = torch.zeros_like(share).scatter(-1, picked, 1.0)
    weight = (share * taken).transpose(1, 2)[:, :, None, :, None]  # (B, P, 1, N, 1)
    open_ = taken.transpose(1, 2).unsqueeze(2)

    def spread(x: Tensor, factor: Tensor) -> Tensor:
        return (x.unsqueeze(1) * factor.to(x.dtype)).flatten(1, 2)

    decay = log_decay
    if log_decay is not None:
        decay = spread(log_decay, open_ if log_decay.ndim == 3 else open_.unsqueeze(-1))
    before = None if held is None else held.flatten(1, 2)
    out, states = recur(
        spread(q, weight), spread(k, open_.unsqueeze(-1)), spread(v, weight), log_decay=decay,
        beta=None if beta is None else spread(beta, open_), initial_state=before, **options,
    )  # fmt: skip
    return out.unflatten(1, (parts, -1)).sum(1), None if states is None else states.unflatten(1, (parts, -1))


def gathered(
    q: Tensor, k: Tensor, v: Tensor, share: Tensor, picked: Tensor, held: Tensor | None, *, log_decay: Tensor | None, beta: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same as `masked`, by one packed sequence for each row and partition."""
    b, n, parts = share.shape
    top = picked.shape[-1]
    # every (row, token, choice) by its sequence; a stable sort keeps the tokens of each in order
    sequence = (torch.arange(b, device=q.device)[:, None, None] * parts + picked).flatten()
    order = sequence.sort(stable=True).indices
    ends = torch.zeros(b * parts + 1, dtype=torch.int64, device=q.device)
    ends[1:] = torch.bincount(sequence, minlength=b * parts).cumsum(0)
    token = order // top  # among the B * N tokens
    weight = share.gather(-1, picked).flatten()[order]

    def packed(x: Tensor) -> Tensor:
        """`(B, H, N, ...)` as `(1, H, B * N * K, ...)`."""
        return x.transpose(0, 1).flatten(1, 2)[:, token].unsqueeze(0)

    out, states = scan(
        packed(q), packed(k), packed(v) * weight[None, None, :, None].to(v.dtype),
        log_decay=None if log_decay is None else packed(log_decay), beta=None if beta is None else packed(beta),
        initial_state=None if held is None else held.flatten(0, 1), cu_seqlens=ends, **options,
    )  # fmt: skip
    assert isinstance(states, Tensor)
    wide = torch.promote_types(out.dtype, torch.float32)
    total = out.new_zeros(out.shape[1], b * n, out.shape[-1], dtype=wide)
    total = total.index_add(1, token, out[0].to(wide) * weight[None, :, None].to(wide))
    return total.to(q.dtype).unflatten(1, (b, n)).transpose(0, 1), states.unflatten(0, (b, parts))
