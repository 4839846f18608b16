"""decode_beside: the newest tokens of a cache, whose number only the device knows, on top of attention over all others."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial, merge
from saccade.ops.gpu import require_triton, runs_on

IMPLEMENTATIONS = ("auto", "torch", "triton")


def decode_beside(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor, others: Partial | None = None, *,
    scale: float | None = None, softcap: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention of q `(B, Hq, 1, D)` over a token's own key and value, those written before it, and what `others` has read.

    k, v `(B, Hk, 1, D and Dv)` are written to keys `(B, Hk, W, D)` and values `(B, Hk, W, Dv)`, in place, at `place`, an int64 tensor
    `(1,)` on the device from 0 to W - 1; entries 0 ... place are read. others: attention over all other entries, with its log-sum-exp.
    scale: default D ** -0.5. softcap as in `attend`. impl: "triton" does all of it in one kernel, "torch" in several.
    Returns `(B, Hq, 1, Dv)`. Nothing waits for the device, and nothing depends on `place` but what the device does, so the call can be
    recorded as a CUDA graph and repeated with other places. Raises ValueError on shapes, dtypes or devices that don't fit.
    """
    _check(q, k, v, keys, values, place, others)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if impl == "triton":
        require_triton("decode_beside", q)
    if impl == "triton" or (impl == "auto" and runs_on(q) and q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= 256):
        from saccade.ops.decode.triton.beside import beside

        return beside(q, k, v, keys, values, place, others, factor, softcap or 0.0)
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    near = _read(q, keys, values, place, factor, softcap)
    return near.out if others is None else merge(others, near).out


def _read(q: Tensor, keys: Tensor, values: Tensor, place: Tensor, scale: float, softcap: float | None) -> Partial:
    batch, heads, _, dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.to(wide).view(batch, keys.shape[1], -1, dim)
    logits = groups @ keys.to(wide).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    there = torch.arange(keys.shape[2], device=q.device) <= place
    logits = logits.masked_fill(~there, -torch.inf)
    # what was never written may be anything
    out = torch.softmax(logits, -1) @ values.to(wide).masked_fill(~there.unsqueeze(-1), 0.0)
    return Partial(out.view(batch, heads, 1, -1).to(q.dtype), torch.logsumexp(logits, -1).view(batch, heads, 1))


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor, others: Partial | None) -> None:
    if q.ndim != 4 or q.shape[2] != 1 or keys.ndim != 4 or q.shape[1] % max(keys.shape[1], 1):
        raise ValueError(f"decode_beside: q is {tuple(q.shape)} and keys {tuple(keys.shape)}: give (B, Hq, 1, D) and (B, Hk, W, D)")
    batch, heads, size, dim = keys.shape
    if q.shape[0] != batch or q.shape[3] != dim or values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"decode_beside: q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} don't fit")
    if k.shape != (batch, heads, 1, dim) or v.shape != (batch, heads, 1, values.shape[3]):
        raise ValueError(f"decode_beside: k {tuple(k.shape)} and v {tuple(v.shape)} are not one token of keys and values")
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1 or len({x.device for x in (q, k, v, keys, values, place)}) > 1:
        raise ValueError("decode_beside: q, k, v, keys and values have different dtypes, or are on different devices with place")
    if place.shape != (1,) or place.dtype != torch.int64:
        raise ValueError(f"decode_beside: place is {place.dtype} {tuple(place.shape)}: give one int64 number from 0 to {size - 1}")
    if others is not None and (others.lse is None or others.out.shape != (*q.shape[:3], values.shape[3])):
        raise ValueError("decode_beside: others needs the outputs of the same queries with their log-sum-exp")
