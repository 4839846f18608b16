"""A small network that says where a text's content changes, from the keys around each place, and the labels it learns from.

A gap p lies between tokens p - 1 and p. The network looks at w = `reach` keys on each side (all heads side by side, C channels):

    x' = LayerNorm(x + SelfAttention(x)) over the 2w keys;   a, b = means of the two halves
    logit = MLP([a, b, |a - b|, a * b, cos(a, b)])

The label compares how much attention A (mean over heads) the two sides get from the rows r >= p + w, which see both whole:

    past = sum_r sum_{j = p-w}^{p-1} A_rj,   future = sum_r sum_{j = p}^{p+w-1} A_rj,   y = sigmoid(4 ln(max / min))

so y is 1/2 where both sides matter alike. Source: dhsa, arXiv 2510.24606.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.parts.probe import ROWS, row_probabilities

EPSILON = 1e-6  # added to both sums before they are divided
LATER_ROWS = 4096  # rows after a gap that its label counts
WINDOWS = 1 << 24  # numbers held for the windows of gaps at a time


class BoundaryPredictor(nn.Module):
    """channels: C, a multiple of `heads`. reach: keys on each side of a gap. hidden: width of the MLP."""

    mean: Tensor
    spread: Tensor

    def __init__(self, channels: int, reach: int, heads: int = 4, hidden: int = 256) -> None:
        if channels % heads:
            raise ValueError(f"keys with {channels} channels do not divide into the {heads} heads of the boundary predictor")
        super().__init__()
        self.reach, self.heads = reach, heads
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        self.mix = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.first, self.last = nn.Linear(4 * channels + 1, hidden), nn.Linear(hidden, 1)

    def forward(self, keys: Tensor) -> Tensor:
        """Logits `(B, n - 2w + 1)` of the gaps w ... n - w in keys `(B, n, C)`, n >= 2w."""
        x = (keys - self.mean) / self.spread
        mixed = torch.cat([x, self.mix(x)], dim=-1)  # projected once per token, however many windows hold it
        windows = mixed.unfold(1, 2 * self.reach, 1).mT  # (B, gaps, 2w, 4C), a view
        step = max(1, WINDOWS // (windows.shape[0] * windows.shape[2] * windows.shape[3]))
        return torch.cat([self._judge(part) for part in windows.split(step, dim=1)], dim=1)

    def _judge(self, windows: Tensor) -> Tensor:
        x, *mixed = windows.chunk(4, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in mixed)
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        x = self.norm(x + self.out((weights @ v).transpose(-3, -2).flatten(-2)))
        a, b = x[..., : self.reach, :].mean(-2), x[..., self.reach :, :].mean(-2)
        features = torch.cat([a, b, (a - b).abs(), a * b, F.cosine_similarity(a, b, dim=-1).unsqueeze(-1)], dim=-1)
        return self.last(F.gelu(self.first(features))).squeeze(-1)


def boundary_labels(q: Tensor, k: Tensor, reach: int, *, scale: float, softcap: float | None = None) -> Tensor:
    """Soft labels y `(B, n)` float32 of the gaps before each token; nan where a side is not whole or no row sees both.

    q `(B, Hq, n, D)`, k `(B, Hk, n, D)`: dense causal attention of one sequence, whose map is summed in float64, a few rows at a time.
    """
    n = k.shape[2]
    labels = torch.full((k.shape[0], n), torch.nan, device=k.device)
    if n <= 2 * reach:
        return labels
    gaps = torch.arange(reach, n - reach, device=k.device)
    sums = torch.zeros(2, k.shape[0], len(gaps), dtype=torch.float64, device=k.device)
    for rows in torch.arange(2 * reach, n, device=k.device).split(ROWS):
        mean = row_probabilities(q, k, rows, scale=scale, softcap=softcap).to(torch.float64).mean(1)
        before = F.pad(mean.cumsum(-1), (1, 0))
        runs = before[..., reach:] - before[..., :-reach]  # entry s: the keys s ... s + w - 1
        later = rows.unsqueeze(-1) - gaps - reach
        counted = ((later >= 0) & (later < LATER_ROWS)).to(torch.float64)
        for side, first in enumerate((0, reach)):
            sums[side] += (runs[..., first : first + len(gaps)] * counted).sum(-2)
    ratio = (sums.amax(0) + EPSILON) / (sums.amin(0) + EPSILON)
    labels[:, gaps] = torch.sigmoid(4 * ratio.log()).float()
    return labels


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy weighted by `|y - p| ** gamma`: the focal loss for soft labels, the mean over entries."""
    off = (labels - torch.sigmoid(logits)).abs()
    return (off**gamma * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).mean()


def train_predictor(
    keys: Tensor, labels: Tensor, *, reach: int, hidden: int, steps: int, gaps: int = 128, rate: float = 1e-3
) -> dict[str, Tensor]:
    """The state of a BoundaryPredictor after `steps` steps of Adam on `gaps` gaps each, the rate falling to 0; the same every time.

    keys `(n, C)`, labels `(n,)` with nan where there is nothing to learn. Raises ValueError when that is so everywhere.
    """
    known = labels.isfinite().nonzero().squeeze(-1)
    if not len(known):
        raise ValueError(f"no sample is longer than {2 * reach} tokens: there is no gap to learn boundaries from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = BoundaryPredictor(keys.shape[-1], reach, hidden=hidden)
    keys = keys.float()
    net.mean.copy_(keys.mean(0))
    net.spread.copy_(keys.std(0).clamp(min=EPSILON))
    net.to(keys.device)
    generator = torch.Generator().manual_seed(0)
    around = torch.arange(-reach, reach, device=keys.device)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            picked = known[torch.randint(len(known), (gaps,), generator=generator).to(keys.device)]
            logits = net(keys[picked.unsqueeze(-1) + around]).squeeze(-1)
            loss = focal_loss(logits, labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def boundary_scores(keys: Tensor, state: dict[str, Tensor], reach: int) -> Tensor:
    """How likely the content changes before each token: sigmoid of the logits `(B, n)` for keys `(B, n, C)`; -inf where a side is
    not whole."""
    scores = keys.new_full(keys.shape[:2], -torch.inf)
    if keys.shape[1] >= 2 * reach:
        state = {name: value.to(keys.device, keys.dtype) for name, value in state.items()}
        with torch.device("meta"):
            net = BoundaryPredictor(keys.shape[-1], reach, hidden=state["last.weight"].shape[-1])
        with torch.no_grad():
            logits = torch.func.functional_call(net, state, (keys,))
        scores[:, reach : keys.shape[1] - reach + 1] = torch.sigmoid(logits)
    return scores
