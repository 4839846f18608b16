"""The attention that a method is given to call: `ops.attend` for many queries, `ops.decode` for one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.core import Partial, Phase, Selection
from saccade.core.context import AttendPartial
from saccade.ops import attend, decode

_DECODE_OPTIONS = {"scale", "softcap", "return_lse"}  # what both take


def attention_calls(phase: Phase, *, scale: float, softcap: float | None, impl: str, causal: bool = True) -> AttendPartial:
    """`(q, k, v, selection, **options) -> Partial` with this layer's scale and softcap.

    In decoding a call with options that only `ops.attend` knows (positions, extra keys, ...) runs there. The option `run` names another
    op that takes these arguments (`attend_low_bit`).
    """

    def call(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        settings = {"scale": scale, "softcap": softcap, "return_lse": True, **options}
        if "run" in settings:
            op = settings.pop("run")
            return op(q, k, v, selection, **{"impl": impl, "causal": causal, **settings})
        if phase == "decode" and settings.keys() <= _DECODE_OPTIONS:
            return decode(q, k, v, selection, impl="reference" if impl == "reference" else "auto", **settings)
        return attend(q, k, v, selection, **{"impl": impl, "causal": causal, **settings})

    return call
