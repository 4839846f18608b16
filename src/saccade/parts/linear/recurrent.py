"""The recurrent layer: projection, convolution, feature map, gate, scan, normaliser, output gate, projection.

    q, k, v = conv(W x)          phi(q), phi(k), with the rotary embedding before or after phi
    g = gate(x, k)               log decays; some gates scale the keys
    S_t = e^(g_t) S_{t-1} + k_t v_t^T          or the delta rule, with write strengths beta = strength(x)
    y = W_o (out_gate(x) * normaliser(phi(q_t) S_t))

A paper is a choice of these parts. Where it does something else in between, its layer is a subclass that overrides one of the small
methods: `project`, `features`, `write`, `finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from saccade.core import Call, MixerShape, TokenMixer
from saccade.ops.scan import Impl, ScanState, scan
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.features import FeatureMap, feature_map
from saccade.parts.linear.gates import Gate, Gated, NoGate, heads_first
from saccade.parts.linear.normalise import Normaliser
from saccade.parts.linear.quadratic import quadratic
from saccade.parts.linear.rotary import RotaryEmbedding

Recur = Callable[..., tuple[Tensor, Any]]


class Recurrent(TokenMixer):
    """One linear recurrence with heads.

    shape: q has `shape.heads` heads, k and v have `shape.kv_heads`, shared by equal groups. key_dim, value_dim: channels of a head in
    q, k and in v (default: shape.head_dim). conv: width of the short convolution on q, k and v, 0 for none. q_map, k_map: feature maps,
    by name or as modules. gate: default none. strength: of the delta rule, None for plain linear attention. normaliser: default none.
    out_gate: default none. rotary: "before" or "after" the feature maps, or None. scale: on the scores (default `F ** -0.5`).
    impl: which implementation of the scan runs.
    """

    batches_padding = True

    def __init__(
        self,
        shape: MixerShape,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 0,
        conv_activation: str | None = "silu",
        q_map: str | FeatureMap = "identity",
        k_map: str | FeatureMap = "identity",
        gate: Gate | None = None,
        strength: nn.Module | None = None,
        normaliser: Normaliser | None = None,
        out_gate: nn.Module | None = None,
        rotary: Literal["before", "after"] | None = None,
        theta: float = 10000.0,
        scale: float | None = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(shape)
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.key_dim, self.value_dim = key_dim or shape.head_dim, value_dim or shape.head_dim
        widths = (self.heads * self.key_dim, self.kv_heads * self.key_dim, self.kv_heads * self.value_dim)
        self.widths = list(widths)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(shape.dim, width, bias=bias) for width in widths)
        self.o_proj = nn.Linear(self.heads * self.value_dim, shape.dim, bias=bias)
        self.conv = ShortConv(sum(widths), conv, conv_activation) if conv else None
        self.q_map = feature_map(q_map, self.heads, self.key_dim) if isinstance(q_map, str) else q_map
        self.k_map = feature_map(k_map, self.kv_heads, self.key_dim) if isinstance(k_map, str) else k_map
        self.gate = gate or NoGate()
        self.strength = strength
        self.normaliser = normaliser or Normaliser()
        self.out_gate = out_gate
        if rotary not in (None, "before", "after"):
            raise ValueError(f"rotary={rotary!r} is not known: use 'before' or 'after' the feature map, or None")
        self.placed = rotary
        turned = self.q_map.width(self.key_dim) if rotary == "after" else self.key_dim
        self.rotary = RotaryEmbedding(turned, theta) if rotary else None
        self.scale = scale
        self.impl: Impl = "auto"

    # -- the small methods -------------------------------------------------------------------------------------------------

    def project(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q `(B, H, N, D)`, k `(B, Hk, N, D)`, v `(B, Hk, N, Dv)`, and what to keep."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        kept: dict[str, Tensor] = {}
        if self.conv is not None:
            (q, k, v), kept["conv"] = self.conv.each((q, k, v), past.get("conv"), call.lengths)
        return heads_first(q, self.heads), heads_first(k, self.kv_heads), heads_first(v, self.kv_heads), kept

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """phi(q) and phi(k), the rotary embedding included."""
        if self.placed == "before" and self.rotary is not None:
            q, k = self.rotary(q, call.positions), self.rotary(k, call.positions)
        q, k = self.q_map(q), self.k_map(k)
        if self.placed == "after" and self.rotary is not None:
            q, k = self.rotary(q, call.positions), self.rotary(k, call.positions)
        return q, k

    def write(self, x: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Gated, Tensor, Tensor | None]:
        """The gate's result (log decays and keys), the values as they are written, and the write strengths or None."""
        beta = None if self.strength is None else self.strength(x)
        return self.gate(x, k, past.get("gate"), call), self.normaliser.before(v, call), beta

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """y `(B, N, dim)` of what was read and normalised, `(B, H, N, Dv)`."""
        y = out.transpose(1, 2).flatten(2).to(x.dtype)
        y = y if self.out_gate is None else self.out_gate(y, x)
        return self.o_proj(y)

    # -- the three forms ---------------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        before = past.get("s")
        if before is not None and self.normaliser.total:
            before = ScanState(before, past["z"])
        y, state, kept = self._run(x, past, call, lambda *given, **options: scan(
            *given, **options, initial_state=before, impl=self.impl, return_state=call.keep
        ))  # fmt: skip
        if isinstance(state, ScanState):
            kept["s"], kept["z"] = state
        elif state is not None:
            kept["s"] = state
        return y, kept

    def naive(self, x: Tensor) -> Tensor:
        return self._run(x, {}, self.whole(x), lambda *given, **options: (quadratic(*given, **options), None))[0]

    def _run(self, x: Tensor, past: Mapping[str, Any], call: Call, recur: Recur) -> tuple[Tensor, Any, dict[str, Any]]:
        q, k, v, kept = self.project(x, past, call)
        q, k = self.features(q, k, call)
        gated, v, beta = self.write(x, k, v, past, call)
        k, log_decay = gated.keys, gated.log_decay
        if gated.carry is not None:
            kept["gate"] = gated.carry
        if log_decay is not None and log_decay.ndim > 1 and log_decay.shape[1] < self.heads:
            # made from keys that several heads share
            log_decay = log_decay.repeat_interleave(self.heads // log_decay.shape[1], dim=1)
        if call.real is not None:
            # a token that is not real neither decays nor, with a key of 0, writes
            k = call.masked(k)
            if log_decay is not None:
                b, n = x.shape[:2]
                log_decay = call.masked(log_decay[None, :, None].expand(b, -1, n) if log_decay.ndim == 1 else log_decay)
        out, state = recur(q, k, v, log_decay=log_decay, beta=beta, scale=self.scale, normalise=self.normaliser.total)
        out = self.normaliser.after(out, call, gated.level)
        return self.finish(out, x), state, kept
