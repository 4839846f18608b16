"""Linformer: keys and values are projected along the sequence to k rows, and softmax attention reads those.

    head = softmax(Q (E K)^T D^-1/2) (F V),     E, F of k x n with n the longest sequence; a shorter one takes its first columns

E and F mix all tokens, later ones too, so there is no causal form and generation is refused. E starts with entries of variance 1 / k.

Source: linformer, arXiv 2006.04768.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.partial import partial_softmax


@register
@dataclass(frozen=True, kw_only=True)
class Linformer(Mixer):
    """k: rows to which keys and values are projected, in the first layer. top: in the last layer, with even steps between (default: k).
    sharing: "none" (E and F of each key head), "heads" (E and F for all heads) or "kv" (one matrix for both); `share_projections` makes
    that one matrix serve several layers. projection: "dense" (E), or windows of ceil(n / k) tokens, each through "mean", "max" or "conv"
    (a strided convolution per channel), with n the shape's max_length.
    """

    k: int = 256
    top: int | None = None
    sharing: Literal["none", "heads", "kv"] = "heads"
    projection: Literal["dense", "mean", "max", "conv"] = "dense"

    info = Info(
        slug="linformer", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"k": 16},
        variants=(
            {"k": 16, "top": 7, "sharing": "none"}, {"k": 16, "sharing": "kv"}, {"k": 16, "projection": "mean"},
            {"k": 16, "projection": "max"}, {"k": 30, "projection": "conv"},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.k < 1 or (self.top is not None and self.top < 1):
            raise ValueError(f"k={self.k}, top={self.top}: give at least 1 row")
        if self.sharing not in ("none", "heads", "kv"):
            raise ValueError(f"sharing={self.sharing!r} is not 'none', 'heads' or 'kv'")
        if self.projection not in ("dense", "mean", "max", "conv"):
            raise ValueError(f"projection={self.projection!r} is not 'dense', 'mean', 'max' or 'conv'")

    def rows(self, layer: int, layers: int) -> int:
        """k in layer `layer` of `layers`."""
        return self.k if self.top is None else round(self.k + (self.top - self.k) * layer / max(layers - 1, 1))

    def build(self, shape: MixerShape) -> TokenMixer:
        if shape.max_length is None:
            raise ValueError("linformer has one column for every position: give max_length, the longest sequence it shall read")
        return LinformerMixer(shape, self, shape.max_length)


class LinformerMixer(TokenMixer):
    """The layer. e, f: the projections, `(Hk or 1, k, n)`; f is None where one matrix serves both."""

    causality = "bidirectional"

    def __init__(self, shape: MixerShape, method: Linformer, longest: int) -> None:
        super().__init__(shape)
        self.method, self.longest = method, longest
        self.batches_padding = method.projection == "dense"
        width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(shape.dim, width, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.dim, bias=False)
        rows = method.rows(shape.layer, shape.layers)
        self.window = -(-longest // rows)
        self.e = self.f = None
        if method.projection in ("dense", "conv"):
            many = shape.kv_heads if method.sharing == "none" else 1
            sizes = (many, rows, longest) if method.projection == "dense" else (many, shape.head_dim, self.window)
            spread = (rows if method.projection == "dense" else self.window) ** -0.5
            self.e = nn.Parameter(spread * torch.randn(sizes))
            self.f = None if method.sharing == "kv" else nn.Parameter(spread * torch.randn(sizes))

    def shorten(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x `(B, Hk, N, D)` as `(B, Hk, k', D)`, k' at most k: less for windows of a shorter sequence."""
        n = x.shape[2]
        if self.method.projection == "dense":
            assert weight is not None
            return weight[:, :, :n] @ x
        parts = F.pad(x, (0, 0, 0, -n % self.window)).unflatten(2, (-1, self.window))
        counts = (n - torch.arange(0, n, self.window, device=x.device)).clamp(max=self.window)[:, None]
        if self.method.projection == "mean":
            return parts.sum(3) / counts
        if self.method.projection == "max":
            real = torch.arange(self.window, device=x.device) < counts
            return parts.masked_fill(~real.unsqueeze(-1), float("-inf")).amax(3)
        assert weight is not None
        return torch.einsum("bhrwd,hdw->bhrd", parts, weight.expand(x.shape[1], -1, -1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, Hq, N, D)`, k and v `(B, Hk, N, D)`. ValueError for more tokens than there are columns."""
        if x.shape[1] > self.longest:
            raise ValueError(f"{x.shape[1]} tokens are more than the {self.longest} linformer was built for: give a larger max_length")
        q = heads_first(self.q_proj(x), self.shape.heads)
        return q, heads_first(self.k_proj(x), self.shape.kv_heads), heads_first(self.v_proj(x), self.shape.kv_heads)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, k, v = self.project(x)
        # padding must add nothing to the projected rows
        k, v = self.shorten(call.masked(k), self.e), self.shorten(call.masked(v), self.e if self.f is None else self.f)
        everything = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        out = partial_softmax(q, k, v, everything).out.to(x.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2)), {}

    def naive(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        short = [self.row_by_row(y, weight) for y, weight in ((k, self.e), (v, self.e if self.f is None else self.f))]
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(wide).repeat_interleave(self.shape.heads // y.shape[1], 1) for y in (q, *short))
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.o_proj(out.to(x.dtype).transpose(1, 2).flatten(2))

    def row_by_row(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """`shorten` by its definition."""
        if weight is not None:
            weight = weight.expand(x.shape[1], -1, -1)
        if self.method.projection == "dense" and weight is not None:
            return torch.einsum("hkn,bhnd->bhkd", weight[:, :, : x.shape[2]], x)
        rows = []
        for part in x.split(self.window, dim=2):
            if weight is not None:
                rows.append((part * weight[:, :, : part.shape[2]].mT).sum(2))
            else:
                rows.append(part.mean(2) if self.method.projection == "mean" else part.amax(2))
        return torch.stack(rows, dim=2)


def share_projections(layers: Iterable[nn.Module]) -> None:
    """Layerwise sharing: all linformer layers among these read the E of the first of them, for keys and values.

    ValueError where a layer's E has another shape, or where a layer has an F of its own.
    """
    mixers = [part for layer in layers for part in layer.modules() if isinstance(part, LinformerMixer)]
    first: nn.Parameter | None = None
    for one in mixers:
        if one.e is None or one.f is not None:
            raise ValueError("layers share one matrix only if each has one for keys and values: build them with sharing='kv'")
        first = one.e if first is None else first
        if one.e.shape != first.shape:
            raise ValueError(f"projections of shapes {tuple(first.shape)} and {tuple(one.e.shape)} can't be one: give all the same k")
        one.e = first
