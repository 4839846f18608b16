"""Softmax attention as a sum of recurrent networks, one for every order of its Taylor series, and what may take its denominator's place.

    exp(s) = sum_n s^n / n!,   s_tj = q_t . k_j D^-1/2,   (q . k)^n = q^(x n) . k^(x n)      (x n: the n-th tensor power)
    H^n_t = H^n_{t-1} + k_t^(x n) v_t^T  (D^n x D),   numerator_t = sum_n q_t^(x n) H^n_t / (n! D^(n/2)),   denominator_t the same of v = 1
    y_t = W_o (numerator_t / denominator_t),   or a norm of the numerator in each head, a gate, or nothing in the place of the division

Linear attention is the first order alone. A norm per head makes any positive denominator irrelevant, so normalised sums of exponentials
equal normalised softmax attention. Up to `order` the powers are the features of one recurrence of fixed size, `C(D + order, order)` times
D numbers a head; `cached` keeps the keys instead and takes the same polynomial of each logit, as orders of ten and more need.

Source: softmax-as-rnn, arXiv 2507.23632.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.cached import CachedMixer
from saccade.methods.linear.softmax import Softmax
from saccade.parts.linear import Recurrent
from saccade.parts.linear.features import feature_map
from saccade.parts.linear.gates import Gated
from saccade.parts.linear.normalise import Normaliser
from saccade.parts.linear.pointwise import pointwise_read
from saccade.parts.linear.powers import TensorPowers

Denominator = Literal["sum", "detached", "length", "gate", "layer", "rms", "l2", "none"]
KERNELS = ("taylor", "exp", "relu", "elu", "cosine")
MAPS = {"relu": "relu", "elu": "elu+1", "cosine": "unit"}


@register
@dataclass(frozen=True, kw_only=True)
class SoftmaxAsRnn(Mixer):
    """kernel: "taylor" (the series up to power `order`), "exp", or the maps "relu", "elu" (elu + 1) and "cosine" of linear attention.

    denominator: "sum" (softmax's), "detached" (the same without its gradient), "length" (tokens so far), "gate" (a sigmoid per head
    instead), "layer", "rms" or "l2" (a norm per head instead; l2 has no weights), or "none". input_gate: a sigmoid per head on the
    values. cached: keep keys rather than powers (taylor; exp always does). clamp: largest logit of exp where nothing divides by its sum.
    """

    kernel: Literal["taylor", "exp", "relu", "elu", "cosine"] = "taylor"
    order: int = 2
    denominator: Denominator = "rms"
    input_gate: bool = False
    cached: bool = False
    clamp: float = 5.0

    info = Info(
        slug="softmax-as-rnn", phase="mixer", needs=frozenset({"training"}),
        variants=(
            {"order": 4, "denominator": "sum"}, {"order": 3, "denominator": "l2", "input_gate": True},
            {"kernel": "elu", "denominator": "sum"}, {"kernel": "cosine", "denominator": "gate"},
            {"kernel": "relu", "denominator": "length"}, {"kernel": "exp", "denominator": "layer"},
            {"order": 12, "cached": True, "denominator": "sum"},
        ),
        opts_out={"constant": "with cached=True or kernel='exp' the keys and values of all tokens are kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is not known: use one of {', '.join(KERNELS)}")
        if self.denominator not in get_args(Denominator):
            raise ValueError(f"denominator={self.denominator!r} is not known: use one of {', '.join(get_args(Denominator))}")
        if self.order < 0:
            raise ValueError(f"order={self.order}: give the highest power of the series, at least 0")
        if self.cached and self.kernel in MAPS:
            raise ValueError(f"kernel={self.kernel!r} has a state of fixed size: leave out cached=True")

    def build(self, shape: MixerShape) -> TokenMixer:
        return (Kernels if self.cached or self.kernel == "exp" else Powers)(shape, self)

    def weigh(self, s: Tensor, top: Tensor) -> Tensor:
        """The weight of logits s before any division; top: the largest of each row."""
        if self.kernel == "exp":
            return (s - top).exp() if self.denominator in ("sum", "detached") else s.clamp(max=self.clamp).exp()
        return taylor(s, self.order)


def taylor(s: Tensor, order: int) -> Tensor:
    """`sum_{n <= order} s^n / n!`."""
    total = torch.ones_like(s)
    for n in range(order, 0, -1):
        total = 1 + s / n * total
    return total


def order_sizes(q: Tensor, k: Tensor, orders: int = 100) -> Tensor:
    """Which powers carry the mass: the mean of `|s^n / n!|` over all causal pairs of q, k `(B, H, N, D)`, float64 `(orders,)`."""
    s = (q.double() @ k.double().mT) * q.shape[-1] ** -0.5
    logs = s[..., torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()].abs().log()
    return torch.stack([(n * logs - math.lgamma(n + 1)).exp().mean() if n else torch.ones_like(logs[0, 0, 0]) for n in range(orders)])


class InPlaceOfTheSum(Normaliser):
    """The denominator, of values that carry a 1 behind their channels."""

    def __init__(self, shape: MixerShape, kind: Denominator) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(shape.head_dim)) if kind in ("layer", "rms") else None
        self.bias = nn.Parameter(torch.zeros(shape.head_dim)) if kind == "layer" else None

    def before(self, v: Tensor, call: Call) -> Tensor:
        return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        out, total = out[..., :-1], out[..., -1:]
        if self.kind in ("sum", "detached"):
            total = total.detach() if self.kind == "detached" else total
            return out / total.masked_fill(total == 0, float("inf"))
        if self.kind == "length":
            n = call.start[:, None] + torch.arange(1, out.shape[2] + 1, device=out.device)
            return out / n[:, None, :, None]
        if self.weight is not None:
            weight = self.weight.to(out.dtype)
            if self.bias is not None:
                return nn.functional.layer_norm(out, weight.shape, weight, self.bias.to(out.dtype))
            return nn.functional.rms_norm(out, weight.shape, weight, 1e-6)
        return nn.functional.normalize(out, dim=-1) if self.kind == "l2" else out


class HeadGate(nn.Module):
    """`y * sigmoid(W x)`, one number per token and head: y `(B, N, H * D)`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, heads)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        gate = self.project(x).sigmoid()
        return (y.unflatten(-1, (gate.shape[-1], -1)) * gate.unsqueeze(-1)).flatten(-2)


class InputGate(nn.Module):
    """Values `(B, H, N, D)` times a sigmoid per token and head."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__()
        self.project = nn.Linear(shape.dim, shape.kv_heads)

    def forward(self, v: Tensor, x: Tensor) -> Tensor:
        return v * self.project(x).sigmoid().mT.unsqueeze(-1)


class Powers(Recurrent):
    """The recurrence over tensor powers, or over the maps of linear attention."""

    def __init__(self, shape: MixerShape, method: SoftmaxAsRnn) -> None:
        series = method.kernel == "taylor"
        maps = [TensorPowers(shape.head_dim, method.order) if series else feature_map(MAPS[method.kernel]) for _ in range(2)]
        super().__init__(
            shape, q_map=maps[0], k_map=maps[1], normaliser=InPlaceOfTheSum(shape, method.denominator), scale=1.0 if series else None,
            out_gate=HeadGate(shape.dim, shape.heads) if method.denominator == "gate" else None,
        )  # fmt: skip
        self.method = method
        self.input_gate = InputGate(shape) if method.input_gate else None

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        # sums and quotients of what is read must not be rounded to half precision on their way
        wide = torch.promote_types(q.dtype, torch.float32)
        return super().features(q.to(wide), k.to(wide), call)

    def write(self, x: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Gated, Tensor, Tensor | None]:
        return super().write(x, k, (v if self.input_gate is None else self.input_gate(v, x)).to(k.dtype), past, call)

    def naive(self, x: Tensor) -> Tensor:
        if self.method.kernel != "taylor":
            return super().naive(x)
        call = self.whole(x)
        q, k, v, _ = self.project(x, {}, call)
        v = v if self.input_gate is None else self.input_gate(v, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(wide).repeat_interleave(self.heads // y.shape[1], 1) for y in (q, k, v))
        weights = taylor(q @ k.mT * q.shape[-1] ** -0.5, self.method.order).tril()
        return self.finish(self.normaliser.after(weights @ self.normaliser.before(v, call), call, None), x)


class Kernels(CachedMixer):
    """Any kernel of the logits over keys that are all kept."""

    def __init__(self, shape: MixerShape, method: SoftmaxAsRnn) -> None:
        super().__init__(shape, Softmax(rotary=False))
        self.rule = method
        self.normaliser = InPlaceOfTheSum(shape, method.denominator)
        self.out_gate = HeadGate(shape.dim, shape.heads) if method.denominator == "gate" else None
        self.input_gate = InputGate(shape) if method.input_gate else None

    def values(self, v: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.normaliser.before(v if self.input_gate is None else self.input_gate(v, x), call)

    def read(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call, own: Tensor, places: Tensor) -> Tensor:
        return self.normaliser.after(pointwise_read(q, k, v, self.rule.weigh, own=own, places=places), call, None)

    def define(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor, call: Call) -> Tensor:
        s = q @ k.mT * q.shape[-1] ** -0.5
        top = s.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True).detach()
        weights = self.rule.weigh(torch.where(mask, s, top), top).masked_fill(~mask, 0.0)
        return self.normaliser.after(weights @ v, call, None)
