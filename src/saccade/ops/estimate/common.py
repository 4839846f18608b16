"""What the estimates share: the grid of tiles, which implementation runs, and what is refused."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core.tilemath import row_tiles
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun

Impl = Literal["auto", "reference", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "triton")
WIDEST = 256  # head dim up to which the kernels hold a row in one piece


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Query tiles of `block_q` rows by key tiles of `block_k` keys over n_q queries and n_k keys, all in tokens.

    causal: query i sits at position `n_k - n_q + i`; a tile is visible when at least one of its pairs is.
    """

    n_q: int
    n_k: int
    block_q: int
    block_k: int
    causal: bool = True

    def __post_init__(self) -> None:
        for name, least in (("n_q", 0), ("n_k", 0), ("block_q", 1), ("block_k", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"TileGrid({name}={value!r}) is not a whole number of at least {least}")

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block_q: int, block_k: int, causal: bool = True) -> TileGrid:
        """The grid over q `(B, Hq, Nq, D)` and k `(B, Hk, Nk, D)`."""
        return cls(n_q=q.shape[2], n_k=k.shape[2], block_q=block_q, block_k=block_k, causal=causal)

    @property
    def rows(self) -> int:
        """Number of query tiles, Tq."""
        return math.ceil(self.n_q / self.block_q)

    @property
    def columns(self) -> int:
        """Number of key tiles, Tk."""
        return math.ceil(self.n_k / self.block_k)

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.n_k - self.n_q

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """bool `(Tq, Tk)`: tiles with at least one visible pair."""
        begin = torch.arange(self.columns, device=device) * self.block_k
        if not self.causal:
            return torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        _, last = row_tiles(self.n_q, self.block_q, self.offset, torch.device(device))
        return begin < last.unsqueeze(-1)

    def forced(self, sinks: int, local: int, device: torch.device | str = "cpu") -> Tensor:
        """bool `(Tq, Tk)`: tiles that hold one of the first `sinks` keys, or of any row's `local` latest keys, its own included."""
        begin = torch.arange(self.columns, device=device) * self.block_k
        first, last = row_tiles(self.n_q, self.block_q, self.offset, torch.device(device))
        near = (begin + self.block_k - 1 > (first - local).unsqueeze(-1)) & (begin < last.unsqueeze(-1))
        return (begin < sinks) | (near if local else torch.zeros_like(near))

    def most_forced(self, sinks: int, local: int) -> int:
        """An upper bound of the forced tiles in a row of tiles."""
        near = (self.block_q + local - 3) // self.block_k + 2 if local else 0
        return min(self.columns, math.ceil(sinks / self.block_k) + near)


_local = threading.local()


def note(op: str, impl: str, x: Tensor, n_q: int, n_k: int) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled graph runs what it was traced with
    _local.run = LastRun(
        op=op, impl=impl, n_q=n_q, n_k=n_k, heads=x.shape[1], device=str(x.device), dtype=str(x.dtype).removeprefix("torch.")
    )


def last_estimate() -> LastRun:
    """The last estimate or choice of this thread, and the implementation that made it. ValueError when there was none."""
    run = getattr(_local, "run", None)
    if run is None:
        raise ValueError("nothing has been estimated in this thread yet: call one of saccade.ops.estimate first")
    return run


def in_torch(impl: str, x: Tensor) -> str:
    """Which of the two in plain torch runs where the kernels don't: what is made for CPUs, or "reference"."""
    return "cpu" if impl == "auto" and x.device.type == "cpu" else "reference"


def use_triton(op: str, impl: str, x: Tensor, unsupported: str | None = None) -> bool:
    """Whether the kernels run. unsupported: why they can't, which `auto` accepts and `triton` refuses."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        require_triton(op, x)
        if unsupported:
            raise ValueError(f'{op}: impl "triton" was asked for, but {unsupported}: use impl "auto" or "reference"')
    return impl == "triton" or (impl == "auto" and runs_on(x) and unsupported is None)


def kernel_limits(x: Tensor) -> str | None:
    """Why a tensor can't go through the kernels, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    if x.shape[-1] > WIDEST:
        return f"the kernels take head dims up to {WIDEST}, not {x.shape[-1]}"
    return None


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def exact(x: Tensor) -> torch.dtype:
    """The dtype that estimates are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_scale(op: str, scale: float | None, dim: int) -> float:
    """The factor on q.k; default `dim ** -0.5`."""
    if scale is None:
        return dim**-0.5
    if not scale > 0:
        raise ValueError(f"{op}: scale {scale!r} must be positive")
    return float(scale)


def check_softcap(op: str, softcap: float | None) -> float:
    """The cap, 0.0 for none."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap {softcap!r} must be positive, or None for no cap")
    return 0.0 if softcap is None else float(softcap)


def check_heads(op: str, x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch tensor of shape (batch, heads, tokens, dim), not {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}: expected a floating-point (batch, heads, tokens, dim)")


def check_block(op: str, name: str, block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{op}: {name}={block!r} is not a whole number of tokens from 1 on")


def rows_first(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, copied only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
