"""A small recurrent network that reads token embeddings and says how much each past token matters to the newest one.

    z_t = GRU(x_t, z_{t-1}),    logit of sigma_j = MLP([z_j, z_t, z_j * z_t])

x are embeddings scaled to mean square 1. Source: adore, arXiv 2407.02328; the pairing is not given in a usable form, the product is added
here: it lets the network compare the two. All is float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenController(nn.Module):
    """width: of the embeddings. dim: of the recurrent state. hidden: of the MLP."""

    def __init__(self, width: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, dim, batch_first=True)
        self.past, self.now, self.both = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.last = nn.Linear(hidden, 1)

    def read(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """States z `(B, m, dim)` of tokens with embeddings x `(B, m, width)`, after the state `before (B, dim)`, 0 at the start."""
        x = x.to(self.last.weight.dtype)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return self.gru(x, None if before is None else before.unsqueeze(0).contiguous())[0]

    def importance(self, z: Tensor, now: Tensor) -> Tensor:
        """Logits `(B, t, n)` of tokens with states z `(B, n, dim)` for those with states now `(B, t, dim)`."""
        # the product's part is one matrix product: both(z_j * z_t) = z_j @ (W * z_t)
        joint = torch.einsum("bnd,hd,btd->btnh", z, self.both.weight, now)
        return self.last(F.gelu(self.past(z).unsqueeze(1) + self.now(now).unsqueeze(2) + joint)).squeeze(-1)

    @classmethod
    def of(cls, tensor: Callable[[str], Tensor]) -> TokenController:
        """From named tensors, such as those of a plan."""
        gru, past = tensor("gru.weight_ih_l0"), tensor("past.weight")
        with torch.device("meta"):
            made = cls(gru.shape[1], past.shape[1], past.shape[0])
        made.load_state_dict({name: tensor(name) for name in made.state_dict()}, assign=True)
        return made.requires_grad_(False)
