"""Neighbourhood and block-sparse attention on diffusion transformers of the diffusers library, for the length of a `with` block.

Every self-attention processor of the model is wrapped, not replaced: projections, norms, rotary embeddings and the order of text and
image tokens stay the model's own, and only its call of torch's scaled_dot_product_attention is answered by a sparse one. Calls
over other numbers of tokens (cross attention) and calls with a mask are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.core import Budget, Mass, Selection, over_groups
from saccade.methods.static.neighborhood import neighborhood_attention
from saccade.ops import attend, last_run
from saccade.parts.choose import choose
from saccade.parts.pooling import pool_mean
from saccade.parts.static.gridattend import query_tile
from saccade.parts.static.gridlists import grid_lists
from saccade.parts.static.neighborhood import Neighborhood

PerAxis = int | Sequence[int]
Side = Literal["first", "last"]


class GridMethod(Protocol):
    """What a processor runs: attention of q, k, v `(B, H, N + extra, D)` of a grid and text tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, extra: int, extra_side: Side, scale: float | None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class NeighborhoodMethod:
    """gna, or fna with stride 1. grid, window, stride, dilation: tokens along each axis, as in `neighborhood_attention`."""

    grid: PerAxis
    window: int | Sequence[int | None] | None
    stride: PerAxis = 1
    dilation: PerAxis = 1

    def __post_init__(self) -> None:
        Neighborhood.of(self.grid, self.window, self.stride, self.dilation)

    @property
    def tokens(self) -> int:
        return Neighborhood.of(self.grid, self.window, self.stride, self.dilation).tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, extra: int, extra_side: Side, scale: float | None) -> Tensor:
        return neighborhood_attention(
            q, k, v, grid=self.grid, window=self.window, stride=self.stride, dilation=self.dilation, extra=extra,
            extra_side=extra_side, scale=scale,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlockMethod:
    """Block-sparse attention chosen by content: n-d tiles of the grid, and for each tile of queries the tiles of keys with the highest
    product of mean query and mean key.

    budget: share of the key tiles (float), their number (int) or `Mass(p)` of the softmax over tiles. rows: tokens a tile has at least
    half of. Text tokens are read by all and read everything.
    """

    grid: PerAxis
    budget: float | int | Mass = 0.25
    rows: int = 64

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        Neighborhood.of(self.grid, 1)
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows={self.rows!r}: expected a whole number of at least 1")

    @property
    def tokens(self) -> int:
        return Neighborhood.of(self.grid, 1).tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, extra: int, extra_side: Side, scale: float | None) -> Tensor:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        hood, n = Neighborhood.of(self.grid, 1), self.tokens
        tile = _dividing(query_tile(hood, self.rows), hood.grid)
        order = grid_lists(hood, tile, None, 0, str(q.device))
        text, image = (slice(0, extra), slice(extra, None)) if extra_side == "first" else (slice(n, None), slice(0, n))
        block = order.selection.block_q
        rows, keys, values = (x[:, :, image].index_select(2, order.rows) for x in (q, k, v))
        listed = self._tiles(rows, keys, block, factor)
        selection = Selection.from_block_mask(listed, block_q=block, block_k=block, n_q=n, n_k=n, causal=False)
        if extra:
            more = torch.arange(n, n + extra, device=q.device).expand(*listed.shape[:3], -1)
            selection = Selection.from_parts(
                n_q=n, n_k=n + extra, block_q=block, block_k=block, starts=selection.starts.masked_fill(selection.starts >= n, n + extra),
                tokens=more, causal=False,
            )  # fmt: skip
            keys, values = torch.cat([keys, k[:, :, text]], 2), torch.cat([values, v[:, :, text]], 2)
        # first, so that `last_run` tells of the sparse call
        read = [attend(q[:, :, text], k, v, causal=False, scale=factor).out] if extra else []
        out = attend(rows, keys, values, selection, scale=factor).out.index_select(2, order.places)
        return torch.cat([*read, out] if extra_side == "first" else [out, *read], 2)

    def _tiles(self, q: Tensor, k: Tensor, block: int, scale: float) -> Tensor:
        """Which key tiles each query tile reads, bool `(B, Hq, T, T)`; a tile always reads itself."""
        means_q, means_k = pool_mean(q, block), pool_mean(k, block)
        scores = over_groups(means_q.unflatten(1, (k.shape[1], -1)), means_k.mT).flatten(1, 2) * scale
        budget = Budget.of(self.budget)
        chosen = choose(scores.softmax(-1) if isinstance(budget.amount, Mass) else scores, budget)
        return chosen | torch.eye(chosen.shape[-1], dtype=torch.bool, device=chosen.device)


def _dividing(tile: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """The tile cut down to divisors of the grid, so that no row is left over."""
    return tuple(max(t for t in range(1, size + 1) if n % t == 0) for size, n in zip(tile, grid, strict=True))


class _Answer(TorchFunctionMode):
    """Within it, scaled_dot_product_attention of matching calls is answered by `run`."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor, float | None], Tensor | None]) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            out = _answered(self.run, *args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _answered(
    run: Callable[[Tensor, Tensor, Tensor, float | None], Tensor | None], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Tensor | None:  # fmt: skip
    """The answer to one call, None where it must go to torch."""
    if attn_mask is not None or is_causal or dropout_p or query.shape[2] != key.shape[2]:
        return None
    return run(query, key, value, scale)


class SparseProcessor:
    """A diffusers attention processor around the model's own; `calls` and `density` say what it did since it was made."""

    def __init__(self, inner: Any, method: GridMethod, extra: int | None, extra_side: Side) -> None:
        self.inner, self.method, self.extra = inner, method, extra
        self.extra_side: Side = extra_side
        self.calls = 0
        self.density: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Answer(self._run):
            return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
        extra = q.shape[2] - self.method.tokens
        if extra < 0 or (extra != self.extra and self.extra is not None and extra):
            return None
        # torch leaves a mode while it answers, so attention called from here on is torch's own
        out = self.method(q, k, v, extra=extra, extra_side=self.extra_side, scale=scale)
        self.calls += 1
        selection = last_run().selection
        self.density = self.density if selection is None else selection.density()
        return out


class SparseTransformer:
    """The handle of `attach_transformer`: put on by `with`, taken off at its end."""

    def __init__(self, model: nn.Module, make: Callable[[Any], SparseProcessor], layers: Collection[int] | None) -> None:
        self.modules = [m for m in model.modules() if hasattr(m, "set_processor") and hasattr(m, "processor")]
        if not self.modules:
            raise ValueError(f"{type(model).__name__} has no attention processors: give a transformer of the diffusers library")
        if layers is not None and (not layers or min(layers) < 0 or max(layers) >= len(self.modules)):
            raise ValueError(f"layers {sorted(layers)} are not among the model's {len(self.modules)} attention modules")
        self.chosen = [m for i, m in enumerate(self.modules) if layers is None or i in layers]
        self.make = make
        self.processors: list[SparseProcessor] = []
        self._before: list[Any] = []

    def __enter__(self) -> SparseTransformer:
        if any(isinstance(m.processor, SparseProcessor) for m in self.chosen):
            raise ValueError("this transformer is already attached: leave that block first")
        self._before = [m.processor for m in self.chosen]
        self.processors = [self.make(inner) for inner in self._before]
        for module, processor in zip(self.chosen, self.processors, strict=True):
            module.processor = processor  # pyright: ignore[reportArgumentType] (a plain attribute, no parameter)
        return self

    def __exit__(self, *_: object) -> None:
        for module, inner in zip(self.chosen, self._before, strict=True):
            module.processor = inner

    @property
    def calls(self) -> int:
        """Attention calls that ran sparsely."""
        return sum(processor.calls for processor in self.processors)


def attach_transformer(
    model: nn.Module, method: GridMethod, *, layers: Collection[int] | None = None, extra: int | None = None,
    extra_side: Side = "first",
) -> SparseTransformer:  # fmt: skip
    """Run a diffusers transformer with `method` in its self attention, inside a `with` block; leaving it restores the model.

    method: a NeighborhoodMethod or BlockMethod, whose grid is that of the latent tokens (frames, height, width after patching). layers:
    indices of attention modules in the order of `model.modules()`, None for all; cross attention is left alone by itself. extra: text
    tokens in joint attention, None for as many as a call has beyond the grid; extra_side: where they stand (first in FLUX, CogVideoX;
    last in HunyuanVideo). Inside the block `handle.calls` counts the calls that ran sparsely: 0 after a run means that the grid is not
    the model's, or that the model passes attention masks.

    Needs the diffusers library (`pip install 'saccade[vision]'`). Raises ValueError when the model has no attention processors.
    """
    if extra_side not in ("first", "last") or (extra is not None and extra < 0):
        raise ValueError(f"extra={extra}, extra_side={extra_side!r}: expected a number of tokens or None, and 'first' or 'last'")
    return SparseTransformer(model, lambda inner: SparseProcessor(inner, method, extra, extra_side), layers)
