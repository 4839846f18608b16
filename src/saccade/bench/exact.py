"""Errors: relative L2 distances to a result in float64, on a slice that is cheap to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.core.tilemath import cover, fill_past, mark

ROWS = 64  # query rows of a checked slice

# (keys, values) of one batch row and one key/value head, each (n, D), in the dtype asked for
Source = Callable[[int, int, torch.dtype], tuple[Tensor, Tensor]]


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative L2; infinite where something is not finite or the shapes differ."""
    if found.shape != exact.shape:
        return float("inf")
    value = float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def verdict(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """(error, allowed) of the part that is worst: allowed is twice the error of plain torch code in the same dtype, plus 1e-6."""
    parts = [(distance(f, e), 2 * distance(p, e) + 1e-6) for f, p, e in zip(found, plain, exact, strict=True)]
    return max(parts, key=lambda part: part[0] / part[1])


def rows_mask(selection: Selection | None, batch: int, head: int, heads: int, rows: Tensor, n_k: int, offset: int, causal: bool) -> Tensor:
    """bool `(rows, n_k)`: what these query rows of one of `heads` heads read. offset: position of row 0."""
    visible = torch.arange(n_k, device=rows.device) <= (rows + offset).unsqueeze(-1)
    if selection is None:
        return visible if causal else torch.ones_like(visible)
    tile = rows // selection.block_q

    def listed(x: Tensor) -> Tensor:
        own = x[min(batch, x.shape[0] - 1), head * x.shape[1] // heads]
        return own if x.shape[2] < selection.tiles else own[tile]  # one list for all tiles

    tokens = fill_past(listed(selection.tokens), listed(selection.token_counts), n_k)
    mask = cover(listed(selection.starts), selection.block_k, n_k) | mark(tokens, n_k)
    return mask & visible if selection.causal else mask


class AttentionCheck:
    """Attention of the first group of heads of the first batch row and the last group of the last one: the last ROWS query rows, and
    as many in the middle where there is no backward pass.

    With d_out the outputs are (out, dq, dk, dv); gradients of the last ROWS keys are exact on the slice, as only the last ROWS queries
    see them.
    """

    def __init__(
        self, q: Tensor, source: Source, *, kv_heads: int, selection: Selection | None = None, causal: bool = True,
        d_out: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.q, self.source, self.kv_heads, self.selection, self.causal, self.d_out = q.detach(), source, kv_heads, selection, causal, d_out
        n = q.shape[2]
        last = torch.arange(max(0, n - ROWS), n, device=q.device)
        middle = torch.arange(n // 2, min(n // 2 + ROWS, n), device=q.device)
        self.rows = last if d_out is not None or n <= 2 * ROWS else torch.cat([middle, last])
        self.places = sorted({(0, 0), (q.shape[0] - 1, kv_heads - 1)})
        self._known: tuple[list[Tensor], list[Tensor]] | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, **options: object) -> AttentionCheck:
        def source(batch: int, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return k[batch, head].detach().to(dtype), v[batch, head].detach().to(dtype)

        return cls(q, source, kv_heads=k.shape[1], **options)  # pyright: ignore[reportArgumentType]

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        if self._known is None:
            self._known = self._compute(torch.float64), self._compute(self.q.dtype)
        exact, plain = self._known
        return verdict(self._slices(outputs), plain, exact)

    def _slices(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """out, then dq, dk, dv: both places one after the other."""
        group = outputs[0].shape[1] // self.kv_heads
        found = []
        for index, x in enumerate(outputs):
            rows = self.rows if index < 2 else slice(-min(ROWS, x.shape[2]), None)
            wide = group if index < 2 else 1
            found.append(torch.cat([x[b, h * wide : (h + 1) * wide][:, rows].flatten() for b, h in self.places]))
        return found

    def _compute(self, dtype: torch.dtype) -> list[Tensor]:
        parts = [self._one(b, h, dtype) for b, h in self.places]
        return [torch.cat([x.flatten() for x in column]) for column in zip(*parts, strict=True)]

    def _one(self, batch: int, head: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        heads = self.q.shape[1]
        group = heads // self.kv_heads
        own = slice(head * group, (head + 1) * group)
        keys, values = self.source(batch, head, dtype)
        n_k = keys.shape[0]
        offset = n_k - self.q.shape[2]
        masks = [rows_mask(self.selection, batch, h, heads, self.rows, n_k, offset, self.causal) for h in range(heads)[own]]
        q = self.q[batch, own][:, self.rows].to(dtype)
        wants = self.d_out is not None
        with torch.set_grad_enabled(wants):
            q, keys, values = (x.requires_grad_(wants) for x in (q, keys, values))
            scores = (q @ keys.T) * self.q.shape[-1] ** -0.5
            out = scores.masked_fill(~torch.stack(masks), -torch.inf).softmax(-1) @ values
            if self.d_out is None:
                return (out,)
            dq, dk, dv = torch.autograd.grad(out, (q, keys, values), self.d_out[batch, own][:, self.rows].to(dtype))
        return out.detach(), dq, dk[-ROWS:], dv[-ROWS:]


class SliceCheck:
    """slices: what is compared, from the outputs. exact: the same in float64. plain: the same by plain torch code in the dtype of the
    inputs; None: the exact result rounded to `dtype`."""

    def __init__(
        self, *, slices: Callable[[tuple[Tensor, ...]], Sequence[Tensor]], exact: Callable[[], Sequence[Tensor]],
        plain: Callable[[], Sequence[Tensor]] | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.slices, self.exact, self.plain, self.dtype = slices, exact, plain, dtype
        self._known: tuple[Sequence[Tensor], list[Sequence[Tensor]]] | None = None

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        if self._known is None:
            exact = [x.where(x.isfinite(), 0.0) for x in self.exact()]
            plain: list[Sequence[Tensor]] = [] if self.plain is None else [[x.where(x.isfinite(), 0.0) for x in self.plain()]]
            if self.dtype is not None:
                plain.append([x.to(self.dtype) for x in exact])
            self._known = exact, plain
        exact, plain = self._known
        found = [x.where(~x.isinf(), 0.0) if x.is_floating_point() else x for x in self.slices(outputs)]
        verdicts = [verdict(found, each, exact) for each in plain]
        return verdicts[0][0], max(allowed for _, allowed in verdicts)


class EqualCheck:
    """Results that must be the same number by number: the error is the share that differs, and none is allowed."""

    def __init__(self, *, slices: Callable[[tuple[Tensor, ...]], Sequence[Tensor]], exact: Callable[[], Sequence[Tensor]]) -> None:
        self.slices, self.exact = slices, exact

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        found, exact = self.slices(outputs), self.exact()
        if any(f.shape != e.shape for f, e in zip(found, exact, strict=True)):
            return 1.0, 0.0
        wrong = sum(int((f != e).sum()) for f, e in zip(found, exact, strict=True))
        return wrong / max(1, sum(e.numel() for e in exact)), 0.0
