"""Delta attention: a sparse prefill drifts from dense attention slowly along the rows, so a few dense rows repair those after them.

    O~ = any sparse prefill of q, k, v
    D  = dense attention of the rows 0, gamma, 2 gamma, ... and of the last rows
    O_i = O~_i + (D_g - O~_g),   g = floor(i / gamma) gamma         (O_i = D_i in the last rows)

The row that repairs stands at or before the repaired ones, so nothing comes from the future. The correction is on attention outputs,
head by head, before the output projection. The dense rows cost 1 / gamma of dense attention. Decoding is dense.

Source: delta-attention, arXiv 2505.11254, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, parse_spec, register
from saccade.methods import build
from saccade.parts.delta import anchor_rows, correct, reading_all
from saccade.parts.sink_window import SinkWindow


@register
@dataclass(frozen=True, kw_only=True)
class DeltaAttention(Prefill):
    """Repairs any prefill method.

    base: spec of the method that is repaired, or the method. "streaming-llm(sinks=1024, window=2048)" means its static pattern here:
    the first keys and a sliding window. A base that needs a calibration plan takes it from the plans given to `attach`.
    gamma: rows from one dense row to the next. tail: last rows that are dense, at least (and at least gamma, and what is left of the
    prompt after whole strides besides). how: "delta", or "recompute" to replace the dense rows only (the paper's ablation).
    """

    base: str | Prefill = "streaming-llm"
    gamma: int = 64
    tail: int = 128
    how: Literal["delta", "recompute"] = "delta"

    info = Info(
        slug="delta-attention", phase="prefill", opened={"gamma": 1},
        tiny={"base": "streaming-llm(sinks=2, window=8, block=4)", "gamma": 16, "tail": 16},
        opts_out={
            "chunked": "strides are counted from the first query given, and the last rows of every chunk are dense",
            "stepwise": "the last rows of a prompt and single tokens are dense, rows in the middle of a prompt are not",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("gamma", 1), ("tail", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"delta-attention({name}={value!r}) is not a whole number of at least {least}")
        if self.how not in ("delta", "recompute"):
            raise ValueError(f"delta-attention(how={self.how!r}) is not 'delta' or 'recompute'")
        if isinstance(self.base, Prefill):
            object.__setattr__(self, "base", self.base.spec)
        if not isinstance(self.base, str):
            raise ValueError(f"delta-attention(base={self.base!r}) is not a prefill method: name one, such as 'minference'")
        self.sparse  # noqa: B018  (an unknown base is refused here)

    @property
    def sparse(self) -> Prefill:
        """The method that is repaired."""
        assert isinstance(self.base, str)
        return _built(self.base)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What the base reads; the dense rows are read besides."""
        base = self.sparse
        return base.select(ctx.inside(base.info.slug), q, k, v)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_q, n_k = q.shape[2], k.shape[2]
        rows = anchor_rows(n_q, self.gamma, self.tail, q.device)
        if rows.shape[0] == n_q:
            return ctx.attend(q, k, v, None)
        positions = rows + n_k - n_q
        dense = ctx.attend(q[:, :, rows], k, v, reading_all(positions, n_k), q_positions=positions[None, None])
        base = self.sparse
        return correct(base.attend(ctx.inside(base.info.slug), q, k, v), dense, rows, self.how)


@lru_cache(maxsize=64)
def _built(spec: str) -> Prefill:
    slug, given = parse_spec(spec)
    base = SinkWindow.from_fields(given) if slug == "streaming-llm" else build(spec)
    if not isinstance(base, Prefill):
        raise ValueError(f"delta-attention repairs prefill methods, {slug} acts on the {base.info.phase} phase: name a prefill method")
    return base
