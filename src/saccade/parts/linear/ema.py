"""Damped exponential moving averages with several features a channel: as a convolution, and token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.parts.linear.fft_conv import fft_convolve


class DampedEMA(nn.Module):
    """`s_t = p b x_t + r s_{t-1}`,  `y_t = sum over features of c s_t / sqrt(h) + w x_t`,  `r = 1 - p a`.

    p = sigmoid(delta) and a = sigmoid(alpha), b, c are learned for each channel and each of its h features, w `(dim,)` for each channel.
    Many tokens are one convolution with the kernel `c p b r^t`, plus what is left of the state. direct: whether there is `w x_t`.
    Source: mega.
    """

    def __init__(self, dim: int, features: int, direct: bool = True) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features}: a moving average needs at least 1 feature a channel")
        self.features = features
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(dim, features)) for _ in range(2))
        sign = 1.0 - 2.0 * (torch.arange(features) % 2)
        self.beta = nn.Parameter(sign + 0.02 * torch.randn(dim, features))
        self.gamma = nn.Parameter(torch.randn(dim, features))
        self.omega = nn.Parameter(torch.randn(dim)) if direct else None

    def rates(self, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(`p b`, `log r`, `c / sqrt(h)`), each `(dim, h)`."""
        share = self.delta.to(wide).sigmoid()
        # gates that are all but shut round to r = 0, whose logarithm is not finite
        left = torch.log1p((-share * self.alpha.to(wide).sigmoid()).clamp(min=torch.finfo(wide).eps - 1))
        return share * self.beta.to(wide), left, self.gamma.to(wide) * self.features**-0.5

    def kernel(self, n: int, wide: torch.dtype) -> Tensor:
        """`(dim, n)`: what a token adds to the average 0 ... n - 1 tokens later."""
        write, left, read = self.rates(wide)
        times = torch.arange(n, device=left.device, dtype=wide)
        return torch.einsum("dh,dht->dt", write * read, (left.unsqueeze(-1) * times).exp())

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y `(B, N, dim)`, state `(B, dim, h)` after the last token) of x `(B, N, dim)` behind a state; float32 at least inside."""
        wide = torch.promote_types(x.dtype, torch.float32)
        write, left, read = self.rates(wide)
        given, n = x.to(wide), x.shape[1]
        if n == 1:
            after = write * given[:, 0, :, None]
            after = after if state is None else after + left.exp() * state
            y = (after * read).sum(-1).unsqueeze(1)
        else:
            times = torch.arange(n, device=x.device, dtype=wide)
            powers = (left.unsqueeze(-1) * times).exp()
            y = fft_convolve(given, torch.einsum("dh,dht->dt", write * read, powers))
            after = write * torch.einsum("bnd,dhn->bdh", given, powers.flip(-1))
            if state is not None:
                later = powers * left.exp().unsqueeze(-1)
                y = y + torch.einsum("bdh,dhn->bnd", state * read, later)
                after = after + later[..., -1] * state
        return (y + self._direct(given)).to(x.dtype), after

    def one_by_one(self, x: Tensor) -> Tensor:
        """y of a whole sequence by the recurrence: the oracle."""
        wide = torch.promote_types(x.dtype, torch.float32)
        write, left, read = self.rates(wide)
        state, outs = torch.zeros_like(write), []
        for token in x.to(wide).unbind(1):
            state = write * token.unsqueeze(-1) + left.exp() * state
            outs.append((state * read).sum(-1) + self._direct(token))
        return torch.stack(outs, 1).to(x.dtype)

    def _direct(self, x: Tensor) -> Tensor | float:
        return 0.0 if self.omega is None else self.omega.to(x.dtype) * x


class BothEMA(nn.Module):
    """One average from the start and one, with parameters of its own, from the end, added; for layers that read all tokens."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.there, self.back = DampedEMA(dim, features), DampedEMA(dim, features, direct=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, after = self.there(x)
        return y + self.back(x.flip(1))[0].flip(1), after

    def one_by_one(self, x: Tensor) -> Tensor:
        return self.there.one_by_one(x) + self.back.one_by_one(x.flip(1)).flip(1)
