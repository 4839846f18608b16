"""decode_low_rank: attention over keys that are kept as factors times a basis.

    k_j = R_(p_j) (a_j B),   l_ij = scale * q_i.k_j

a_j, R numbers for a token, may serve all heads at once; B holds R x D numbers for each head; R_p turns pairs of channels by the angles of
position p. Without rotation, q.(a B) = (q B^T).a: the query is projected and the factors are the keys. With it the basis can't move to the
query's side (cskv, 2409.10593; shadowkv, 2410.21465, keep keys so): keys are rebuilt a tile at a time and never stored. Keys projected
after their rotation (matryoshkakv, 2410.14731; loki) need none here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saccade.core import Partial, Rotary, Selection, merge, rotate
from saccade.ops.attend.tile import attend_tile
from saccade.ops.decode.check import check_selection
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note

CHUNK = 2048  # keys that the plain torch path rebuilds at a time
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")

__all__ = ["decode_low_rank"]


class Turns(NamedTuple):
    """How keys turn. positions `(B or 1, Hk or 1, n)` with inv_freq float32 `(pairs,)`, or cos and sin `(B or 1, Hk or 1, n, pairs)`."""

    pairs: int
    interleaved: bool
    positions: Tensor | None = None
    inv_freq: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankKeys:
    """factors `(B, Hk or 1, n, R)`, basis `(Hk or 1, R, D)`, turns or None."""

    factors: Tensor
    basis: Tensor
    turns: Turns | None

    def rebuild(self, rows: slice | Tensor, heads: Tensor, exact: torch.dtype) -> Tensor:
        """Keys in `exact`. rows: a slice, the same for all of `heads (H,)`: `(B, H, l, D)`; or ids `(B, H, l)` for each head."""

        def pick(x: Tensor) -> Tensor:
            """Entries of x `(B or 1, Hk or 1, n, ...)`."""
            x = x[:, heads] if x.shape[1] > 1 else x
            if isinstance(rows, slice):
                return x[:, :, rows]
            batch, count = (torch.arange(n, device=x.device) % m for n, m in zip(rows.shape[:2], x.shape[:2], strict=True))
            return x[batch[:, None, None], count[:, None], rows]

        basis = self.basis[heads] if self.basis.shape[0] > 1 else self.basis
        keys = pick(self.factors).to(exact) @ basis.to(exact)
        if self.turns is None:
            return keys
        t = self.turns
        if t.positions is not None and t.inv_freq is not None:
            angles = pick(t.positions).to(exact).unsqueeze(-1) * t.inv_freq.to(exact)
            cos, sin = angles.cos(), angles.sin()
        else:
            assert t.cos is not None and t.sin is not None
            cos, sin = pick(t.cos).to(exact), pick(t.sin).to(exact)
        return rotate(keys, cos, sin, interleaved=t.interleaved)


def decode_low_rank(
    q: Tensor,
    factors: Tensor,
    basis: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    selection: Selection | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> Partial:
    """Attention of q `(B, Hq, m, D)`, m <= 16 and turned already, over keys `factors @ basis`.

    factors `(B, Hk or 1, n, R)`, basis `(Hk or 1, R, D)`, v `(B, Hk, n, Dv)`; a head count of 1 serves all heads.
    rotary: a Rotary with `positions`, int `(n,)`, `(B or 1, n)` or `(B or 1, Hk or 1, n)`, default 0 ... n - 1: angles are worked out in
    float32 (float64 for float64 q); or tables (cos, sin), each `(n, pairs)`, `(B or 1, n, pairs)` or `(B or 1, Hk or 1, n, pairs)`, whose
    pairs are channels i and i + pairs. None: keys stay unturned.
    selection: as in `decode`. Without one every query sees all keys. scale: default D ** -0.5. softcap, return_lse as in `decode`.
    impl: "triton" on CUDA tensors (no gradients or float64; with rotary R and D <= 256 and at most 32768 basis entries a head, 16384 in
    float32), "cpu": plain torch on any device, CHUNK keys at a time, "reference": all keys rebuilt in float32 (float64 for float64 q).
    Returns Partial as `decode` does. Raises ValueError or TypeError on inputs that don't fit.
    """
    _check(q, factors, basis, v, selection, softcap, impl)
    keys = LowRankKeys(factors=factors, basis=basis, turns=_turns(q, factors, v.shape[1], rotary, positions))
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if keys.turns is None and impl != "reference":
        from saccade.ops.decode import decode

        return decode(
            _projected(q, basis, v.shape[1]), factors.expand(-1, v.shape[1], -1, -1), v, selection, scale=factor, softcap=softcap,
            return_lse=return_lse, impl=impl,
        )  # fmt: skip
    if _on_gpu(impl, q, keys, v):
        from saccade.ops.decode.triton import low_rank as kernels

        out, lse = kernels.attend(q, keys, v, selection, factor, softcap, return_lse)
        result, ran = Partial(out, lse), "triton"
    else:
        ran = "reference" if impl == "reference" else "cpu"
        chunk = max(factors.shape[2], 1) if ran == "reference" else CHUNK
        result = _in_torch(q, keys, v, selection, factor, softcap, chunk)
    if not torch.compiler.is_compiling():
        note(LastRun(
            op="decode", impl=ran, n_q=q.shape[2], n_k=factors.shape[2], heads=q.shape[1], device=str(q.device),
            dtype=str(q.dtype).removeprefix("torch."), selection=selection,
        ))  # fmt: skip
    return result if return_lse else Partial(result.out, None)


def _projected(q: Tensor, basis: Tensor, kv_heads: int) -> Tensor:
    """q B^T `(B, Hq, m, R)`, summed in float32 at least."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(exact).unflatten(1, (kv_heads, -1))
    return (grouped @ basis.to(exact).mT.unsqueeze(1)).flatten(1, 2).to(q.dtype)


def _in_torch(
    q: Tensor, keys: LowRankKeys, v: Tensor, selection: Selection | None, scale: float, softcap: float | None, chunk: int
) -> Partial:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, m, _ = q.shape
    kv_heads, n = v.shape[1], v.shape[2]
    if selection is None:
        rows, parts = q.to(exact).unflatten(1, (kv_heads, -1)).flatten(2, 3), []
        every = torch.arange(kv_heads, device=q.device)
        for begin in range(0, n, chunk):
            k = keys.rebuild(slice(begin, begin + chunk), every, exact)
            parts.append(_tile(rows, k, v[:, :, begin : begin + chunk].to(exact), None, None, scale, softcap))
        return _joined(parts, q, v)
    # lists of a key/value head serve the rows of its whole group
    lists = kv_heads if kv_heads % selection.heads == 0 else heads
    s = selection.own_lists().expand(batch, lists)
    kv = torch.arange(lists, device=q.device) // (lists // kv_heads)
    outs = []
    for tile, first in enumerate(range(0, m, s.block_q)):
        mine = q[:, :, first : first + s.block_q]
        rows = mine.to(exact).unflatten(1, (lists, -1)).flatten(2, 3)
        ids, weight = _listed(s, tile)
        last = torch.full((mine.shape[2],), n - 1, device=q.device)
        if s.causal:
            last = torch.arange(first, first + mine.shape[2], device=q.device) + n - m
        last = last.repeat(heads // lists)[:, None]
        parts = []
        for begin in range(0, ids.shape[-1], chunk):
            part = ids[..., begin : begin + chunk]
            read = part.clamp(max=n - 1)
            batches = torch.arange(batch, device=q.device)[:, None, None]
            values = v[batches, kv[:, None], read].to(exact).masked_fill((part >= n).unsqueeze(-1), 0.0)
            mask = torch.where(part.unsqueeze(2) <= last, 0.0, -torch.inf)
            bias = None if weight is None else weight[..., begin : begin + chunk].unsqueeze(2)
            parts.append(_tile(rows, keys.rebuild(read, kv, exact), values, mask, bias, scale, softcap))
        outs.append(_joined(parts, mine, v))
    return Partial(torch.cat([part.out for part in outs], 2), torch.cat([part.lse for part in outs if part.lse is not None], 2))


def _tile(
    rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, softcap: float | None
) -> Partial:
    return attend_tile(rows, k, v, mask, scale=scale, softcap=softcap, bias=bias, return_lse=True)


def _joined(parts: list[Partial], q: Tensor, v: Tensor) -> Partial:
    """Parts of rows `(B, H, group * m)` put together as `(B, Hq, m)`."""
    if not parts:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        return Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device))
    out, lse = merge(*parts)
    assert lse is not None
    return Partial(out.reshape(*q.shape[:3], v.shape[-1]).to(q.dtype), lse.reshape(q.shape[:3]))


def _listed(s: Selection, tile: int) -> tuple[Tensor, Tensor | None]:
    """Key ids `(B, H, L)` that a query tile reads, n_k or more for none, and what their logits get on top."""
    runs = (s.starts[:, :, tile].long().unsqueeze(-1) + torch.arange(s.block_k, device=s.device)).flatten(-2)
    ids = torch.cat([runs, s.tokens[:, :, tile].long()], -1)
    if s.log_weight is None:
        return ids, None
    return ids, torch.nn.functional.pad(s.log_weight[:, :, tile], (runs.shape[-1], 0))


def _on_gpu(impl: str, q: Tensor, keys: LowRankKeys, v: Tensor) -> bool:
    """Whether the kernel runs; ValueError where it was asked for and can't."""
    if impl != "triton" and not (impl == "auto" and runs_on(q)):
        return False
    if impl == "triton":
        require_triton("decode_low_rank", q)
    from saccade.ops.decode.triton.low_rank import unsupported

    why = unsupported(q, keys, v)
    if why and impl == "triton":
        raise ValueError(f'decode_low_rank: impl "triton" can\'t run here: {why}; use impl "auto"')
    return why is None


def _turns(
    q: Tensor, factors: Tensor, kv_heads: int, rotary: Rotary | tuple[Tensor, Tensor] | None, positions: Tensor | None
) -> Turns | None:
    batch, n, dim = factors.shape[0], factors.shape[2], q.shape[3]
    if positions is not None and not isinstance(rotary, Rotary):
        raise ValueError("positions were given without a Rotary: give one, or tables (cos, sin) of the keys' own positions")
    if rotary is None:
        return None

    def fitted(x: Tensor, name: str, tail: int) -> Tensor:
        """x as `(B or 1, Hk or 1, n, ...)`, `tail` axes after n."""
        given = tuple(x.shape)
        if x.ndim == 1 + tail:
            x = x.unsqueeze(0)
        if x.ndim == 2 + tail:
            x = x.unsqueeze(1)
        if x.ndim != 3 + tail or x.shape[0] not in (1, batch) or x.shape[1] not in (1, kv_heads) or x.shape[2] != n or x.device != q.device:
            raise ValueError(
                f"{name} have shape {given} on {x.device}: expected (n,), (B or 1, n) or (B or 1, Hk or 1, n) with B {batch}, "
                f"Hk {kv_heads} and n {n}{', then pairs,' if tail else ''} on {q.device}"
            )
        return x

    if isinstance(rotary, Rotary):
        pairs = rotary.inv_freq.numel()
        where = torch.arange(n, device=q.device) if positions is None else positions
        if where.is_floating_point() or where.is_complex() or where.dtype == torch.bool:
            raise TypeError(f"positions are {where.dtype}: expected an integer dtype")
        turns = Turns(
            pairs, rotary.interleaved, positions=fitted(where, "positions", 0), inv_freq=rotary.inv_freq.to(q.device, torch.float32)
        )  # fmt: skip
    else:
        cos, sin = (fitted(x, name, 1) for x, name in zip(rotary, ("cos", "sin"), strict=True))
        if cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.is_floating_point():
            raise ValueError(f"cos is {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)}: expected two alike, in floats")
        pairs = cos.shape[-1]
        turns = Turns(pairs, False, cos=cos, sin=sin)
    if pairs < 1 or 2 * pairs > dim:
        raise ValueError(f"the rotary embedding turns {2 * pairs} channels: expected 2 to {dim}, the head dim of q")
    return turns


def _check(q: Tensor, factors: Tensor, basis: Tensor, v: Tensor, selection: Selection | None, softcap: float | None, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap} must be positive, or None for no cap")
    if q.ndim != 4 or q.shape[2] > 16:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected (B, Hq, m, D) with at most 16 queries")
    if not q.dtype == factors.dtype == basis.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(
            f"q, factors, basis and v have dtypes {q.dtype}, {factors.dtype}, {basis.dtype}, {v.dtype}: convert them to one "
            "floating-point dtype"
        )
    if not q.device == factors.device == basis.device == v.device:
        raise ValueError(
            f"q, factors, basis and v are on {q.device}, {factors.device}, {basis.device}, {v.device}: move them to one device"
        )
    if v.ndim != 4 or v.shape[0] != q.shape[0] or v.shape[1] < 1 or q.shape[1] % v.shape[1]:
        raise ValueError(f"v has shape {tuple(v.shape)}: expected (B, Hk, n, Dv) with B {q.shape[0]} and Hk a divisor of {q.shape[1]}")
    heads, n = v.shape[1], v.shape[2]
    if factors.ndim != 4 or factors.shape[0] != q.shape[0] or factors.shape[1] not in (1, heads) or factors.shape[2] != n:
        raise ValueError(f"factors have shape {tuple(factors.shape)}: expected ({q.shape[0]}, {heads} or 1, {n}, R)")
    if basis.ndim != 3 or basis.shape[0] not in (1, heads) or basis.shape[1:] != (factors.shape[3], q.shape[3]):
        raise ValueError(f"the basis has shape {tuple(basis.shape)}: expected ({heads} or 1, {factors.shape[3]}, {q.shape[3]})")
    if selection is not None:
        check_selection(selection, q, heads, n)
