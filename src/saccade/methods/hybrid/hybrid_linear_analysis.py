"""The grid of the systematic analysis of hybrids: six linear mixers under one interface, and the ratios at which full layers stand in.

    generation 1, a gate on a vector      hgrn            h = f * h + (1 - f) * silu(c),   o = norm(h) * silu(gate)
    generation 2, products and decay      retnet          S = g S + k v^T,   g = 1 - 2^(-5-h) constant for each head
                                          gla             S = diag(a) S + k v^T,   a = sigmoid(low-rank x)^(1/16)
                                          hgrn-2          S = diag(f) S + (1 - f) v^T,   read by silu(W x)
    generation 3, the delta rule          deltanet        S = (I - b k k^T) S + b k v^T,   k of length 1
                                          gated-deltanet  S = a (I - b k k^T) S + b k v^T,   a one number per head

HGRN's f has a lower bound that rises with depth, in HGRN-2 too. Placement for r:1: full attention at the layers i with
(i + 1) mod (r + 1) = 0, so that the KV cache is 1 / (r + 1) of a transformer's: `saccade.models.decoder.schedule(cell.pattern, layers,
cell.spec)` for every cell of `grid()`.

Source: hybrid-linear-analysis, arXiv 2507.06457.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, format_spec, register
from saccade.methods.linear.deltanet import DeltaNet
from saccade.ops.scan import scan
from saccade.parts.linear import Recurrent, quadratic
from saccade.parts.linear.features import feature_map
from saccade.parts.linear.gates import HeadGate, SigmoidGate, SoftplusGate
from saccade.parts.linear.lower_bound import LowerBound, LowerBoundGate
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.slopes import retention_slopes
from saccade.parts.linear.strength import WriteStrength

Kind = Literal["hgrn", "retnet", "gla", "hgrn-2", "deltanet", "gated-deltanet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GENERATION: Mapping[Kind, int] = {"hgrn": 1, "retnet": 2, "gla": 2, "hgrn-2": 2, "deltanet": 3, "gated-deltanet": 3}
PATTERNS = ("pure", "24:1", "12:1", "6:1", "3:1")


@register
@dataclass(frozen=True, kw_only=True)
class HybridLinearAnalysis(Mixer):
    """kind: which of the six mixers, with the settings of the analysis."""

    kind: Kind = "gated-deltanet"

    info = Info(
        slug="hybrid-linear-analysis", phase="mixer", needs=frozenset({"training"}),
        variants=({"kind": "hgrn"}, {"kind": "retnet"}, {"kind": "gla"}, {"kind": "hgrn-2"}, {"kind": "deltanet"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.kind == "hgrn":
            return HGRNMixer(shape)
        if self.kind == "deltanet":
            return DeltaNet().build(shape)
        inner, norm = shape.heads * shape.head_dim, OutputNorm(shape.heads, shape.head_dim)
        if self.kind == "hgrn-2":
            gate = LowerBoundGate(shape.kv_heads, shape.head_dim, shape.layer, shape.layers)
            return Recurrent(shape, q_map=feature_map("silu"), gate=gate, normaliser=norm)
        out_gate = OutputGate(shape.dim, inner, "silu")
        if self.kind == "retnet":
            gate = HeadGate(retention_slopes(shape.heads))
            return Recurrent(shape, rotary="before", gate=gate, normaliser=norm, out_gate=out_gate, scale=None)
        if self.kind == "gla":
            gate = SigmoidGate(shape.dim, shape.kv_heads, shape.head_dim, rank=16, temperature=16.0)
            return Recurrent(shape, gate=gate, normaliser=norm, out_gate=out_gate, scale=None)
        return Recurrent(
            shape, conv=4, q_map="unit", k_map="unit", gate=SoftplusGate(shape.dim, shape.heads), normaliser=norm, out_gate=out_gate,
            strength=WriteStrength(shape.dim, shape.heads), scale=None,
        )  # fmt: skip


class HGRNMixer(TokenMixer):
    """HGRN: a vector for a state, `(B, heads * head_dim)`; there are no queries and no keys. Each channel is a head of width 1 to the
    scan."""

    batches_padding = True

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        inner = shape.heads * shape.head_dim
        self.f_proj, self.c_proj = (nn.Linear(shape.dim, inner, bias=False) for _ in range(2))
        self.bound = LowerBound(inner, shape.layer, shape.layers)
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out_gate = OutputGate(shape.dim, inner, "silu")
        self.o_proj = nn.Linear(inner, shape.dim, bias=False)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        before = past["h"][..., None, None] if past else None
        y, state = self._run(x, call, lambda *given, **options: scan(
            *given, **options, initial_state=before, return_state=call.keep
        ))  # fmt: skip
        return y, {} if state is None else {"h": state[..., 0, 0]}

    def naive(self, x: Tensor) -> Tensor:
        return self._run(x, self.whole(x), lambda *given, **options: (quadratic(*given, **options), None))[0]

    def _run(self, x: Tensor, call: Call, recur: Callable[..., tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        log_f, room = self.bound(self.f_proj(x))
        written = call.masked((room * F.silu(self.c_proj(x)).to(room.dtype)).mT).unsqueeze(-1)
        one = torch.ones_like(written[:, :1])
        out, state = recur(one, one, written, log_decay=call.masked(log_f.mT), scale=1.0)
        h = out.squeeze(-1).mT.to(x.dtype)
        return self.o_proj(self.out_gate(self.norm(h), x)), state


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the grid. kind: its linear mixer. pattern: "pure" or "r:1", for `saccade.models.decoder.schedule`."""

    kind: Kind
    pattern: str

    @property
    def spec(self) -> str:
        """The linear mixer, as a spec."""
        return format_spec("hybrid-linear-analysis", {"kind": self.kind})

    @property
    def full_share(self) -> float:
        """Full layers among all, and so the size of the KV cache against a transformer's."""
        return 0.0 if self.pattern == "pure" else 1 / (int(self.pattern.split(":")[0]) + 1)

    def state_numbers(self, shape: MixerShape) -> int:
        """Numbers that one linear layer keeps for one sequence, whatever its length (a short convolution's inputs apart)."""
        inner = shape.heads * shape.head_dim
        return inner if GENERATION[self.kind] == 1 else inner * shape.head_dim


def grid(kinds: Sequence[str] = KINDS, patterns: Sequence[str] = PATTERNS) -> list[Cell]:
    """Every mixer at every ratio, the mixers in the order of their generations. ValueError for unknown kinds and patterns."""
    known: list[Kind] = []
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        known.append(kind)
    for pattern in patterns:
        many, _, few = pattern.partition(":")
        if pattern != "pure" and not (many.isdecimal() and few == "1"):
            raise ValueError(f"pattern {pattern!r} is not 'pure' or a ratio to one full layer, such as '3:1'")
    return [Cell(kind=kind, pattern=pattern) for kind in known for pattern in patterns]
