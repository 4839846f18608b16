"""Short and long depthwise convolutions side by side, which outside training are one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.parts.linear.fft_conv import fft_convolve
from saccade.parts.linear.tokens import last_tokens


class ShortLongConv(nn.Module):
    """`y = sum over branches of norm(kernel * x)`: one long kernel, and short ones of these widths.

    long: tokens of the long kernel, 0 for none. batch_norm: a batch norm of each branch; in training it takes the statistics of the batch,
    where every token counts, afterwards those it has collected, and all branches are merged into one kernel. Source: chela.
    """

    def __init__(self, dim: int, long: int, short: Sequence[int], batch_norm: bool) -> None:
        super().__init__()
        if long < 0 or any(width < 1 for width in short) or not (long or short):
            raise ValueError(f"long={long}, short={tuple(short)}: give at least one kernel, of at least 1 token")
        self.reach = max(long, *short, 1)
        self.long = ImplicitKernel(dim, long) if long else None
        self.short = nn.ParameterList([nn.Parameter(torch.empty(dim, width).uniform_(-1, 1) * width**-0.5) for width in short])
        branches = len(self.short) + bool(long)
        self.norms = nn.ModuleList([nn.BatchNorm1d(dim) for _ in range(branches)]) if batch_norm else None

    def kernels(self) -> list[Tensor]:
        """Each branch's kernel `(dim, width)`, by lag, the long one first."""
        return [*([] if self.long is None else [self.long()]), *self.short]

    def merged(self, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """The one kernel `(dim, reach)` and the shift `(dim,)` that do what all branches and their norms do outside training."""
        total, shift = 0.0, 0.0
        for index, kernel in enumerate(self.kernels()):
            kernel = F.pad(kernel.to(wide), (0, self.reach - kernel.shape[1]))
            if self.norms is not None:
                norm = self.norms[index]
                assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
                factor = norm.weight.to(wide) * (norm.running_var.to(wide) + norm.eps).rsqrt()
                kernel = kernel * factor[:, None]
                shift = shift + norm.bias.to(wide) - norm.running_mean.to(wide) * factor
            total = total + kernel
        assert isinstance(total, Tensor)
        return total, shift if isinstance(shift, Tensor) else total.new_zeros(total.shape[0])

    def forward(self, x: Tensor, tail: Tensor | None = None, before: int = 0) -> tuple[Tensor, Tensor]:
        """(y, the new tail): x `(B, N, dim)`, tail `(B, reach - 1, dim)` the inputs before, of which the last `before` are tokens."""
        wide = torch.promote_types(x.dtype, torch.float32)
        held = x.new_zeros(x.shape[0], self.reach - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
        joined = torch.cat([held[:, self.reach - 1 - min(before, self.reach - 1) :], x], dim=1)
        after = last_tokens(held, x, None)
        if self.training and self.norms is not None:
            outs = [fft_convolve(joined, kernel)[:, -x.shape[1] :].to(x.dtype) for kernel in self.kernels()]
            return torch.stack([norm(out.mT).mT for norm, out in zip(self.norms, outs, strict=True)]).sum(0), after
        kernel, shift = self.merged(wide)
        if x.shape[1] == 1:
            y = torch.einsum("bnd,dn->bd", joined.to(wide), kernel[:, : joined.shape[1]].flip(1)).unsqueeze(1)
        else:
            y = fft_convolve(joined, kernel)[:, -x.shape[1] :]
        return (y + shift).to(x.dtype), after

    def by_branch(self, x: Tensor) -> Tensor:
        """y of a whole sequence outside training, each branch as an N x N matrix for every channel: the oracle."""
        wide = torch.promote_types(x.dtype, torch.float32)
        i = torch.arange(x.shape[1], device=x.device)
        lag, total = i[:, None] - i, x.new_zeros(x.shape, dtype=wide)
        for index, kernel in enumerate(self.kernels()):
            inside = (lag >= 0) & (lag < kernel.shape[1])
            matrix = kernel.to(wide)[:, lag.clamp(0, kernel.shape[1] - 1)] * inside
            out = torch.einsum("dij,bjd->bid", matrix, x.to(wide))
            if self.norms is not None:
                norm = self.norms[index]
                assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
                out = (out - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            total = total + out
        return total.to(x.dtype)


class ImplicitKernel(nn.Module):
    """A kernel `(dim, length)` by lag: a small network of the lag times an exponential window with a learned rate for each channel."""

    def __init__(self, dim: int, length: int, waves: int = 8, width: int = 32) -> None:
        super().__init__()
        self.length, self.waves = length, waves
        self.first, self.last = nn.Linear(2 * waves + 1, width), nn.Linear(width, dim, bias=False)
        for linear in (self.first, self.last):
            linear.keeps_init = True  # pyright: ignore[reportArgumentType] (models that set up their maps alike leave these)
        # from a window over the whole kernel to one over its first hundredth
        self.rate = nn.Parameter(torch.linspace(0.0, math.log(100.0), dim))

    def forward(self) -> Tensor:
        weight = self.first.weight
        lag = torch.arange(self.length, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        part = lag[:, None] / self.length
        angle = 2 * math.pi * part * torch.arange(1, self.waves + 1, device=weight.device)
        hidden = self.first(torch.cat([part, angle.sin(), angle.cos()], -1).to(weight.dtype)).sin()
        window = torch.exp(-self.rate.to(lag.dtype).exp()[:, None] * lag / self.length)
        return self.last(hidden).mT.to(lag.dtype) * window
