"""The context of one attention call: what a method may know, and the attention it is given to call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.attach.calls import attention_calls
from saccade.attach.layercall import LayerCall, hidden_of
from saccade.cache import KVLayer
from saccade.core import HeadLayout, LayerContext, Partial, Phase, Selection

if TYPE_CHECKING:
    from saccade.attach.layers import LayerRunner


def layer_context(runner: LayerRunner, call: LayerCall, row: int | None, layer: KVLayer | None, seen: int, phase: Phase) -> LayerContext:
    """For a call of `runner` on all rows or on one; attention is counted in the runner's statistics."""
    layout = HeadLayout.of(call.q, call.k, call.v)
    method = {"prefill": runner.prefill, "decode": runner.decode, "cache": runner.policy}[phase]
    real_seen = seen if layer is None or row is None else layer.real_seen(row)

    whole = layout.query_heads * (call.q.shape[0] if row is None else 1)
    pairs = runner.stats.decode if phase == "decode" else runner.stats.prefill

    attention = attention_calls(phase, scale=call.scale, softcap=call.softcap, impl=runner.impl)

    def partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        out = attention(q, k, v, selection, **options)
        # a pass over some of the heads counts in proportion: pairs are means over heads
        share = q.shape[0] * q.shape[1] / whole
        pairs.add_call(share, q.shape[2], k.shape[2], selection, options)
        return out

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return partial(q, k, v, selection, **{"return_lse": False, **options}).out

    return LayerContext(
        layer=runner.layer, layers=runner.layers, layout=layout, scale=call.scale, softcap=call.softcap, attend=run,
        partial=partial, phase=phase, count=lambda computed: pairs.add(computed, 0), seen=real_seen, tokens=real_seen,
        hidden=hidden_of(call, row),
        plan=None if method is None else runner.plans.get(method.info.slug), plans=runner.plans,
        state={} if layer is None else layer.states.get(phase, row), shared=call.shared.setdefault(f"row {row}", {}),
        sequence={} if layer is None else layer.sequence(row), seed=runner.seed, rotary=runner.rotary,
    )  # fmt: skip
