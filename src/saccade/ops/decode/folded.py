"""Attention over packed codes in plain torch. Codes are multiplied as they are; what turns them into numbers goes to the queries, to the
products and to the weights:

    q.(s c + z) = (q s).c + q.z              a scale s and zero z for each channel
    q.(s c + z) = s (q.c) + z sum(q)         for each token
    sum_t w_t (s_t c_t + z_t) = sum_t (w_t s_t) c_t + sum_t w_t z_t, and likewise for each channel

So a code costs a mask and becomes a float once; it is neither scaled nor shifted, and channels stay in the order in which bytes hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core import Partial, merge
from saccade.ops.decode.packed import Packed
from saccade.ops.scratch import scratch

SPAN = 1 << 18  # numbers that are floats at a time, for each thread: they are read again while still in cache
ROOM = 1 << 24  # logits held at a time


def takes(x: Packed) -> bool:
    """Whether these codes can be read so: whole codes in a byte, on a line, without exceptions."""
    if x.bits not in (2, 4, 8) or x.codebook is not None or x.outlier_index is not None:
        return False
    # channels that share a scale are then whole bytes
    return x.granularity == "channel" or x.group >= x.dim or x.group % (8 // x.bits) == 0


def attend(q: Tensor, keys: Packed, values: Packed, ends: Tensor | None, scale: float, softcap: float | None) -> Partial:
    """Attention of q `(B, Hq, m, D)`, float32 or float64, over what `takes` accepts, with log-sum-exp. ends: `(B,)`, the first ones that
    count in each row."""
    batch, heads, m, _ = q.shape
    rows = (q * scale).reshape(batch, keys.codes.shape[1], -1, q.shape[3])
    k, v = _Codes(keys, q.dtype), _Codes(values, q.dtype)
    n, piece = keys.length, max(ROOM // max(batch * heads * m, 1), 1)
    for x in (keys, values):  # a piece that ends where a group does leaves no rest of one
        piece -= piece % x.group if x.granularity == "channel" and x.group <= piece else 0
    parts = [_piece(rows, k, v, begin, min(begin + piece, n), ends, softcap) for begin in range(0, max(n, 1), piece)]
    out, lse = merge(*parts)
    return Partial(out.reshape(batch, heads, m, values.dim), None if lse is None else lse.reshape(batch, heads, m))


def _piece(q: Tensor, k: _Codes, v: _Codes, begin: int, end: int, ends: Tensor | None, softcap: float | None) -> Partial:
    """q `(B, Hk, R, D)`, times the scale, over tokens begin ... end - 1."""
    if end == begin:
        return Partial(q.new_zeros(*q.shape[:3], v.packed.dim), q.new_full(q.shape[:3], -torch.inf))
    logits = k.products(q, begin, end)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if ends is not None:
        gone = torch.arange(begin, end, device=q.device) >= ends.unsqueeze(-1)
        logits.masked_fill_(gone[:, None, None], -torch.inf)
    most = logits.amax(-1, keepdim=True)
    most = most.masked_fill(most == -torch.inf, 0.0)  # of a row without keys
    weights = logits.sub_(most).exp_()
    total = weights.sum(-1, keepdim=True)
    out = v.sums(weights, begin, end) / total.masked_fill(total == 0, 1.0)
    return Partial(out, (total.log() + most).squeeze(-1))


@dataclass(frozen=True)
class _Span:
    """Tokens begin ... end - 1 in groups of `size`; `group` is the number of the first one."""

    begin: int
    end: int
    size: int
    group: int

    @property
    def count(self) -> int:
        return (self.end - self.begin) // self.size

    @property
    def groups(self) -> slice:
        return slice(self.group, self.group + self.count)


class _Codes:
    """Packed codes, with scale and zero (None: 1, and 0) in the dtype of the arithmetic. Lane i of a byte is its i-th code, the lowest
    bits first: a lane has every `8 / bits`-th channel."""

    def __init__(self, x: Packed, wide: torch.dtype) -> None:
        self.packed, self.wide = x, wide
        self.scale, self.zero = (None if p is None else p.to(wide) for p in (x.scale, x.zero))
        self.batch, self.heads, self.n, self.width = x.codes.shape
        if x.symmetric:  # levels are codes less the middle one
            middle = torch.full((1, 1, 1, 1), 1 << (x.bits - 1), dtype=wide, device=x.codes.device)
            shift = middle * (middle.new_ones(1).expand(self.batch, self.heads, *self._groups) if self.scale is None else self.scale)
            self.zero = -shift if self.zero is None else self.zero - shift
        self.lanes = 8 // x.bits
        # what a one stands for: bits are left where they are in their byte
        self.sizes = torch.tensor([2.0 ** (-i * x.bits) for i in range(self.lanes)], dtype=wide, device=x.codes.device)

    @property
    def _groups(self) -> tuple[int, int]:
        x = self.packed
        return (-(-self.n // x.group), x.dim) if x.granularity == "channel" else (self.n, -(-x.dim // x.group))

    def products(self, q: Tensor, begin: int, end: int) -> Tensor:
        """q.k of q `(B, Hk, R, D)`: `(B, Hk, R, tokens)`."""
        if self.packed.granularity == "token":
            # rows of their own for channels that share parameters, (B, Hk, groups, R, D)
            rows = self._apart(q)
            laid = self._laid(rows).flatten(1, 2).flatten(2, 3)
            found = self._joined([_over_lanes(laid, self._floats(span).mT) for span in self._spans(begin, end)])
            found = found.view(*rows.shape[:4], end - begin)
            scale, zero = (None if p is None else p[:, :, begin:end].mT.unsqueeze(3) for p in (self.scale, self.zero))
            found = found if scale is None else found.mul_(scale)
            found = found if zero is None else found.addcmul_(rows.sum(-1, keepdim=True), zero)
            return found.squeeze(2) if found.shape[2] == 1 else found.sum(2)
        rows = q.unsqueeze(2)
        # queries of their own for tokens that share parameters
        laid = self._laid(rows if self.scale is None else rows * self.scale.unsqueeze(3)).flatten(1, 2)
        laid = laid.expand(-1, -1, self._groups[0], -1, -1)
        found = []
        for span in self._spans(begin, end):
            part = _over_lanes(laid[:, :, span.groups].flatten(1, 2), self._floats(span).unflatten(2, (-1, span.size)).flatten(1, 2).mT)
            found.append(part.view(-1, span.count, *part.shape[1:]).transpose(1, 2).flatten(2))
        products = self._joined(found).view(*q.shape[:3], end - begin)
        if self.zero is not None:
            first, last = begin // self.packed.group, (end - 1) // self.packed.group
            added = (rows * self.zero[:, :, first : last + 1].unsqueeze(3)).sum(-1).mT  # (B, Hk, R, groups)
            products += added if first == last else added[..., torch.arange(begin, end, device=q.device) // self.packed.group - first]
        return products

    def sums(self, weights: Tensor, begin: int, end: int) -> Tensor:
        """`sum_t w_t v_t` of weights `(B, Hk, R, tokens)`: `(B, Hk, R, D)`."""
        by_token = self.packed.granularity == "token"
        one = weights.unsqueeze(2)
        scale, zero = (None if p is None or not by_token else p[:, :, begin:end].mT.unsqueeze(3) for p in (self.scale, self.zero))
        rows = one
        if scale is not None:
            shape = (*weights.shape[:2], scale.shape[2], *weights.shape[2:])
            rows = torch.mul(one, scale, out=scratch("decode.weights", shape, self.wide, weights.device))
        rows = rows.flatten(0, 1).flatten(1, 2)  # (B * Hk, groups of channels times R, tokens)
        total = weights.new_zeros(self.lanes, *rows.shape[:2], self.width)
        added = weights.new_zeros(())
        for span in self._spans(begin, end):
            codes, own = self._floats(span), rows[..., span.begin - begin : span.end - begin]
            if by_token:
                for lane in range(self.lanes):
                    total[lane].baddbmm_(own, codes[lane])
                continue
            own = own.unflatten(2, (span.count, span.size)).transpose(1, 2)  # (B * Hk, groups, R, size)
            part = own @ codes.unflatten(2, (span.count, span.size))
            total += (part if self.scale is None else part * self._of_groups(self.scale, span)).sum(2)
            if self.zero is not None:
                zero = self.zero[:, :, span.groups]
                added = added + own.sum(-1).unflatten(0, weights.shape[:2]).mT @ zero
        out = (total.movedim(0, -1) * self.sizes).flatten(-2)[..., : self.packed.dim].unflatten(0, weights.shape[:2])
        if not by_token:
            return out + added
        out = out.unflatten(2, (-1, weights.shape[2]))
        out = out if zero is None else out + (one * zero).sum(-1, keepdim=True)
        return out.squeeze(2) if out.shape[2] == 1 else (out * self._members.unsqueeze(1)).sum(2)

    @staticmethod
    def _joined(parts: list[Tensor]) -> Tensor:
        """One after the other along the tokens: the caller's until the next call."""
        shape = (*parts[0].shape[:2], sum(part.shape[2] for part in parts))
        return torch.cat(parts, dim=-1, out=scratch("decode.products", shape, parts[0].dtype, parts[0].device))

    def _spans(self, begin: int, end: int) -> Iterator[_Span]:
        x = self.packed
        held = SPAN * torch.get_num_threads() if x.codes.device.type == "cpu" else ROOM
        most = max(held // max(self.batch * self.heads * self.width * self.lanes, 1), 64)
        if x.granularity == "token":
            yield from (_Span(at, min(at + most, end), min(most, end - at), 0) for at in range(begin, end, most))
            return
        while begin < end:
            group = begin // x.group
            if x.group >= most or begin % x.group or end - begin < x.group:
                # within one group
                stop = min((group + 1) * x.group, begin + most, end)
                yield _Span(begin, stop, stop - begin, group)
            else:
                stop = begin + min(most, end - begin) // x.group * x.group
                yield _Span(begin, stop, x.group, group)
            begin = stop

    def _floats(self, span: _Span) -> Tensor:
        """The codes of a span as numbers, each in its bits' place: `(lanes, B * Hk, tokens, bytes)`."""
        raw, bits = self.packed.codes[:, :, span.begin : span.end], self.packed.bits
        out = scratch("decode.lanes", (self.lanes, *raw.shape), self.wide, raw.device)
        own = scratch("decode.lane", tuple(raw.shape), torch.uint8, raw.device)
        for lane in range(self.lanes):
            out[lane] = torch.bitwise_and(raw, (1 << bits) - 1 << lane * bits, out=own)
        return out.flatten(1, 2)

    @property
    def _members(self) -> Tensor:
        """Which channels share parameters of a token: `(groups, D)`."""
        x = self.packed
        own = torch.arange(x.dim, device=x.codes.device) // x.group
        return (own == torch.arange(self._groups[1], device=x.codes.device).unsqueeze(1)).to(self.wide)

    def _apart(self, q: Tensor) -> Tensor:
        return q.unsqueeze(2) if self._groups[1] == 1 else q.unsqueeze(2) * self._members.unsqueeze(1)

    def _of_groups(self, p: Tensor, span: _Span) -> Tensor:
        """Parameters of groups of tokens, a lane's channels together: `(lanes, B * Hk, groups, 1, bytes)`."""
        return self._split(p[:, :, span.groups].flatten(0, 1)).movedim(-1, 0).unsqueeze(3)

    def _laid(self, q: Tensor) -> Tensor:
        """q `(..., D)` as the lanes have it, `(lanes, ..., bytes)`, 0 beyond the last channel."""
        return (self._split(q) * self.sizes).movedim(-1, 0).contiguous()

    def _split(self, x: Tensor) -> Tensor:
        return pad(x, (0, self.lanes * self.width - x.shape[-1])).unflatten(-1, (-1, self.lanes))


def _over_lanes(q: Tensor, codes: Tensor) -> Tensor:
    """The sum over lanes of `q @ codes`, `(lanes, b, ...)` each."""
    total = torch.bmm(q[0], codes[0])
    for lane in range(1, len(q)):
        total.baddbmm_(q[lane], codes[lane])
    return total
